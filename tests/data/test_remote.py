"""Data at addresses: folders, tables and tars of another machine, read in place and as those of this one are."""

import errno
import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest
import torch

from diffusers_mcm.data import ImageDataset, StepLoader, StepSampler, VideoDataset
from diffusers_mcm.data import remote as module
from diffusers_mcm.data.faults import MachineError
from diffusers_mcm.data.sources import VIDEOS, open_rows
from tests.hub_server import hub_server

from .conftest import captions, image_bytes, write_tar

DOG, CAT = {"caption": "a dog"}, {"caption": "a cat"}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(module, "_PAUSES", (0.0, 0.0))


@pytest.fixture
def memory():
    """`fsspec`'s file system in memory, which forgets all afterwards."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.fixture
def put(memory, tmp_path):
    """Put a tar, a folder or bytes at an address; returns the address."""

    def put(path, content):
        if isinstance(content, dict):
            with open(write_tar(tmp_path / "written.tar", content), "rb") as file:
                content = file.read()
        if isinstance(content, bytes):
            memory.pipe(path, content)
        else:
            memory.put(f"{content}/", path, recursive=True)
        return f"memory://{path}"

    return put


def test_parts_of_files_wherever_they_are(put, tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    for path in (str(tmp_path / "a"), put("/a", b"0123456789")):
        assert module.read_part(path, 3, 4) == b"3456" and module.read_part(path, 8, 4) == b"89"
        with module.open_file(path) as file:
            file.seek(5)
            assert file.read(2) == b"56"
        before = module.file_version(path)
        assert before[0] == 10 and module.file_version(path) == before and module.file_version(path + "b") is None
    put("/a", b"01234567891")
    assert module.file_version("memory:///a") != before


def test_what_addresses_stand_for(put):
    for name in ("x-000.tar", "x-001.tar", "x-002.tar", "y.csv"):
        put(f"/d/{name}", b"1")
    assert module.expand("memory:///d/*.tar") == [f"memory:///d/x-00{number}.tar" for number in range(3)]
    # Nothing need be listed for these.
    assert module.expand("https://h/x-{008..010}.tar") == [f"https://h/x-{n}.tar" for n in ("008", "009", "010")]
    assert module.expand("s3://b/{a,c}-{1..2}.tar") == [f"s3://b/{n}.tar" for n in ("a-1", "a-2", "c-1", "c-2")]
    assert module.expand("s3://b/{a}.tar") == ["s3://b/{a}.tar"]
    assert module.list_remote("memory:///d") == ["x-000.tar", "x-001.tar", "x-002.tar", "y.csv"]
    assert module.list_remote("memory:///nowhere") is None


def test_braces_work_on_this_machine_too(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"x-{number}.tar", {"a.mp4": b"", "a.txt": f"tar {number}"})
    assert captions(open_rows(str(tmp_path / "x-{1..2}.tar"), VIDEOS)) == ["tar 1", "tar 2"]
    with pytest.raises(ValueError, match=r"No \.tar file matches '.*y-\{1\.\.2\}\.tar'"):
        open_rows(str(tmp_path / "y-{1..2}.tar"), VIDEOS)


@pytest.mark.parametrize("source", ["memory:///d", "memory:///d/*.tar", "memory:///d/{0..1}.tar"])
def test_tars_at_addresses_give_what_they_give_here(put, tmp_path, clip, source):
    files = [{"a.mp4": clip, "a.json": DOG, "x.mp4": b"broken", "x.json": CAT}, {"b.mp4": clip, "b.json": CAT}]
    (tmp_path / "here").mkdir()
    for number, content in enumerate(files):
        put(f"/d/{number}.tar", content)
        write_tar(tmp_path / "here" / f"{number}.tar", content)
    there, here = (VideoDataset(each, num_frames=2, height=8, width=8) for each in (source, tmp_path / "here"))
    assert there.rows.order() == here.rows.order()
    for index in range(9):
        assert there[index]["caption"] == here[index]["caption"]
        assert torch.equal(there[index]["pixels"], here[index]["pixels"])
    assert there.skipped == here.skipped and len(here.skipped) == 1
    assert torch.equal(pickle.loads(pickle.dumps(there))[3]["pixels"], here[3]["pixels"])


def test_workers_read_addresses(put, clip):
    """The memory of the process that they were forked from, here."""
    dataset = VideoDataset(put("/0.tar", {"a.mp4": clip, "a.json": DOG}), num_frames=2, height=8, width=8)
    (batch,) = StepLoader(dataset, StepSampler(2, end_step=1), num_workers=1)
    assert batch["caption"] == ["a dog", "a dog"]


def test_folders_and_tables_at_addresses(put, video_folder):
    address, here = put("/videos", video_folder), VideoDataset(video_folder, num_frames=2, height=8, width=8)
    for source in (address, f"{address}/metadata.csv"):
        there = VideoDataset(source, num_frames=2, height=8, width=8)
        assert there.rows.order() == here.rows.order() and not there.skipped
        assert torch.equal(there[4]["pixels"], here[4]["pixels"]) and there[4]["caption"] == here[4]["caption"]


def test_splits_of_a_folder_at_an_address(put, clip):
    put("/d/train/a.tar", {"a.mp4": clip, "a.json": DOG})
    put("/d/test/b.tar", {"b.mp4": clip, "b.json": CAT})
    assert captions(open_rows("memory:///d", VIDEOS)) == ["a dog"]
    assert captions(open_rows("memory:///d/", VIDEOS, split="test")) == ["a cat"]
    with pytest.raises(ValueError, match=r"no subfolder 'val' for that split; found \['test', 'train'\]"):
        open_rows("memory:///d", VIDEOS, split="val")


def test_images_and_parquet_at_addresses(put):
    import io

    import pyarrow
    import pyarrow.parquet

    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"file_name": ["a.png"], "text": ["x"]}), table)
    put("/i/metadata.parquet", table.getvalue())
    put("/i/a.png", image_bytes(80))
    put("/i/b.png", image_bytes(80))
    assert [(item["caption"], item["pixels"].shape) for item in [ImageDataset("memory:///i", size=8)[0]]] == [
        ("x", (3, 8, 8))
    ]


def test_an_address_that_is_nothing(put):
    with pytest.raises(ValueError, match=r"'memory:///d' is no folder whose files can be listed.*name-\{000\.\.039\}"):
        open_rows("memory:///d", VIDEOS)
    with pytest.raises(ValueError, match="'nothing://x' is no address of data"):
        open_rows("nothing://x", VIDEOS)
    with pytest.raises(ValueError, match=r"No \.tar file matches 'memory:///d/\*\.tar'"):
        open_rows("memory:///d/*.tar", VIDEOS)
    with pytest.raises(ValueError, match=r"None of the 1 tars of 'memory:///d/0.tar' can be read"):
        open_rows("memory:///d/0.tar", VIDEOS)


def test_a_package_that_is_not_there_is_named(monkeypatch):
    def missing(address):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(ImportError, match=r"Reading s3://b/0.tar needs s3fs \(pip install s3fs\): Install"):
        open_rows("s3://b/0.tar", VIDEOS)


def test_a_remote_tar_that_changes_costs_its_samples_only(put, clip):
    put("/d/0.tar", {"a.mp4": clip, "a.json": DOG})
    put("/d/1.tar", {"b.mp4": clip, "b.json": CAT})
    dataset = VideoDataset("memory:///d", num_frames=2, height=8, width=8)
    put("/d/1.tar", {"c.json": {"caption": "something else", "more": "x" * 600}, "c.mp4": clip})
    assert {dataset[index]["caption"] for index in range(6)} == {"a dog"}
    assert dataset.skipped == {"1.tar/b.mp4": "its tar has changed since it was opened"}


class Answer:
    def __init__(self, status):
        self.status_code = status


def failing(monkeypatch, *errors):
    """Reads of files in memory fail with these errors, one after the other."""
    from fsspec.implementations.memory import MemoryFileSystem

    original, left = MemoryFileSystem._open, list(errors)

    def fail(self, *args, **kwargs):
        if left:
            raise left.pop(0)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "_open", fail)
    return left


def test_a_connection_that_is_lost_is_tried_again(put, clip, monkeypatch):
    address = put("/0.tar", {"a.mp4": clip, "a.json": DOG})
    dataset = VideoDataset(address, num_frames=2, height=8, width=8)
    left = failing(monkeypatch, ConnectionResetError(errno.ECONNRESET, "reset"), TimeoutError("slow"))
    assert dataset[0]["caption"] == "a dog" and not left
    failing(monkeypatch, *(ConnectionError("gone") for _ in range(3)))
    with pytest.raises(MachineError, match=r"0.tar cannot be read, and not by its own fault: ConnectionError: gone"):
        dataset[0]
    assert not dataset.skipped


@pytest.mark.parametrize(("status", "stops"), [(503, True), (403, False)])
def test_what_a_server_answers_is_told_from_a_lost_file(put, clip, monkeypatch, status, stops):
    """As aiohttp says it, whose errors are none of the system's."""

    class ResponseError(Exception):
        def __init__(self):
            super().__init__(f"status {status}")
            self.status = status

    dataset = VideoDataset(put("/0.tar", {"a.mp4": clip, "a.json": DOG}), num_frames=2, height=8, width=8)
    failing(monkeypatch, *(ResponseError() for _ in range(3)))
    with pytest.raises(MachineError if stops else ValueError, match=f"ResponseError: status {status}"):
        dataset[0]


@pytest.mark.parametrize(
    ("behind", "told"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), "0.tar cannot be read, .*: ConnectionRefusedError"),
        (None, "None of the 1 tars of .* can be read:\\s+memory:///0.tar: there is no such file"),
    ],
    ids=["no server", "no file"],
)
def test_a_server_that_is_not_there_is_no_missing_file(memory, monkeypatch, behind, told):
    """As `fsspec` says it over HTTP: whatever went wrong, the file is not found."""
    from fsspec.implementations.memory import MemoryFileSystem

    def not_found(self, path, *args, **kwargs):
        raise FileNotFoundError(path) from behind

    monkeypatch.setattr(MemoryFileSystem, "info", not_found)
    monkeypatch.setattr(MemoryFileSystem, "_open", not_found)
    with pytest.raises(MachineError if behind else ValueError, match=told):
        open_rows("memory:///0.tar", VIDEOS)


def test_a_server_that_gives_whole_files_only_is_told(put, monkeypatch):
    from fsspec.implementations.memory import MemoryFile

    def stream(self, place, whence=0):
        if place != self.tell():
            raise ValueError("Cannot seek streaming HTTP file")

    address = put("/0.tar", {"a.mp4": b"v", "a.json": DOG})
    monkeypatch.setattr(MemoryFile, "seek", stream)
    with pytest.raises(MachineError, match="0.tar: its server gives whole files only, .* needs parts of them"):
        open_rows(address, VIDEOS)


# --- over HTTP -------------------------------------------------------------------------------------------------------
FILM = 300_000  # bytes, many more than are read ahead


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import datasets

    clips = tmp_path / "hub" / "me" / "clips"
    clips.mkdir(parents=True)
    write_tar(clips / "train-0.tar", {"a.mp4": b"a" * FILM, "a.json": DOG, "b.mp4": b"b" * FILM, "b.json": CAT})
    write_tar(clips / "test-0.tar", {"c.mp4": b"c", "c.txt": "a bird"})
    with hub_server(tmp_path / "hub") as server:
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
        fsspec.get_filesystem_class("hf").clear_instance_cache()
        yield server


def read_bytes(hub):
    return sum(last - first + 1 for path, first, last in hub.parts)


@pytest.mark.parametrize("source", ["me/clips", "hf://datasets/me/clips/train-*.tar"])
def test_a_data_set_on_the_hub_is_read_in_place(hub, source):
    rows = open_rows(source, VIDEOS)
    assert captions(rows) == ["a dog", "a cat"]
    assert read_bytes(hub) < FILM  # of two films none was read
    assert rows.media(rows[1])["bytes"] == b"b" * FILM
    assert read_bytes(hub) < 2 * FILM
    hub.parts.clear()
    assert open_rows(source, VIDEOS).table.equals(rows.table)
    assert max(last - first for _, first, last in hub.parts) < 1000  # the samples' json alone
    assert rows.far_captions


def test_a_split_and_a_folder_on_the_hub(hub, tmp_path, video_folder):
    assert captions(open_rows("me/clips", VIDEOS, split="test")) == ["a bird"]
    films = tmp_path / "hub" / "me" / "films"
    films.mkdir()
    for path in video_folder.iterdir():
        name = path.name.replace("test_", "")  # which `datasets` takes for a split
        (films / name).write_bytes(path.read_bytes().replace(b"test_", b""))
    dataset = VideoDataset("me/films", num_frames=2, height=8, width=8)
    assert len(dataset) == 5 and dataset[0]["caption"].startswith("clip ")
    assert dataset.rows.folder.startswith("hf://datasets/me/films@")


@pytest.fixture(params=["hf", "http"])
def films(request, hub, tmp_path, clip):
    """The address of a tar of two films on the server, by the Hub's protocol or as any other file of the web."""
    if request.param == "http":
        pytest.importorskip("aiohttp", reason="`fsspec` reads http with it, and it is an extra")
    (tmp_path / "hub" / "me" / "films").mkdir()
    files = {"a.mp4": clip, "a.json": DOG, "b.mp4": clip, "b.json": CAT}
    write_tar(tmp_path / "hub" / "me" / "films" / "0.tar", files)
    return (
        "hf://datasets/me/films/0.tar" if request.param == "hf" else f"{hub.url}/datasets/me/films/resolve/main/0.tar"
    )


def test_workers_have_connections_of_their_own(films):
    """This process has some, when they are forked from it."""
    dataset = VideoDataset(films, num_frames=2, height=8, width=8)
    alone = [dataset[index] for index in range(4)]
    helped = list(StepLoader(dataset, StepSampler(2, end_step=2), num_workers=2))
    assert [caption for batch in helped for caption in batch["caption"]] == [item["caption"] for item in alone]


def test_the_web_gives_parts(hub):
    pytest.importorskip("aiohttp", reason="`fsspec` reads http with it, and it is an extra")
    folder = f"{hub.url}/datasets/me/clips/resolve/main"
    rows = open_rows(f"{folder}/train-{{0..0}}.tar", VIDEOS)
    assert captions(rows) == ["a dog", "a cat"] and read_bytes(hub) < FILM
    assert rows.media(rows[0])["bytes"] == b"a" * FILM
    with pytest.raises(ValueError, match="None of the 1 tars of .* can be read"):
        open_rows(f"{folder}/nothing.tar", VIDEOS)


@pytest.mark.parametrize("size", [1, 200_000], ids=["read at once", "read in parts"])
def test_a_web_server_without_parts_is_told_when_data_are_opened(tmp_path, size):
    """As `python -m http.server`: a small tar came whole, and the run failed at its first clip; a large one was
    called broken, and its first samples were all."""
    pytest.importorskip("aiohttp", reason="`fsspec` reads http with it, and it is an extra")
    write_tar(tmp_path / "0.tar", {"a.mp4": b"a" * size, "a.txt": "a dog", "b.mp4": b"b" * size, "b.txt": "a cat"})
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with pytest.raises(MachineError, match="0.tar: its server gives whole files only, .* needs parts of them"):
                open_rows(f"http://127.0.0.1:{server.server_port}/0.tar", VIDEOS)
        finally:
            server.shutdown()
