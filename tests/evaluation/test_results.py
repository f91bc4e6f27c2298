"""What is written, what is read back, and what is never put side by side."""

import json

import pytest

from diffusers_mcm.evaluation.distances import Interval
from diffusers_mcm.evaluation.records import Difference
from diffusers_mcm.evaluation.results import Evaluation, check_protocols
from tests.evaluation.conftest import PROTOCOL, evaluation, method


def test_results_come_back_as_they_were_written(tmp_path):
    difference = Difference("lcm4", "mcm4", "fvd.i3d", Interval(200.0, 150.0, 240.0), 200)
    written = evaluation(differences=[difference], mcm4=method(), lcm4=method(700.0, skipped={"a.mp4": "broken"}))
    written.write(tmp_path)
    assert Evaluation.read(tmp_path) == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "evaluation.md", "evaluation.png"]


def test_another_protocol_is_refused_with_the_field_that_differs():
    other = json.loads(json.dumps(PROTOCOL)) | {"window": {"num_frames": 8}}
    with pytest.raises(ValueError, match=r"side by side: .*\n  window.num_frames: 16 there, 8 now"):
        evaluation(other, lcm4=method()).with_others(evaluation(mcm4=method()), "results")


def test_a_network_that_was_not_there_before_is_another_protocol():
    with pytest.raises(ValueError, match="networks.clipsim.sha256: None there, 'cd' now"):
        check_protocols(PROTOCOL, PROTOCOL | {"networks": {"i3d": {}, "clipsim": {"sha256": "cd"}}}, "results")


def test_methods_of_before_stay_and_those_measured_again_are_replaced():
    stays = Difference("lcm4", "mcm4", "fvd.i3d", Interval(1.0, 0.0, 2.0), 200)
    before = evaluation(differences=[stays], mcm4=method(500.0), lcm4=method(700.0))
    after = evaluation(lcm4=method(650.0), ddim4=method(900.0)).with_others(before, "results")
    found = {name: each.values["fvd.i3d"] for name, each in after.methods.items()}
    assert found == {"mcm4": 500.0, "lcm4": 650.0, "ddim4": 900.0}
    assert after.differences == []  # the one of before was of other numbers
    same = evaluation(lcm4=method(700.0), ddim4=method(900.0)).with_others(before, "results")
    assert same.differences == [stays]  # neither has changed


def test_a_file_that_is_no_result(tmp_path):
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(ValueError, match="evaluation.json is no result of an evaluation that this version wrote"):
        Evaluation.read(tmp_path)
    assert Evaluation.read(tmp_path / "nothing") is None


def test_the_card_gets_a_sentence_columns_and_rows():
    found = evaluation(mcm4=method()).card_table()
    assert found["columns"] == ["steps", "videos", "FVD (i3d)", "change", "near still", "flicker"]
    assert found["rows"][1] == ["mcm4", "4", "500", "500.0", "4.000", "0.000", "0.500"]
    assert found["about"].startswith("Measured against 500 videos of `out`, 16 frames each")


def test_results_at_several_steps_belong_together():
    methods = {"mcm4": method(1, 4), "mcm-8-steps": method(2, 8), "lcm": method(3, 1), "theirs": method(4, None)}
    methods |= {"lora-r32": method(5, 4), "lora-r64": method(6, 4), "8": method(7, 8)}
    found = evaluation(**methods).series()
    scores = {name: [(steps, values["fvd.i3d"]) for steps, values in line] for name, line in found.items()}
    assert scores.pop("mcm") == [(4, 1), (8, 2)]
    assert scores == {"lcm": [(1, 3)], "lora-r32": [(4, 5)], "lora-r64": [(4, 6)], "8": [(8, 7)]}


def test_columns_of_before_stay():
    before = evaluation(mcm4=method())
    later = evaluation(lcm4=method(values={"clipsim": 29.8, "motion.change": 4.0})).with_others(before, "results")
    assert [column.title for column in later.columns()] == ["FVD (i3d)", "CLIPSIM", "change", "near still", "flicker"]
    assert "| lcm4 | 4 | 500 | – | 29.80 | 4.000 | – | – |" in later.page()


def test_names_that_are_no_utf8(tmp_path):
    evaluation(mcm4=method(skipped={"caf\udce9.mp4": "broken"})).write(tmp_path)
    assert "caf\\udce9.mp4" in (tmp_path / "evaluation.md").read_text()
