import json

import pytest
import speed
import torch


def test_what_the_network_allows():
    """(100·2 + 8) / (4·2 + 8) = 13 times as fast by the count, (50·3 + 10) / (4·2 + 8) = 10 by the calls' seconds."""
    stock, mcm = {"whole": 168.0, "call": 3.0, "decode": 10.0}, {"whole": 21.0, "call": 2.0, "decode": 8.0}
    assert speed.compare(stock, mcm) == {"speed-up": 8.0, "of 100 : 4": 8 / 13, "of the calls": 0.8}


@pytest.mark.parametrize("model", speed.PIPELINES)
def test_the_script_runs_both_pipelines_and_writes_the_table(tmp_path, monkeypatch, model):
    document, output = tmp_path / "page.md", tmp_path / "speed.json"
    document.write_text("<!-- speed -->\n<!-- /speed -->\n")
    flags = ["--model", model, "--size", "tiny", "--height", "32", "--width", "32", "--num_frames", "2"]
    monkeypatch.setattr("sys.argv", ["speed.py", *flags, "--output", str(output), "--document", str(document)])
    threads = torch.get_num_threads()
    try:
        speed.main()
    finally:
        torch.set_num_threads(threads)
    (result,) = json.loads(output.read_text()).values()
    assert list(result["runs"]) == ["stock", "LoRA beside the weights", "LoRA fused"]
    for name, run in result["runs"].items():
        steps = 50 if name == "stock" else 4
        assert run["call"] > 0 and run["decode"] > 0
        assert run["whole"] >= steps * run["call"] + run["decode"]
    lines = document.read_text().splitlines()
    assert f"| {model}, tiny, 32x32x2, float32 | stock, DDIM 50 with guidance |" in lines[3]
    assert lines[5].startswith("|  | MCM 4, LoRA fused |") and "extrapolated from one step" in lines[5]


def test_whole_runs_take_all_their_steps():
    pipeline = speed.random_pipeline("modelscope", "tiny", torch.float32)
    calls = []
    pipeline.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    speed.seconds_of(pipeline, 3, True, height=32, width=32, num_frames=2)
    assert len(calls) == 2 + 3  # to warm up, and what counts
    assert "step" not in vars(pipeline.scheduler) and "decode" not in vars(pipeline.vae)
