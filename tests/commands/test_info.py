"""`diffusers-mcm info`."""

import json

from diffusers_mcm.cli import main
from tests.formats.world import MODELSCOPE, RELEASED
from tests.hub_server import hub_server


def test_the_command_on_the_hub(hub_root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with hub_server(hub_root):
        assert main(["info", "yhzhai/mcm", "--subfolder", "modelscopet2v-anime", "--json"]) == 0
        about = json.loads(capsys.readouterr().out)
        assert (about["base_model"], about["base_model_repository"]) == ("modelscope", MODELSCOPE)
        assert main(["info", "yhzhai/mcm", "--subfolder", "animatediff-laion"]) == 0
        printed = capsys.readouterr().out
        assert "base_model: animatediff\n" in printed and "  timestep_scaling: 4.0\n" in printed
        assert f"sha256: {about['sha256']}" not in printed and "training: not known" in printed
        assert main(["info", "yhzhai/mcm"]) == 2
        assert f"There are LoRAs in its subfolders: {', '.join(sorted(RELEASED))}" in capsys.readouterr().err
