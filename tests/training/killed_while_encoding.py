"""`python killed_while_encoding.py SCRIPT FLAGS...` runs the training script in float64, with one clip in each file of
its cache, and each process is killed in the midst of its third file."""

import itertools
import os
import runpy
import signal
import sys
from functools import partial

from diffusers_mcm.files import atomic_file
from diffusers_mcm.training import encoding, stored
from tests.training.world import double_precision

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    write, count = stored.write_safetensors, itertools.count(1)

    def write_or_die(path, *what, **how):
        if next(count) < 3:
            return write(path, *what, **how)
        with atomic_file(path) as temporary:
            temporary.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

    stored.write_safetensors = write_or_die
    encoding.in_files = partial(encoding.in_files, limit=1)
    with double_precision():
        runpy.run_path(sys.argv[0], run_name="__main__")
