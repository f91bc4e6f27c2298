"""README.md and docs/publishing.md, run from top to bottom; what they say of models, files and links is so."""

import inspect
import json
import re
import subprocess

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusers_mcm import BASE_MODELS, AnimateDiffMCMPipeline, MCMPipeline, ModelScopeMCMPipeline
from diffusers_mcm.base_models import BaseModel
from diffusers_mcm.base_models.animatediff import ADAPTER
from diffusers_mcm.lora import CONFIG_NAME, MOTION_HEAD_NAME, PAIR_NAMES, WEIGHTS_NAME, lora_state_dict
from diffusers_mcm.video_io import read_metadata
from tests.distillation.discriminator.tiny import tiny_clip_text, tiny_dinov2
from tests.documents import NOT_RUN, ROOT, run_document
from tests.formats.world import MODELSCOPE, sample, save_hub
from tests.hub_server import hub_server
from tests.test_publish_pairs import save_half
from tests.tiny import (
    NUM_FRAMES,
    SIZE,
    TEXT_DIM,
    save_tiny_lora,
    save_tiny_stable_diffusion,
    tiny_image_unet,
    tiny_tokenizer,
)
from tests.training.world import make_images, make_videos

README = (ROOT / "README.md").read_text(encoding="utf-8")
PUBLISHED = {"README.md", CONFIG_NAME, WEIGHTS_NAME, "sample.mp4", "scheduler/scheduler_config.json"}
FINE_TUNE_SEED = 3


@pytest.fixture(scope="module")
def hub_root(tmp_path_factory):
    """What the two pages name: base models, the released LoRAs, a fine-tune, the discriminator's networks."""
    root = save_hub(tmp_path_factory.mktemp("hub"))
    save_tiny_stable_diffusion(root / "Lykon/dreamshaper-8", FINE_TUNE_SEED)
    tiny_dinov2(num_hidden_layers=12).save_pretrained(root / "facebook/dinov2-small")
    clip = root / "laion/CLIP-ViT-g-14-laion2B-s34B-b88K"
    tiny_clip_text().save_pretrained(clip)
    tiny_tokenizer().save_pretrained(clip)
    return root


@pytest.fixture
def reader(hub_root, tmp_path, monkeypatch):
    """Somebody with a checkout, videos and images of their own, and a token; yields the Hub they are on."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    make_videos(tmp_path / "my_videos")
    make_images(tmp_path / "my_images")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub_server(hub_root) as server:
        server.token = "hf_secret"
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


def kohya_style(path):
    """A style LoRA for Stable Diffusion, its text encoder included."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module, width in (
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", 8),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", TEXT_DIM),
    ):
        tensors[f"{module}.lora_down.weight"] = torch.randn(2, width, generator=generator)
        tensors[f"{module}.lora_up.weight"] = torch.randn(width, 2, generator=generator)
        tensors[f"{module}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)


def test_the_readme(reader, tmp_path):
    kohya_style(tmp_path / "watercolour.safetensors")
    (first, style, mine), left_out = run_document("README.md")
    assert left_out == set(NOT_RUN)

    assert type(first["pipe"]) is ModelScopeMCMPipeline and first["video"].shape == (16, SIZE, SIZE, 3)
    with Image.open("corgi.gif") as gif:
        assert gif.n_frames == 16
    assert read_metadata("corgi.gif")["subfolder"] == "animatediff-laion"

    pipe = style["pipe"]
    assert type(pipe) is AnimateDiffMCMPipeline
    assert torch.equal(pipe.unet.conv_in.weight, tiny_image_unet(FINE_TUNE_SEED).conv_in.weight)
    assert pipe.get_list_adapters() == {"unet": ["mcm", "watercolour"], "text_encoder": ["watercolour"]}
    both = sample(pipe)
    for weights in ([1.0, 0.0], [0.0, 0.7], [1.0, 1.0]):
        pipe.set_adapters(["mcm", "watercolour"], weights)
        assert (sample(pipe) - both).abs().max() > 1e-3, weights
    pipe.set_adapters(["mcm", "watercolour"], [1.0, 0.7])
    assert torch.equal(sample(pipe), both)

    assert reader.repositories["me/my-mcm"].files.keys() == PUBLISHED | {MOTION_HEAD_NAME}
    trained, landed = load_file(f"my_mcm/{WEIGHTS_NAME}"), lora_state_dict(mine["pipe"].unet, "mcm")
    assert {f"unet.{key}" for key in landed} == trained.keys()
    assert all(torch.equal(tensor, trained[f"unet.{key}"]) for key, tensor in landed.items())
    assert mine["video"].shape == (NUM_FRAMES, SIZE, SIZE, 3)
    assert read_metadata("shapes.mp4")["model"] == "my_shapes_mcm"


def test_the_page_on_publishing(reader, tmp_path):
    save_tiny_lora(tmp_path / "my_mcm", base=MODELSCOPE)
    for seed, (name, expert) in enumerate({"my_high": "high_noise", "my_low": "low_noise"}.items()):
        save_half(tmp_path / name, expert, seed, base=BASE_MODELS["wan-a14b"].default_repository)
    (seen,), left_out = run_document("docs/publishing.md")
    assert reader.repositories["me/my-pair"].files.keys() == {"README.md", *PAIR_NAMES.values()}
    assert left_out == {"hf auth login"}
    assert len(reader.repositories["me/my-mcm"].messages) == 4  # made, pushed, trained, pushed from Python
    whole = reader.repositories["me/my-pipeline"].files
    assert {"model_index.json", f"mcm_adapters/mcm/{WEIGHTS_NAME}"} <= whole.keys()
    assert torch.equal(sample(MCMPipeline.from_pretrained("me/my-pipeline")), sample(seen["pipe"]))


# --- what the README says --------------------------------------------------------------------------------------------
def noise(schedule) -> str:
    if "shift" in schedule:
        return f"flow, shift {schedule.shift:g}"
    betas = f"{schedule.beta_start:g} to {schedule.beta_end:g}, {schedule.beta_schedule}"
    return f"betas {betas}; `timestep_scaling` {schedule.timestep_scaling:g}"


def base_model_table() -> str:
    """A column for each base model, from what the package and `model_cards/released.json` say of it."""
    released = json.loads((ROOT / "model_cards/released.json").read_text(encoding="utf-8"))["loras"]
    guidance = inspect.signature(MCMPipeline.__call__).parameters["guidance_scale"].default
    columns = []
    for model in BASE_MODELS.values():
        schedule = model.scheduler_class.from_config(model.scheduler_config(None)).config
        steps = BaseModel.sampling_default(model, "num_inference_steps", None, None)
        loras = ", ".join(f"`{name}`" for name, lora in released.items() if lora["base_model"] == model.name)
        columns.append(
            {
                "": type(model).__name__,
                "base model": f"`{model.default_repository}`",
                "motion adapter": f"`{model.extra_repositories[ADAPTER]}`" if model.extra_repositories else "–",
                "LoRAs in `yhzhai/mcm`": loras or "–",
                "size": f"{model.num_frames} frames of {model.width}×{model.height}, {model.fps} fps",
                "steps": f"{2 if model.experts else 1} to 8, {steps} by default",
                "guidance": f"off: scale {guidance:g}",
                "noise": noise(schedule),
                "teacher's guidance w, when distilling": " and ".join(
                    "{:g} to {:g}".format(*model.guidance_range_of(expert)) for expert in model.experts or [None]
                ),
            }
        )
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    rows.insert(1, ["---"] * len(rows[0]))
    return "".join(f"| {' | '.join(row)} |\n".replace("|  |", "| |") for row in rows)


def test_the_table_of_base_models():
    table = base_model_table()
    assert table in README, f"The table is stale; it should be\n{table}"


def test_the_tree_is_the_real_one():
    section = README.split("## The tree\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = set()
    for cell in cells:
        paths = re.findall(r"`([^`]+)`", cell)
        parent = paths[0].rstrip("/").rpartition("/")[0]
        named |= {paths[0], *(f"{parent}/{path}" for path in paths[1:])}
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode:
        pytest.skip("not a checkout")
    tracked = [path.split("/") for path in git.stdout.splitlines() if "/" in path and not path.startswith(".")]
    folders = {f"{top}/" for top, *_ in tracked}
    units = {"/".join(path[:2]) + "/" * (len(path) > 2) for path in tracked if path[0] == "diffusers_mcm"}
    units = {path for path in units if path.endswith((".py", "/")) and "__" not in path}
    assert named == units | folders - {"diffusers_mcm/"}


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(document):
    page = ROOT / document
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []
