"""MCM in four steps against the stock pipeline with DDIM in fifty and guidance, at a base model's full size.

    python benchmarks/speed.py --device cuda --dtype float16     # the whole runs
    python benchmarks/speed.py --device cpu                      # one step of each and one decoding, extrapolated
    python benchmarks/speed.py --device cpu --size tiny --whole  # a check of the script

The weights are random, which changes no time. On a CPU the seconds are those of one thread.

A guided step evaluates the network twice, as a batch of two, so the stock pipeline evaluates it 100 times and MCM 4
times. With e seconds for MCM's call and d for the decoding, that count allows a speed-up of (100 e + d) / (4 e + d). A
batch of two costs less than two calls where a call mostly waits for weights; with the g seconds that a guided call
really takes, the calls allow (50 g + d) / (4 e + d), and what is missing to that is what the pipelines do besides.
Every result goes into --output, and from there into the table of --document.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import wraps
from pathlib import Path

import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler, DiffusionPipeline, TextToVideoSDPipeline
from random_weights import PIPELINES, SIZES, add_random_lora, random_pipeline, scheduler_config
from results import machine, read_results, write_results

from diffusers_mcm import MCMPipeline
from diffusers_mcm.tables import replace_section, table

PROMPT = "a red circle moving left on a black background"
STOCK = {"modelscope": (TextToVideoSDPipeline, 9.0), "animatediff": (AnimateDiffPipeline, 7.5)}  # and its guidance
STOCK_STEPS, MCM_STEPS = 50, 4
SIDES = ("height", "width", "num_frames")
VARIANTS = ("LoRA beside the weights", "LoRA fused", "LoRA fused, compiled")


def stock_pipeline(pipeline: MCMPipeline) -> DiffusionPipeline:
    """diffusers' own pipeline with the same networks, sampling with DDIM."""
    name = pipeline.base_model.name
    ddim = DDIMScheduler(**scheduler_config(name), clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    parts = dict(vae=pipeline.vae, text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer, scheduler=ddim)
    if name == "animatediff":
        parts["motion_adapter"] = None
    stock = STOCK[name][0](unet=pipeline.denoiser, **parts)
    stock.set_progress_bar_config(disable=True)
    return stock


class Clock:
    """Seconds by the wall until an accelerator is done; on a CPU those of the processor, which others do not slow."""

    def __init__(self, device: torch.device):
        self.device = device

    def now(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


def time_run(pipeline: DiffusionPipeline, **options) -> dict[str, float]:
    """Seconds of one video: in all, of one call of the denoiser (the median), and of the decoding."""
    now = Clock(pipeline.unet.device).now
    scheduler, vae = pipeline.scheduler, pipeline.vae
    starts, ends, decoding = [], [], []

    def noting(method, before: list[float] | None = None, after: list[float] | None = None):
        @wraps(method)
        def noted(*arguments, **keywords):
            if before is not None:
                before.append(now())
            result = method(*arguments, **keywords)
            if after is not None:
                after.append(now())
            return result

        return noted

    # every pipeline calls the one just before the denoiser and the other just after it
    scheduler.scale_model_input = noting(scheduler.scale_model_input, before=starts)
    scheduler.step = noting(scheduler.step, before=ends)
    vae.decode = noting(vae.decode, decoding, decoding)
    try:
        begin = now()
        pipeline(PROMPT, generator=torch.Generator().manual_seed(0), **options)
        whole = now() - begin
    finally:
        del scheduler.scale_model_input, scheduler.step, vae.decode  # what they hid, the class's own, is back
    calls = [end - start for start, end in zip(starts, ends, strict=True)]
    decode = sum(decoding[1::2]) - sum(decoding[::2])
    return {"whole": whole, "call": statistics.median(calls), "decode": decode}


def seconds_of(
    pipeline: DiffusionPipeline, steps: int, in_full: bool, decoding: float | None = None, **options
) -> dict[str, float]:
    """`time_run` of a video of so many steps; unless `in_full` of one step, the others taken to be like it.

    Where it is known what the same `decoding` took, it is not done again.
    """
    if in_full:
        time_run(pipeline, num_inference_steps=2, **options)  # the first calls are slower
        return time_run(pipeline, num_inference_steps=steps, **options)
    if decoding is None:
        seconds = time_run(pipeline, num_inference_steps=1, **options)
    else:
        seconds = time_run(pipeline, num_inference_steps=1, output_type="latent", **options)
        seconds = {"whole": seconds["whole"] + decoding, "call": seconds["call"], "decode": decoding}
    return seconds | {"whole": seconds["whole"] + (steps - 1) * seconds["call"]}


def compare(stock: dict[str, float], mcm: dict[str, float]) -> dict[str, float]:
    """The speed-up, and its share of what the count of evaluations and the calls' own seconds allow."""
    reached = stock["whole"] / mcm["whole"]
    networks = MCM_STEPS * mcm["call"] + mcm["decode"]
    by_count = (2 * STOCK_STEPS * mcm["call"] + mcm["decode"]) / networks
    by_calls = (STOCK_STEPS * stock["call"] + stock["decode"]) / networks
    return {"speed-up": reached, "of 100 : 4": reached / by_count, "of the calls": reached / by_calls}


def measure(options: argparse.Namespace) -> dict:
    """Seconds of the stock pipeline and of every variant of MCM, in one process and one after the other."""
    pipeline = random_pipeline(options.model, options.size, getattr(torch, options.dtype), options.device)
    sides = {name: getattr(options, name) for name in SIDES}
    sides = {name: pipeline.sampling_default(name) if value is None else value for name, value in sides.items()}
    guidance = STOCK[options.model][1]
    stock = seconds_of(stock_pipeline(pipeline), STOCK_STEPS, options.whole, guidance_scale=guidance, **sides)
    runs = {"stock": stock}
    print(f"stock: {stock}", flush=True)
    add_random_lora(pipeline, options.size)
    for variant in options.variants:
        if "fused" in variant and not pipeline._adapters.fused:
            pipeline.fuse_lora()
        if "compiled" in variant:
            pipeline.denoiser.compile()
            time_run(pipeline, num_inference_steps=1, **sides)  # which compiles
        runs[variant] = seconds_of(pipeline, MCM_STEPS, options.whole, stock["decode"], **sides)
        print(f"{variant}: {runs[variant]}", flush=True)
    described = {name: getattr(options, name) for name in ("model", "size", "dtype", "whole")}
    return described | sides | {"machine": machine(options.device), "runs": runs}


def rows_of(result: dict) -> list[tuple[str, dict[str, str]]]:
    """The table's lines for one result."""
    size = f"{result['height']}x{result['width']}x{result['num_frames']}"
    how = "whole runs" if result["whole"] else "extrapolated from one step"
    stock = result["runs"]["stock"]
    first = {"run": f"stock, DDIM {STOCK_STEPS} with guidance"} | _seconds(stock)
    rows = [(f"{result['model']}, {result['size']}, {size}, {result['dtype']}", first | {"how": how})]
    for variant, run in result["runs"].items():
        if variant != "stock":
            reached = compare(stock, run)
            ratios = {"speed-up": f"{reached.pop('speed-up'):.1f}"} | {name: f"{x:.1%}" for name, x in reached.items()}
            rows.append(("", {"run": f"MCM {MCM_STEPS}, {variant}"} | _seconds(run) | ratios | {"how": how}))
    return rows


def _seconds(run: dict[str, float]) -> dict[str, str]:
    return {title: f"{run[name]:.0f}" if run[name] >= 1e4 else f"{run[name]:.4g}" for title, name in SECONDS.items()}


SECONDS = {"one call, s": "call", "decoding, s": "decode", "video, s": "whole"}
COLUMNS = ["run", *SECONDS, "speed-up", "of 100 : 4", "of the calls", "how"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=PIPELINES, default="modelscope")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS[:2]))
    parser.add_argument("--whole", action="store_true", help="run all steps also on the CPU")
    for side in SIDES:
        parser.add_argument(f"--{side}", type=int, help="default: the model's")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/speed.json"), help="results, added to")
    parser.add_argument("--document", type=Path, help="file whose <!-- speed --> section takes the table")
    options = parser.parse_args()
    options.whole |= options.device == "cuda"
    if options.device == "cpu":
        torch.set_num_threads(1)  # so that the processor's seconds are those of the wall, were it alone

    results = read_results(options.output)
    result = measure(options)
    what = (options.model, options.size, options.dtype, options.device, *(result[name] for name in SIDES))
    results[" ".join(map(str, what))] = result
    write_results(options.output, results)
    if options.document:
        replace_section(
            options.document, "speed", table([row for r in results.values() for row in rows_of(r)], COLUMNS)
        )


if __name__ == "__main__":
    main()
