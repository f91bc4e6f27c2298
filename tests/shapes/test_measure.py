"""Measuring what was trained for the tables, on two captions: what is written, what stays, and what is refused."""

import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

from diffusers_mcm import MCMPipeline, make_scheduler
from diffusers_mcm.hub import PACKAGED_FOLDER
from diffusers_mcm.shapes.methods import TEACHER_METHODS

SCRIPTS = Path(__file__).parents[2] / "examples" / "shapes"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import measure
    import tables

    captions = measure.held_out_captions()[:2]
    monkeypatch.setattr(measure, "held_out_captions", lambda: captions)
    monkeypatch.setattr(measure, "REFERENCE_SEEDS", range(1000, 1002))
    monkeypatch.setattr(measure, "STEPS", (1, 4))
    monkeypatch.setattr(tables, "STEPS", ("1", "4"))
    return measure, tables


def flags(tmp_path, *more):
    places = ["--runs", tmp_path / "runs", "--world", tmp_path / "world", "--output", tmp_path / "out"]
    return [str(word) for word in (*places, "--rows", "teacher-ddim", "--resamples", 3, *more)]


def test_a_baseline_is_measured_once_and_shown_in_its_table(scripts, tmp_path, capsys):
    measure, tables = scripts
    measure.main(flags(tmp_path, "--videos", 2))
    assert "teacher-ddim, 4 steps: fvd" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "teacher-ddim.json").read_text())
    values = written["steps"]["1"]["values"]
    assert {"fvd", "clipsim", "fid.clean", "fid.cartoon", "motion.change", "oracle.all_right"} <= set(values)
    assert values["fvd"] > 0 and -100 < values["clipsim"] < 100
    assert all(len(draws) == 3 for draws in written["steps"]["4"]["draws"].values())
    protocol = json.loads((tmp_path / "out" / "protocol.json").read_text())
    assert protocol["samplers"]["teacher-ddim"]["guidance"]["4"] == 3.0 and protocol["seeds"] == "0 to 1"
    assert protocol["videos"] == 4 and len(protocol["networks"]["fvd"]["sha256"]) == 64
    vae = hashlib.sha256((PACKAGED_FOLDER / measure.TEACHER / "vae" / SAFETENSORS_WEIGHTS_NAME).read_bytes())
    assert set(protocol["teacher"]) == {"text_encoder", "unet", "vae"}
    assert protocol["teacher"]["vae"] == vae.hexdigest()

    measure.main(flags(tmp_path, "--videos", 2))
    assert capsys.readouterr().out == ""  # it is there
    tables.main(["--results", str(tmp_path / "out"), "--page", str(tmp_path / "tables.md")])
    page = (tmp_path / "tables.md").read_text()
    assert (
        f"| DDIM (not trained) | {values['fvd']:.2f} |" in page
        and "DDIM: `ddim`, spacing trailing, guidance" in page
        and "Each has 4 videos of 2 held-out captions" in page
    )


def test_a_row_that_is_none_and_trainings_of_another_length(scripts, tmp_path, capsys):
    import ablate

    measure, _ = scripts
    with pytest.raises(SystemExit, match="2"):
        measure.main(flags(tmp_path, "--rows", "lmc"))
    assert "invalid choice: 'lmc'" in capsys.readouterr().err
    (tmp_path / "world").mkdir()
    (tmp_path / "world" / "build.json").write_text("{}")
    run = ablate.Run("lcm", 0, tmp_path / "runs", tmp_path / "world", steps=2)
    run.folder.mkdir(parents=True)
    run.write(run.how_made())
    measure.main(flags(tmp_path, "--rows", "lcm", "--steps", 2))  # begun, and not finished
    assert "lcm: no training with these seeds is finished" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"begun with other settings \(stages\) than are asked for: give those .*--steps"
    ):
        measure.main(flags(tmp_path, "--rows", "lcm"))


def test_another_protocol_is_refused(scripts, tmp_path):
    measure, _ = scripts
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "protocol.json").write_text(json.dumps({"captions": 60}))
    (tmp_path / "out" / "lcm-0.json").write_text("{}")
    with pytest.raises(ValueError, match=r"was measured by another protocol \(captions, .*\): name another --output"):
        measure.main(flags(tmp_path, "--videos", 1))
    (tmp_path / "out" / "lcm-0.json").unlink()  # nothing was measured by it
    measure.check_protocol(tmp_path / "out", {"captions": 2})
    assert json.loads((tmp_path / "out" / "protocol.json").read_text()) == {"captions": 2}


def test_the_baselines_are_sampled_at_the_guidance_that_figures_take(scripts, monkeypatch):
    """Which is not one for all steps; it stands in the protocol with the spacing, and is what the sampler gets."""
    measure, _ = scripts
    best = {(row.sampler, row.steps): row.guidance for row in TEACHER_METHODS}
    given = {(row.sampler, 4): row.guidances[4] for row in measure.BASELINES.values()}
    assert given == {key: best[key] for key in given}
    ddim = measure.BASELINES["teacher-ddim"]
    assert measure.described(ddim) == {
        "sampler": "ddim",
        "spacing": "trailing",
        "guidance": {"1": ddim.guidances[1], "4": 3.0},
    }
    sampled = []
    networks = SimpleNamespace(sample=lambda method, captions, seeds: sampled.append(method))
    ruler = SimpleNamespace(score=lambda sample: sample([], []) or {"values": {"fvd": 0.0}})
    measure.measure_one(ruler, networks, "teacher-ddim")
    assert [(method.sampler, method.steps, method.guidance) for method in sampled] == [
        ("ddim", 1, ddim.guidances[1]),
        ("ddim", 4, 3.0),
    ]


def test_the_spacing_that_is_stated_is_that_of_the_sampler(scripts):
    measure, _ = scripts
    pipeline = MCMPipeline.from_pretrained("mcm-shapes-teacher")
    for row in measure.BASELINES.values():
        assert make_scheduler(row.sampler, pipeline).config.timestep_spacing == row.spacing


def test_the_best_guidance_is_searched(scripts, tmp_path, monkeypatch, capsys):
    measure, _ = scripts
    monkeypatch.setattr(measure, "STEPS", (1,))
    monkeypatch.setattr(measure, "GUIDANCES", (1.0, 8.0))
    monkeypatch.setattr(measure, "SEARCH_CAPTIONS", 2)
    measure.main(flags(tmp_path, "--search"))
    said = re.findall(
        r"(teacher-\w+), 1 steps: guidance (1|8), all right \{1.0: .*, 8.0: .*\}", capsys.readouterr().out
    )
    assert [name for name, _ in said] == ["teacher-ddim", "teacher-dpm"]
    assert not (tmp_path / "out").exists()
