import itertools
import math

import pytest
import torch

from diffusers_mcm.data.loading import StepSampler
from diffusers_mcm.distillation.draws import (
    Coins,
    draw_adversarial,
    draw_normal,
    draw_step,
    draw_uniform,
    pack,
    sample_generator,
    unpack,
)


def draws(indices, seed=0):
    grid = torch.arange(19, 1000, 20)
    return draw_step(seed, indices, (4, 3, 2, 2), grid, (5.0, 15.0), 2, Coins())


def test_draws_do_not_depend_on_how_a_batch_is_split():
    whole, first, second = draws([4, 5, 6, 7]), draws([4, 5]), draws([6, 7])
    for name, value in vars(whole).items():
        assert torch.equal(value, torch.cat([getattr(first, name), getattr(second, name)])), name
    whole, first, second = (draw_adversarial(0, indices, 2) for indices in ([4, 5], [4], [5]))
    assert torch.equal(whole.fake.shift_x, torch.cat([first.fake.shift_x, second.fake.shift_x]))
    assert torch.equal(whole.interpolation, torch.cat([first.interpolation, second.interpolation]))
    assert not torch.equal(whole.fake.shift_x, whole.real.shift_x)


def test_the_draws_of_a_step_go_to_a_device_as_one():
    drawn = {name: value for name, value in vars(draws([4, 5, 6])).items() if name != "coin"}
    drawn["guidance"] = drawn["guidance"].double()[:1]  # of another type, and of bytes that end between others' places
    packed, places = pack(drawn)
    assert packed.dtype == torch.uint8 and packed.ndim == 1
    for name, value in unpack(packed.clone(), places).items():
        assert value.dtype == drawn[name].dtype and torch.equal(value, drawn[name]), name
    there = draws([4, 5, 6]).to(torch.device("meta"))
    assert there.coin.device.type == "cpu"  # it decides shapes
    assert there.noise.device.type == "meta" and there.noise.shape == drawn["noise"].shape
    assert there.timestep.dtype == torch.int64


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


# --- the coins -------------------------------------------------------------------------------------------------------
SHARES = (0.0, 0.1, 0.25, 0.3, 1 / 3, 0.5, 0.7, 0.9, 1.0)


def real(coins, indices, seed=0):
    return coins.draw(seed, indices) < coins.lambda_real


def within_one(count, length, share):
    return math.floor(length * share + 1e-9) <= count <= math.ceil(length * share - 1e-9)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("total", [1, 6, 15, 24])
def test_processes_and_micro_batches_have_equal_counts_to_within_one(share, total):
    """However the total batch is split: by as many samples as divide it, in the order in which they are loaded."""
    coins = Coins(share, total)
    for batch_size in (size for size in range(1, total + 1) if total % size == 0):
        for processes in (count for count in range(1, total // batch_size + 1) if total // batch_size % count == 0):
            accumulation = total // batch_size // processes
            for rank in range(processes):
                batches = iter(StepSampler(batch_size, rank, processes, accumulation, end_step=3))
                for indices in batches:
                    assert within_one(real(coins, indices).sum(), batch_size, share), (batch_size, rank, indices)


@pytest.mark.parametrize("share", SHARES)
def test_each_block_holds_its_share_rounded_by_chance_to_the_right_mean(share):
    coins, blocks = Coins(share, 6), 1000
    counts = real(coins, range(6 * blocks)).reshape(blocks, 6).sum(1)
    assert all(within_one(count, 6, share) for count in counts)
    deviation = math.sqrt(6 * share % 1 * (1 - 6 * share % 1) / blocks)
    assert abs(counts.double().mean() - 6 * share) <= 4.5 * deviation + 1e-9


@pytest.mark.parametrize("share", SHARES)
def test_every_place_of_a_block_is_real_as_often(share):
    coins, seeds = Coins(share, 5), 1500
    drawn = torch.stack([coins.draw(seed, range(10)) for seed in range(seeds)])
    assert 0 <= drawn.min() and drawn.max() < 1
    frequency = (drawn < share).double().mean(0)
    assert (frequency - share).abs().max() <= 4.5 * math.sqrt(share * (1 - share) / seeds)
    quarters = torch.stack([(4 * drawn).long() == quarter for quarter in range(4)]).double().mean(1)
    assert (quarters - 0.25).abs().max() <= 4.5 * math.sqrt(0.25 * 0.75 / seeds)  # each coin is uniform by itself


def test_all_or_none_are_real_at_the_ends():
    assert real(Coins(1.0, 7), range(500)).all() and not real(Coins(0.0, 7), range(500)).any()


def test_blocks_and_seeds_do_not_know_of_each_other():
    """Whether the first of a block is real, in the next block and under the next seed."""
    for coins in (Coins(0.5, 8), Coins(0.3, 8)):
        first = torch.stack([real(coins, range(0, coins.block * 2000, coins.block), seed) for seed in (0, 1)]).double()
        first = (first - coins.lambda_real) / math.sqrt(coins.lambda_real * (1 - coins.lambda_real))
        for one, other in ((first[0, :-1], first[0, 1:]), (first[0], first[1])):
            assert abs((one * other).mean()) < 4.5 / math.sqrt(2000)


def test_half_and_half_does_not_depend_on_the_total_batch_and_is_no_rhythm():
    pairs = real(Coins(0.5, 4), range(2000))
    assert torch.equal(pairs, real(Coins(0.5, 64), range(2000)))
    assert abs(pairs[::2].double().mean() - 0.5) < 4.5 * 0.5 / math.sqrt(1000)


def test_samples_may_share_a_coin():
    """Those of all processes' micro-batches; a step of several then has its share of them."""
    for share, total, together in itertools.product(SHARES, [16, 48], [4, 8]):
        drawn = real(Coins(share, total, together), range(20 * total)).reshape(-1, together)
        assert (drawn == drawn[:, :1]).all()
        steps = drawn[:, 0].reshape(20, -1).sum(1)
        assert all(within_one(count, total // together, share) for count in steps)
        assert torch.equal(real(Coins(share, total, together), [5, 17]), drawn.flatten()[[5, 17]])


def test_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    draws([0])
    assert torch.equal(before, torch.random.get_rng_state())
