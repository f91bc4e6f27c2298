import pytest
import torch

from diffusers_mcm.files import DiskFullError
from diffusers_mcm.training import stored
from diffusers_mcm.training.stored import ClipStore, StoredTexts, TextStore, in_files
from diffusers_mcm.training.text import CachedTextEncoder, Kept


def clip(number, dtype=torch.float32):
    mean = torch.full((4, 2, 3, 3), float(number), dtype=dtype)
    frames = torch.full((2, 3, 6, 6), number, dtype=torch.uint8)
    return dict(index=number, caption=f"caption {number}", mean=mean, deviation=mean / 2, frames=frames)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_clips_come_back_bit_for_bit_whatever_file_they_are_in(tmp_path, dtype):
    store = ClipStore(tmp_path, 8)
    assert store.missing(8) == list(range(8)) and store.captions(8) == set()
    store.write([clip(3, dtype), clip(0, dtype)])
    store.write([clip(5, dtype)])
    assert 3 not in store  # written by another process, for all that this one knows
    store.refresh()
    assert 3 in store and store.missing(8) == [1, 2, 4, 6, 7] and store.missing(3) == [1, 2]
    assert store.captions(8) == {"caption 0", "caption 3", "caption 5"} and store.captions(3) == {"caption 0"}
    again = ClipStore(tmp_path, 8)
    for number in (0, 3, 5):
        item, expected = again.read(number), clip(number, dtype)
        assert item["caption"] == expected["caption"]
        for name in ("mean", "deviation", "frames"):
            assert item[name].dtype == expected[name].dtype and torch.equal(item[name], expected[name])
    unread = again.read(3, latents=False, frames=False)
    assert unread.keys() == {"caption", "mean", "deviation"} and unread["mean"].dtype == dtype
    assert unread["mean"].shape == (4, 2, 3, 3) and not unread["mean"].any()
    assert ClipStore(tmp_path, 4).missing(4) == [1, 2]  # of a cache with more windows, those that are asked for


def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch):
    store = ClipStore(tmp_path, 4)
    store.write([clip(0)])

    def save_half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored, "save_file", save_half)
    with pytest.raises(DiskFullError, match="no room to write .*clips-000000001.safetensors"):
        store.write([clip(1)])
    assert [path.name for path in tmp_path.iterdir()] == ["clips-000000000.safetensors"]


def test_a_file_that_is_cut_off_is_named(tmp_path):
    ClipStore(tmp_path, 4).write([clip(0)])
    path = tmp_path / "clips-000000000.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"clips-000000000.safetensors of the cache is damaged .*Remove it: what was"):
        ClipStore(tmp_path, 4)


def test_texts_come_back_as_they_were_encoded(tmp_path):
    rows = {"a": torch.tensor([[1.0, 2], [0, 0], [3, 0], [0, 0]]), "": torch.zeros(4, 2)}
    encoder = CachedTextEncoder(
        lambda texts: {"prompt_embeds": rows[texts[0]][None], "pooled": torch.ones(1, 2)}, capacity=2
    )
    store = TextStore(tmp_path, "prompt")
    assert store.missing(["b", "a", "", "a"]) == ["", "a", "b"]
    store.write({text: encoder.encoded(text) for text in rows})
    again = TextStore(tmp_path, "prompt")
    assert again.missing(["b", "a", ""]) == ["b"] and TextStore(tmp_path, "judge").missing(["a"]) == ["a"]
    read, expected = StoredTexts(again, torch.device("cpu"))(["a", "", "a"]), encoder(["a", "", "a"])
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in read)
    assert len(again.read("a")["prompt_embeds"].rows) == 3  # without the row of padding
    with pytest.raises(ValueError, match=r"has no encoding of 'b' \(prompt\). `diffusers-mcm encode` with the flags"):
        StoredTexts(again, torch.device("cpu"))(["b"])


def test_a_text_of_padding_alone_is_kept(tmp_path):
    store = TextStore(tmp_path, "prompt")
    store.write({"": {"prompt_embeds": Kept(torch.zeros(0, 2), 4)}})
    assert torch.equal(StoredTexts(store, torch.device("cpu"))([""])["prompt_embeds"], torch.zeros(1, 4, 2))


def test_files_are_of_so_many_bytes_at_most_but_for_larger_items():
    sizes = [4, 4, 3, 20, 1, 1]
    assert list(in_files(enumerate(sizes), limit=10)) == [[0, 1], [2], [3], [4, 5]]
    assert list(in_files([])) == []
