import os
import resource

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


@pytest.fixture
def full_disk():
    """No file can grow beyond 500 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path, request):
    store = ClipStore(tmp_path, 4)
    store.write([clip(0)])
    there = list(tmp_path.iterdir())
    request.getfixturevalue("full_disk")
    with pytest.raises(DiskFullError, match="no room to write .*clips-000000001-.*safetensors"):
        store.write([clip(1)])
    assert list(tmp_path.iterdir()) == there


def test_files_are_the_same_bytes_each_time_and_for_whom_the_umask_allows(tmp_path):
    for name in "ab":
        ClipStore(tmp_path / name, 4).write([clip(2), clip(0)])
        TextStore(tmp_path / name, "judge").write({text: {"x": Kept(torch.ones(1, 2), 1)} for text in "pq"})
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab"]
    assert files[0] == files[1] and len(files[0]) == 2
    (tmp_path / "plain").touch()
    assert {path.stat().st_mode for path in (tmp_path / "a").iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_a_file_is_not_replaced_by_one_with_other_clips_or_texts(tmp_path):
    """As two runs write them that share the work among one process and among two: whoever reads goes on reading."""
    store, texts = ClipStore(tmp_path, 4), TextStore(tmp_path, "judge")
    encoded = {text: {"x": Kept(torch.full((1, 2), float(number)), 1)} for number, text in enumerate("pqr")}
    store.write([clip(0), clip(1)])
    texts.write({text: encoded[text] for text in "pq"})
    store.refresh()
    ClipStore(tmp_path, 4).write([clip(0), clip(2)])
    TextStore(tmp_path, "judge").write({text: encoded[text] for text in "pr"})
    stored._open.cache_clear()
    assert store.read(1)["caption"] == "caption 1" and texts.read("q")["x"].rows.unique().tolist() == [1]


def test_a_clip_that_is_not_there_is_not_another(tmp_path):
    store = ClipStore(tmp_path, 4)
    store.write([clip(0)])
    store.refresh()
    with pytest.raises(KeyError, match="has no clip 2"):
        store.read(2)


def test_what_a_killed_run_left_half_written_goes_and_what_is_being_written_stays(tmp_path):
    ClipStore(tmp_path, 4).write([clip(0)])
    for name in ("old", "new"):
        (tmp_path / f".clips-{name}.safetensors.123.tmp").touch()
    os.utime(tmp_path / ".clips-old.safetensors.123.tmp", (0, 0))
    stored.clear_up(tmp_path)
    assert [path.name for path in tmp_path.glob(".*")] == [".clips-new.safetensors.123.tmp"]
    assert ClipStore(tmp_path, 4).missing(4) == [1, 2, 3]


def test_a_file_that_is_cut_off_is_named(tmp_path):
    ClipStore(tmp_path, 4).write([clip(0)])
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"clips-0+-.*\.safetensors of the cache is damaged .*Remove it: what was"):
        ClipStore(tmp_path, 4)


def test_texts_come_back_as_they_were_encoded(tmp_path):
    rows = {"a": torch.tensor([[1.0, 2], [0, 0], [3, 0], [0, 0]]), "": torch.zeros(4, 2)}
    encoder = CachedTextEncoder(lambda texts: {"prompt_embeds": rows[texts[0]][None], "pooled": torch.ones(1, 2)})
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
