import json

import pytest
import start_up

ROUNDS = [
    {start_up.BARE: 5.0, start_up.CLASSES: 10.0, "first line": 2.0, "first step": 10.0},
    {start_up.BARE: 10.0, start_up.CLASSES: 20.0, "first line": 5.0, "first step": 18.0},
    {start_up.BARE: 4.0, start_up.CLASSES: 8.0, "first line": 1.0, "first step": 8.4},
]


def test_ratios_are_taken_within_a_round():
    rows = dict(start_up.rows_of(ROUNDS))
    assert rows["first step"] == {
        "seconds": "10.00",
        "times the bare imports": "2.00",  # of 2, 1.8 and 2.1
        "times the bare imports and the classes": "1.00",
    }
    assert rows["first line"]["times the bare imports"] == "0.40"


def test_a_process_of_its_own_notes_down_its_seconds():
    found = start_up.seconds_of("sum(range(10**6))\nseconds['half'] = time.process_time()\nsum(range(10**6))")
    assert 0 < found["half"] < found["whole"]
    with pytest.raises(RuntimeError, match="(?s)a run failed:.*NameError"):
        start_up.seconds_of("undefined")


def test_the_script_writes_results_and_table(tmp_path, monkeypatch, capsys):
    document, output = tmp_path / "page.md", tmp_path / "start_up.json"
    document.write_text("<!-- start-up -->\n<!-- /start-up -->\n")
    monkeypatch.setattr(start_up, "measure", lambda rounds: ROUNDS[:rounds])
    arguments = ["start_up.py", "--rounds", "3", "--output", str(output), "--document", str(document)]
    monkeypatch.setattr("sys.argv", arguments)
    assert start_up.main() == 1  # over the target
    assert "2.00 times at most; the target is 1.3" in capsys.readouterr().out
    assert json.loads(output.read_text()) == {"rounds": ROUNDS}
    assert "| first step | 10.00 | 2.00 | 1.00 |" in document.read_text()
