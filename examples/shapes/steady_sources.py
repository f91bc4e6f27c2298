"""Says where a shape's wobble comes from: the autoencoder, the teacher, the few steps or how they are sampled.

Each row is a way to make the clips of the same captions and seeds, read by the oracle. Rows that are in --output
already are not made again.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch

from diffusers_mcm import MCMScheduler, make_scheduler
from diffusers_mcm.files import write_text
from diffusers_mcm.location import Location
from diffusers_mcm.scheduler import MCMSchedulerOutput
from diffusers_mcm.shapes.captions import Caption, held_out_captions, spaced
from diffusers_mcm.shapes.methods import Networks
from diffusers_mcm.shapes.render import render_video
from diffusers_mcm.shapes.scores import METRICS, outcomes, read
from diffusers_mcm.tables import table
from diffusers_mcm.video_io import to_uint8

SHOWN = ("all_right", "identity_kept", "wobble", "flicker", "sharpness", "displacement", "watermark_seen")
DOMAINS = ("video", "clean")
Make = Callable[[Sequence[Caption], Sequence[int]], np.ndarray]


class LessNoise(MCMScheduler):
    """`MCMScheduler` that adds the share η of fresh noise, and for the rest the noise that the sample had already.

    1 is multistep consistency sampling, 0 the deterministic step of DDIM.
    """

    eta = 1.0

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        prev_sample, x_0 = super().step(model_output, timestep, sample, generator, return_dict=False)
        if self.step_index < self.num_inference_steps:  # the last step adds none
            alpha_t, sigma_t = self.coefficients(timestep)
            alpha, sigma = self.coefficients(self.timesteps[self.step_index])
            fresh, own = (prev_sample - alpha * x_0) / sigma, (sample - alpha_t * x_0) / sigma_t
            prev_sample = alpha * x_0 + sigma * (self.eta * fresh + (1 - self.eta**2) ** 0.5 * own)
        return MCMSchedulerOutput(prev_sample, x_0) if return_dict else (prev_sample, x_0)

    def coefficients(self, timestep) -> tuple[torch.Tensor, torch.Tensor]:
        """α and σ of a timestep."""
        kept = self.alphas_cumprod[int(timestep)]
        return kept.sqrt(), (1 - kept).sqrt()


def rendered(domain: str) -> Make:
    return lambda captions, seeds: np.stack([render_video(c, s, domain) for c, s in zip(captions, seeds)])


@torch.no_grad()
def decode(vae, latents: torch.Tensor) -> np.ndarray:
    """Latents (T, C, h, w) to frames uint8 (T, H, W, 3)."""
    return to_uint8(vae.decode(latents).sample.movedim(1, -1).div(2).add(0.5).clamp(0, 1).numpy())


def reconstructed(vae, domain: str, noise: float = 0.0) -> Make:
    """What the autoencoder makes of rendered clips; noise of this deviation is added to their latents."""

    def make(captions: Sequence[Caption], seeds: Sequence[int]) -> np.ndarray:
        videos = []
        for caption, seed in zip(captions, seeds):
            frames = torch.from_numpy(render_video(caption, seed, domain)).movedim(-1, 1).float().div(127.5).sub(1)
            with torch.no_grad():
                latents = vae.encode(frames).latent_dist.mean
            drawn = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
            videos.append(decode(vae, latents + noise * drawn))
        return np.stack(videos)

    return make


def sampled(
    networks: Networks, network: str, sampler: str, steps: int, guidance: float = 1.0, eta: float | None = None
) -> Make:
    def make(captions: Sequence[Caption], seeds: Sequence[int]) -> np.ndarray:
        pipeline = networks.pipeline(network)
        pipeline.scheduler = make_scheduler(sampler, pipeline)
        if eta is not None:
            pipeline.scheduler = LessNoise.from_config(pipeline.scheduler.config)
            pipeline.scheduler.eta = eta
        frames = pipeline(
            [str(caption) for caption in captions],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
        ).frames
        return np.stack([to_uint8(video) for video in frames])

    return make


def rows(networks: Networks) -> dict[str, Make]:
    """Every way of making the clips, by its name."""
    vae = networks.pipeline("teacher").vae
    found = {f"rendered, {domain}": rendered(domain) for domain in DOMAINS}
    found |= {f"rendered, {domain}, through the autoencoder": reconstructed(vae, domain) for domain in DOMAINS}
    for noise in (0.1, 0.2, 0.3, 0.5):
        found[f"rendered, clean, its latents with noise of {noise}"] = reconstructed(vae, "clean", noise)
    for steps, guidance in ((4, 1.5), (8, 2.0), (25, 2.0), (50, 2.0)):
        found[f"teacher, DDIM, {steps} steps"] = sampled(networks, "teacher", "ddim", steps, guidance)
    for steps in (1, 2, 4, 8):
        found[f"MCM, {steps}"] = sampled(networks, "mcm", "mcm", steps)
    for eta, steps in product((0.0, 0.5), (2, 4, 8)):
        found[f"MCM, {steps}, η = {eta:g}"] = sampled(networks, "mcm", "mcm", steps, eta=eta)
    for guidance, steps in product((1.25, 1.5), (1, 4)):
        found[f"MCM, {steps}, guidance {guidance:g}"] = sampled(networks, "mcm", "mcm", steps, guidance)
    return found


def measure(make: Make, captions: Sequence[Caption], seeds: Sequence[int], batch: int = 8) -> dict[str, float]:
    """The oracle's means of so many videos."""
    videos: list[np.ndarray] = []
    for start in range(0, len(captions), batch):
        videos.extend(make(captions[start : start + batch], seeds[start : start + batch]))
    values = outcomes([[read(video)] for video in videos], captions)
    return {metric: float(np.nanmean(values[metric])) for metric in SHOWN}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--output", type=Path, default=Path("steady_sources.json"), help="the figures, row by row")
    p.add_argument("--teacher", default="mcm-shapes-teacher", help="packaged name, folder or Hub repository")
    p.add_argument("--mcm", default="mcm-shapes", help="likewise")
    p.add_argument("--prompts", type=int, default=24, help="how many of the held-out captions, one seed each")
    args = p.parse_args()
    captions = spaced(held_out_captions(), args.prompts)
    kept = json.loads(args.output.read_text()) if args.output.exists() else {}
    protocol = {"teacher": args.teacher, "mcm": args.mcm, "prompts": args.prompts}
    protocol["weights"] = [Location.of(name).version() for name in (args.teacher, args.mcm)]
    if kept and kept.get("protocol") != protocol:
        p.error(f"{args.output} holds figures of {kept.get('protocol')}, not of {protocol}: name another --output")
    found = kept.get("rows", {})
    for name, make in rows(Networks({"teacher": args.teacher, "mcm": args.mcm})).items():
        if name not in found:
            found[name] = measure(make, captions, range(len(captions)))
            content = {"protocol": protocol, "rows": found}
            write_text(args.output, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    cells = [(name, {METRICS[m].title: METRICS[m].format(v) for m, v in row.items()}) for name, row in found.items()]
    print(table(cells, [METRICS[metric].title for metric in SHOWN]))


if __name__ == "__main__":
    main()
