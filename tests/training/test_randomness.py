import torch

from diffusers_mcm.training.randomness import draw_adversarial, draw_normal, draw_step, draw_uniform, sample_generator


def draws(indices, seed=0):
    grid = torch.arange(19, 1000, 20)
    return draw_step(seed, indices, (4, 3, 2, 2), grid, (5.0, 15.0), 2)


def test_draws_do_not_depend_on_how_a_batch_is_split():
    whole, first, second = draws([4, 5, 6, 7]), draws([4, 5]), draws([6, 7])
    for name, value in vars(whole).items():
        assert torch.equal(value, torch.cat([getattr(first, name), getattr(second, name)])), name
    whole, first, second = (draw_adversarial(0, indices, 2) for indices in ([4, 5], [4], [5]))
    assert torch.equal(whole.fake.shift_x, torch.cat([first.fake.shift_x, second.fake.shift_x]))
    assert torch.equal(whole.interpolation, torch.cat([first.interpolation, second.interpolation]))
    assert not torch.equal(whole.fake.shift_x, whole.real.shift_x)


def test_each_seed_purpose_and_index_has_its_own_stream():
    keys = [(0, "noise", 0), (1, "noise", 0), (0, "start noise", 0), (0, "noise", 1), (0, "noise", 11)]
    values = {sample_generator(*key).initial_seed() for key in keys}
    assert len(values) == len(keys)
    noise = [draw_normal(*key[:2], [key[2]], (1000,)) for key in keys]
    products = [abs((a * b).mean()) for i, a in enumerate(noise) for b in noise[:i]]
    assert max(products) < 0.15  # uncorrelated: five standard deviations of a mean over 1000


def test_draws_have_the_distributions_they_should():
    many = draws(range(2000))
    assert set(many.timestep.tolist()) == set(range(19, 1000, 20))
    assert 5 <= many.guidance.min() < 5.1 and 14.9 < many.guidance.max() <= 15
    assert abs(many.coin.mean() - 0.5) < 0.03
    assert many.frames.shape == (2000, 2)
    uniform = draw_uniform(0, "frames", range(2000))
    assert 0 <= uniform.min() and uniform.max() < 1


def test_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    draws([0])
    assert torch.equal(before, torch.random.get_rng_state())
