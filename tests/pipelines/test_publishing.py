"""A pipeline publishes one of its LoRAs, or all of itself."""

import json

import pytest
import torch
from safetensors.torch import load_file

from diffusers_mcm import MCMPipeline
from diffusers_mcm.cards import check_card
from diffusers_mcm.lora import CONFIG_NAME, WEIGHTS_NAME
from diffusers_mcm.publish import PublishError
from tests import publishing
from tests.publishing import FILES, SECRET, STAGES, edited_on_the_hub, make_lora, sample
from tests.tiny import save_tiny_lora

root, server, lora = publishing.root, publishing.server, publishing.lora


def test_a_pipeline_publishes_its_lora(server, lora, root, tmp_path):
    pipe = MCMPipeline.from_pretrained(lora, base_model=root / "owner" / "base")
    video = sample(pipe)
    other = save_tiny_lora(tmp_path / "other", base=root / "owner" / "base", seed=1)
    pipe.load_lora_weights(other, "style")
    pipe.set_adapters(["mcm", "style"], [0.9, 0.5])
    with pytest.raises(ValueError, match="Say which LoRA is meant with `adapter_name`; loaded are: mcm, style"):
        pipe.push_to_hub("me/mcm")
    address = pipe.push_to_hub("me/mcm", "From a pipeline", adapter_name="mcm", prompt="a blue ring")
    repository = server.repositories["me/mcm"]
    assert repository.messages == ["initial commit", "From a pipeline"] and repository.files.keys() == FILES
    assert address.endswith(repository.branches["main"])
    assert "text: a blue ring" in repository.files["README.md"].decode()
    edited = edited_on_the_hub(server)
    pipe.push_to_hub("me/mcm", adapter_name="mcm", prompt="a red ring")
    assert repository.files["README.md"] == edited
    pipe.push_to_hub("me/mcm", adapter_name="mcm", prompt="a red ring", overwrite_card=True)
    assert b"text: a red ring" in repository.files["README.md"]
    assert pipe.get_active_adapters() == ["mcm", "style"] and pipe._adapters.weights == {"mcm": 0.9, "style": 0.5}
    options = dict(cache_dir=tmp_path / "cache", token=SECRET)
    assert torch.equal(sample(MCMPipeline.from_pretrained("me/mcm", **options)), video)
    pipe.unload_lora_weights()
    with pytest.raises(ValueError, match="loaded are: none"):
        pipe.push_to_hub("me/mcm")


def test_a_pipeline_publishes_all_of_itself(server, root, tmp_path):
    training = {"video_data": "../../home/alice/videos", "extra_repositories": {"adapter": "../alice/adapter"}}
    lora = make_lora(tmp_path / "lora", training=training)
    pipe = MCMPipeline.from_pretrained(lora, base_model=root / "owner" / "base")
    pipe.save_pretrained(tmp_path / "whole", push_to_hub=True, repo_id="me/whole", token=SECRET)
    repository = server.repositories["me/whole"]
    assert len(repository.messages) == 2
    assert {"model_index.json", "README.md", f"mcm_adapters/mcm/{WEIGHTS_NAME}"} <= repository.files.keys()
    check_card(repository.files["README.md"].decode())
    assert json.loads(repository.files[f"mcm_adapters/mcm/{CONFIG_NAME}"])["training"]["video_data"] == "videos"
    assert not [name for name, content in repository.files.items() if b"alice" in content]
    edited = edited_on_the_hub(server, "me/whole")
    pipe.save_pretrained(tmp_path / "whole", push_to_hub=True, repo_id="me/whole")  # whose README.md is the old one
    assert repository.files["README.md"] == edited
    pipe.save_pretrained(tmp_path / "whole", push_to_hub=True, repo_id="me/whole", overwrite_card=True)
    assert repository.files["README.md"] == (tmp_path / "whole" / "README.md").read_bytes() != edited
    count = len(repository.messages)
    again = MCMPipeline.from_pretrained("me/whole", cache_dir=tmp_path / "cache")
    assert torch.equal(sample(again), sample(pipe))
    server.fail(STAGES["commit"], 500, times=99)
    pipe.scheduler.register_to_config(timestep_scaling=5.0)
    with pytest.raises(PublishError, match="Publishing me/whole failed. .* finishes the job"):
        pipe.save_pretrained(tmp_path / "whole", push_to_hub=True, repo_id="me/whole")
    assert len(repository.messages) == count and (tmp_path / "whole" / "model_index.json").is_file()


def test_a_saved_pipeline_from_the_hub_is_called_by_its_name(server, root, tmp_path):
    """Not by the folder of the cache: its LoRA records it as the base model, and can be published."""
    pipe = MCMPipeline.from_pretrained(make_lora(tmp_path / "local", base=root / "owner" / "base"))
    pipe.save_pretrained(tmp_path / "whole", push_to_hub=True, repo_id="me/whole", token=SECRET)
    whole = MCMPipeline.from_pretrained("me/whole", cache_dir=tmp_path / "cache")
    assert whole.config._name_or_path == "me/whole"
    whole.save_mcm_lora(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / CONFIG_NAME).read_text())["base_model_repository"] == "me/whole"
    whole.push_to_hub("me/lora", prompt="a red ring")
    recorded = json.loads(server.repositories["me/lora"].files[CONFIG_NAME])
    assert recorded["base_model_repository"] == "me/whole"
    again = MCMPipeline.from_pretrained("me/lora", cache_dir=tmp_path / "cache")
    assert torch.equal(sample(again), sample(pipe))


def test_a_saved_lora_is_the_one_that_was_loaded(lora, root, tmp_path):
    pipe = MCMPipeline.from_pretrained(lora, base_model=root / "owner" / "base")
    pipe.save_mcm_lora(tmp_path / "saved")
    saved, before = load_file(tmp_path / "saved" / WEIGHTS_NAME), load_file(lora / WEIGHTS_NAME)
    assert saved.keys() == before.keys() and all(torch.equal(saved[key], before[key]) for key in before)
    again = MCMPipeline.from_pretrained(tmp_path / "saved", base_model=root / "owner" / "base")
    assert torch.equal(sample(again), sample(pipe)) and again.config.num_inference_steps == 2
