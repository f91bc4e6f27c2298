import json

import pytest

from diffusers_mcm.commands.grammar import GRAMMAR_NAME, is_drawn, notice, read_grammar
from diffusers_mcm.hub import PACKAGED_FOLDER
from diffusers_mcm.shapes.captions import all_captions, grammar, parse

TEACHER = PACKAGED_FOLDER / "mcm-shapes-teacher"


def test_the_packaged_models_know_their_grammar():
    found = read_grammar(TEACHER)
    assert found == grammar()
    assert all(is_drawn(str(caption), found) for caption in all_captions())
    assert notice(map(str, all_captions()), TEACHER, "mcm-shapes") is None


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat",
        "",
        "a red circle",
        "a pink circle growing on a black background",
        "red",
        "a red circle growing on a black",
    ],
)
def test_what_the_grammar_has_not_is_not_drawn(prompt):
    assert not is_drawn(prompt, grammar())
    with pytest.raises(ValueError, match="expected a caption of the form"):
        parse(prompt)


def test_capitals_and_spaces_do_not_matter():
    assert is_drawn("  A red circle\n growing on a Black background", grammar())


def test_the_notice_names_what_is_drawn_and_what_to_use_instead():
    told = notice(["a cat", str(all_captions()[0]), "a dog"], TEACHER, "my-shapes")
    assert told.startswith("my-shapes cannot draw 'a cat' and 1 more: all it knows is «a {red|green|")
    assert "{moving left|moving right|" in told and "{black|white|gray|cyan} background»" in told
    assert "--model yhzhai/mcm" in told and told.count("\n") == 0


def test_a_model_without_a_grammar_may_draw_anything(tmp_path):
    assert notice(["a cat"], tmp_path, "it") is None
    assert notice(["a cat"], "owner/name", "it") is None and notice(["a cat"], None, "it") is None
    (tmp_path / GRAMMAR_NAME).write_text(json.dumps({"template": "{pet} (1+1)", "words": {"pet": ["a cat"]}}))
    assert notice(["a cat (1+1)"], tmp_path, "it") is None
    assert "it cannot draw 'a cat'" in notice(["a cat"], tmp_path, "it")
