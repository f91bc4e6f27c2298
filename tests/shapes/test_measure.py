"""Measuring what was trained for the tables, on two captions: what is written, what stays, and what is refused."""

import json
from pathlib import Path

import pytest

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
    assert protocol["videos"] == 4 and len(protocol["networks"]["fvd"]["sha256"]) == 64

    measure.main(flags(tmp_path, "--videos", 2))
    assert capsys.readouterr().out == ""  # it is there
    tables.main(["--results", str(tmp_path / "out"), "--page", str(tmp_path / "tables.md")])
    page = (tmp_path / "tables.md").read_text()
    assert (
        f"| DDIM (not trained) | {values['fvd']:.2f} |" in page and "Each has 4 videos of 2 held-out captions" in page
    )


def test_another_protocol_is_refused(scripts, tmp_path):
    measure, _ = scripts
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "protocol.json").write_text(json.dumps({"captions": 60}))
    with pytest.raises(ValueError, match=r"was measured by another protocol \(captions, .*\): name another --output"):
        measure.main(flags(tmp_path, "--videos", 1))
