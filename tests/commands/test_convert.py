"""`diffusers-mcm convert`."""

from safetensors import safe_open

from diffusers_mcm.cli import main
from diffusers_mcm.lora import read_lora
from tests.formats.world import save_released


def test_the_command(tmp_path, capsys):
    source = str(save_released(tmp_path / "adapter", "animatediff", alpha=6))
    destination = str(tmp_path / "out.safetensors")
    assert main(["convert", source, destination, "--to", "kohya"]) == 0
    with safe_open(destination, framework="pt") as file:
        assert file.metadata()["ss_network_module"] == "networks.lora" and file.metadata()["ss_network_alpha"] == "6"
        modules = len([key for key in file.keys() if key.endswith("alpha")])
    assert f"{destination}  (kohya: {modules} modules, {3 * modules} tensors" in capsys.readouterr().out
    assert main(["convert", source, destination, "--to", "kohya"]) == 2
    assert "exists already; choose another name, or overwrite it (--overwrite)" in capsys.readouterr().err
    assert main(["convert", source, destination, "--to", "diffusers", "--overwrite"]) == 0
    assert read_lora(destination).modules == read_lora(source).modules
