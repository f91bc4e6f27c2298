"""A LoRA of the released layout on a full-size base model, both random: does all of it land, is fusing it the same?

    python benchmarks/full_size_lora.py modelscope animatediff

Needs about 12 GB of memory for ModelScope and 9 GB for AnimateDiff. Writes the LoRA in PEFT's layout (384 or 433 MB),
reads it back as `MCMPipeline.from_pretrained` would, and calls the network once unfused and once fused, in float32.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from diffusers import UNet3DConditionModel, UNetMotionModel
from safetensors.torch import save_file

from diffusers_mcm.base_models import BaseModel, get_base_model, infer_base_model
from diffusers_mcm.lora import fresh_lora, lora_state_dict, read_lora
from diffusers_mcm.pipelines.adapters import LoRAVerbs

NETWORKS = {
    "modelscope": (UNet3DConditionModel, dict(sample_size=32, cross_attention_dim=1024)),
    "animatediff": (UNetMotionModel, dict(sample_size=64, cross_attention_dim=768, num_attention_heads=8)),
}
TOLERANCE = 1e-4


class Holder(LoRAVerbs):
    """As much of a pipeline as the LoRA verbs need."""

    config: dict = {}

    def __init__(self, base_model: BaseModel, denoiser: torch.nn.Module):
        self.base_model, self.denoiser = base_model, denoiser


def random_network(name: str, generator: torch.Generator) -> torch.nn.Module:
    """Full size, with activations of ordinary size and no layer that does nothing."""
    network_class, config = NETWORKS[name]
    skipped = {init: mock.DEFAULT for init in ("kaiming_uniform_", "uniform_", "zeros_", "constant_")}
    with mock.patch.multiple(torch.nn.init, **skipped):  # would take longer than all the rest, for nothing
        network = network_class(**config)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.data.normal_(std=0.02, generator=generator)
    for module in network.modules():
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            module.weight.data.fill_(1.0)
    return network.eval().requires_grad_(False)


def write_adapter(folder: Path, base_model: BaseModel, network: torch.nn.Module, generator: torch.Generator) -> Path:
    """Rank and alpha 64 on the released targets, as peft writes it."""
    lora = fresh_lora(network, base_model.lora_target_modules(network), rank=64, alpha=64, generator=generator)
    for key, tensor in lora.tensors.items():
        if ".lora_B." in key:
            tensor.normal_(std=0.02, generator=generator)
    tensors = {f"base_model.model.{key}": tensor for key, tensor in lora.tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 64, "lora_alpha": 64, "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def check(name: str, num_frames: int, size: int) -> dict:
    """The figures for one base model."""
    generator, start = torch.Generator().manual_seed(0), time.perf_counter()
    base_model = get_base_model(name)
    network = random_network(name, generator)
    latents = torch.randn(1, 4, num_frames, size, size, generator=generator)
    text = {"prompt_embeds": torch.randn(1, 77, NETWORKS[name][1]["cross_attention_dim"], generator=generator)}

    def call() -> torch.Tensor:
        return base_model.denoise(network, latents, torch.tensor([499]), text)

    base = call()
    with tempfile.TemporaryDirectory() as folder:
        lora = read_lora(write_adapter(Path(folder), base_model, network, generator))
        recognised = infer_base_model(lora_modules=lora.modules) is base_model
        holder = Holder(base_model, network)
        holder.load_lora_weights(lora, "mcm")
        landed = lora_state_dict(network, "mcm")
        equal = all(torch.equal(tensor, lora.tensors[key]) for key, tensor in landed.items())
        count = (len(landed), len(lora.tensors))
        del lora, landed
    adapted = call()
    holder.fuse_lora()
    fused = call()
    holder.unload_lora_weights()

    def relative(difference: torch.Tensor) -> float:
        return float(difference.abs().max() / adapted.abs().max())

    return {
        "base_model": name,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "tensors_landed": f"{count[0]} of {count[1]}",
        "whole": equal and recognised and count[0] == count[1],
        "fused_against_unfused": relative(fused - adapted),
        "lora_against_base": relative(base - adapted),
        "base_restored": torch.equal(call(), base),
        "seconds": round(time.perf_counter() - start),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_models", nargs="+", choices=NETWORKS)
    parser.add_argument("--num_frames", type=int, default=2)
    parser.add_argument("--size", type=int, default=16, help="of the latents")
    arguments = parser.parse_args()
    for name in arguments.base_models:
        figures = check(name, arguments.num_frames, arguments.size)
        print(json.dumps(figures), flush=True)
        good = figures["whole"] and figures["base_restored"] and figures["fused_against_unfused"] < TOLERANCE
        if not good or figures["lora_against_base"] < 100 * TOLERANCE:
            raise SystemExit(f"{name}: expected every tensor to land, and fusing to change at most {TOLERANCE:g}")


if __name__ == "__main__":
    main()
