import hashlib

import pytest

from diffusers_mcm.shapes.captions import (
    Caption,
    all_captions,
    held_out,
    held_out_captions,
    parse,
    training_captions,
)


def test_the_grammar_gives_576_different_sentences_that_parse_back():
    captions = all_captions()
    assert len(captions) == len({str(caption) for caption in captions}) == 6 * 4 * 6 * 4
    assert all(parse(str(caption)) == caption and parse(caption) == caption for caption in captions)


def test_the_sentence_is_the_one_of_the_grammar():
    assert str(Caption("red", "ring", "moving up", "cyan")) == "a red ring moving up on a cyan background"


def test_sixty_captions_are_held_out_by_their_hash_and_no_training_reads_them():
    kept = {str(caption) for caption in held_out_captions()}
    assert len(kept) == 60
    assert kept == {
        str(caption)
        for caption in all_captions()
        if int(hashlib.sha256(str(caption).encode()).hexdigest(), 16) % 10 == 0
    }
    trained = {str(caption) for caption in training_captions()}
    assert len(trained) == 516 and not kept & trained
    assert all(held_out(caption) for caption in kept)


@pytest.mark.parametrize(
    "sentence", ["", "a red circle", "a pink circle growing on a black background", "A red circle"]
)
def test_a_sentence_outside_the_grammar_is_refused_with_the_grammar(sentence):
    with pytest.raises(ValueError, match=r"expected a caption of the form 'a \{red\|green.*circle\|square.*, got '"):
        parse(sentence)
