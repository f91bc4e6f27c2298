import dataclasses
from dataclasses import dataclass

import pytest

from diffusers_mcm.flags import FIXED, TOLD, FlagConfig, flag
from diffusers_mcm.settings import SOURCES
from diffusers_mcm.training.config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Config(FlagConfig):
    rank: int = flag(4, help="Rank.", group="a", above=0, resume=FIXED)
    share: float = flag(0.5, help="Share.", group="a", least=0, most=1, formerly="part")
    decay: float = flag(0.0, help="Decay.", group="a", least=0, below=1, beyond_paper=True)
    size: int | None = flag(None, help="Size.", group="a", least=2)
    kinds: tuple[str, ...] = flag((), help="Kinds.", group="a", choices=("x", "y"), many=True)
    place: str = flag("here", help="Place.", group="a", filled=True, source=True, resume=TOLD)
    token: str | None = flag(None, help="Token.", group="a", secret=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(rank=0), "--rank must be greater than 0, not 0"),
        (dict(share=1.1), "--share must be between 0 and 1, not 1.1"),
        (dict(share=float("inf")), "--share must be between 0 and 1, not inf"),
        (dict(decay=1.0), "--decay must be below 1, not 1.0"),
        (dict(decay=-0.1), "--decay must be 0 or more, not -0.1"),
        (dict(size=1), "--size must be 2 or more, not 1"),
        (dict(kinds=["x", "z"]), "--kinds must be one of x, y, not 'z'"),
        (dict(place=""), "--place must not be empty"),
    ],
)
def test_a_value_that_its_flag_rules_out(values, message):
    with pytest.raises(ValueError, match=message):
        Config(**values)


def test_bounds_that_are_met_and_values_that_are_left_open():
    config = Config(rank=1, share=1, decay=0, size=2, kinds=["y", "x"])
    assert config.kinds == ("y", "x") and Config().size is None


def test_fields_are_found_by_what_is_said_of_them():
    assert Config.names(resume=FIXED) == ["rank"] and Config.names(source=True, resume=TOLD) == ["place"]
    assert Config.names(beyond_paper=True) == ["decay"]
    assert Config.renamed({"part": 0.1, "rank": 2, "other": 3}) == {"share": 0.1, "rank": 2, "other": 3}


def test_a_secret_is_not_shown():
    assert "hidden" not in repr(Config(token="hidden"))


# --- the training's --------------------------------------------------------------------------------------------------
def test_sources_are_the_ones_that_cards_make_public():
    assert sorted(TrainingConfig.names(source=True)) == sorted(SOURCES)


def test_every_number_has_bounds():
    numbers = ("int", "float", "int | None", "float | None", int, float, int | None, float | None)
    without = [e.name for e in dataclasses.fields(TrainingConfig) if e.type in numbers and not e.metadata["bounds"]]
    assert without == []


def test_the_whole_method_and_nothing_else_of_it_is_what_a_step_takes():
    config = TrainingConfig(pretrained_teacher_model="teacher", video_data="videos", lambda_real=0.25)
    method = config.method
    assert method.lambda_real == 0.25 and not hasattr(method, "video_data")
    assert {entry.metadata["group"] for entry in dataclasses.fields(method)} == {"method"}
    assert set(type(method).names(resume=FIXED)) == {entry.name for entry in dataclasses.fields(method)}


def test_what_is_secret_is_not_recorded():
    assert set(TrainingConfig.names(secret=True)) <= set(TrainingConfig.names(recorded=False))
