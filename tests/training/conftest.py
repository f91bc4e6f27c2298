import pytest
from accelerate.state import AcceleratorState

from .world import make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> dict[str, str]:
    """The flags of a tiny world on disk, made once."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps its settings for the life of a process; each test wants its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
