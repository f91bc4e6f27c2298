"""What is kept of tars: as much as their headers say, small, and never of a tar that has changed."""

import io
import os
import random
import sqlite3
import tarfile

import pytest

from diffusers_mcm.data import tar_index as module
from diffusers_mcm.data.shards import Member
from diffusers_mcm.data.sources import VIDEOS, open_rows
from diffusers_mcm.data.tars import Tar

from .conftest import captions, write_tar

DOG, CAT = {"caption": "a dog"}, {"caption": "a cat"}


@pytest.fixture(autouse=True)
def own_index(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSERS_MCM_CACHE", str(tmp_path / "cache"))
    module._told.clear()


@pytest.fixture
def headers_read(monkeypatch):
    """The tars whose headers were read."""
    read, original = [], module.read_headers
    monkeypatch.setattr(module, "read_headers", lambda path: read.append(os.path.basename(path)) or original(path))
    return read


@pytest.fixture
def tars(tmp_path):
    folder = tmp_path / "tars"
    folder.mkdir()
    write_tar(folder / "0.tar", {"a.mp4": b"v" * 1000, "a.json": DOG})
    write_tar(folder / "1.tar", {"b.mp4": b"w" * 3, "b.json": CAT})
    return folder


def test_headers_are_read_once(tars, headers_read):
    first = open_rows(tars, VIDEOS)
    again = open_rows(tars, VIDEOS)
    assert headers_read == ["0.tar", "1.tar"]
    assert again.table.equals(first.table) and again.order() == first.order()
    assert captions(again) == ["a dog", "a cat"] and again.media(again[0])["bytes"] == b"v" * 1000


def test_a_tar_that_has_changed_is_read_anew(tars, headers_read):
    open_rows(tars, VIDEOS)
    write_tar(tars / "1.tar", {"c.mp4": b"new", "c.json": {"caption": "a bird"}})
    assert captions(open_rows(tars, VIDEOS)) == ["a dog", "a bird"]
    assert headers_read == ["0.tar", "1.tar", "1.tar"]


def test_a_start_that_was_stopped_goes_on(tars, headers_read, monkeypatch):
    original = module.read_headers

    def stopped(path):
        if path.endswith("1.tar"):
            raise KeyboardInterrupt
        return original(path)

    monkeypatch.setattr(module, "read_headers", stopped)
    with pytest.raises(KeyboardInterrupt):
        open_rows(tars, VIDEOS)
    monkeypatch.setattr(module, "read_headers", original)
    assert captions(open_rows(tars, VIDEOS)) == ["a dog", "a cat"]
    assert headers_read == ["0.tar", "1.tar"]


def test_what_is_wrong_with_a_tar_is_kept_too(tars, headers_read):
    os.truncate(tars / "1.tar", 2048)
    told = [open_rows(tars, VIDEOS).skipped for _ in range(2)]
    reason = "it breaks off without an end mark; read are the 2 files before"
    assert told[0] == told[1] == {str(tars / "1.tar"): reason}
    assert headers_read == ["0.tar", "1.tar"]


def test_a_tar_of_which_nothing_can_be_read_is_looked_at_each_time(tars, headers_read):
    (tars / "1.tar").write_bytes(b"")
    for _ in range(2):
        assert len(open_rows(tars, VIDEOS)) == 1
    assert headers_read == ["0.tar", "1.tar", "1.tar"]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_files_are_where_they_were_however_they_lie(tmp_path, form):
    """Long names take blocks of their own between the files, a link's file lies before it; of two the last counts."""
    path = tmp_path / "0.tar"
    sizes = [("a" * 300 + ".mp4", 5), ("ü/b.json", 512), ("twice.txt", 3), ("empty.txt", 0), ("c\n\"'.mp4", 513)]
    with tarfile.open(path, "w", format=form) as tar:
        for name, size in [*sizes, ("twice.txt", 700)]:
            member = tarfile.TarInfo(name)
            member.size = size
            tar.addfile(member, io.BytesIO(name.encode()[:1] * size))
        link = tarfile.TarInfo("d.mp4")
        link.type, link.linkname = tarfile.LNKTYPE, "twice.txt"
        tar.addfile(link)
    members, problem = module.read_headers(str(path))
    assert module._unpack(module._pack(members, problem)) == (members, None)
    found = {member.name: Tar(str(path), module.file_version(path)).read(*member[1:]) for member in members}
    assert found.pop("d.mp4") == found["twice.txt"] == b"t" * 700
    assert found == {name: name.encode()[:1] * size for name, size in {**dict(sizes), "twice.txt": 700}.items()}


def test_a_clip_takes_few_bytes(tmp_path):
    """Less than 100, of which most are for its name: here such as none resembles another, and 25 clips in a tar."""
    numbers, unsaved = random.Random(0), module._Unsaved()
    for tar in range(40):
        members, end = [], 0
        for _ in range(25):
            name = f"{numbers.getrandbits(128):032x}"
            for ending, size in (("json", 180), ("mp4", numbers.randrange(1 << 22))):
                members.append(Member(f"{name}.{ending}", end + 512, size))
                end = members[-1].offset + -(-size // 512) * 512
        unsaved.add(str(tmp_path / f"{tar:05d}.tar"), module.TarMembers(members, None, [end, 1]))
    unsaved.save()
    assert os.path.getsize(module.index_file()) < 100 * 40 * 25


def test_names_that_are_no_text(tars, headers_read):
    folder = os.path.join(os.path.dirname(tars), os.fsdecode(b"\xff"))
    os.rename(tars, folder)
    assert [captions(open_rows(folder, VIDEOS)) for _ in range(2)] == [["a dog", "a cat"]] * 2
    assert len(headers_read) == 2


def test_a_place_that_cannot_be_written_costs_time_only(tars, headers_read, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("DIFFUSERS_MCM_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        assert captions(open_rows(tars, VIDEOS)) == ["a dog", "a cat"]
    assert len(headers_read) == 4
    assert caplog.text.count("The index of tars is not kept in") == 1 and "are read at each start" in caplog.text


@pytest.mark.parametrize("content", [b"", b"no database at all" * 100])
def test_a_damaged_index_costs_time_only(tars, content, caplog):
    open_rows(tars, VIDEOS)
    module.index_file().write_bytes(content)
    assert captions(open_rows(tars, VIDEOS)) == ["a dog", "a cat"]
    assert ("is not kept in" in caplog.text) == bool(content)


def test_an_entry_that_cannot_be_read_is_made_anew(tars, headers_read):
    open_rows(tars, VIDEOS)
    with sqlite3.connect(module.index_file()) as database:
        database.execute("UPDATE tars SET members = ?", (b"\x00",))
    database.close()
    assert captions(open_rows(tars, VIDEOS)) == ["a dog", "a cat"]
    assert captions(open_rows(tars, VIDEOS)) == ["a dog", "a cat"]
    assert len(headers_read) == 4


def test_where_the_index_is_kept(monkeypatch, tmp_path):
    assert module.index_file() == tmp_path / "cache" / "tars.sqlite"
    monkeypatch.delenv("DIFFUSERS_MCM_CACHE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    assert module.index_file() == tmp_path / "diffusers-mcm" / "tars.sqlite"
