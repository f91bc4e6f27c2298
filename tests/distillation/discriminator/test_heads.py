import math

import pytest
import torch
import torch.nn.functional as F

from diffusers_mcm.distillation.discriminator.heads import DiscriminatorHead, DiscriminatorHeads, SpectralConv1d
from tests.distillation.discriminator.tiny import BLOCKS, FEATURE_DIM, NUM_PATCHES, TEXT_DIM, random_tensor, tiny_heads


def spectral_convs(module):
    return [child for child in module.modules() if isinstance(child, SpectralConv1d)]


def largest_singular_value(conv):
    return torch.linalg.svdvals(conv.normalized_weight().detach().flatten(1))[0].item()


def inputs(count=2):
    features = [random_tensor(count, NUM_PATCHES, FEATURE_DIM, seed=seed) for seed in BLOCKS]
    return features, random_tensor(count, TEXT_DIM, seed=99)


def test_spectral_norm_is_one_from_the_start():
    convs = spectral_convs(tiny_heads())
    assert len(convs) == 3 * len(BLOCKS)
    assert all(abs(largest_singular_value(conv) - 1) < 1e-5 for conv in convs)


def test_spectral_norm_follows_the_weight_only_by_its_own_method():
    conv = SpectralConv1d(8, 8, 9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        conv.weight.copy_(random_tensor(8, 8, 9, seed=5))
    conv(random_tensor(1, 8, 16))
    stale = largest_singular_value(conv)
    assert abs(stale - 1) > 0.1
    conv(random_tensor(1, 8, 16))
    assert largest_singular_value(conv) == stale
    for _ in range(100):
        conv.update_spectral_norm()
    assert abs(largest_singular_value(conv) - 1) < 1e-3


def test_update_reaches_every_convolution():
    heads = tiny_heads()
    with torch.no_grad():
        for conv in spectral_convs(heads):
            conv.weight.add_(random_tensor(*conv.weight.shape, seed=3))
    for _ in range(100):
        heads.update_spectral_norm()
    assert all(abs(largest_singular_value(conv) - 1) < 5e-3 for conv in spectral_convs(heads))


def test_convolution_wraps_around():
    conv = SpectralConv1d(4, 4, 9, generator=torch.Generator().manual_seed(0))
    tokens = random_tensor(1, 4, 12)
    torch.testing.assert_close(conv(tokens.roll(5, -1)), conv(tokens).roll(5, -1), atol=1e-6, rtol=0)


def test_head_is_the_scaled_dot_product_with_the_text():
    head = DiscriminatorHead(FEATURE_DIM, TEXT_DIM, torch.Generator().manual_seed(0))
    tokens, text = random_tensor(2, NUM_PATCHES, FEATURE_DIM), random_tensor(2, TEXT_DIM, seed=1)
    hidden = head.pointwise(tokens.mT)
    kernel = head.residual.conv
    wrapped = torch.cat([hidden[..., -4:], hidden, hidden[..., :4]], -1)
    inner = F.conv1d(wrapped, kernel.normalized_weight(), kernel.bias)
    inner = F.leaky_relu(head.residual.norm(inner), 0.2)
    channels = head.project((hidden + inner) / math.sqrt(2))
    expected = torch.einsum("ncp,nc->np", channels, head.text(text)) / 8
    torch.testing.assert_close(head(tokens, text), expected, atol=1e-5, rtol=0)


def test_logits_of_all_blocks_in_order():
    heads = tiny_heads()
    features, text = inputs()
    logits = heads(features, text)
    assert logits.shape == (2, len(BLOCKS) * NUM_PATCHES)
    torch.testing.assert_close(logits[:, NUM_PATCHES : 2 * NUM_PATCHES], heads.heads[1](features[1], text))


def test_a_sample_does_not_depend_on_its_neighbours():
    heads = tiny_heads()
    features, text = inputs(4)
    whole = heads(features, text)
    halves = [heads([tokens[part] for tokens in features], text[part]) for part in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(whole, torch.cat(halves), atol=1e-5, rtol=0)  # float32: kernels differ with the batch


def test_overall_look_survives_the_normalisation():
    # Normalising each channel on its own would make any two constant images equal.
    heads = DiscriminatorHeads(1, FEATURE_DIM, TEXT_DIM, generator=torch.Generator().manual_seed(0))
    flat = random_tensor(2, 1, FEATURE_DIM).expand(2, NUM_PATCHES, FEATURE_DIM)
    text = random_tensor(1, TEXT_DIM).expand(2, TEXT_DIM)
    one, other = heads([flat], text)
    assert (one - other).abs().mean() > 1e-3


def test_initial_weights_come_from_the_generator():
    first, again, other = tiny_heads(0).state_dict(), tiny_heads(0).state_dict(), tiny_heads(1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_spectral_state_is_saved():
    heads, other = tiny_heads(0), tiny_heads(1)
    for _ in range(3):
        heads.update_spectral_norm()
    other.load_state_dict(heads.state_dict())
    features, text = inputs()
    assert torch.equal(heads(features, text), other(features, text))


def test_errors():
    heads = tiny_heads()
    features, text = inputs()
    with pytest.raises(ValueError, match="features of 3 blocks, got 2"):
        heads(features[:2], text)
    with pytest.raises(ValueError, match=r"text embeddings of shape \(N, 12\), got \(2, 5\)"):
        heads(features, text[:, :5])
    with pytest.raises(ValueError, match=r"tokens of shape \(N, P, 16\), got \(2, 16, 3\)"):
        heads([tokens[..., :3] for tokens in features], text)
    with pytest.raises(ValueError, match="2 images, 1 texts"):
        heads(features, text[:1])
    with pytest.raises(ValueError, match="at least 4 patches per image, got 3"):
        heads([tokens[:, :3] for tokens in features], text)
    with pytest.raises(ValueError, match="num_blocks=0"):
        DiscriminatorHeads(0, 16, 12)
    with pytest.raises(ValueError, match="feature_dim of at least 4, got 2"):
        DiscriminatorHeads(1, 2, 12)
