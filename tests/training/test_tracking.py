import errno
import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import LoggerType

from diffusers_mcm.training.config import TRACKERS
from diffusers_mcm.training.loop import Trainer, train
from diffusers_mcm.training.tracking import LossLog, PictureLog, check_tracker

from .world import CAPTIONS, tiny_config

PICTURE = np.zeros((4, 6, 3), dtype=np.uint8)


def test_every_tracker_of_accelerate_is_offered():
    assert LOGGER_TYPE_TO_CLASS.keys() <= set(TRACKERS)


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_loaded(world, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_mcm.training.run.build_networks", lambda *_: pytest.fail("too late"))
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    for name, package in (("wandb", "wandb"), ("comet_ml", "comet-ml"), ("tensorboard", "'diffusers-mcm.train.'")):
        with pytest.raises(
            ImportError, match=f"--report_to {name} needs it: pip install {package}, or --report_to none"
        ):
            Trainer(tiny_config(world, tmp_path / "out", report_to=name))
    assert not (tmp_path / "out").exists()
    monkeypatch.delitem(LOGGER_TYPE_TO_CLASS, "swanlab")
    with pytest.raises(ImportError, match="--report_to swanlab needs a newer accelerate"):
        check_tracker("swanlab")
    check_tracker("none")


@pytest.fixture
def comet(monkeypatch):
    """A stand-in for comet, whose tracker in accelerate takes no pictures; what it was sent."""
    sent, module = [], ModuleType("comet_ml")
    module.__version__ = "3.50.0"
    experiment = SimpleNamespace(
        log_parameters=lambda values: sent.append(("parameters", values)),
        set_step=lambda step: None,
        log_metric=lambda name, value, step: sent.append((name, step)),
        end=lambda: sent.append(("end", None)),
    )
    module.start = lambda project_name: experiment
    monkeypatch.setitem(sys.modules, "comet_ml", module)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.COMETML])
    return sent


def test_a_tracker_without_pictures_gets_the_losses(world, tmp_path, comet, caplog):
    caplog.set_level("INFO")
    options = dict(lambda_adv=0.0, image_data=None, train_batch_size=1)
    options |= dict(validation_prompts=(CAPTIONS[0],), validation_steps=1)
    train(tiny_config(world, tmp_path, report_to="comet_ml", **options))
    assert [step for name, step in comet if name == "loss"] == [1, 2]
    assert comet[0][0] == "parameters" and comet[-1] == ("end", None)
    assert caplog.text.count("accelerate sends comet_ml no pictures") == 1
    assert (tmp_path / "validation/step-000002/overview.png").is_file()


class Image:
    """As wandb's, swanlab's and Aim's: of one picture."""

    def __init__(self, picture, caption=None):
        assert picture.shape == PICTURE.shape and picture.dtype == np.uint8


@pytest.mark.parametrize("name", ["wandb", "swanlab", "aim", "clearml", "tensorboard"])
def test_a_tracker_with_pictures_gets_them_in_its_own_shape(name, monkeypatch, tmp_path):
    """accelerate's own tracker, with a stand-in for the library behind it."""
    PartialState(cpu=True)
    got = []
    tracker = LOGGER_TYPE_TO_CLASS[name].__new__(LOGGER_TYPE_TO_CLASS[name])
    if name == "tensorboard":
        tracker = LOGGER_TYPE_TO_CLASS[name]("run", tmp_path)
        tracker.start()
    elif name == "clearml":
        report = lambda title, series, iteration, image: got.append((iteration, Image(image)))  # noqa: E731
        tracker.task = SimpleNamespace(get_logger=lambda: SimpleNamespace(report_image=report))
    else:
        module = ModuleType(name)
        module.Image = Image
        monkeypatch.setitem(sys.modules, name, module)
        tracker.run = SimpleNamespace(log=lambda values, step: got.append((step, *values["validation"])))
        tracker.writer = SimpleNamespace(track=lambda image, name, step: got.append((step, image)))
    PictureLog([tracker]).write("validation", PICTURE, 3)
    if name == "tensorboard":
        tracker.finish()
        assert b"validation" in next(tmp_path.rglob("events.out*")).read_bytes()
    else:
        assert [(step, type(image)) for step, image in got] == [(3, Image)]


def test_a_line_of_the_log_is_whole_or_not_there(tmp_path, monkeypatch):
    log = LossLog(tmp_path, 0)
    log.write({"step": 1})
    original = type(log.path).open

    def filling(path, *args, **options):
        file = original(path, *args, **options)
        if args == ("a",):
            write = file.write
            monkeypatch.setattr(file, "write", lambda text: (write(text[:5]), file.flush(), full()))
        return file

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(log.path), "open", filling)
    with pytest.raises(OSError, match="No space"):
        log.write({"step": 2})
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == [{"step": 1}]
