import dataclasses
import warnings

import pytest

from diffusers_mcm.training.arguments import build_parser, parse_config
from diffusers_mcm.training.config import TrainingConfig

REQUIRED = ["--pretrained_teacher_model", "teacher", "--video_data", "videos"]


@pytest.mark.parametrize(("old", "value"), [("--fold_lora", True), ("--no_fold_lora", False)])
def test_an_old_name_is_still_read_with_one_warning(old, value):
    with pytest.warns(FutureWarning, match=f"{old} is called {old.replace('fold', 'fuse')} now") as told:
        config = parse_config([*REQUIRED, old])
    assert config.fuse_lora is value and len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parse_config([*REQUIRED, old.replace("fold", "fuse")]) == config


def test_help_says_what_the_paper_does_not_have():
    text = " ".join(build_parser().format_help().split())
    for entry in dataclasses.fields(TrainingConfig):
        said = " ".join(entry.metadata["help"].split())
        assert (f"{said} Not in the paper." in text) == entry.metadata["beyond_paper"], entry.name
