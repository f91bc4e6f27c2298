import os

import pytest

from diffusers_mcm.files import whole_file, whole_folder


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half way"), whole_file(path) as temporary:
        temporary.write_text("ne")
        raise RuntimeError("half way")
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]
    assert path.read_text() == "old"


def test_a_folder_takes_the_place_of_another_as_a_whole(tmp_path):
    path = tmp_path / "new" / "kept"
    for text in ("old", "new"):
        with whole_folder(path) as temporary:
            (temporary / f"{text}.txt").write_text(text)
    with pytest.raises(RuntimeError, match="half way"), whole_folder(path) as temporary:
        (temporary / "more.txt").write_text("mo")
        raise RuntimeError("half way")
    assert [p.name for p in path.parent.iterdir()] == ["kept"]
    assert [p.name for p in path.iterdir()] == ["new.txt"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    path = tmp_path / "kept"
    path.mkdir()
    (path / "old.txt").write_text("old")
    replace = os.replace

    def interrupted(source, target):
        if target == path and source.name.endswith(".tmp"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt), whole_folder(path) as temporary:
        (temporary / "new.txt").write_text("new")
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["kept", "kept/old.txt"]
