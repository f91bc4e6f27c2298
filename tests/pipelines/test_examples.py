"""The examples in the docstrings, run as they stand."""

import doctest
import inspect

from PIL import Image

from diffusers_mcm import AnimateDiffMCMPipeline, MCMPipeline
from tests.formats.world import save_hub
from tests.hub_server import hub_server


def run_example(function) -> None:
    """The block of code in a docstring, with what it is said to print."""
    text = inspect.getdoc(function).split("```py\n")[1].split("```")[0]
    example = doctest.DocTestParser().get_doctest(text, {}, function.__qualname__, None, 0)
    assert doctest.DocTestRunner().run(example).failed == 0 and len(example.examples) > 4


def test_the_example_of_every_pipeline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_example(MCMPipeline.__call__)
    assert (tmp_path / "circle.mp4").stat().st_size > 0


def test_the_example_of_animatediff(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub_server(save_hub(tmp_path / "hub")):
        run_example(AnimateDiffMCMPipeline.__call__)
    with Image.open("corgi.gif") as gif:
        assert gif.n_frames == 16
