import functools
import json
import sys
from pathlib import Path

import pytest
import torch
import training_memory

ROOT = Path(__file__).parents[2]
RESULTS = json.loads((ROOT / "benchmarks" / "training_memory.json").read_text())
# What a step may need at most, GiB, with layers recomputed.
TARGETS = {"ModelScope 256×256×16": 8, "AnimateDiff 512×512×16": 12.5}


@pytest.mark.skipif(
    torch.__version__ < (2, 7),
    reason="accelerate makes parameters on the meta device in a way that torch's fake tensors do not know before 2.7",
)
def test_counted_without_computing_is_what_really_happens():
    """Against the same sums over tensors that hold data."""
    row = training_memory.Row("wan-1.3b", 5, 32, 32)
    counted, real = (training_memory.count_whole(row, True, "tiny", real) for real in (False, True))
    assert counted["peak"] == pytest.approx(real["peak"], rel=0.02)
    del counted["peak"], real["peak"]
    assert counted == real


def test_blocks_that_are_alike_add_the_same(monkeypatch):
    """What is counted of a few gives what is counted of more."""
    row, count_whole = training_memory.Row("wan-1.3b", 5, 32, 32), training_memory.count_whole
    whole = functools.partial(count_whole, size="tiny", real=True)
    monkeypatch.setattr(training_memory, "count_whole", whole)
    monkeypatch.setattr(training_memory, "FEW_BLOCKS", (2, 4))
    monkeypatch.setitem(training_memory.WAN_BLOCKS, "wan-1.3b", 7)
    assert training_memory.count(row, True) == whole(row, True, blocks=7)


def test_the_page_says_what_was_counted():
    table = training_memory.table(training_memory.lines(RESULTS), training_memory.COLUMNS)
    page = (ROOT / "docs" / "performance.md").read_text()
    assert f"<!-- training memory -->\n{table}\n<!-- /training memory -->" in page
    assert RESULTS.keys() == training_memory.ROWS.keys()
    assert all("checkpointing" in counted for counted in RESULTS.values())


@pytest.mark.parametrize("label", TARGETS)
def test_the_papers_models_fit_the_cards_that_they_are_to_fit(label):
    assert RESULTS[label]["checkpointing"]["peak"] / training_memory.GIB <= TARGETS[label]


def test_what_sharding_and_host_memory_save():
    gib = training_memory.GIB
    sizes = {"peak": 50, "text encoders": 11, "denoiser": 16, "largest block": 1}
    counted = {"checkpointing": {name: size * gib for name, size in sizes.items()}}
    assert training_memory.peaks(counted) == {"checkpointing": 50, "text encoders in host memory": 39}
    # Seven eighths of 16 are elsewhere, and two blocks are here whole.
    assert training_memory.peaks(counted, sharded=True) == {"checkpointing": 38, "text encoders in host memory": 27}
    counted["checkpointing"]["networks"] = 30 * gib
    cells = training_memory.cells_of(counted)
    assert cells["smallest card"] == "48 GB" and cells["networks"] == "30.0"
    counted["checkpointing"]["peak"] = 85 * gib  # 74 without the encoders, and a tenth on top is more than 80
    assert training_memory.cells_of(counted)["smallest card"] == "none of one"


def test_the_script_adds_to_what_it_has_and_writes_the_table(tmp_path, monkeypatch, capsys):
    document, output = tmp_path / "page.md", tmp_path / "results.json"
    document.write_text("# Page\n<!-- training memory -->\n<!-- /training memory -->\nend\n")
    output.write_text(json.dumps({label: RESULTS[label] for label in TARGETS}))
    label = "Wan 1.3B 480×832×81"
    monkeypatch.setattr(training_memory, "count", lambda row, checkpointing: RESULTS[label]["checkpointing"])
    options = ["--rows", label, "--variants", "checkpointing", "--output", str(output), "--document", str(document)]
    monkeypatch.setattr(sys, "argv", ["training_memory.py", *options])
    training_memory.main()
    assert json.loads(output.read_text()).keys() == {*TARGETS, label} and label in capsys.readouterr().out
    assert all(f"| {each} |" in document.read_text() for each in (*TARGETS, label))
