import json

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

from diffusers_mcm.features import PatchFeatures, TextFeatures
from tests.distillation.discriminator.tiny import (
    BLOCKS,
    FEATURE_DIM,
    IMAGE_SIZE,
    NUM_PATCHES,
    TEXT_DIM,
    random_tensor,
    tiny_clip_config,
    tiny_clip_text,
    tiny_dinov2,
)
from tests.tiny import TEXT_LENGTH, tiny_tokenizer

PROMPTS = ["a red circle moving left on a black background", "a blue ring growing on a white background"]


def test_tokens_are_the_normalised_output_of_the_blocks():
    model = tiny_dinov2()
    outputs = {}
    for index in BLOCKS:
        model.encoder.layer[index].register_forward_hook(
            lambda _, __, output, index=index: outputs.update({index: output})
        )
    images = random_tensor(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    features = PatchFeatures(model, BLOCKS)(images)

    outputs.clear()
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    model((images * 0.5 + 0.5 - mean) / std)
    assert len(features) == len(BLOCKS)
    for tokens, index in zip(features, BLOCKS):
        assert tokens.shape == (2, NUM_PATCHES, FEATURE_DIM)
        torch.testing.assert_close(tokens, model.layernorm(outputs[index])[:, 1:], atol=1e-5, rtol=0)


def test_gradients_reach_the_images_and_nothing_else():
    features = PatchFeatures(tiny_dinov2(), BLOCKS)
    images = random_tensor(1, 3, IMAGE_SIZE, IMAGE_SIZE).requires_grad_()
    sum(tokens.square().sum() for tokens in features(images)).backward()
    assert images.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in features.parameters())


def test_stays_in_evaluation_mode():
    features = PatchFeatures(tiny_dinov2(hidden_dropout_prob=0.5), BLOCKS).train()
    images = random_tensor(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert torch.equal(features(images)[-1], features(images)[-1])


def test_input_size_is_the_networks_but_at_most_224():
    assert PatchFeatures(tiny_dinov2(), BLOCKS).input_size == IMAGE_SIZE
    large = PatchFeatures(tiny_dinov2(image_size=518, patch_size=14, num_hidden_layers=1), (0,))
    assert large.input_size == 224
    tokens = large(random_tensor(1, 3, 16, 16))[0]
    assert tokens.shape == (1, 256, FEATURE_DIM)


def test_features_in_half_precision_are_returned_in_float32():
    images = random_tensor(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    exact = PatchFeatures(tiny_dinov2(), BLOCKS)(images)[0]
    rounded = PatchFeatures(tiny_dinov2().to(torch.bfloat16), BLOCKS)(images)[0]
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=0.1, rtol=0)


def test_image_network_from_a_folder(tmp_path):
    tiny_dinov2().save_pretrained(tmp_path)
    images = random_tensor(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    loaded = PatchFeatures.from_pretrained(tmp_path, BLOCKS)
    for tokens, expected in zip(loaded(images), PatchFeatures(tiny_dinov2(), BLOCKS)(images)):
        assert torch.equal(tokens, expected)


def test_text_embedding_is_the_projected_one():
    model, tokenizer = tiny_clip_text(), tiny_tokenizer()
    embeddings = TextFeatures(model, tokenizer)(PROMPTS)
    assert embeddings.shape == (2, TEXT_DIM) and not embeddings.requires_grad
    ids = torch.tensor([tokenizer(PROMPTS[0]).input_ids])  # unpadded: what follows the end token plays no part
    hidden = model.text_model(ids).last_hidden_state[:, -1]
    torch.testing.assert_close(embeddings[:1], model.text_projection(hidden), atol=1e-5, rtol=0)


def test_text_embedding_does_not_depend_on_its_neighbours():
    text = TextFeatures(tiny_clip_text(), tiny_tokenizer())
    torch.testing.assert_close(
        text(PROMPTS)[1:], text(PROMPTS[1:]), atol=1e-5, rtol=0
    )  # float32: kernels differ with the batch
    assert text(["red " * 100]).shape == (1, TEXT_DIM)  # too long: truncated


@pytest.mark.parametrize("whole", [True, False])
def test_text_network_from_a_folder(tmp_path, whole):
    text_model = tiny_clip_text()
    if whole:  # as on the Hub: the text half of the configuration does not know the model's projection
        vision = CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
        )
        config = CLIPConfig(
            text_config=tiny_clip_config(projection_dim=512).to_dict(),
            vision_config=vision.to_dict(),
            projection_dim=TEXT_DIM,
        )
        clip = CLIPModel(config)
        clip.text_model.load_state_dict(text_model.text_model.state_dict())
        clip.text_projection.load_state_dict(text_model.text_projection.state_dict())
        clip.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert saved["text_config"]["projection_dim"] == 512
    else:
        text_model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = TextFeatures.from_pretrained(tmp_path)
    assert loaded.text_dim == TEXT_DIM
    expected = TextFeatures(tiny_clip_text(), tiny_tokenizer())(PROMPTS)
    torch.testing.assert_close(loaded(PROMPTS), expected, atol=1e-5, rtol=0)  # and with where weights lie in memory


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"blocks within 0..3, got \(2, 5, 8, 11\)"):
        PatchFeatures(tiny_dinov2())
    with pytest.raises(ValueError, match="input size 30 is not a multiple of the network's patch size 8"):
        PatchFeatures(tiny_dinov2(image_size=30), BLOCKS)
    with pytest.raises(ValueError, match=r"images of shape \(N, 3, H, W\), got \(1, 4, 32, 32\)"):
        PatchFeatures(tiny_dinov2(), BLOCKS)(torch.zeros(1, 4, 32, 32))
    with pytest.raises(ValueError, match="a list of prompts, got the single string 'a ring'"):
        TextFeatures(tiny_clip_text(), tiny_tokenizer())("a ring")
    tiny_clip_text().save_pretrained(tmp_path / "text")
    tiny_dinov2().save_pretrained(tmp_path / "image")
    with pytest.raises(ValueError, match="type 'dinov2' in .*text.*, got 'clip_text_model'"):
        PatchFeatures.from_pretrained(tmp_path / "text", BLOCKS)
    with pytest.raises(ValueError, match="type 'clip' or 'clip_text_model' in .*image.*, got 'dinov2'"):
        TextFeatures.from_pretrained(tmp_path / "image")
    assert TEXT_LENGTH == tiny_tokenizer().model_max_length


def test_weights_that_are_missing_are_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_dinov2().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = "does not hold all weights of a Dinov2Model, or not in their shapes: layernorm.weight; they would"
    with pytest.raises(ValueError, match=message):
        PatchFeatures.from_pretrained(str(tmp_path), BLOCKS)
    weights["layernorm.weight"] = torch.ones(3)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        PatchFeatures.from_pretrained(str(tmp_path), BLOCKS)


def test_the_other_half_of_a_clip_is_not_reported(tmp_path, capsys, caplog):
    text = tiny_clip_config().to_dict()
    CLIPModel(CLIPConfig(text_config=text, projection_dim=TEXT_DIM)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    capsys.readouterr()
    TextFeatures.from_pretrained(str(tmp_path))
    assert "UNEXPECTED" not in capsys.readouterr().err + caplog.text
