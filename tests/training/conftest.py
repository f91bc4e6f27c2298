import pytest
from accelerate.state import AcceleratorState

from tests.tiny import save_tiny_stable_diffusion, tiny_motion_adapter

from .world import make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> dict[str, str]:
    """The flags of a tiny world on disk, made once."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def animatediff(world, tmp_path_factory) -> dict[str, str]:
    """The same world with Stable Diffusion and a motion adapter as the base model."""
    folder = tmp_path_factory.mktemp("animatediff")
    save_tiny_stable_diffusion(folder / "sd")
    tiny_motion_adapter().save_pretrained(folder / "adapter")
    extra = (f"motion_adapter={folder / 'adapter'}",)
    return world | dict(pretrained_teacher_model=str(folder / "sd"), extra_repositories=extra)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps its settings for the life of a process; each test wants its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
