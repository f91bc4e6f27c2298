import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import LCMScheduler
from safetensors import safe_open
from safetensors.torch import load_file

from diffusers_mcm.distillation.losses import pseudo_huber
from diffusers_mcm.files import atomic_files
from diffusers_mcm.training.batches import Batches
from diffusers_mcm.training.checkpoint import STATE_FILE
from diffusers_mcm.training.loop import Trainer, train
from diffusers_mcm.training.tracking import NonFiniteLoss
from diffusers_mcm.training.trained_module import MissingGradient, SkippedSteps

from .world import CAPTIONS, SPLIT, assert_same_training, double_precision, flatten, stop_in_step_two, tiny_config


def run(config) -> dict[str, torch.Tensor]:
    trainer = Trainer(config)
    trainer.train()
    return flatten(trainer.state())


def read_log(folder):
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def without_time(rows):
    return [{key: value for key, value in row.items() if key not in ("seconds", "waiting")} for row in rows]


def test_a_run_leaves_a_complete_lora_folder(world, tmp_path):
    config = tiny_config(
        world,
        tmp_path / "lora",
        max_train_steps=1,
        validation_prompts=(CAPTIONS[0],),
        report_to="tensorboard",
        save_dtype="fp16",
    )
    out = train(config)
    with safe_open(out / "pytorch_lora_weights.safetensors", "pt") as file:
        names = list(file.keys())
        assert names and all(name.startswith("unet.") for name in names)
        assert file.get_tensor(names[0]).dtype == torch.float16
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.r"] == 2
    assert LCMScheduler.from_pretrained(out / "scheduler").config.timestep_scaling == 4.0
    assert sum(key.startswith("target_motion.") for key in load_file(out / "motion_head.safetensors")) == 6
    saved = (out / "mcm_config.json").read_text()
    assert str(tmp_path) not in saved and world["video_data"] not in saved
    values = json.loads(saved)
    assert values["base_model"] == "modelscope" and values["sampling"]["num_inference_steps"] == 4
    assert (out / values["base_model_repository"]).resolve() == (out / world["pretrained_teacher_model"]).resolve()
    card = (out / "README.md").read_text()
    assert card.startswith("---\n") and "| motion representation | learnable |" in card and str(tmp_path) not in card
    assert (out / "validation/step-000001/00.mp4").read_bytes() == (out / "sample.mp4").read_bytes()
    assert "sample.mp4" in card and CAPTIONS[0] in card
    assert list((out / "logs").rglob("events.out.tfevents*"))
    row = read_log(out)[0]
    expected = {"loss", "consistency", "adversarial", "discriminator", "gradient_penalty", "student_grad_norm"}
    assert expected <= row.keys() and row["step"] == 1
    assert row["loss"] == pytest.approx(row["consistency"] + row["adversarial"], rel=1e-5)


def test_a_resumed_run_is_bit_identical(world, tmp_path, monkeypatch):
    """The penalty's weight included, which grows after the first step, here, and not again.

    The interrupted run loads its data in other processes, which are then ahead of it.
    """
    monkeypatch.setattr("diffusers_mcm.distillation.discriminator.penalty.GROWTH_THRESHOLD", 0.0)
    options = dict(max_train_steps=3, gradient_accumulation_steps=2, train_batch_size=2, ema_decay=0.5)
    options |= dict(lambda_temporal=0.5, lambda_change=0.5)
    whole = run(tiny_config(world, tmp_path / "whole", **options))

    parts = tmp_path / "parts"
    helped = options | dict(dataloader_num_workers=2)
    stop_in_step_two(tiny_config(world, parts, checkpointing_steps=1, **helped))
    resumed = run(tiny_config(world, parts, resume_from_checkpoint="latest", **helped))
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert any("change_heads" in name for name in whole)
    assert without_time(read_log(tmp_path / "whole")) == without_time(read_log(parts))
    assert [row["gradient_penalty_weight"] for row in read_log(parts)] == pytest.approx([1e-5, 5e-5, 5e-5])
    with pytest.raises(ValueError, match="lora_rank was 2, is 4"):
        Trainer(tiny_config(world, parts, resume_from_checkpoint="latest", **options | dict(lora_rank=4)))
    with pytest.raises(ValueError, match="lambda_temporal was 0.5, is 0.0"):
        Trainer(tiny_config(world, parts, resume_from_checkpoint="latest", **options | dict(lambda_temporal=0.0)))


def test_what_is_saved_is_the_moving_average(world, tmp_path):
    """Against its recursion; diffusers' decay rises to the one asked for: 0, 2/11, 3/12, 4/13, …"""

    class Watched(Trainer):
        weights = []

        def update(self):
            losses = super().update()
            self.weights.append({key: tensor.clone() for key, tensor in self.state()["lora"].items()})
            return losses

    trainer = Watched(tiny_config(world, tmp_path, max_train_steps=4, ema_decay=0.2, lambda_adv=0.0, image_data=None))
    trainer.train()
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    for key, expected in trainer.weights[0].items():
        for decay, weights in zip((2 / 11, 0.2, 0.2), trainer.weights[1:]):
            expected = decay * expected + (1 - decay) * weights[key]
        torch.testing.assert_close(saved[f"unet.{key}"], expected)
        assert torch.equal(
            trainer.state()["lora"][key], trainer.weights[-1][key]
        )  # training itself goes on from these
    assert any(not torch.equal(saved[f"unet.{key}"], last) for key, last in trainer.weights[-1].items())


def test_a_run_may_be_given_an_average_on_its_way(world, tmp_path):
    run(tiny_config(world, tmp_path, checkpointing_steps=1, max_train_steps=1))
    trainer = Trainer(tiny_config(world, tmp_path, resume_from_checkpoint="latest", max_train_steps=2, ema_decay=0.9))
    for average, parameter in zip(trainer.student.average.shadow_params, trainer.student.parameters, strict=True):
        assert torch.equal(average, parameter) and average.data_ptr() != parameter.data_ptr()


def test_a_run_may_start_from_another_runs_lora(world, tmp_path):
    first = tmp_path / "styles" / "first"
    train(tiny_config(world, first))
    where = dict(pretrained_lora=str(first.parent), pretrained_lora_subfolder="first")
    trainer = Trainer(tiny_config(world, tmp_path / "second", **where))
    saved, head = load_file(first / "pytorch_lora_weights.safetensors"), load_file(first / "motion_head.safetensors")
    state = trainer.state()
    assert all(torch.equal(saved[f"unet.{key}"], tensor) for key, tensor in state["lora"].items())
    assert any(tensor.any() for key, tensor in state["lora"].items() if "lora_B" in key)
    for name, tensor in state["motion"].items():
        assert torch.equal(tensor, head[f"motion.{name}"]) and torch.equal(tensor, state["target_motion"][name])
    config = json.loads((trainer.train() / "mcm_config.json").read_text())
    assert config["training"]["pretrained_lora"] == "../styles"

    with pytest.raises(ValueError, match="has rank 2 and alpha 2, and --lora_rank is 4 and --lora_alpha 2"):
        Trainer(tiny_config(world, tmp_path / "third", lora_rank=4, **where))
    with pytest.raises(FileNotFoundError, match="No LoRA in"):
        Trainer(tiny_config(world, tmp_path / "third", pretrained_lora=str(tmp_path)))


def test_a_checkpoint_from_before_a_flag_was_made_as_its_default_says(world, tmp_path):
    run(tiny_config(world, tmp_path, checkpointing_steps=1, max_train_steps=1))
    file = tmp_path / "checkpoint-1" / STATE_FILE
    state = torch.load(file, weights_only=True)
    identity = json.loads(state["identity"])
    del identity["timesteps"], identity["discriminator_augmentation"], identity["coin"]
    torch.save(state | {"identity": json.dumps(identity)}, file)
    options = dict(resume_from_checkpoint="latest", max_train_steps=2)
    assert Trainer(tiny_config(world, tmp_path, **options)).step == 1
    with pytest.raises(ValueError, match="timesteps was uniform, is visited"):
        Trainer(tiny_config(world, tmp_path, timesteps="visited", **options))
    with pytest.raises(ValueError, match=r"coin was sample, is batch \(of 4\)"):
        Trainer(tiny_config(world, tmp_path, coin="batch", **options))


def test_with_one_coin_a_batch_all_of_it_is_real_or_none(world, tmp_path):
    options = dict(train_batch_size=2, gradient_accumulation_steps=2, coin="batch", lambda_adv=0.0, image_data=None)
    seen = []

    class Watched(Trainer):
        def draw(self, batch):
            draws = super().draw(batch)
            seen.append((draws.coin < self.config.lambda_real).tolist())
            return draws

    Watched(tiny_config(world, tmp_path, max_train_steps=2, **options)).train()
    assert sorted(seen[:2]) == sorted(seen[2:]) == [[False, False], [True, True]]


def test_frames_by_time_are_recorded_and_belong_to_the_run(world, tmp_path):
    by_time = dict(frame_interval=None, data_fps=4.0)
    folder = train(tiny_config(world, tmp_path, checkpointing_steps=1, max_train_steps=1, **by_time))
    training = json.loads((folder / "mcm_config.json").read_text())["training"]
    assert (training["frame_interval"], training["data_fps"]) == (None, 4.0)
    assert "frames per second of the data" in (folder / "README.md").read_text()
    options = dict(resume_from_checkpoint="latest", max_train_steps=2)
    assert Trainer(tiny_config(world, tmp_path, **options, **by_time)).step == 1
    with pytest.raises(ValueError, match="data_fps was 4.0, is 8.0"):
        Trainer(tiny_config(world, tmp_path, **options, frame_interval=None, data_fps=8.0))


def test_a_checkpoint_from_before_the_discriminators_flags_goes_on_as_it_began(world, tmp_path):
    as_before = dict(image_text="own", gradient_penalty_growth=1.0)
    run(tiny_config(world, tmp_path, checkpointing_steps=1, max_train_steps=1, **as_before))
    file = tmp_path / "checkpoint-1" / STATE_FILE
    state = torch.load(file, weights_only=True)
    identity = {name: value for name, value in json.loads(state["identity"]).items() if name not in as_before}
    del state["penalty_weight"]
    torch.save(state | {"identity": json.dumps(identity)}, file)
    options = dict(resume_from_checkpoint="latest", max_train_steps=2)
    with pytest.raises(ValueError, match="gradient_penalty_growth was 1.0, is 5.0") as error:
        Trainer(tiny_config(world, tmp_path, **options))
    assert "image_text was own, is none" in str(error.value)
    assert "go on with --image_text own --gradient_penalty_growth 1.0" in str(error.value)
    trainer = Trainer(tiny_config(world, tmp_path, **options, **as_before))
    assert trainer.step == 1 and trainer.penalty_weight.value == 1e-5
    # Without a discriminator none of this was ever done.
    plain = dict(lambda_adv=0.0, image_data=None)
    run(tiny_config(world | plain, tmp_path / "plain", checkpointing_steps=1, max_train_steps=1))
    file = tmp_path / "plain" / "checkpoint-1" / STATE_FILE
    state = torch.load(file, weights_only=True)
    identity = {name: value for name, value in json.loads(state["identity"]).items() if name not in as_before}
    torch.save(state | {"identity": json.dumps(identity)}, file)
    assert Trainer(tiny_config(world | plain, tmp_path / "plain", **options)).step == 1


def test_the_penalty_of_the_whole_batch_decides_on_its_weight(world, tmp_path, monkeypatch):
    """What `accelerate` gives as the mean over all processes, not what this one has."""
    trainer = Trainer(tiny_config(world, tmp_path, max_train_steps=3))
    means = iter([99.0, 100.0, 100.0])
    original = trainer.accelerator.reduce

    def reduce(values, how):
        assert how == "mean"
        reduced = original(values, how).clone()
        if not reduced.ndim:  # whether all are to stop
            return reduced
        reduced[-1] = next(means)  # the last of the losses that are recorded
        return reduced

    monkeypatch.setattr(trainer.accelerator, "reduce", reduce)
    trainer.train()
    assert [row["gradient_penalty_weight"] for row in read_log(tmp_path)] == pytest.approx([1e-5, 1e-5, 5e-5])


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_accumulation_equals_one_big_batch(world, tmp_path, double):
    with double_precision() if double else nullcontext():
        trainer = Trainer(tiny_config(world, tmp_path / "whole", train_batch_size=4, **SPLIT))
        start = flatten(trainer.state())
        trainer.train()
        split = run(tiny_config(world, tmp_path / "split", train_batch_size=1, gradient_accumulation_steps=4, **SPLIT))
    assert_same_training(start, flatten(trainer.state()), split, double)


def test_plain_lcm_needs_no_discriminator_no_decoder_and_no_images(world, tmp_path, monkeypatch):
    def unwanted(*args, **kwargs):
        raise AssertionError("plain LCM must not use this")

    monkeypatch.setattr("diffusers_mcm.features.PatchFeatures.from_pretrained", unwanted)
    monkeypatch.setattr("diffusers_mcm.features.TextFeatures.from_pretrained", unwanted)
    monkeypatch.setattr("diffusers_mcm.training.batches.ImageDataset", unwanted)
    monkeypatch.setattr("diffusers_mcm.training.batches.pair_texts", unwanted)
    monkeypatch.setattr("diffusers.AutoencoderKL.decode", unwanted)
    config = tiny_config(
        world | dict(image_data=None), tmp_path, motion="raw", lambda_real=1.0, lambda_adv=0.0, max_train_steps=1
    )
    out = train(config)
    assert {"adversarial", "discriminator"}.isdisjoint(read_log(out)[0])
    assert load_file(out / "motion_head.safetensors") == {}


def test_each_network_is_called_as_often_as_the_method_needs(world, tmp_path):
    trainer = Trainer(tiny_config(world, tmp_path, max_train_steps=1, lambda_real=0.0))
    networks, calls = trainer.networks, []

    def count(name, module):
        module.register_forward_pre_hook(lambda module, args: calls.append((name, len(args[0]))))

    count("denoiser", networks.student.denoiser)
    count("features", networks.discriminator.features)
    decode, encode = networks.student.vae.decode, networks.student.vae.encode
    networks.student.vae.decode = lambda z, **k: calls.append(("decode", len(z))) or decode(z, **k)
    networks.student.vae.encode = lambda x, **k: calls.append(("encode", len(x))) or encode(x, **k)
    trainer.train()
    # One-step sample, teacher (both halves of the guidance), target, student; frames decoded once; nothing encoded.
    assert [size for name, size in calls if name == "denoiser"] == [4, 8, 4, 4]
    assert [size for name, size in calls if name in ("decode", "encode")] == [8]
    assert [size for name, size in calls if name == "features"] == [8, 8, 8]  # generated, real, interpolated


def test_nan_stops_the_run_with_its_cause_and_spoils_nothing(world, tmp_path, monkeypatch):
    before, calls = [], []

    def poisoned(*args):
        calls.append(args)
        return pseudo_huber(*args) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr("diffusers_mcm.distillation.student.pseudo_huber", poisoned)
    trainer = Trainer(tiny_config(world, tmp_path, max_train_steps=3, checkpointing_steps=1))
    original = trainer.save
    trainer.save = lambda: (original(), before.append(flatten(trainer.state())))
    with pytest.raises(NonFiniteLoss, match=r"stopped at step 2, samples 4 to 7: loss = nan, consistency = nan"):
        trainer.train()
    after = flatten(trainer.state())
    assert all(torch.equal(before[0][name], after[name]) for name in after)
    assert (tmp_path / "checkpoint-1").is_dir() and not (tmp_path / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ("lora_B", r"step 1: 1 of \d+ trained parameters of the student have no gradient \(denoiser\..*lora_B"),
        ("motion", r"step 1: 6 of \d+ trained parameters of the student .* \(motion\..*, …\)"),
        ("heads", r"of the discriminator have no gradient \(heads\."),
    ],
)
def test_what_gets_no_gradient_stops_the_run_before_a_weight_changes(world, tmp_path, cut, message):
    """As under the cached weights of torch before 2.11: the forward pass is right, and its history is gone."""
    trainer = Trainer(tiny_config(world, tmp_path, gradient_accumulation_steps=2, train_batch_size=1))
    student, discriminator = trainer.networks.student, trainer.networks.discriminator
    loras = [module for name, module in student.denoiser.named_modules() if name.endswith("lora_B.default")]
    module = {"lora_B": loras[0], "motion": student.motion, "heads": discriminator.heads}[cut]
    # Its parameters are cut off, what comes in is not: gradients reach all that is before it.
    module.register_forward_pre_hook(lambda module, args: freeze(module, False))
    module.register_forward_hook(lambda module, args, output: freeze(module, True))

    def freeze(module, trained):
        for parameter in module.parameters():
            parameter.requires_grad_(trained)

    before = flatten(trainer.state())
    with pytest.raises(MissingGradient, match=message):
        trainer.train()
    after = flatten(trainer.state())
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert not (tmp_path / "pytorch_lora_weights.safetensors").exists()


def test_a_run_of_which_fp16_skips_every_step_writes_no_lora(world, tmp_path):
    trainer = Trainer(tiny_config(world, tmp_path, lambda_adv=0.0, image_data=None, train_batch_size=1))
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    trainer.student.parameters[0].register_hook(lambda gradient: gradient * float("inf"))
    before = flatten(trainer.state()["lora"])
    with pytest.raises(SkippedSteps, match="no LoRA is written: the last 2 steps of the student were"):
        trainer.train()
    after = flatten(trainer.state()["lora"])
    assert before and all(torch.equal(before[name], after[name]) for name in before)
    assert not (tmp_path / "pytorch_lora_weights.safetensors").exists()


def test_accelerates_settings_are_those_of_the_run(world, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    options = dict(lambda_adv=0.0, image_data=None, train_batch_size=1, checkpointing_steps=1)
    trainer, seen = Trainer(tiny_config(world, tmp_path, **options, validation_prompts=(CAPTIONS[0],))), set()
    trainer.networks.student.denoiser.register_forward_pre_hook(
        lambda *_: seen.add((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
    )
    trainer.train()
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2]
    assert seen == {(True, False)}  # training and validation alike: autocast, and no cache
    made = json.loads((tmp_path / "mcm_config.json").read_text())["training"]
    assert (made["mixed_precision"], made["gradient_accumulation_steps"], made["total_batch"]) == ("bf16", 2, 2)

    options |= dict(resume_from_checkpoint="latest", max_train_steps=3)
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    with pytest.raises(ValueError, match="total_batch was 2, is 1"):
        Trainer(tiny_config(world, tmp_path, **options))
    videos = shutil.copytree(world["video_data"], tmp_path / "other videos")
    options |= dict(gradient_accumulation_steps=2, video_data=str(videos))
    caplog.clear()
    assert Trainer(tiny_config(world, tmp_path, **options)).step == 2
    assert "goes on with something else" in caplog.text and "video_data was " in caplog.text
    assert "mixed_precision" not in caplog.text
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    AcceleratorState._reset_state(reset_partial_state=True)
    Trainer(tiny_config(world, tmp_path, **options))
    assert "mixed_precision was bf16, is no" in caplog.text


def test_fewer_steps_than_asked_for_are_an_error(world, tmp_path, monkeypatch, caplog):
    whole = Batches.__iter__
    monkeypatch.setattr(Batches, "__iter__", lambda self: (batch for batch, _ in zip(whole(self), range(3))))
    options = dict(lambda_adv=0.0, image_data=None, train_batch_size=1, gradient_accumulation_steps=2)
    with pytest.raises(RuntimeError, match="1 of 2 steps were made .* no LoRA is written. Accumulation is over 2"):
        train(tiny_config(world, tmp_path, **options, learning_rate=1e-6))
    assert not (tmp_path / "pytorch_lora_weights.safetensors").exists()
    assert f"The state of step 1 is in {tmp_path / 'checkpoint-1'}" in caplog.text
    assert caplog.text.count("learning rates add up to 1.5e-06 over the 2 steps of this run") == 1


def test_latest_goes_on_where_a_run_went_back_to(world, tmp_path, caplog):
    options = dict(lambda_adv=0.0, image_data=None, train_batch_size=1, checkpointing_steps=1)
    train(tiny_config(world, tmp_path, **options, max_train_steps=3))
    with pytest.raises(ValueError, match="holds checkpoints of another run .checkpoint-1, checkpoint-2, checkpoint-3"):
        Trainer(tiny_config(world, tmp_path, **options))
    train(tiny_config(world, tmp_path, **options, max_train_steps=2, resume_from_checkpoint="checkpoint-1"))
    assert "checkpoint-2, checkpoint-3" in caplog.text and "'latest' will not mean them" in caplog.text
    assert Trainer(tiny_config(world, tmp_path, **options, resume_from_checkpoint="latest")).step == 2
    with pytest.raises(ValueError, match="checkpoint-3 is of step 3, beyond --max_train_steps 2"):
        Trainer(tiny_config(world, tmp_path, **options, resume_from_checkpoint="checkpoint-3"))
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2]
    (tmp_path / "mcm_run.json").unlink()  # a checkpoint as it was before runs were recorded
    file = tmp_path / "checkpoint-3" / STATE_FILE
    state = torch.load(file, weights_only=True)
    for name in ("run", "circumstances", "data_sizes"):
        del state[name]
    torch.save(state, file)
    options |= dict(resume_from_checkpoint="latest", max_train_steps=4)
    assert Trainer(tiny_config(world, tmp_path, **options)).step == 3


def test_gradient_checkpointing_changes_nothing_but_memory(world, tmp_path):
    options = dict(max_train_steps=1, lambda_adv=0.0, image_data=None)
    plain = run(tiny_config(world | options, tmp_path / "plain"))
    again = run(tiny_config(world | options, tmp_path / "again", gradient_checkpointing=True))
    assert [name for name in plain if not torch.equal(plain[name], again[name])] == []


def test_precision_that_the_machine_lacks_is_refused(world, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="fp16 needs a GPU; on a CPU use bf16 or no"):
        Trainer(tiny_config(world, tmp_path, mixed_precision="fp16"))


def test_a_folder_that_is_no_pipeline_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match="has no model_index.json"):
        Trainer(tiny_config(world | dict(pretrained_teacher_model=str(tmp_path)), tmp_path / "out"))


def test_half_precision_keeps_what_is_trained_in_fp32_and_video_frames_stand_in_for_images(world, tmp_path):
    options = dict(image_data=None, mixed_precision="bf16", max_train_steps=1, validation_prompts=(CAPTIONS[0],))
    trainer = Trainer(tiny_config(world | options, tmp_path, push_to_hub=False))
    trainer.train()
    student = trainer.networks.student
    assert student.vae.dtype == student.denoiser.conv_in.weight.dtype == torch.bfloat16
    trained = [parameter for trained in trainer.trained for parameter in trained.parameters]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert read_log(tmp_path)[0]["discriminator"] > 0


def test_a_kill_while_the_files_move_leaves_no_half_old_folder(tmp_path, monkeypatch):
    (tmp_path / "weights").write_text("old")
    (tmp_path / "config").write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), atomic_files(tmp_path, last="weights") as folder:
        for name in ("weights", "config"):
            (folder / name).write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["config"]
