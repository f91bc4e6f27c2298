import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch
from PIL import Image

from diffusers_mcm import MCMFlowScheduler, MCMPipeline, get_base_model
from diffusers_mcm.cli import main
from diffusers_mcm.evaluation.samples import open_samples
from diffusers_mcm.files import fingerprint
from diffusers_mcm.lora import add_lora
from diffusers_mcm.video_io import read_metadata
from tests.hub_server import hub_server
from tests.motion_models import FINE_TUNE, LCM, LCM_LORA, LIGHTNING, save_motion_models
from tests.tiny import NUM_FRAMES, SIZE, randomise_lora, save_lora, save_tiny_base, save_tiny_lora
from tests.tiny_wan import save_wan_base, tiny_wan_transformer

ROOT = Path(__file__).parents[2]
WEIGHTS = "diffusion_pytorch_model.safetensors"
PROMPT = "a red circle moving left on a black background"
LIST = [PROMPT, "a blue ring growing", "a green square"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("world") / "base")


@pytest.fixture(scope="module")
def lora(base):
    return save_tiny_lora(base.parent / "lora", base)


def flags(model, *arguments, size=SIZE, frames=NUM_FRAMES):
    sizes = ["--frames", frames, "--height", size, "--width", size]
    named = ["--model", model] if model else []
    return [*map(str, ["generate", *named, *sizes, "--steps", 1, "--device", "cpu", *arguments])]


def generate(model, *arguments, **sizes):
    return main(flags(model, *arguments, **sizes))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def calls(monkeypatch):
    """The prompts that were really sampled."""
    from diffusers_mcm import ModelScopeMCMPipeline

    seen = []
    call = ModelScopeMCMPipeline.__call__
    monkeypatch.setattr(
        ModelScopeMCMPipeline, "__call__", lambda self, prompt, **kw: seen.append(prompt) or call(self, prompt, **kw)
    )
    return seen


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """LoRAs for the two experts of a tiny Wan 2.2 A14B, in a folder for each and in one for both."""
    folder = tmp_path_factory.mktemp("a14b")
    base, model = save_wan_base(folder / "base", "wan-a14b"), get_base_model("wan-a14b")
    for seed, expert in enumerate(model.experts):
        transformer = tiny_wan_transformer()
        add_lora(transformer, model.lora_target_modules(transformer)[:2], rank=2, alpha=2)
        randomise_lora(transformer, seed)
        settings = dict(repository=base, expert=expert, scheduler=MCMFlowScheduler(boundary=0.875))
        save_lora(folder / expert, transformer, model, **settings)
    MCMPipeline.from_pretrained((folder / "high_noise", folder / "low_noise")).save_mcm_lora(folder / "both")
    return folder


# --- what comes out --------------------------------------------------------------------------------------------------
def test_generate_writes_an_mp4_that_the_seed_decides(base, tmp_path):
    for name, seed in (("a.mp4", 1), ("b.mp4", 1), ("c.mp4", 2)):
        assert generate(base, PROMPT, "-o", tmp_path / name, "--seed", seed, "--fps", 4) == 0
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 4
        assert [(f.height, f.width) for f in container.decode(video=0)] == [(SIZE, SIZE)] * NUM_FRAMES
    first, again, other = ((tmp_path / name).read_bytes() for name in ("a.mp4", "b.mp4", "c.mp4"))
    assert first == again != other


def test_several_prompts_give_numbered_files(base, tmp_path, capsys):
    assert generate(base, PROMPT, "a blue ring", "-o", tmp_path / "out.gif", "--seed", 3) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-1.gif", "out-2.gif"]
    with Image.open(tmp_path / "out-2.gif") as image:
        assert image.size == (SIZE, SIZE)
    output = capsys.readouterr()
    assert f"({NUM_FRAMES} frames, seed 3): a blue ring" in output.out
    assert "2/2" in output.err  # the progress of the list


@pytest.mark.parametrize(
    ("kind", "name"),
    [("webp", "0001-a-blue-ring.webp"), ("png", "0001-a-blue-ring.png"), ("frames", "0001-a-blue-ring")],
)
def test_a_folder_holds_a_named_video_for_each_prompt(base, tmp_path, kind, name):
    assert generate(base, "a blue ring", "-o", tmp_path / "videos", "--format", kind) == 0
    assert [path.name for path in (tmp_path / "videos").iterdir()] == [name]
    assert read_metadata(tmp_path / "videos" / name)["prompt"] == "a blue ring"
    if kind == "frames":
        names = sorted(path.name for path in (tmp_path / "videos" / name).iterdir())
        assert names == ["0001.png", "0002.png", "0003.png", "0004.png", "metadata.json"]


def test_the_name_of_a_folder_may_hold_a_dot(base, tmp_path):
    for _ in range(2):
        assert generate(base, "a blue ring", "-o", f"{tmp_path}/run_0.5/", "--seed", 3, "--overwrite") == 0
    assert generate(base, "a red ring", "-o", tmp_path / "run_0.5", "--format", "frames") == 0  # now it is there
    assert sorted(path.name for path in (tmp_path / "run_0.5").iterdir()) == [
        "0001-a-blue-ring.mp4",
        "0001-a-red-ring",
    ]


def test_guidance_and_negative_prompt_reach_the_pipeline(base, tmp_path):
    for name, options in (("a.png", []), ("b.png", ["--guidance_scale", 4]), ("c.png", ["--guidance_scale", 4])):
        negative = ["--negative_prompt", "yellow"] if name == "c.png" else []
        assert generate(base, PROMPT, "-o", tmp_path / name, "--seed", 1, *options, *negative) == 0
    pictures = set()
    for name in ("a.png", "b.png", "c.png"):
        with Image.open(tmp_path / name) as image:
            pictures.add(image.tobytes())
    assert len(pictures) == 3


def test_a_video_depends_on_its_prompt_and_seed_and_not_on_its_place(base, tmp_path):
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps({"prompt": p, "seed": 5}) for p in LIST))
    assert generate(base, "--prompts", tmp_path / "list.jsonl", "-o", tmp_path / "list") == 0
    assert generate(base, LIST[2], "-o", tmp_path / "alone.mp4", "--seed", 4, "--num_videos", 2) == 0
    assert (tmp_path / "list" / "0003-a-green-square.mp4").read_bytes() == (tmp_path / "alone-2.mp4").read_bytes()


def test_videos_of_another_model_by_the_same_name_are_made_again(tmp_path, calls):
    run = {name: tmp_path / name / "final" for name in ("first", "second")}
    for seed, folder in enumerate(run.values()):
        save_tiny_base(folder, seed=seed)
    for model in (*run.values(), run["second"]):
        assert generate(model, PROMPT, "-o", tmp_path / "v.png") == 0
    assert len(calls) == 2
    whole = shutil.copytree(run["first"], tmp_path / "other" / "final")  # weights are the same wherever they lie
    shutil.copyfile(run["second"] / "vae" / WEIGHTS, whole / "vae" / WEIGHTS)
    lora = save_tiny_lora(tmp_path / "lora", run["first"])
    assert generate(run["first"], PROMPT, "-o", tmp_path / "w.png") == 0
    for base, made in ((tmp_path / "copy" / "final", 0), (whole, 1)):
        shutil.copytree(run["first"], tmp_path / "copy" / "final", dirs_exist_ok=True)
        calls.clear()
        assert generate(base, PROMPT, "-o", tmp_path / "w.png") == 0
        assert len(calls) == made
    for base in (run["first"], whole):
        calls.clear()
        assert generate(lora, PROMPT, "--base_model", base, "-o", tmp_path / "x.png") == 0
        assert len(calls) == 1


def test_what_cannot_be_written_is_told_before_anything_is_sampled(base, tmp_path, calls, capsys):
    (tmp_path / "file").touch()
    frames = tmp_path / "frames" / f"0001-{video_slug()}"
    frames.mkdir(parents=True)
    (frames / "thesis.doc").touch()
    for output, told, *options in (
        (tmp_path / "file" / "v.mp4", f"--output {tmp_path}/file: {tmp_path}/file is a file; name another folder"),
        (f"{tmp_path}/file/new/", f"--output {tmp_path}/file/new: {tmp_path}/file is a file; name another folder"),
        (frames.parent, "it also holds 'thesis.doc'", "--format", "frames", "--overwrite"),
    ):
        assert generate(base, PROMPT, "-o", output, *options) == 2
        assert told in capsys.readouterr().err
    assert calls == []


# --- how it was made -------------------------------------------------------------------------------------------------
def test_the_file_says_how_it_was_made_and_nothing_about_this_machine(base, lora, tmp_path):
    options = ["--lora_scale", 0.5, "--guidance_scale", 2, "--negative_prompt", "dull", "--seed", 7, "--fps", 12]
    assert generate(lora, "ein Hund „bellt“", "-o", tmp_path / "v.mp4", *options) == 0
    found = read_metadata(tmp_path / "v.mp4")
    assert set(found.pop("versions")) == {"diffusers_mcm", "diffusers", "torch", "python"}
    assert found.pop("base_version") == fingerprint(base)
    assert found == {
        "prompt": "ein Hund „bellt“",
        "negative_prompt": "dull",
        "seed": 7,
        "model": "lora",
        "lora": None,
        "subfolder": None,
        "revision": None,
        "base_model": None,
        "lora_sha256": hashlib.sha256((lora / "pytorch_lora_weights.safetensors").read_bytes()).hexdigest(),
        "lora_scale": 0.5,
        "guidance_scale": 2.0,
        "sampler": "mcm",
        "timestep_spacing": None,
        "dtype": "float32",
        "num_inference_steps": 1,
        "num_frames": NUM_FRAMES,
        "height": SIZE,
        "width": SIZE,
        "fps": 12.0,
    }
    assert str(tmp_path).encode() not in (tmp_path / "v.mp4").read_bytes()


def test_a_pair_of_loras_for_two_experts(pair, tmp_path):
    two = ["--lora", pair / "high_noise", "--lora", pair / "low_noise"]
    ways = {
        "a": [pair / "base", *two],
        "b": [None, *two],
        "c": [pair / "both"],
        "d": [pair / "base", "--lora", pair / "both"],
        "e": [pair / "base"],
    }
    for name, (model, *options) in ways.items():
        path = tmp_path / f"{name}.png"
        assert generate(model, PROMPT, "-o", path, "--steps", 2, *options, size=32, frames=5) == 0
    pixels = {name: Image.open(tmp_path / f"{name}.png").tobytes() for name in ways}
    assert pixels["a"] == pixels["b"] == pixels["c"] == pixels["d"] != pixels["e"]
    read = {name: read_metadata(tmp_path / f"{name}.png") for name in ways}
    assert (read["a"]["lora"], read["b"]["model"]) == (["high_noise", "low_noise"],) * 2
    files = [pair / "both" / f"{expert}_model.safetensors" for expert in ("high_noise", "low_noise")]
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert read["c"]["lora_sha256"] == read["d"]["lora_sha256"] == hashes and read["e"]["lora_sha256"] is None
    assert len(read["a"]["lora_sha256"]) == 2
    assert generate(pair / "base", PROMPT, "-o", tmp_path / "f.png", *two, "--lora", pair / "both") == 2


def test_the_lora_may_be_given_from_either_side(base, lora, tmp_path):
    named = shutil.copytree(lora, lora.parent / "named")
    (named / "pytorch_lora_weights.safetensors").rename(named / "this.safetensors")
    shutil.copyfile(named / "this.safetensors", named / "that.safetensors")
    ways = {
        "a": [lora],
        "b": [lora, "--base_model", base],
        "c": [base, "--lora", lora],
        "d": [base, "--lora", lora.parent, "--subfolder", "lora"],
        "e": [lora, "--fuse_lora", "--vae_slicing", "--decode_chunk_size", 1],
        "f": [lora, "--lora_scale", 0],
        "g": [base],
        "h": [None, "--lora", lora],
        "i": [named, "--weight_name", "this.safetensors"],
    }
    for name, (model, *options) in ways.items():
        assert generate(model, PROMPT, "-o", tmp_path / name, "--format", "frames", *options) == 0
    frames = {name: (tmp_path / name / f"0001-{video_slug()}" / "0002.png").read_bytes() for name in ways}
    assert frames["a"] == frames["b"] == frames["c"] == frames["d"] == frames["e"] == frames["h"] == frames["i"]
    assert frames["f"] == frames["g"] != frames["a"]
    read = {name: read_metadata(tmp_path / name / f"0001-{video_slug()}") for name in ways}
    assert (
        read["a"]["lora_sha256"] == read["d"]["lora_sha256"] == read["i"]["lora_sha256"]
        and read["g"]["lora_sha256"] is None
    )
    assert (read["d"]["model"], read["d"]["lora"], read["d"]["subfolder"]) == ("base", lora.parent.name, "lora")


# --- samplers --------------------------------------------------------------------------------------------------------
def test_the_flags_are_the_tables():
    from diffusers_mcm.commands import generate as command
    from diffusers_mcm.pipelines import few_step, samplers

    assert command.SAMPLERS == (samplers.OWN, *samplers.SAMPLERS) and command.SPACINGS == samplers.SPACINGS
    assert command.FEW_STEP == (few_step.AUTO, *few_step.FEW_STEP)


def test_a_sampler_decides_the_video_and_is_written_down(base, tmp_path, calls):
    run = [PROMPT, "-o", tmp_path / "videos", "--format", "frames", "--steps", 2]
    pictures, recipes = {}, {}
    for name in ("", "mcm", "lcm", "ddim", "ddim leading", "dpm++ linspace", "euler trailing"):
        flag, spacing = (*name.split(), None, None)[:2]
        sampler = [] if flag is None else ["--sampler", flag]
        assert generate(base, *run, *sampler, *(["--timestep_spacing", spacing] if spacing else [])) == 0
        video = tmp_path / "videos" / f"0001-{video_slug()}"
        pictures[name], found = (video / "0002.png").read_bytes(), read_metadata(video)
        recipes[name] = found["sampler"], found["timestep_spacing"]
    assert recipes == {
        "": ("mcm", None),
        "mcm": ("mcm", None),
        "lcm": ("lcm", None),
        "ddim": ("ddim", "trailing"),
        "ddim leading": ("ddim", "leading"),
        "dpm++ linspace": ("dpm++", "linspace"),
        "euler trailing": ("euler", "trailing"),
    }
    assert len(calls) == 6  # the second was made already, and every other is another recipe
    assert pictures[""] == pictures["mcm"] and len(set(pictures.values())) >= 5
    assert pictures["ddim"] != pictures["ddim leading"]


@pytest.mark.parametrize(
    "arguments, got",
    [
        (["--timestep_spacing", "leading"], "'leading', got none"),
        (["--sampler", "lcm", "--timestep_spacing", "trailing"], "'trailing', got lcm"),
        (["--sampler", "mcm", "--timestep_spacing", "linspace"], "'linspace', got mcm"),
    ],
)
def test_a_spacing_needs_a_sampler_that_has_one(tmp_path, capsys, arguments, got):
    assert generate(tmp_path / "no model is looked for", PROMPT, *arguments, "-o", tmp_path / "v.mp4") == 2
    error = capsys.readouterr().err
    assert (
        f"expected a sampler out of ddim, dpm++, euler, unipc with the timestep_spacing {got}: a consistency" in error
    )


# --- the motion modules of others ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def motion_root(tmp_path_factory):
    return save_motion_models(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def motion_hub(motion_root, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub_server(motion_root) as server:
        yield server


def test_animate_lcm_is_one_line(motion_root, motion_hub, tmp_path):
    """Without `--steps`, which `generate` of these tests gives."""
    line = ["generate", PROMPT, "--model", LCM, "--base_model", FINE_TUNE, "--frames", "2", "--device", "cpu"]
    assert main([*line, "-o", str(tmp_path / "v.gif")]) == 0
    found = read_metadata(tmp_path / "v.gif")
    assert {key: found[key] for key in ("model", "base_model", "sampler", "timestep_spacing")} == {
        **{"model": LCM, "base_model": FINE_TUNE, "sampler": "lcm", "timestep_spacing": None}
    }
    assert (found["num_inference_steps"], found["guidance_scale"], found["lora_scale"]) == (6, 2.0, 1.0)
    assert found["adapter_weights"] == {"animatelcm": 0.8}
    assert found["lora_sha256"] == hashlib.sha256((motion_root / LCM / LCM_LORA).read_bytes()).hexdigest()
    assert main([*line, "-o", str(tmp_path / "w.gif"), "--guidance_scale", "1", "--sampler", "ddim"]) == 0
    found = read_metadata(tmp_path / "w.gif")
    assert (found["guidance_scale"], found["sampler"], found["timestep_spacing"]) == (1.0, "ddim", "trailing")


def test_lightning_is_one_line(motion_hub, tmp_path, capsys):
    line = [
        "generate",
        PROMPT,
        "--model",
        LIGHTNING,
        "--frames",
        "2",
        "--device",
        "cpu",
        "-o",
        str(tmp_path / "v.gif"),
    ]
    assert main([*line, "--steps", "2"]) == 0
    found = read_metadata(tmp_path / "v.gif")
    assert (found["sampler"], found["timestep_spacing"], found["lora_sha256"]) == ("euler", "trailing", None)
    assert (found["num_inference_steps"], found["guidance_scale"]) == (2, 1.0)
    assert main(line) == 0
    assert read_metadata(tmp_path / "v.gif")["num_inference_steps"] == 4
    capsys.readouterr()
    assert main([*line, "--steps", "3"]) == 2
    assert f"error: {LIGHTNING} has motion modules for 1, 2, 4, 8 steps, none for 3" in capsys.readouterr().err


# --- layouts ---------------------------------------------------------------------------------------------------------
def test_the_layout_of_vbench_is_read_by_evaluate(base, tmp_path, calls):
    run = ["A cat (close up), wet", "a dog.", "-o", tmp_path / "videos", "--layout", "vbench", "--num_videos", 2]
    assert generate(base, *run) == 0
    names = [f"{prompt}-{index}.mp4" for prompt in ("A cat (close up), wet", "a dog.") for index in (0, 1)]
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == sorted(names)
    found = open_samples(tmp_path / "videos")
    assert [(video.caption, video.seed) for video in found.videos] == [
        *(("A cat (close up), wet", 0), ("A cat (close up), wet", 1), ("a dog.", 0), ("a dog.", 1))
    ]
    assert found.settings["sampler"] == "mcm" and found.settings["num_inference_steps"] == 1
    assert generate(base, *run, "--format", "gif") == 0
    assert {path.suffix for path in (tmp_path / "videos").iterdir()} == {".mp4", ".gif"}
    assert generate(base, *run) == 0 and len(calls) == 8  # nothing is made again


@pytest.mark.parametrize(
    "prompts, message",
    [
        (["open 24/7"], "expected prompts that files can be called by, for --layout vbench; 'open 24/7': it holds a"),
    ],
)
def test_what_vbench_cannot_name_is_refused_before_a_model_is_looked_for(tmp_path, capsys, prompts, message):
    assert generate(tmp_path / "none", *prompts, "-o", tmp_path / "videos", "--layout", "vbench") == 2
    assert message in capsys.readouterr().err


def video_slug():
    from diffusers_mcm.commands.prompts import slug

    return slug(PROMPT)


# --- resuming --------------------------------------------------------------------------------------------------------
def test_a_list_goes_on_where_it_stopped(base, tmp_path, calls, capsys):
    (tmp_path / "list.txt").write_text("\n".join(LIST))
    run = ["--prompts", tmp_path / "list.txt", "-o", tmp_path / "videos"]
    assert generate(base, *run) == 0
    whole = contents(tmp_path / "videos")
    (tmp_path / "videos" / "0002-a-blue-ring-growing.mp4").unlink()
    calls.clear()
    assert generate(base, *run) == 0
    assert calls == [LIST[1]]
    assert "2 of 3 videos are there already, made by the same settings" in capsys.readouterr().out
    assert generate(base, *run, "--seed", 1) == 0
    assert calls == [LIST[1], *LIST]
    assert {read_metadata(path)["seed"] for path in (tmp_path / "videos").iterdir()} == {1}
    assert generate(base, *run, "--overwrite") == 0
    assert contents(tmp_path / "videos") == whole


@pytest.mark.parametrize("name", ["v.mp4", "v.gif", "v.webp", "v.png"])
def test_what_is_not_ours_is_not_replaced(base, tmp_path, capsys, name):
    (tmp_path / name).write_bytes(b"holiday")
    assert generate(base, PROMPT, "-o", tmp_path / name) == 2
    assert re.search(rf"{name} is there already .* --overwrite replaces it", capsys.readouterr().err)
    assert (tmp_path / name).read_bytes() == b"holiday"
    assert generate(base, PROMPT, "-o", tmp_path / name, "--overwrite") == 0
    assert read_metadata(tmp_path / name)["prompt"] == PROMPT


@pytest.fixture
def interruptible():
    """A job in the background starts with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("kind", ["mp4", "frames"])
def test_ctrl_c_leaves_whole_files_only(base, tmp_path, monkeypatch, capsys, kind):
    """A real signal, in the middle of writing the second video."""
    run = [*LIST, "-o", tmp_path / "videos", "--format", kind]
    name, write = ("write_bytes", Path.write_bytes) if kind == "mp4" else ("save", Image.Image.save)
    owner = Path if kind == "mp4" else Image.Image
    written = []

    def interrupted(self, *arguments, **options):
        write(self, *arguments, **options)
        written.append(self)
        if len(written) == (2 if kind == "mp4" else NUM_FRAMES + 2):
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        assert generate(base, *run) == 130
    assert "interrupted" in capsys.readouterr().err
    (left,) = (tmp_path / "videos").iterdir()
    assert read_metadata(left)["prompt"] == PROMPT
    assert generate(base, *run) == 0
    assert len(list((tmp_path / "videos").iterdir())) == 3


def test_processes_share_a_list(base, tmp_path):
    """Two processes make every video once, each the same as one process would, and finish a list that stopped."""
    prompts = [*LIST, "a yellow triangle", "a white ring"]
    assert generate(base, *prompts, "-o", tmp_path / "one") == 0
    expected = contents(tmp_path / "one")
    (tmp_path / "two").mkdir()
    first = min(expected)
    (tmp_path / "two" / first).write_bytes(expected[first])
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    more = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*launcher, *more, "-m", "diffusers_mcm", *flags(base, *prompts, "-o", tmp_path / "two")],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert contents(tmp_path / "two") == expected
    told = sorted(line.rpartition(": ")[2] for line in done.stdout.splitlines() if "frames, seed" in line)
    assert told == sorted(prompts[1:])  # each once, and the one that was there not at all
    assert done.stdout.count("1 of 5 videos are there already") == 1


# --- what a run says -------------------------------------------------------------------------------------------------
def test_a_run_says_one_line_draws_one_bar_and_names_the_file(tmp_path):
    """In a process of its own, for the libraries say most of what they say when they are first imported."""
    command = [sys.executable, "-m", "diffusers_mcm", "generate", "a cat", "-o", "v.gif", "--steps", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, "--device", "cpu", "--fps", "60"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["v.gif  (16 frames, seed 0): a cat"]
    first, cannot, *rest = [line for line in re.split(r"[\r\n]+", run.stderr) if line.strip()]
    assert first == "mcm-shapes on cpu, float32"
    assert cannot.startswith("mcm-shapes cannot draw 'a cat': all it knows is «a {red|green|")
    assert "--model yhzhai/mcm" in cannot
    *bar, warning = rest
    assert warning.startswith("diffusers-mcm: warning: a GIF plays 50 frames per second at most")
    assert bar and all(re.search(r"[01]/1 \[", state) for state in bar), bar  # of one step


@pytest.mark.parametrize("arguments", [["info", "mcm-shapes"], ["convert", "mcm-shapes", "peft", "--to", "peft"]])
def test_the_other_commands_are_quiet_too(tmp_path, arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "diffusers_mcm", *arguments]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "") and run.stdout


def test_the_rest_is_told_when_it_is_asked_for(base, tmp_path, capsys):
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    before = [library.get_verbosity() for library in (of_diffusers, of_transformers)]
    for options, shown in (([], False), (["-v"], True)):
        assert generate(base, PROMPT, "-o", tmp_path / "v.mp4", "--overwrite", *options) == 0
        error = capsys.readouterr().err
        assert ("Loading pipeline components" in error) is shown
        assert ("Loading weights" in error) is shown
        assert error.startswith("base on cpu, float32\n")
        assert [library.get_verbosity() for library in (of_diffusers, of_transformers)] == before
        assert of_diffusers.is_progress_bar_enabled() and of_transformers.is_progress_bar_enabled()


def test_a_gif_that_is_too_fast_is_told_once_for_a_list(base, tmp_path, capsys):
    assert generate(base, *LIST, "-o", tmp_path / "videos", "--format", "gif", "--fps", 100) == 0
    assert capsys.readouterr().err.count("diffusers-mcm: warning: a GIF plays 50") == 1


def test_a_full_disk_is_one_line_and_leaves_nothing(base, tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        for kind in ("mp4", "frames"):
            assert generate(base, PROMPT, "-o", tmp_path / "videos", "--format", kind) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capsys.readouterr().err.count("diffusers-mcm: error: The disk is full: there was no room to write") == 2
    assert list(tmp_path.iterdir()) == []


# --- the machine -----------------------------------------------------------------------------------------------------
def test_compiling_compiles_the_denoiser(base, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    assert generate(base, PROMPT, "-o", tmp_path / "v.mp4", "--compile") == 0
    assert compiled == ["UNet3DConditionModel"]


@pytest.mark.parametrize(("offload", "verb"), [("model", "model"), ("sequential", "sequential")])
def test_offloading_reaches_the_pipeline_with_its_device(base, monkeypatch, offload, verb):
    """Up to where an accelerator is needed."""
    from diffusers_mcm import MCMPipeline
    from diffusers_mcm.commands.generate import build_parser, load_pipeline

    asked = []
    monkeypatch.setattr(MCMPipeline, f"enable_{verb}_cpu_offload", lambda self, device: asked.append(device))
    monkeypatch.setattr(MCMPipeline, "to", lambda self, *a, **kw: pytest.fail("must not be moved as a whole"))
    load_pipeline(build_parser().parse_args([PROMPT, "--model", str(base), "--offload", offload]), "cuda:1")
    assert asked == ["cuda:1"]


# --- bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "out.avi"], "ending in .mp4, .gif, .webp, .png, got 'out.avi'"),
        (["-o", "out.mp4", "--format", "gif"], "expected a folder as --output with --format gif, got 'out.mp4'"),
        (["-o", ""], "expected a file or folder as --output, got an empty text"),
        (["--prompts", "missing.txt"], "missing.txt"),
        (["--fps", "0"], "expected --fps above 0, got 0"),
        (["--fps", "nan"], "expected a finite number as --fps, got nan"),
        (["--fps", "5000"], "expected --fps from 0.01 to 1000, got 5000"),
        (
            ["-o", "run_0.5"],
            "ending in .* a folder is written with a slash at its end: 'run_0.5/'",
        ),
        (["-o", f"{__file__}/"], "expected a folder as --output, got '.*py/', which is a file"),
        (["--layout", "vbench"], "expected a folder as --output with --layout vbench, got 'out.mp4'"),
        (
            ["-o", "videos", "--layout", "vbench", "--format", "webp"],
            "expected --format mp4 or gif with --layout vbench, for VBench reads no other, got webp",
        ),
        (["--num_videos", "0"], "expected --num_videos of at least 1, got 0"),
        (["--device", "abacus"], "expected a device out of .*cpu.* got 'abacus'"),
        (["--offload", "model"], r"expected an accelerator .* for --offload model, got the cpu"),
        (["--offload", "sequential"], r"expected an accelerator .* for --offload sequential, got the cpu"),
        (["--steps", "51"], "51"),
        (["--frames", "0"], "num_frames"),
        (["--height", "7"], "height"),
        (["--decode_chunk_size", "0"], "decode_chunk_size"),
        (["--lora_scale", "0.5"], "scale of 0.5 was given, but no LoRA is active"),
        (["--fuse_lora"], "no active LoRA to fuse"),
        (["--model", "no/such/model/here"], "no/such/model/here"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(base, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert generate(base, PROMPT, *arguments) == 2
    error = capsys.readouterr().err
    assert "diffusers-mcm: error: " in error and "Traceback" not in error
    assert re.search(message, error), error
    assert list(tmp_path.iterdir()) == []


def test_unknown_flags_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", PROMPT, "--stepz", "4"])
    assert "unrecognized arguments: --stepz" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["lora_scale", "guidance_scale", "fps"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_that_are_not_finite_are_refused_before_a_model_is_loaded(tmp_path, capsys, flag, value):
    output = tmp_path / "v.mp4"
    assert main(["generate", PROMPT, "--model", str(tmp_path / "none"), f"--{flag}", value, "-o", str(output)]) == 2
    assert f"expected a finite number as --{flag}, got {value}" in capsys.readouterr().err
    assert not output.exists()


def test_frames_that_are_not_finite_are_an_error_and_no_file(base, tmp_path, capsys, monkeypatch):
    from diffusers import AutoencoderKL

    decode = AutoencoderKL.decode
    monkeypatch.setattr(
        AutoencoderKL, "decode", lambda self, z, **options: (decode(self, z, **options)[0] * float("nan"),)
    )
    assert generate(base, PROMPT, "-o", tmp_path / "out" / "v.mp4") == 2
    assert "error: The decoded frames hold 3072 values of 3072 that are NaN or infinite" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.*"))
