"""`python train_in_double.py SCRIPT FLAGS...` runs the training script in float64."""

import runpy
import sys

from tests.training.world import double_precision

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    with double_precision():
        runpy.run_path(sys.argv[0], run_name="__main__")
