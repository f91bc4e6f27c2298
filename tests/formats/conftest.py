import pytest

from tests.formats.world import save_hub


@pytest.fixture(scope="session")
def hub_root(tmp_path_factory):
    """Both base models and the seven released LoRAs; not to be changed."""
    return save_hub(tmp_path_factory.mktemp("hub"))
