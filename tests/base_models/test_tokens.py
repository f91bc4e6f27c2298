import logging

import torch
from torch import nn

from diffusers_mcm.base_models.tokens import tokenize
from tests.tiny import tiny_tokenizer


def test_prompts_are_padded_or_cut_off_with_a_warning(caplog):
    tokenizer, encoder = tiny_tokenizer(), nn.Module()
    encoder.device = torch.device("cpu")
    with caplog.at_level(logging.WARNING):
        tokens = tokenize(tokenizer, ["a ring"], 6, encoder)
        assert tokens.input_ids.shape == (1, 6) and tokens.attention_mask.sum() == 4 and not caplog.text
        tokens = tokenize(tokenizer, ["a ring", "a red green blue ring moving"], 6, encoder)
    assert tokens.input_ids.shape == (2, 6) and tokens.attention_mask[1].all()
    assert "The text encoder reads 6 tokens; of 'a red green blue ring moving' it will not see" in caplog.text
    assert "moving" in caplog.text.rpartition("not see")[2]


def test_an_encoder_that_is_offloaded_is_given_tokens_on_the_cpu():
    encoder = nn.Module()
    encoder.device = torch.device("meta")
    assert tokenize(tiny_tokenizer(), ["a"], 6, encoder).input_ids.device.type == "cpu"
