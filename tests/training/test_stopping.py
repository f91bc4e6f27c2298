"""A run that is told to stop loses nothing; nor does one that fails."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_mcm.training.arguments import to_go_on
from diffusers_mcm.training.loop import Trainer, train
from diffusers_mcm.training.stopping import ONE_REQUEST, STOPPING, Stopped, StopRequests

from .test_loop import read_log, run, without_time
from .world import flags_of, tiny_config

PLAIN = dict(lambda_adv=0.0, image_data=None, train_batch_size=1, max_train_steps=3)


@pytest.fixture(autouse=True)
def usual_signals():
    """Who runs the tests in the background of a shell, or by nohup, has them ignore signals, which runs respect."""
    before = {signum: signal.getsignal(signum) for signum in STOPPING}
    for signum in STOPPING:
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


class Told(Trainer):
    """A run that gets a signal in the midst of its step two, as many times as `times` says."""

    signum, times = signal.SIGTERM, 1

    def draw(self, batch):
        if self.step == 1 and self.times:
            self.times -= 1
            os.kill(os.getpid(), self.signum)
        return super().draw(batch)


@pytest.mark.parametrize("signum", STOPPING, ids=lambda signum: signum.name)
def test_a_run_that_is_told_to_stop_goes_on_bit_for_bit(world, tmp_path, signum, capfd):
    """The checkpoint is of the step in which the signal came, whether or not there is one on its turn."""
    options = PLAIN | dict(gradient_accumulation_steps=2, ema_decay=0.5)
    whole = run(tiny_config(world, tmp_path / "whole", **options))
    parts = tmp_path / "parts"
    trainer, before = Told(tiny_config(world, parts, **options)), signal.getsignal(signum)
    trainer.signum = signum
    with pytest.raises(Stopped, match=f"Stopped by {signum.name} after step 2. .* in {parts}/checkpoint-2") as stopped:
        trainer.train()
    assert stopped.value.exit_code == 128 + signum and stopped.value.checkpoint == "latest"
    assert signal.getsignal(signum) == before
    assert f"{signum.name}: stopping after this step" in capfd.readouterr().err
    assert not (parts / "pytorch_lora_weights.safetensors").exists()
    resumed = run(tiny_config(world, parts, resume_from_checkpoint="latest", **options))
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert without_time(read_log(tmp_path / "whole")) == without_time(read_log(parts))


def test_the_step_before_is_kept_while_that_of_the_signal_goes_on(world, tmp_path):
    """A launcher may give it no time to end: torchrun kills after 30 s, and a step may take minutes."""

    class Killed(Told):
        def update(self):
            if self.step == 1:
                raise KeyboardInterrupt  # which no handler of this process sees
            return super().update()

    with pytest.raises(KeyboardInterrupt):
        Killed(tiny_config(world, tmp_path, **PLAIN, gradient_accumulation_steps=2)).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_several_signals_at_once_are_one_request_and_a_later_one_is_obeyed(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with StopRequests() as requests:
        assert not requests.received
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), signum)
        assert requests.received == signal.SIGINT
        now[0] += ONE_REQUEST + 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_what_is_ignored_stays_so_and_other_threads_are_left_alone():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequests() as requests:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not requests.received and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    handlers = []

    def elsewhere():
        with StopRequests():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]


def test_a_process_whose_launcher_is_gone_is_told_to_stop(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    requests = StopRequests()
    assert not requests.received
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert requests.received == signal.SIGTERM
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert StopRequests().parent is None  # in a shell that ends a run goes on


def test_a_signal_before_the_first_step_leaves_nothing_to_keep(world, tmp_path):
    trainer = Trainer(tiny_config(world, tmp_path, **PLAIN))
    trainer.requests.number = signal.SIGTERM
    with pytest.raises(Stopped, match="after step 0. There is nothing to keep"):
        trainer.train()
    assert list(tmp_path.glob("checkpoint-*")) == []
    assert train(tiny_config(world, tmp_path, **PLAIN, resume_from_checkpoint="latest")) == tmp_path


def test_a_signal_while_a_clip_is_sampled_stops_before_the_next_step(world, tmp_path):
    class Told(Trainer):
        def clip(self, prompt, index=0):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().clip(prompt, index)

    with pytest.raises(Stopped, match="after step 1"):
        Told(tiny_config(world, tmp_path, **PLAIN, validation_prompts=("a circle",), validation_steps=1)).train()
    assert (tmp_path / "validation/step-000001").is_dir() and (tmp_path / "checkpoint-1").is_dir()


def test_a_signal_while_the_lora_is_written_does_not_stop_that(world, tmp_path):
    class Told(Trainer):
        def write_lora(self, sample):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().write_lora(sample)

    Told(tiny_config(world, tmp_path, **PLAIN)).train()
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()


def test_a_run_that_fails_keeps_its_last_step(world, tmp_path, caplog):
    class Failing(Trainer):
        def backward(self, batch):
            if self.step == 2:
                raise RuntimeError("out of memory")
            super().backward(batch)

    whole = run(tiny_config(world, tmp_path / "whole", **PLAIN))
    parts = tmp_path / "parts"
    with pytest.raises(RuntimeError, match="out of memory"):
        Failing(tiny_config(world, parts, **PLAIN)).train()
    assert "failed after step 2 (out of memory). The state of step 2 is in" in caplog.text
    resumed = run(tiny_config(world, parts, resume_from_checkpoint="latest", **PLAIN))
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_half_an_update_is_not_kept(world, tmp_path):
    trainer = Trainer(tiny_config(world, tmp_path, **PLAIN))
    trainer.student.schedule.step = lambda: 1 / 0  # the weights are changed then
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert list(tmp_path.glob("checkpoint-*")) == []


def test_the_command_that_goes_on_has_no_secret_and_one_checkpoint():
    command = "accelerate launch x.py --seed 1 --hub_token hf_x --resume_from_checkpoint=latest --no_scale_lr".split()
    assert to_go_on(command) == "accelerate launch x.py --seed 1 --no_scale_lr --resume_from_checkpoint latest".split()
    assert to_go_on(["x.py", "--hub_token=hf_x"], "there") == ["x.py", "--resume_from_checkpoint", "there"]


# --- the script ------------------------------------------------------------------------------------------------------
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "train_mcm_distill.py"
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def start(config, folder, *launcher):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launcher, str(SCRIPT), *flags_of(config)]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **streams)


def wait_for(process, found):
    end = time.monotonic() + 120
    while not found():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1][-3000:]
        time.sleep(0.02)


def rows(folder):
    file = folder / "train_log.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def final(folder):
    return load_file(folder / "pytorch_lora_weights.safetensors") | load_file(folder / "motion_head.safetensors")


def test_the_script_says_the_command_that_goes_on(world, tmp_path):
    """The whole group is told, as a terminal or a scheduler does: data workers and the launcher too."""
    options = dict(gradient_accumulation_steps=2, dataloader_num_workers=1, max_train_steps=5, train_batch_size=1)
    options |= dict(lambda_adv=0.0, image_data=None)
    whole = tiny_config(world, tmp_path / "whole", **options)
    assert start(whole, tmp_path, *TWO).wait() == 0
    out = tmp_path / "out"
    process = start(tiny_config(world, out, **options), tmp_path, *TWO)
    wait_for(process, lambda: rows(out) >= 2)
    os.killpg(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    (line,) = [line for line in said.splitlines() if "Stopped by SIGTERM after step " in line]
    line = line[line.index("Stopped") :]
    step, command = int(line.split()[5].rstrip(".")), line.partition("Go on with: ")[2]
    assert process.returncode != 0 and step == rows(out) >= 2
    assert (out / f"checkpoint-{step}").is_dir() and command.endswith("--resume_from_checkpoint latest")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, shell=True, cwd=tmp_path, env=environment, check=True, capture_output=True)
    found, expected = final(out), final(tmp_path / "whole")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
