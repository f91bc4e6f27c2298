import json
import re

import pytest

from diffusers_mcm.hub import PACKAGED_FOLDER
from diffusers_mcm.shapes import figures
from diffusers_mcm.shapes.captions import held_out_captions
from diffusers_mcm.shapes.figures import READERS, Study
from diffusers_mcm.shapes.methods import LCM_METHODS, MCM_METHODS, TEACHER_METHODS, Networks
from diffusers_mcm.shapes.scores import MEASURED, SEEN


class Untouchable:
    """Networks that may be asked for nothing."""


def test_study_keeps_what_it_read(tmp_path):
    captions = held_out_captions()[:3]
    first = Study(Untouchable(), tmp_path, batch_size=2).truth("truth-clean", captions, [0, 5])
    assert [len(row) for row in first] == [2, 2, 2]
    (kept,) = tmp_path.iterdir()
    kept.write_text(kept.read_text().replace('"sharpness": 0.', '"sharpness": 7.'))
    again = Study(Untouchable(), tmp_path).truth("truth-clean", captions, [0, 5])
    assert all(r["sharpness"] > 7 for row in again for r in row)
    other_seeds = Study(Untouchable(), tmp_path).truth("truth-clean", captions, [0, 6])
    assert all(r["sharpness"] < 1 for row in other_seeds for r in row)


@pytest.mark.parametrize("changed", READERS)
def test_study_reads_again_when_a_module_that_reads_has_changed(changed, tmp_path, monkeypatch):
    captions = held_out_captions()[:1]
    Study(Untouchable(), tmp_path).truth("truth-clean", captions, [0])
    digest = figures.source_digest
    monkeypatch.setattr(figures, "source_digest", lambda module: digest(module) + "changed" * (module == changed))
    Study(Untouchable(), tmp_path).truth("truth-clean", captions, [0])
    assert len(list(tmp_path.iterdir())) == 2


def test_every_module_of_the_oracle_is_a_reader():
    """What `oracle` imports of the package is a reader too, or is the world itself, whose truth has its own digest."""
    source = (PACKAGED_FOLDER.parent / "oracle.py").read_text()
    assert set(re.findall(r"^from \.(\w+)", source, re.M)) - {"captions", "render"} <= set(READERS)


def test_best_guidance_prefers_right_then_small(tmp_path, monkeypatch):
    shares = {1.0: 0.0, 2.0: 1.0, 4.0: 1.0, 8.0: 0.0}
    captions = held_out_captions()[:2]

    def readings(self, method, captions, seeds):
        wrong = {} if shares[method.guidance] else {"colour": None}
        numbers = dict.fromkeys((*SEEN, *MEASURED), 0) | {"position": [0, 0]}
        return [[caption._asdict() | numbers | wrong for _ in seeds] for caption in captions]

    monkeypatch.setattr(Study, "readings", readings)
    best, found = Study(Untouchable(), tmp_path).best_guidance(TEACHER_METHODS[0], [8.0, 4.0, 2.0, 1.0], captions)
    assert (best, found) == (2.0, shares)


def test_a_tiny_run_end_to_end_and_again_from_what_it_kept(tiny_base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "TEACHER_METHODS", tuple(m._replace(steps=2) for m in TEACHER_METHODS))
    readme = tmp_path / "README.md"
    readme.write_text("<!-- figures -->\n<!-- /figures -->\n")
    command = ["--teacher", tiny_base, "--mcm", tiny_base, "--lcm", tiny_base, "--output", str(tmp_path / "out")]
    command += ["--captions", "2", "--seeds", "2", "--guidances", "1", "3", "--search_captions", "1"]
    command += ["--timing_runs", "1", "--batch_size", "4"]
    command += ["--device", "cpu", "--readme", str(readme)]
    figures.main(command)
    results = json.loads((tmp_path / "out" / "figures.json").read_text())
    names = [method.name for method in (*TEACHER_METHODS, *MCM_METHODS, *LCM_METHODS)]
    assert set(results["methods"]) == {*names, "truth-video", "truth-clean"}
    assert results["methods"]["truth-clean"]["all_right"] == [1, 1, 1]
    assert all(min(results["methods"][name]["seconds"][size] for size in "14") > 0 for name in names)
    assert set(results["guidance_search"]["teacher-ddim-50"]) == {"1", "3"}
    assert len(results["checks"]) == 23
    assert "| rendered truth, clean |" in readme.read_text() and "≥ 12" in readme.read_text()
    capsys.readouterr()

    monkeypatch.setattr(Networks, "sample", lambda *_: pytest.fail("sampled again"))
    monkeypatch.setattr(figures, "time_methods", lambda *_: dict.fromkeys(names, 1.0))
    figures.main([*command, "--checks"])
    again = json.loads((tmp_path / "out" / "figures.json").read_text())
    for name, method in results["methods"].items():
        assert again["methods"][name] | {"seconds": None} == method | {"seconds": None}
    assert "| target | measured | reached |" in capsys.readouterr().out


def test_counts_below_one_are_refused():
    with pytest.raises(ValueError, match="expected --seeds of at least 1, got 0"):
        figures.main(["--seeds", "0"])
