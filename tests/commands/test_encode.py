import json

import pytest

from diffusers_mcm import cli
from tests.training.conftest import fresh_accelerator, world
from tests.training.world import flags_of, tiny_config

__all__ = ["fresh_accelerator", "world"]


def test_the_command_fills_the_folder_and_adds_what_is_missing(world, tmp_path, capsys, monkeypatch):
    cache = tmp_path / "cache"
    flags = flags_of(tiny_config(world, tmp_path / "out", cache_latents=str(cache)))
    assert cli.main(["encode", *flags]) == 0
    assert capsys.readouterr().out.strip() == str(cache)
    written = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert {path.name.partition("-")[0] for path in written} == {"cache.json", "clips", "prompt", "judge"}
    assert json.loads((cache / "cache.json").read_text())["clips"]["number of videos"] == 4
    next(cache.glob("clips-*")).unlink()
    assert cli.main(["encode", *flags, "--validation_prompts", "a red ring"]) == 0
    kept = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert [path for path in written if written[path] != kept[path] and "clips" not in path.name] == []
    assert len(kept) == len(written) + 1
    assert cli.main(["encode", *flags, "--seed", "1"]) == 2
    assert "seed was 0, is 1" in capsys.readouterr().err


def test_without_a_folder_it_says_what_is_missing(world, tmp_path, capsys):
    assert cli.main(["encode", *flags_of(tiny_config(world, tmp_path))]) == 2
    assert "Say with --cache_latents in which folder" in capsys.readouterr().err


def test_its_help_is_that_of_the_flags(capsys):
    with pytest.raises(SystemExit):
        cli.main(["encode", "--help"])
    out = capsys.readouterr().out
    assert out.startswith("usage: diffusers-mcm encode") and "--windows_per_clip" in out
