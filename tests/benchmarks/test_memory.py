import json

import memory
import pytest
import torch

TINY = ["--size", "tiny", "--models", "modelscope", "--dtypes", "float32"]


def test_bytes_are_those_of_the_tensors_alive():
    with memory.TensorBytes() as alive:
        kept = torch.zeros(1000)  # 4000 bytes
        view = kept[10:]  # none
        two = torch.zeros(500) + torch.ones(500)  # 2000 each, and 2000 for the sum
        assert (alive.now, alive.peak) == (6000, 10000)
        del kept, two
        assert alive.now == 4000  # the view keeps its storage
        del view
    assert (alive.now, alive.peak) == (0, 10000)


@pytest.mark.skipif(
    torch.__version__ < (2, 7),
    reason="accelerate makes parameters on the meta device in a way that torch's fake tensors do not know before 2.7",
)
@pytest.mark.parametrize("model", memory.PIPELINES)
def test_counted_without_computing_is_what_really_happens(model, monkeypatch):
    """Against the same sums over tensors that hold data."""
    counted = memory.count(model, "tiny", "float32")
    with memory.TensorBytes() as alive, torch.no_grad():
        pipeline = memory.random_pipeline(model, "tiny", torch.float32)
        sides = [pipeline.sampling_default(name) for name in ("num_frames", "height", "width")]
        shape = pipeline.base_model.latent_shape(pipeline.denoiser, pipeline.vae, *sides)
        networks = (pipeline.denoiser, pipeline.vae, pipeline.text_encoder)
        weights = sum(parameter.nbytes for network in networks for parameter in network.parameters())
        latents = torch.zeros(2, *shape)
        for chunk, variant in ((None, "all frames decoded at once"), (1, "decode_chunk_size=1")):
            before = alive.peak = alive.now
            pipeline.base_model.decode_video(pipeline.vae, latents[:1], chunk)
            expected = alive.peak - before
            found = counted[variant]["decoding"] - counted[variant]["weights"]
            assert found == pytest.approx(expected, rel=0.1)
    assert counted[variant]["weights"] == pytest.approx(weights, rel=0.01)
    sizes = {variant: found["decoding"] for variant, found in counted.items()}
    assert sizes["decode_chunk_size=1"] == pytest.approx(sizes["vae.enable_slicing()"], rel=0.1)
    assert sizes["decode_chunk_size=1"] < sizes["decode_chunk_size=4"] < sizes["all frames decoded at once"]
    assert counted[variant]["weights"] < counted[variant]["call"] < counted[variant]["guided call"]


def test_the_script_measures_in_a_process_and_writes_the_table(tmp_path, monkeypatch, capsys):
    document, output = tmp_path / "page.md", tmp_path / "memory.json"
    document.write_text("# Page\n<!-- memory -->\n<!-- /memory -->\nend\n")
    variants = ["decode_chunk_size=1", "decode_chunk_size=1, model offload"]
    monkeypatch.setattr(
        "sys.argv", ["memory.py", *TINY, "--measure", "--variants", *variants, "--output", str(output)]
    )
    memory.main()
    results = json.loads(output.read_text())
    one, offloaded = results.values()
    assert 0 < one["measured"]["cpu"]["peak"] < 2**31
    assert "measured" not in offloaded  # which needs an accelerator
    for result in results.values():
        result["size"] = "full"
    results["modelscope tiny float32 decode_chunk_size=1"]["measured"]["cpu"]["peak"] = 3 * 2**30
    output.write_text(json.dumps(results))
    monkeypatch.setattr("sys.argv", ["memory.py", *TINY, "--output", str(output), "--document", str(document)])
    memory.main()
    text = document.read_text()
    assert "| modelscope | float32 | decode_chunk_size=1 | – | – | – | – | 3.00 | not measured |" in text
    assert "decode_chunk_size=1, model offload | – | – | – | – | not measured | not measured |" in text
    assert text.startswith("# Page\n") and text.endswith("end\n")
