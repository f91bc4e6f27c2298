import json
from pathlib import Path

import pytest
import training
from accelerate.state import AcceleratorState

RESULTS = {
    "a": {
        "targets": {"s": "≤ 2"},
        "now": [{"s": 1.0, "bytes": 2000.0}, None, {"s": 3.0, "bytes": 2000.0}],
        "before": [{"s": 2.0}, {"s": 5.0}, {"s": 4.0}],
    },
    "b": {"targets": {}, "now": [{"ms": 1.0}]},
    "c": {"targets": {}, "now": [{"ms": 1.0}], "before": [{"ms": 0.0}]},
}


def test_figures_are_medians_and_ratios_those_of_pairs():
    """Of the pairs that both trees could measure: 1/2 and 3/4, whose median is between them."""
    assert dict(training.rows_of(RESULTS)) == {
        "a: s": {"before": "3", "now": "2", "now / before": "0.625", "target": "≤ 2"},
        "a: bytes": {"now": "2,000", "target": "–"},
        "b: ms": {"now": "1", "target": "–"},
        "c: ms": {"before": "0", "now": "1", "target": "–"},
    }


@pytest.mark.parametrize("name", training.all_rows())
def test_every_row_measures_what_its_targets_are_about(name, tmp_path, monkeypatch):
    for variable in ("DIFFUSERS_MCM_CACHE", "HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path))  # so that they are afterwards what they were
    row = training.all_rows()[name]
    row.prepare(tmp_path, True)
    try:
        figures = row.measure(tmp_path, True)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    # So small a data set may need no memory that the process does not have.
    assert figures and all(value > 0 or name.endswith("MiB at most") for name, value in figures.items())
    assert {figure.replace("100,000", "1,000") for figure in row.targets} <= figures.keys()


def test_the_script_measures_in_turns_and_writes_the_table(tmp_path, capsys):
    document, output, here = tmp_path / "page.md", tmp_path / "training.json", Path(__file__).parents[2]
    document.write_text("<!-- training -->\n<!-- /training -->\n")
    flags = ["--small", "--pairs", "1", "--before", str(here), "--scratch", str(tmp_path), "--output", str(output)]
    training.main(["--rows", "a core", *flags, "--document", str(document)])
    (result,) = json.loads(output.read_text()).values()
    assert result["now"][0].keys() == result["before"][0].keys()
    lines = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if ": {" in line]
    assert lines == ["a core, now", "a core, before"]
    assert "| a core: 720p, clips each second |" in document.read_text()


def test_what_a_tree_cannot_do_is_left_out(tmp_path, capsys):
    row = training.Row(lambda folder, small: {})
    options = training.parse(["--pairs", "1", "--scratch", str(tmp_path)])
    assert training.compare("no such row", row, options) == {"now": [None]}
    assert "no such row: the package in" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"There are no rows \['x'\]; there are \['open a folder', "):
        training.main(["--rows", "x"])
