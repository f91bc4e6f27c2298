import pytest

from diffusers_mcm.files import whole_file


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half way"), whole_file(path) as temporary:
        temporary.write_text("ne")
        raise RuntimeError("half way")
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]
    assert path.read_text() == "old"
