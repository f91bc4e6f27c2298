import dataclasses

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from diffusers_mcm.training.config import TrainingConfig
from diffusers_mcm.training.trained_module import (
    MOST_SKIPPED,
    MissingGradient,
    SkippedSteps,
    TrainedModule,
    slow_learning,
)

REQUIRED = dict(pretrained_teacher_model="teacher", video_data="videos")


def build_trained(config, total_batch=128):
    rate = config.learning_rates(total_batch)[0]
    return TrainedModule(
        "student", nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), rate, config, Accelerator(cpu=True)
    )


def warning(total_batch=128, **flags):
    config = TrainingConfig(**REQUIRED, **flags)
    return slow_learning(build_trained(config, total_batch), config, total_batch)


def test_the_sum_of_the_rates_is_that_of_the_schedule():
    """Against the steps themselves."""
    for scheduler in ("constant", "constant_with_warmup", "linear", "cosine"):
        config = TrainingConfig(**REQUIRED, max_train_steps=50, lr_warmup_steps=10, lr_scheduler=scheduler)
        part, rates = build_trained(config), []
        for _ in range(50):
            rates.append(part.rate)
            part.optimizer.step()
            part.schedule.step()
        assert part.sum_of_rates() == pytest.approx(sum(rates), rel=1e-12), scheduler
    papers = TrainingConfig(**REQUIRED, lr_scheduler="constant")
    assert build_trained(papers).sum_of_rates() == pytest.approx(0.15)


def test_rates_that_teach_nothing_are_told_with_what_to_do():
    said = warning(total_batch=1)
    assert "add up to 0.00059 over the 30000 steps" in said and "5e-6 × 30,000 steps = 0.15" in said
    assert "--learning_rate 5e-06 is scaled to 3.9e-08 by a total batch of 1" in said
    assert "--gradient_accumulation_steps" in said
    given = warning(scale_lr=False, max_train_steps=100, lr_warmup_steps=0)
    assert "5e-06 is not scaled" in given and "a larger batch" not in given


def test_the_papers_rates_are_enough_and_so_are_fewer_steps():
    assert warning() is None
    assert warning(max_train_steps=3000) is None
    assert warning(lr_scheduler="constant", max_train_steps=300, lr_warmup_steps=0) is None
    assert warning(lr_scheduler="constant", max_train_steps=299, lr_warmup_steps=0) is not None


def test_a_parameter_without_a_gradient_is_named_and_one_of_zeros_is_not():
    part = build_trained(TrainingConfig(**REQUIRED))
    first, second = part.module
    with pytest.raises(MissingGradient, match=r"step 3: 4 of 4 .* student .*\(0.weight, 0.bias, 1.weight, …\)"):
        part.check_gradients(3)
    second(first(torch.ones(1, 2)).detach()).sum().backward()
    with pytest.raises(MissingGradient, match=r"2 of 4 trained parameters .* no gradient \(0.weight, 0.bias\)"):
        part.check_gradients(1)
    (0 * second(first(torch.ones(1, 2)))).sum().backward()  # another micro-batch
    part.check_gradients(1)
    assert not first.weight.grad.any()


def test_steps_that_fp16_skips_are_counted_in_a_row():
    part = build_trained(TrainingConfig(**REQUIRED))
    part.check_learnt()  # a run that has nothing left to do
    for norm in (float("inf"), float("nan")):
        part.count_step(norm, 1)
    with pytest.raises(SkippedSteps, match="Nothing was trained.* last 2 steps of the student were skipped"):
        part.check_learnt()
    part.count_step(1.0, 3)
    for step in range(MOST_SKIPPED):
        part.count_step(float("inf"), 4 + step)
    part.check_learnt()
    with pytest.raises(SkippedSteps, match=f"stopped at step 99: the last {MOST_SKIPPED + 1} steps of the student"):
        part.count_step(float("inf"), 99)


@pytest.mark.parametrize("made", [3, 10])
def test_the_first_step_of_a_run_made_longer_has_the_rate_of_the_longer_schedule(made):
    def run(steps, length):
        flags = dict(max_train_steps=length, lr_warmup_steps=0, learning_rate=1.0, scale_lr=False)
        part = build_trained(TrainingConfig(**REQUIRED, **flags))
        for _ in range(steps):
            part.optimizer.step()
            part.schedule.step()
        return part

    state = run(made, 10).state()
    for length in (10, 20):
        resumed, expected = run(0, length), run(made, length)
        resumed.load(state)
        for _ in range(2):
            assert resumed.optimizer.param_groups[0]["lr"] == resumed.rate == expected.rate
            for part in (resumed, expected):
                part.optimizer.step()
                part.schedule.step()


def test_what_is_frozen_from_the_start_is_not_trained():
    config = dataclasses.replace(TrainingConfig(**REQUIRED), learning_rate=1.0)
    module = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    part = TrainedModule("student", module, 1.0, config, Accelerator(cpu=True))
    assert part.names == ["1.weight", "1.bias"]
    part.module(torch.ones(1, 2)).sum().backward()
    part.check_gradients(1)
