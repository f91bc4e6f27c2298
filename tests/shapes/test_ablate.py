"""What the paper's tables compare: the rows, their recipe, and a run that is stopped and goes on."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from diffusers_mcm.distillation.motion import MOTION_REPRESENTATIONS
from diffusers_mcm.shapes.build import build
from diffusers_mcm.training.arguments import parse_config
from diffusers_mcm.training.encoding import encode
from diffusers_mcm.training.loop import Trainer

SCRIPTS = Path(__file__).parents[2] / "examples" / "shapes"


@pytest.fixture
def ablate(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import ablate

    return ablate


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build(tmp_path_factory.mktemp("world") / "built", num_videos=4, num_images=4, image_domains=["clean"])


@pytest.fixture
def tiny(ablate, tiny_base, monkeypatch):
    """The recipe with a tiny base model, few samples and a checkpoint in each step."""
    recipe = dict(pretrained_teacher_model=tiny_base, train_batch_size=2, lora_rank=2, lr_warmup_steps=0)
    recipe |= dict(checkpointing_steps=1)
    monkeypatch.setattr(ablate, "RECIPE", ablate.RECIPE | recipe)
    pictures, clips = ablate.ROWS["two-stage-clean"]
    monkeypatch.setitem(ablate.ROWS, "two-stage-clean", (pictures | dict(train_batch_size=4), clips))
    return ablate


@pytest.fixture
def in_process(monkeypatch):
    """Stages are trained in this process, where they can be stopped before the update of a step."""
    stop_at: dict[int, bool] = {}

    class Stopping(Trainer):
        def update(self):
            if stop_at.pop(self.step, False):
                raise subprocess.CalledProcessError(1, "training")
            return super().update()

    def run(command, **options):
        AcceleratorState._reset_state(reset_partial_state=True)
        if command[1:4] == ["-m", "diffusers_mcm", "encode"]:
            encode(parse_config(command[4:]))
        else:
            Stopping(parse_config(command[2:])).train()

    monkeypatch.setattr(subprocess, "run", run)
    yield stop_at
    AcceleratorState._reset_state(reset_partial_state=True)


def configs(ablate, row, world=Path("world"), seed=0):
    (run,) = ablate.runs([row], [seed], Path("runs"), world)
    return [parse_config(ablate.command(run, number)[2:]) for number in range(len(run.stages))]


# --- the table -------------------------------------------------------------------------------------------------------
def test_every_row_stands_in_a_table_and_no_two_are_the_same_configuration(ablate):
    assert list(ablate.TABLES) == [1, 3, 4, 5, 6, 7]
    assert {row for table in ablate.TABLES.values() for row in table.values()} == set(ablate.ROWS)
    made = [json.dumps(stages, sort_keys=True) for stages in ablate.ROWS.values()]
    assert len(set(made)) == len(made) == 15 and len(ablate.PAPERS) == 13
    in_the_papers = {row for number, table in ablate.TABLES.items() if number < 7 for row in table.values()}
    assert in_the_papers == set(ablate.PAPERS) == set(ablate.ROWS) - set(ablate.BEYOND)


def test_the_rows_are_what_the_papers_tables_compare(ablate):
    def read(table, *names):
        rows = [configs(ablate, row)[-1] for row in ablate.TABLES[table].values()]
        return [tuple(getattr(config, name) for name in names) for config in rows]

    steps = [("raw", 1.0, False), ("raw", 1.0, True), ("learnable", 1.0, True), ("learnable", 0.5, True)]
    assert read(4, "motion", "lambda_real", "adversarial") == steps
    assert read(5, "motion", "lambda_real", "adversarial") == [(name, 1.0, True) for name in MOTION_REPRESENTATIONS]
    assert read(6, "lambda_real", "motion") == [(1.0, "learnable"), (0.5, "learnable"), (0.0, "learnable")]
    assert read(1, "motion", "image_data") == [("raw", None), ("learnable", None), ("learnable", "world/images/clean")]
    images = [None, "world/images/clean", None, "world/images/cartoon"]
    assert [image for (image,) in read(3, "image_data")] == images
    adversarial = {config for config in read(4, "lambda_adv") + read(5, "lambda_adv") if config != (0.0,)}
    assert len(adversarial) == 1  # one weight for all rows


def test_what_is_beyond_the_paper_is_one_flag_more(ablate):
    (paper,), (temporal,), (change,) = (ablate.ROWS[row] for row in ("clean", *ablate.BEYOND))
    assert temporal == paper | dict(lambda_temporal=1) and change == paper | dict(lambda_change=paper["lambda_adv"])
    for row in ablate.BEYOND:
        assert configs(ablate, row)[0].lambda_temporal + configs(ablate, row)[0].lambda_change > 0
    assert ablate.parse(["--world", "w", "--output", "o"]).rows == ablate.PAPERS


def test_a_judge_of_changes_reads_no_cache(ablate, world, tmp_path):
    cached = {run.row: run.cached(0) for run in ablate.runs(ablate.BEYOND, [0], tmp_path, world, cache=tmp_path)}
    assert cached["change"] == {} and cached["temporal"]["cache_latents"] == tmp_path / "seed-0" / "videos"


@pytest.mark.parametrize("images", ["clean", "cartoon"])
def test_two_stages_are_spatial_modules_on_images_then_temporal_ones_on_videos(ablate, images):
    first, second = configs(ablate, f"two-stage-{images}", seed=2)
    assert (first.lora_modules, first.video_data, first.num_frames) == ("spatial", f"world/images/{images}", 1)
    assert (second.lora_modules, second.video_data, second.num_frames) == ("temporal", "world/videos", None)
    assert second.pretrained_lora == first.output_dir
    assert first.train_batch_size == 16 * second.train_batch_size  # the frames of a clip
    assert not first.adversarial and not second.adversarial
    assert (first.max_train_steps, second.max_train_steps, first.seed, second.seed) == (300, 300, 2, 2)


def test_the_recipe_is_that_of_the_packaged_weights(ablate):
    """But for what one stage has of two: the weight of the adversarial loss, the share of real clips, the length."""
    script = (SCRIPTS / "distil.sh").read_text()
    config = configs(ablate, "clean")[0]
    for name in ("learning_rate", "lora_rank", "num_solver_steps", "ema_decay", "lr_warmup_steps", "guidance_max"):
        assert float(re.search(rf"--{name} (\S+)", script)[1]) == getattr(config, name)
    for name in ("discriminator_learning_rate", "gradient_penalty_weight", "gradient_penalty_growth"):
        assert float(re.search(rf"--{name} (\S+)", script)[1]) == getattr(config, name)
    assert (config.timesteps, config.fuse_lora, config.scale_lr) == ("visited", True, False)
    assert config.discriminator_augmentation == () and config.pretrained_lora is None


def test_the_first_seed_of_all_rows_comes_before_the_second(ablate):
    found = [(run.row, run.seed) for run in ablate.runs(["mcd", "lcm"], [0, 1], Path("runs"), Path("world"))]
    assert found == [("lcm", 0), ("mcd", 0), ("lcm", 1), ("mcd", 1)]
    first = list(ablate.ROWS)[:5]
    assert {*ablate.TABLES[1].values(), *ablate.TABLES[4].values()} == set(first)


# --- a run -----------------------------------------------------------------------------------------------------------
def test_a_run_that_was_stopped_goes_on(tiny, in_process, world, tmp_path, capsys):
    def call(output, *more):
        flags = ["--world", world, "--output", tmp_path / output, "--rows", "two-stage-clean", "--seeds", 1]
        tiny.main([str(word) for word in (*flags, "--steps", 4, *more)])
        return capsys.readouterr().out

    assert call("parts", "--list") == "two-stage-clean, seed 1: missing\n"
    assert call("parts", "--minutes", -1) == "" and not (tmp_path / "parts").exists()
    in_process[1] = True
    with pytest.raises(SystemExit, match="1 of 1 runs failed"):
        call("parts")
    assert "failed with status 1, see " in capsys.readouterr().out
    assert call("parts", "--list") == "two-stage-clean, seed 1: 1 of 4 steps\n"
    assert re.search(r"two-stage-clean, seed 1: 4 steps in \d minutes, loss 0\.\d+, consistency 0\.", call("parts"))
    call("whole")
    assert call("whole") == ""  # there is nothing left to train

    parts, whole = (tmp_path / name / "two-stage-clean" / "seed-1" for name in ("parts", "whole"))
    weights, again = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (whole, parts))
    assert weights.keys() == again.keys() and all((weights[key] == again[key]).all() for key in weights)
    record = json.loads((parts / "run.json").read_text())
    digest = hashlib.sha256((parts / "pytorch_lora_weights.safetensors").read_bytes()).hexdigest()
    assert (record["row"], record["seed"], record["steps"], record["sha256"]) == ("two-stage-clean", 1, 4, digest)
    assert record["losses"].keys() == {"loss", "consistency"} and record["seconds"] >= 0
    assert [stage["video_data"] for stage in record["stages"]] == ["images/clean", "videos"]
    assert str(tmp_path) not in json.dumps({**record, "stages": None})
    assert not list(parts.rglob("checkpoint-*"))

    with pytest.raises(ValueError, match=r"was begun with other settings \(stages\) than are asked for"):
        tiny.main(["--world", str(world), "--output", str(tmp_path / "parts"), "--seeds", "1"])


def test_what_was_encoded_serves_all_rows_of_a_seed_and_trains_the_same(tiny, in_process, world, tmp_path):
    def call(output, *rows_and_flags):
        flags = ["--world", world, "--output", tmp_path / output, "--seeds", 1, "--steps", 4, "--rows"]
        tiny.main([str(word) for word in (*flags, *rows_and_flags)])
        return tmp_path / output

    def kept():
        return {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.safetensors")}

    cache = ["--cache", tmp_path / "cache"]
    plain, cached = call("plain", "two-stage-clean"), call("cached", "two-stage-clean", *cache)
    before = kept()
    assert {file.parent.relative_to(tmp_path / "cache").as_posix() for file in before} == {
        "seed-1/images/clean",
        "seed-1/videos",
    }
    call("cached", "mcd", *cache)  # which judges frames
    clips = {file: time for file, time in kept().items() if file in before}
    assert clips == before
    records = [json.loads((folder / "two-stage-clean/seed-1/run.json").read_text()) for folder in (plain, cached)]
    assert [record["cached"] for record in records] == [False, True] and records[0]["stages"] == records[1]["stages"]
    folders = [folder / "two-stage-clean/seed-1" for folder in (plain, cached)]
    weights, same = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in folders)
    # a clip is encoded alone there, and in a batch otherwise; Adam's first steps make much of the last digits
    assert all(torch.allclose(weights[key], same[key], atol=2e-5, rtol=1e-3) for key in weights)
    assert any(weights[key].any() for key in weights)


def test_a_stage_is_a_process_that_holds_the_runs_lock(tiny, world, tmp_path, monkeypatch):
    (run,) = tiny.runs(["lcm"], [0], tmp_path, world, steps=2)
    free = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import ablate; from pathlib import Path"
    free += f"; run = ablate.Run('lcm', 0, Path({str(tmp_path)!r}), Path())"
    free += "; lock = ablate.alone(run); sys.exit(lock.__enter__() is None)"
    script = tmp_path / "script.py"
    script.write_text(
        f"import subprocess, sys\nsys.exit(2 + subprocess.run([sys.executable, '-c', {free!r}]).returncode)"
    )
    monkeypatch.setattr(tiny, "SCRIPT", script)
    with tiny.alone(run) as lock, pytest.raises(subprocess.CalledProcessError) as error:
        tiny.train(run, lock)
    assert error.value.returncode == 3  # another one would have passed the run over
    assert subprocess.run([sys.executable, "-c", free]).returncode == 0


def test_a_world_that_was_not_built_is_told(ablate, tmp_path):
    (run,) = ablate.runs(["lcm"], [0], tmp_path, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nowhere is not a built world: make one with diffusers-mcm shapes build"):
        run.how_made()
