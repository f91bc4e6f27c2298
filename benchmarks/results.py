"""Results of the benchmarks, kept as JSON."""

import json
import platform
from pathlib import Path

import torch


def machine(device: str) -> str:
    """What a figure was measured on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, threads: {torch.get_num_threads()}"


def read_results(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_results(path: Path, results: dict) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
