import pytest

from diffusers_mcm.tables import replace_section, table


def test_table_is_markdown():
    assert table([("a", {"x": "1"}), ("b", {"y": "2"})], ["x", "y"]).splitlines() == [
        "|  | x | y |",
        "| --- | --- | --- |",
        "| a | 1 | – |",
        "| b | – | 2 |",
    ]


def test_replace_section_keeps_the_rest_and_is_idempotent(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- figures -->\nold\n<!-- /figures -->\nafter\n")
    for _ in range(2):
        replace_section(path, "figures", "new\n")
        assert path.read_text() == "before\n<!-- figures -->\nnew\n<!-- /figures -->\nafter\n"
    with pytest.raises(ValueError, match="expected one <!-- demo --> and then one <!-- /demo --> in .*README.md"):
        replace_section(path, "demo", "new")
