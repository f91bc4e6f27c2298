import pytest

from diffusers_mcm.training.loop import Trainer, train

from .world import tiny_config

PLAIN = dict(lambda_adv=0.0, image_data=None, train_batch_size=1, checkpointing_steps=1, max_train_steps=1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(lora_rank=4), "lora_rank was 2, is 4"),
        (dict(train_batch_size=2), "total_batch was 1, is 2"),
        (dict(caption_column="file_name"), "goes on with something else than it was begun with: caption_column"),
    ],
)
def test_whether_a_run_can_be_gone_on_with_is_known_before_a_network_is_loaded(
    world, tmp_path, monkeypatch, changed, message, caplog
):
    train(tiny_config(world, tmp_path, **PLAIN))

    def loaded(*_):
        raise InterruptedError("too late")

    monkeypatch.setattr("diffusers_mcm.training.run.build_networks", loaded)
    options = PLAIN | dict(max_train_steps=2, resume_from_checkpoint="latest") | changed
    with pytest.raises((ValueError, InterruptedError)) as error:
        Trainer(tiny_config(world, tmp_path, **options))
    assert message in f"{error.value} {caplog.text}"
    assert isinstance(error.value, ValueError) == ("goes on" not in message)
