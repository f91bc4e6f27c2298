import pytest

from .world import make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> dict[str, str]:
    """The flags of a tiny world on disk, made once."""
    return make_world(tmp_path_factory.mktemp("world"))
