"""The memory that sampling needs at a base model's full size, with random weights.

    python benchmarks/memory.py --count                                  # seconds: tensors counted, nothing computed
    python benchmarks/memory.py --measure                                # every configuration in a process of its own
    python benchmarks/memory.py --measure --device cuda --dtypes float16 --document docs/performance.md

Counted: the network's call and the decoding run on tensors without data, and the largest sum of those alive at once is
kept. That is what the tensors need on any device; libraries add their work space. Measured: one video of one step in a
fresh process; on a GPU `torch.cuda.max_memory_allocated`, on the CPU the process's peak less what it had before the
weights. Every result goes into --output, and from there into the table of --document.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import weakref
from itertools import product
from pathlib import Path

import torch
from random_weights import PIPELINES, SIZES, random_pipeline
from results import machine, read_results, write_results
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_mcm.tables import replace_section, table

PROMPT = "a red circle moving left on a black background"
DTYPES = ("float32", "float16", "bfloat16")
# how it is decoded and where the weights are: label -> (decode_chunk_size, slicing, offload)
VARIANTS = {
    "all frames decoded at once": (None, False, None),
    "decode_chunk_size=4": (4, False, None),
    "decode_chunk_size=1": (1, False, None),
    "vae.enable_slicing()": (None, True, None),
    "decode_chunk_size=1, model offload": (1, False, "model"),
    "decode_chunk_size=1, sequential offload": (1, False, "sequential"),
}
GIB = 2**30


class TensorBytes(TorchDispatchMode):
    """Bytes of the tensors alive, and the most there were since `peak` was last set."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self._seen:
                storage = tensor.untyped_storage()
                self._seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return result

    def _freed(self, size: int) -> None:
        self.now -= size


@torch.no_grad()
def count(model: str, size: str, dtype: str) -> dict[str, dict[str, int]]:
    """For every way of decoding, the bytes of the weights, and with them at the peaks of a call and of decoding."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    kind = getattr(torch, dtype)
    with FakeTensorMode(), TensorBytes() as alive:

        def peak_of(function, *arguments) -> int:
            alive.peak = alive.now
            function(*arguments)
            return alive.peak

        pipeline = random_pipeline(model, size, kind)
        base, denoiser, vae = pipeline.base_model, pipeline.denoiser, pipeline.vae
        peaks = {"weights": alive.now}
        sides = [pipeline.sampling_default(name) for name in ("num_frames", "height", "width")]
        latents = torch.empty(2, *base.latent_shape(denoiser, vae, *sides), dtype=kind)
        text = torch.empty(2, 77, denoiser.config.cross_attention_dim, dtype=kind)
        for name, batch in (("call", 1), ("guided call", 2)):
            condition = {"prompt_embeds": text[:batch]}
            peaks[name] = peak_of(base.denoise, denoiser, latents[:batch], torch.ones(batch), condition)
        found = {}
        for variant, (chunk, slicing, offload) in VARIANTS.items():
            if not offload:
                vae.use_slicing = slicing
                found[variant] = peaks | {"decoding": peak_of(base.decode_video, vae, latents[:1], chunk)}
        return found


def measure(model: str, size: str, dtype: str, variant: str, device: str) -> dict[str, int]:
    """Peak bytes of one video of one step, in this process."""
    chunk, slicing, offload = VARIANTS[variant]
    before = process_bytes("VmRSS")
    pipeline = random_pipeline(model, size, getattr(torch, dtype), "cpu" if offload else device)
    if slicing:
        pipeline.vae.enable_slicing()
    if offload:
        getattr(pipeline, f"enable_{offload}_cpu_offload")(device=device)
    pipeline(PROMPT, num_inference_steps=1, decode_chunk_size=chunk, generator=torch.Generator().manual_seed(0))
    if device == "cpu":
        return {"peak": process_bytes("VmHWM") - before}
    return {"peak": torch.cuda.max_memory_allocated()}


def process_bytes(field: str) -> int:
    """A field of Linux's account of this process: VmRSS is its memory now, VmHWM the most it had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure_apart(arguments: list[str]) -> dict[str, int] | None:
    """`measure` in a process of its own; `None` where it could not run, which is said on stderr."""
    run = subprocess.run([sys.executable, __file__, "--one", *arguments], stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else None


def row_of(result: dict) -> tuple[str, dict[str, str]]:
    """A line of the table, in GiB."""
    cells = {"type": result["dtype"], "decoding and offload": result["variant"]}
    cells |= {title: f"{result['counted'][name] / GIB:.2f}" for title, name in COUNTED.items() if "counted" in result}
    for device, title in MEASURED.items():
        found = result.get("measured", {}).get(device)
        cells[title] = f"{found['peak'] / GIB:.2f}" if found else "not measured"
    return result["model"], cells


COUNTED = {"weights": "weights", "one call": "call", "guided call": "guided call", "decoding": "decoding"}
MEASURED = {"cpu": "peak on a CPU", "cuda": "peak on a GPU"}
COLUMNS = ["type", "decoding and offload", *COUNTED, *MEASURED.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=PIPELINES, default=list(PIPELINES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "float16"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--count", action="store_true", help="count the tensors")
    parser.add_argument("--measure", action="store_true", help="run every configuration")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/memory.json"), help="results, added to")
    parser.add_argument("--document", type=Path, help="file whose <!-- memory --> section takes the table")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.models, options.size, *options.dtypes, *options.variants, options.device)))
        return

    results = read_results(options.output)
    for model, dtype in product(options.models, options.dtypes):
        counted = count(model, options.size, dtype) if options.count else {}
        for variant in options.variants:
            key = dict(model=model, size=options.size, dtype=dtype, variant=variant)
            result = results.setdefault(" ".join(key.values()), key)
            if variant in counted:
                result["counted"] = counted[variant]
            if options.measure and not (VARIANTS[variant][2] and options.device == "cpu"):
                flags = ["--models", model, "--size", options.size, "--dtypes", dtype, "--variants", variant]
                found = measure_apart([*flags, "--device", options.device])
                if found:
                    result.setdefault("measured", {})[options.device] = found | {"machine": machine(options.device)}
            write_results(options.output, results)
            print(model, row_of(result)[1], flush=True)
    if options.document:
        full = [row_of(result) for result in results.values() if result["size"] == "full"]
        replace_section(options.document, "memory", table(full, COLUMNS))


if __name__ == "__main__":
    main()
