"""The tests have a home of their own on the Hub: they neither read nor fill your cache, and never send your token."""

import os
import shutil
import tempfile

import pytest

HOME = tempfile.mkdtemp(prefix="mcm-tests-")
# Before anything imports `huggingface_hub`, which reads them once. Subprocesses inherit them.
for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
    del os.environ[name]
os.environ["HF_HOME"] = HOME
# The Hub that answers is a thread of the tests: on a machine that is busy with other work it may take its time.
os.environ["HF_HUB_ETAG_TIMEOUT"] = os.environ["HF_HUB_DOWNLOAD_TIMEOUT"] = "600"


@pytest.fixture(scope="session")
def hub_root(tmp_path_factory):
    """Both base models and the seven released LoRAs; not to be changed."""
    from tests.formats.world import save_hub

    return save_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture(autouse=True)
def registered():
    """What a test registers, a file of the examples by being imported, is forgotten after it: others list it all."""
    from diffusers_mcm import MCMPipeline
    from diffusers_mcm.base_models import BASE_MODELS

    tables = (BASE_MODELS, MCMPipeline._of_base_models)
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        if list(table.items()) != list(content.items()):
            table.clear()
            table.update(content)


def pytest_unconfigure():
    shutil.rmtree(HOME, ignore_errors=True)
