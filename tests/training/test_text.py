import pytest
import torch
from torch import nn

from diffusers_mcm.base_models.wan import TEXT_LENGTH
from diffusers_mcm.training.loop import Trainer
from diffusers_mcm.training.networks import build_networks
from diffusers_mcm.training.text import CachedTextEncoder, build_text_encoder
from tests.tiny_wan import save_wan_base

from .world import CAPTIONS, flatten, tiny_config

META = torch.device("meta")  # stands for the device that trains


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(one.view(torch.int32), other.view(torch.int32))


def test_each_caption_is_encoded_once_and_rows_keep_their_order():
    seen = []

    def encode(captions):
        seen.append(captions)
        return {"prompt_embeds": torch.tensor([[float(len(caption))] for caption in captions])}

    text = CachedTextEncoder(encode, capacity=2 * 4)  # bytes, of two float32
    assert text(["aa", "b", "aa"])["prompt_embeds"].tolist() == [[2], [1], [2]]
    assert text(["b"])["prompt_embeds"].tolist() == [[1]]
    assert seen == [["aa"], ["b"]]
    text(["ccc"])  # drops "aa", which was not used for longest
    text(["b"])
    assert seen == [["aa"], ["b"], ["ccc"]]
    text(["aa"])
    assert seen[-1] == ["aa"] and list(text.rows) == ["b", "aa"] and text.size == 2 * 4


def test_what_is_larger_than_the_whole_memory_is_kept_until_the_next_one():
    text = CachedTextEncoder(lambda captions: {"prompt_embeds": torch.ones(1, 3)}, capacity=8)
    for caption in "ab":
        assert text([caption])["prompt_embeds"].tolist() == [[1, 1, 1]] and list(text.rows) == [caption]


def test_rows_of_padding_are_not_kept_and_come_back():
    """Zeros within a text, or a text of nothing else, are no padding that would be lost."""
    rows = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(0))
    rows[0, 3:], rows[1, 2], rows[2] = 0, 0, 0
    seen = iter(rows)
    text = CachedTextEncoder(lambda _: {"prompt_embeds": next(seen)[None], "pooled": torch.ones(1, 2)})
    captions = ["short", "with a gap", "", "full"]
    for _ in range(2):
        assert same_bits(text(captions)["prompt_embeds"], rows)
        assert text(captions)["pooled"].tolist() == [[1, 1]] * 4
    assert same_bits(text(["", "short"])["prompt_embeds"], rows[[2, 0]])
    kept = [text.row(caption)["prompt_embeds"].rows for caption in captions]
    assert [row.untyped_storage().nbytes() // (6 * 4) for row in kept] == [3, 8, 0, 8]


class Encoder(nn.Module):
    """A text encoder that knows where its weights were when it was called."""

    def __init__(self):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.ones(3)), []
        self.tied = nn.Linear(3, 1, bias=False)
        self.tied.weight = self.weight
        self.register_buffer("positions", torch.ones(2))

    def forward(self, captions):
        self.stays_tied = self.tied.weight is self.weight
        self.calls.append((captions, self.weight.device, self.positions.device))
        if captions == ["broken"]:
            raise RuntimeError("a bad caption")
        return {"prompt_embeds": torch.ones(1, 2, 3)}

    def place(self):
        return [(tensor.device.type, tensor.data_ptr()) for tensor in (self.weight, self.positions)]


def test_an_offloaded_encoder_is_on_the_device_only_while_it_encodes():
    encoder = Encoder()
    before, fetched = encoder.place(), []
    text = build_text_encoder(encoder, encoder, META, offload=True)
    fetch = text.weights.fetch
    text.weights.fetch = lambda: (fetched.append(len(text.weights.waiting)), fetch())
    assert text(["a", "b", "a"])["prompt_embeds"].device == META
    assert encoder.calls == [(["a"], META, META), (["b"], META, META)]
    assert fetched == [0, 3]  # the second caption of a batch finds it there
    assert encoder.stays_tied and encoder.place() == before  # its own memory again: nothing was copied back
    text(["b", "a"])
    assert len(encoder.calls) == len(fetched) == 2  # nobody asked for it
    with pytest.raises(RuntimeError, match="a bad caption"):
        text(["broken"])
    assert encoder.calls[-1] == (["broken"], META, META) and encoder.place() == before


def test_without_offload_it_stays_where_it_is():
    encoder = Encoder().to(META)
    text = build_text_encoder(encoder, encoder, META, offload=False)
    text(["a"])
    assert encoder.calls == [(["a"], META, META)] and encoder.weight.device == META


def devices(module):
    return {tensor.device.type for tensor in (*module.parameters(), *module.buffers())}


def test_all_but_the_text_encoders_goes_to_the_device(world, tmp_path):
    networks = build_networks(tiny_config(world, tmp_path, offload_text_encoder=True), META)
    assert devices(networks.student) == devices(networks.discriminator) == {"meta"}
    assert networks.pipeline.text_encoder is None and networks.pipeline.device == META
    for text in (networks.text, networks.discriminator_text):
        assert devices(text.weights.network) == {"cpu"} and text.device == META


def test_offloading_changes_no_bit_of_a_training_nor_of_its_clips(world, tmp_path):
    trainers = []
    for offload in (False, True):
        options = dict(offload_text_encoder=offload, validation_prompts=CAPTIONS[:1], max_train_steps=2)
        trainers.append(Trainer(tiny_config(world, tmp_path / str(offload), **options)))
        trainers[-1].train()
    one, other = (flatten(trainer.state()) for trainer in trainers)
    assert one.keys() == other.keys() and [name for name in one if not torch.equal(one[name], other[name])] == []
    clips = [trainer.clip(CAPTIONS[1]) for trainer in trainers]
    assert (clips[0] == clips[1]).all() and clips[0].std() > 0


def test_texts_of_wan_are_kept_as_what_is_real_of_them(world, tmp_path):
    flags = world | dict(pretrained_teacher_model=str(save_wan_base(tmp_path / "base")))
    config = tiny_config(flags, tmp_path, num_frames=5, height=16, width=16)
    networks = build_networks(config, torch.device("cpu"))
    pipeline = networks.pipeline
    expected = networks.base_model.encode_text(pipeline.tokenizer, pipeline.text_encoder, CAPTIONS[:1])
    found = networks.text(CAPTIONS[:1])["prompt_embeds"]
    assert same_bits(found, expected["prompt_embeds"]) and found.shape[1] == TEXT_LENGTH
    tokens = len(pipeline.tokenizer(CAPTIONS[0]).input_ids)
    assert len(networks.text.row(CAPTIONS[0])["prompt_embeds"].rows) == tokens < TEXT_LENGTH / 4
