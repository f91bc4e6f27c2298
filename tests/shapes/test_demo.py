import json

import pytest
from PIL import Image

from diffusers_mcm.shapes import demo
from diffusers_mcm.shapes.captions import held_out
from diffusers_mcm.shapes.methods import MCM_METHODS, TEACHER_METHODS


def test_demo_writes_videos_picture_and_tables(tiny_base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "TEACHER_METHODS", tuple(m._replace(steps=2) for m in TEACHER_METHODS))
    readme = tmp_path / "README.md"
    readme.write_text("<!-- demo -->\n<!-- /demo -->\n")
    output = tmp_path / "demo"
    demo.main(
        ["--teacher", tiny_base, "--mcm", tiny_base, "--prompts", "2", "--output", str(output), "--device", "cpu"]
        + ["--readme", str(readme)]
    )
    results = json.loads((output / "table.json").read_text())
    names = [method.name for method in (*TEACHER_METHODS, *MCM_METHODS)]
    assert list(results["methods"]) == names
    assert len(results["prompts"]) == 2 and all(held_out(prompt) for prompt in results["prompts"])
    for name in names:
        files = sorted(path.name for path in (output / name).iterdir())
        expected = [f"{i:02d}-{p.replace(' ', '-')}.mp4" for i, p in enumerate(results["prompts"], start=1)]
        assert files == expected
    with Image.open(output / "comparison.png") as picture, Image.open(tmp_path / "docs" / "demo.png") as copy:
        assert picture.size == copy.size
    table = (output / "table.md").read_text()
    assert all(f"| {method.label} |" in table for method in (*TEACHER_METHODS, *MCM_METHODS))
    assert "](docs/demo.png)" in readme.read_text() and "| MCM, 4 steps |" in readme.read_text()
    printed = capsys.readouterr().out
    assert str(output / "comparison.png") in printed and "diffusers-mcm generate" in printed


@pytest.mark.parametrize("count", ["0", "61"])
def test_number_of_prompts_is_checked(count):
    with pytest.raises(ValueError, match=f"expected --prompts between 1 and 60, got {count}"):
        demo.main(["--prompts", count])
