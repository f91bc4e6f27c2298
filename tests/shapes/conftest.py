import json

import pytest

from tests.tiny import save_tiny_base


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """Folder of a tiny random base model whose videos, 4 frames of 32 x 32, are large enough for the oracle."""
    folder = save_tiny_base(tmp_path_factory.mktemp("base"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"height": 32, "width": 32, "num_frames": 4}))
    return str(folder)
