"""Folders of samples: what each video shows, how it was made, and which of its frames are read."""

import errno
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_mcm.data.faults import UnusableItem
from diffusers_mcm.evaluation.samples import open_samples, size_of
from diffusers_mcm.evaluation.videos import Window, seeds_of
from diffusers_mcm.video_io import write_video
from tests.evaluation.conftest import CAPTIONS, brightness, ramp, write_samples

WINDOW = Window(4, 1, None, "start", 64, 64)


def test_own_samples_say_prompt_seed_and_settings(tmp_path):
    found = open_samples(write_samples(tmp_path / "mcm4"))
    assert found.name == "mcm4"
    assert [(video.caption, video.seed) for video in found.videos] == list(zip(CAPTIONS, range(6)))
    assert found.settings == {"num_inference_steps": 4, "model": "mcm-shapes"}


def test_only_what_all_samples_say_alike_is_a_setting(tmp_path):
    write_samples(tmp_path / "all", 4)
    write_video(tmp_path / "all" / "last.mp4", ramp(8), metadata={"prompt": "p", "num_inference_steps": 8})
    assert open_samples(tmp_path / "all").settings == {}


def test_a_table_beside_the_files_says_the_prompts(ramps):
    found = open_samples(ramps, "theirs")
    assert [video.caption for video in found.videos] == ["long", "short"] and found.name == "theirs"
    assert len(found.skipped) == 1


@pytest.mark.parametrize("column", ["steps", "num_inference_steps", "Num Inference Steps"])
def test_a_table_may_say_seeds_steps_and_settings(ramps, column):
    lines = [f"file_name,caption,seed,{column},sampler", "0.mp4,long,7,4,ddim", "1.mp4,short,9,4,ddim"]
    (ramps / "metadata.csv").write_text("\n".join(lines))
    found = open_samples(ramps, "theirs")
    assert [video.seed for video in found.videos] == [7, 9] and seeds_of(found.videos) == "7 and 9"
    assert (found.steps, found.steps_by_name, found.settings["sampler"]) == (4, False, "ddim")
    (ramps / "metadata.csv").write_text("\n".join([lines[0], "0.mp4,long,,4,ddim", "1.mp4,short,,8,dpm++"]))
    mixed = open_samples(ramps, "theirs8")
    assert mixed.steps is None and mixed.settings == {} and seeds_of(mixed.videos) is None


def test_a_table_names_folders_of_frames(tmp_path):
    """What `write_video` says in them is of each video, and no table."""
    for name in ("one", "two", "sub/three"):
        write_video(tmp_path / name, ramp(8), metadata={"prompt": "p", "seed": 5, "fps": 8})
    write_video(tmp_path / "four.mp4", ramp(8))
    (tmp_path / "empty").mkdir()
    names = ("one", "two/", "sub\\three", "four.mp4", "empty", "gone")
    lines = ["file_name,caption,fps", *(f"{name},{n},12" for n, name in enumerate(names))]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    found = open_samples(tmp_path)
    assert {video.caption: video.seed for video in found.videos} == {"0": 5, "1": 5, "2": 5, "3": None, "4": None}
    assert [Path(name).name for name in found.skipped] == ["gone"]
    videos = {video.caption: video for video in found.videos}
    empty = videos.pop("4")
    assert all(brightness(video.read(WINDOW, 0)) == [0, 1, 2, 3] for video in videos.values())
    assert [videos[caption].rate() for caption in "012"] == [12, 12, 12] and size_of([found]) == (16, 16)
    with pytest.raises(UnusableItem, match="it has 0 frames, fewer than the 4"):
        empty.read(WINDOW, 0)


def test_folders_of_frames_alone_beside_a_table_without_their_size(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "metadata.csv").write_text("file_name,caption\na,one\nb,two\n")
    with pytest.raises(ValueError, match="none of the 2 videos of .* can be opened"):
        size_of([open_samples(tmp_path)])


def test_what_cannot_be_followed_or_listed_stops_nothing(tmp_path, monkeypatch, caplog):
    write_video(tmp_path / "a ring-0.mp4", ramp(8))
    write_video(tmp_path / "a dot-0", ramp(8))
    (tmp_path / "a loop-0.mp4").symlink_to("a loop-0.mp4")
    (tmp_path / "lost+found").mkdir()
    listed = Path.iterdir

    def iterdir(path):
        if path.name == "lost+found":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    found = open_samples(tmp_path)
    assert [video.caption for video in found.videos] == ["a dot", "a loop", "a ring"]
    assert "lost+found is not read: the video cannot be read (PermissionError" in caplog.text
    with pytest.raises(UnusableItem, match="symbolic links"):
        found.videos[1].read(WINDOW, 0)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_numbers_of_a_table_are_numbers(ramps, name):
    """A whole column with a gap is one of 4.0 and 8.0 where pandas writes it, and a long seed is not rounded."""
    seeds, made = [7, 2**53 + 1], dict(steps=4.0, guidance_scale=7.5, fps=8)
    rows = [dict(file_name=f"{n}.mp4", caption="c", seed=f"{seed}.0", **made) for n, seed in enumerate(seeds)]
    (ramps / "metadata.csv").unlink()
    lines = [",".join(map(str, row.values())) for row in rows] if name.endswith("csv") else map(json.dumps, rows)
    (ramps / name).write_text("\n".join([*([",".join(rows[0])] if name.endswith("csv") else []), *lines]))
    found = open_samples(ramps)
    assert [video.seed for video in found.videos] == seeds and found.steps == 4
    assert found.settings == {"num_inference_steps": 4, "guidance_scale": 7.5, "fps": 8}


def test_a_table_says_the_same_however_it_names_a_file(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "caf\u00e9.mp4") for form in ("NFC", "NFD"))
    for name in (nfd, "sub/b.mp4", "c.mp4"):
        write_video(tmp_path / name, ramp(8))
    names = (nfc, "sub\\b.mp4", str(tmp_path / "c.mp4"))
    lines = ["file_name,caption,seed,steps", *(f"{name},{'abc'[n]},{n + 7},4" for n, name in enumerate(names))]
    (tmp_path / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    found = open_samples(tmp_path)
    assert {(video.caption, video.seed) for video in found.videos} == {("a", 7), ("b", 8), ("c", 9)}
    assert found.steps == 4 and not found.skipped


@pytest.mark.parametrize("name", ["all.zip", "all.tar", "sub/all.tar.gz"])
def test_archives_beside_a_table_are_left_alone(ramps, name):
    (ramps / name).parent.mkdir(exist_ok=True)
    (ramps / name).write_bytes(b"a copy of the videos")
    assert [video.caption for video in open_samples(ramps).videos] == ["long", "short"]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("clip,sentence", r"Call it file_name, or another of \[.*'video', .*\]: no flag names it here"),
        ("video,sentence", r"looked for \['caption', .*\]; .* Rename it to one of those: no flag names it here"),
    ],
)
def test_columns_of_a_table_that_are_not_known(ramps, header, message):
    (ramps / "metadata.csv").write_text(f"{header}\n0.mp4,long\n")
    with pytest.raises(ValueError, match=message) as refused:
        open_samples(ramps)
    assert "--" not in str(refused.value)


SETTINGS = {"model": "x", "seed": 3, "vae": {"dtype": "float16"}}


@pytest.mark.parametrize("settings", [SETTINGS, {"video": {"fps": 8}}, {"file": None, "path": {"weights": "x"}}])
def test_settings_beside_samples_are_no_table(tmp_path, settings):
    for name in ("a ring", "a dot"):
        write_video(tmp_path / f"{name}-0.mp4", ramp(8))
    (tmp_path / "metadata.json").write_text(json.dumps(settings))
    assert [video.caption for video in open_samples(tmp_path).videos] == ["a dot", "a ring"]
    (tmp_path / "metadata.csv").write_text("file_name,caption\na ring-0.mp4,one\na dot-0.mp4,two\n")
    assert [video.caption for video in open_samples(tmp_path).videos] == ["two", "one"]


@pytest.mark.parametrize(
    "table",
    [
        {"clip": "a ring-0.mp4", "sentence": "one"},
        {"a ring-0.mp4": {"prompt": "one"}},
        {"videos": [{"clip": "A RING-0.MP4"}]},
        {"file_name": "a ring-0", "text": 7},
        {"file_name": {"0": "a ring-0", "1": "a dot-0"}},
        {"file": {"x": "a ring-0"}, "caption": {"x": "one"}},
        [SETTINGS],
    ],
)
def test_what_names_a_file_is_a_table_and_refused_where_it_is_none(tmp_path, table):
    for name in ("a ring", "a dot"):
        write_video(tmp_path / f"{name}-0.mp4", ramp(8))
    (tmp_path / "metadata.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="metadata.json"):
        open_samples(tmp_path)


def test_each_row_of_a_table_says_its_own(ramps):
    (ramps / "metadata.csv").write_text("file_name,caption,seed\n0.mp4,long,7\n0.mp4,longer,8\n")
    assert [(video.caption, video.seed) for video in open_samples(ramps).videos] == [("long", 7), ("longer", 8)]


@pytest.mark.parametrize("name", ["Metadata.CSV", "metadata.ndjson", "METADATA.jsonl"])
def test_tables_of_every_name_are_seen_beside_samples(ramps, name):
    (ramps / "metadata.csv").unlink()
    row = {"File_Name": "0.mp4", "Caption": "long", "Seed": 7, "Steps": 4}
    lines = [",".join(row), ",".join(map(str, row.values()))] if name.endswith("CSV") else [json.dumps(row)]
    (ramps / name).write_text("\n".join(lines))
    found = open_samples(ramps)
    assert [(video.caption, video.seed) for video in found.videos] == [("long", 7)] and found.steps == 4


def test_what_one_of_two_columns_leaves_open_the_other_says(ramps):
    lines = ["file_name,caption,num_inference_steps,steps", "0.mp4,long,4,", "1.mp4,short,,4"]
    (ramps / "metadata.csv").write_text("\n".join(lines))
    assert open_samples(ramps).steps == 4


def test_a_rate_in_a_table_counts(tmp_path):
    shown = [0, 0, 1, 1, 2, 2, 3, 3]
    write_video(tmp_path / "a.gif", ramp()[shown], fps=8, metadata={"prompt": "p", "num_frames": 8, "fps": 8})
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.gif", "caption": "one", "fps": 8}\n')
    (video,) = open_samples(tmp_path).videos
    assert video.rate() == 8 and brightness(video.read(WINDOW._replace(num_frames=8), 0)) == shown


@pytest.mark.parametrize("fps", ["fast", "0", "-8", "nan", "inf"])
def test_what_is_no_rate_is_none(tmp_path, fps):
    write_video(tmp_path / "a.gif", ramp(8), fps=10)
    (tmp_path / "metadata.csv").write_text(f"file_name,caption,fps\na.gif,one,{fps}\n")
    assert open_samples(tmp_path).videos[0].rate() == pytest.approx(10)


def test_the_files_own_metadata_count_beside_a_table(tmp_path):
    folder = Path(write_samples(tmp_path / "mcm"))
    (folder / "metadata.csv").write_text("file_name,caption\n0001-clip.mp4,one\n0002-clip.mp4,two\n")
    found = open_samples(folder)
    assert [(video.caption, video.seed) for video in found.videos] == [("one", 0), ("two", 1)]
    assert found.steps == 4 and found.settings["model"] == "mcm-shapes"


def test_a_sample_that_is_there_twice_is_told(tmp_path, caplog):
    for name, caption, seed in (("1.mp4", "a", 1), ("1.gif", "a", 1), ("2.mp4", "a", 2), ("3.mp4", "b", 1)):
        write_video(tmp_path / "m" / name, ramp(8), metadata={"prompt": caption, "seed": seed})
    told = "1 of the 4 videos of m have the caption and the seed of another one, and count beside it: 1.gif and 1.mp4."
    assert open_samples(tmp_path / "m").remarks == [told] and told in caplog.text
    (tmp_path / "m" / "1.gif").unlink()
    assert not open_samples(tmp_path / "m").remarks


def test_a_sample_that_a_table_names_twice_is_told(ramps):
    (ramps / "metadata.csv").write_text("file_name,caption\n0.mp4,long\n0.mp4,longer\n1.mp4,short\n")
    (told,) = open_samples(ramps, "m").remarks
    assert told == "1 of the 3 videos of m are the file of another one, and count beside it: 0.mp4 and 0.mp4."


def test_what_no_row_of_a_table_names_is_told_once(tmp_path, caplog):
    for name in ("a.mp4", "b.mp4", "c.gif", "d.gif", "sub/e", "sub/f"):
        write_video(tmp_path / name, ramp(8), metadata={"prompt": "p"})
    write_video(tmp_path / "sub" / "e" / "preview.gif", ramp(8))
    (tmp_path / "metadata.csv").write_text("file_name,caption\na.mp4,one\nc.gif,two\nsub/e,three\n")
    found = open_samples(tmp_path, "m")
    told = "3 of the 6 video files are not used, for no row of the metadata names them: b.mp4, d.gif, sub/f"
    assert found.remarks == [f"m: {told}."] and caplog.text.count(told) == 1
    assert len(found.videos) == 3 and not found.skipped


def test_steps_are_taken_from_the_name_where_nothing_else_says_them(ramps, tmp_path):
    found = open_samples(ramps, "lcm4")
    assert (found.steps, found.steps_by_name) == (4, True)
    assert (open_samples(ramps, "lcm").steps, open_samples(ramps, "lcm").steps_by_name) == (None, False)
    own = open_samples(write_samples(tmp_path / "mcm8", steps=4))
    assert (own.steps, own.steps_by_name) == (4, False)


@pytest.mark.parametrize("name", ["a-0.mp4", "a-0.gif", "a-0.webp", "a-0"])
def test_frame_rates_of_samples(tmp_path, name):
    write_video(tmp_path / name, ramp(8), fps=12.5, metadata={"prompt": "p", "fps": 12.5})
    (video,) = open_samples(tmp_path).videos
    assert video.rate() == pytest.approx(12.5)
    rates = [Window(4, 1, None, "start", 8, 8), Window(4, 5, None, "start", 8, 8), Window(4, 1, 6.0, "start", 8, 8)]
    assert [window.rate(12.5) for window in rates] == [12.5, 2.5, 6.0]
    assert np.isnan(rates[0].rate(None)) and rates[2].rate(None) == 6.0


@pytest.mark.parametrize("name", ["a-0.gif", "a-0"])
def test_frame_rates_that_nothing_says(tmp_path, name):
    write_video(tmp_path / name, ramp(8), fps=10)
    assert open_samples(tmp_path).videos[0].rate() == (None if name == "a-0" else pytest.approx(10))


def test_vbench_names(tmp_path):
    write_video(tmp_path / "a blue ring-0.mp4", ramp(8))
    for index in range(2):
        write_video(tmp_path / f"a red-hot ring-{index}.mp4", ramp(8))
    found = open_samples(tmp_path).videos
    assert [video.caption for video in found] == ["a blue ring", "a red-hot ring", "a red-hot ring"]
    assert seeds_of(found) is None  # the numbers count


def test_what_files_without_a_prompt_say_counts_beside_their_names(tmp_path):
    for seed, name in enumerate(("a ring-0", "a ring-1", "a dot-0")):
        write_video(tmp_path / f"{name}.mp4", ramp(8), metadata={"seed": seed + 5, "num_inference_steps": 4})
    found = open_samples(tmp_path)
    assert seeds_of(found.videos) == "5 to 7" and (found.steps, found.steps_by_name) == (4, False)


@pytest.mark.parametrize("name", ["a-0.mp4", "a-0.gif", "a-0.webp", "a-0"])
def test_every_format_that_holds_frames(tmp_path, name):
    write_video(tmp_path / name, ramp(8))
    (video,) = open_samples(tmp_path).videos
    frames = video.read(Window(4, 1, None, "start", 16, 16), 0)
    assert frames.shape == (4, 16, 16, 3) and brightness(frames) == [0, 1, 2, 3]
    assert size_of([open_samples(tmp_path)]) == (16, 16)


@pytest.mark.parametrize("name", ["a-0.webp", "a-0"])
def test_too_few_pictures(tmp_path, name):
    write_video(tmp_path / name, ramp(3))
    with pytest.raises(UnusableItem, match="it has 3 frames, fewer than the 4 asked for"):
        open_samples(tmp_path).videos[0].read(WINDOW, 0)


@pytest.mark.parametrize("name", ["sample", "Video", "clip_4"])
def test_names_that_only_count_are_no_captions(tmp_path, name):
    for index in range(3):
        write_video(tmp_path / f"{name}-{index:04d}.mp4", ramp(8))
    told = f"all 3 videos of .* would show '{name}', by their names: write a metadata.csv"
    with pytest.raises(ValueError, match=told):
        open_samples(tmp_path)


@pytest.mark.parametrize("prompt", ["a red circle", "\u7ea2\u5706"])
def test_samples_of_one_prompt_may_be_called_by_it(tmp_path, caplog, prompt):
    for index in range(3):
        write_video(tmp_path / f"{prompt}-{index}.mp4", ramp(8))
    found = open_samples(tmp_path, "m")
    assert found.captions() == {prompt: 3}
    assert found.remarks == [f"All 3 videos of m show {prompt!r}, by their names."]
    assert caplog.text.count(found.remarks[0]) == 1


def test_frames_are_read_by_the_numbers_in_their_names(tmp_path):
    (tmp_path / "a-0").mkdir()
    for t in range(12):
        Image.fromarray(ramp()[t]).save(tmp_path / "a-0" / f"{t}.png")
    frames = open_samples(tmp_path).videos[0].read(Window(12, 1, None, "start", 16, 16), 0)
    assert brightness(frames) == list(range(12))


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
@pytest.mark.parametrize("shown", [[5] * 8, [0, 0, 0, 9, 9, 20, 20, 20]], ids=["still", "in part"])
def test_animations_whose_writer_joins_equal_frames(tmp_path, suffix, shown):
    path = tmp_path / f"clip{suffix}"
    write_video(path, ramp()[shown], fps=8, metadata={"prompt": "p", "seed": 0, "num_frames": 8, "fps": 8})
    frames = open_samples(tmp_path).videos[0].read(Window(8, 1, None, "start", 16, 16), 0)
    np.testing.assert_allclose(brightness(frames), shown, atol=1)


def test_a_table_beside_animations(tmp_path):
    write_video(tmp_path / "a.webp", ramp(8))
    (tmp_path / "metadata.csv").write_text("file_name,caption\na.webp,one\n")
    (video,) = open_samples(tmp_path).videos
    assert video.caption == "one" and len(video.read(WINDOW, 0)) == 4


GRAPH = {"6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat"}}}


@pytest.mark.parametrize(
    "foreign",
    [
        {"prompt": json.dumps(GRAPH), "workflow": {"nodes": []}},
        {"prompt": json.dumps(GRAPH)},
        {"prompt": GRAPH},
        {"prompt": "a prompt", "workflow": "{}"},
        {"prompt": None},
    ],
)
@pytest.mark.parametrize("suffix", ["mp4", "gif"])
def test_the_graph_of_nodes_of_another_tool_is_no_caption(tmp_path, foreign, suffix):
    for name in ("a cat-0", "a dog-0"):
        write_video(tmp_path / f"{name}.{suffix}", ramp(8), metadata=foreign | {"seed": 5})
    found = open_samples(tmp_path)
    assert [(video.caption, video.seed) for video in found.videos] == [("a cat", None), ("a dog", None)]
    (tmp_path / "metadata.csv").write_text(f"file_name,caption\na cat-0.{suffix},one\na dog-0.{suffix},two\n")
    assert open_samples(tmp_path).settings == {}


@pytest.mark.parametrize("prompt", ["{red|blue} ring", "[a ring]", "7", '"quoted"'])
def test_a_prompt_with_brackets_is_a_prompt(tmp_path, prompt):
    write_video(tmp_path / "a.mp4", ramp(8), metadata={"prompt": prompt})
    assert open_samples(tmp_path).videos[0].caption == prompt


def test_what_cannot_be_opened_is_skipped_where_others_say_their_prompts(tmp_path):
    folder = Path(write_samples(tmp_path / "mcm4"))
    (folder / "0002-clip.mp4").write_bytes((folder / "0002-clip.mp4").read_bytes()[:700])
    (folder / "0003-clip.mp4").write_bytes(b"")
    (folder / "._0001-clip.mp4").write_bytes(b"what macOS leaves")
    found = open_samples(folder)
    assert [video.caption for video in found.videos] == [CAPTIONS[0], *CAPTIONS[3:]]
    assert {Path(name).name for name in found.skipped} == {"0002-clip.mp4", "0003-clip.mp4"}
    assert all("cannot be read" in reason for reason in found.skipped.values())


@pytest.mark.parametrize("data", [b"no video", b"OggS"])  # of which FFmpeg says that it ends
def test_what_ffmpeg_cannot_open_in_any_way_is_skipped(tmp_path, data):
    write_video(tmp_path / "1.mp4", ramp(8), metadata={"prompt": "p"})
    (tmp_path / "0.mp4").write_bytes(data)
    found = open_samples(tmp_path)
    assert [Path(name).name for name in found.skipped] == ["0.mp4"]
    (tmp_path / "metadata.csv").write_text("file_name,caption\n0.mp4,zero\n1.mp4,one\n")
    found = open_samples(tmp_path)
    assert [video.caption for video in found.videos] == ["zero", "one"] and size_of([found]) == (16, 16)


def test_a_name_may_begin_as_an_address_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video("red: a ring-0.mp4", ramp(8), metadata={"prompt": "red: a ring", "seed": 5})
    found = open_samples(".")
    (video,) = found.videos
    assert (video.caption, video.seed, video.rate()) == ("red: a ring", 5, 8) and size_of([found]) == (16, 16)
    assert brightness(video.read(WINDOW, 0)) == [0, 1, 2, 3]


def test_a_video_without_a_prompt_among_others_that_have_one(tmp_path):
    write_samples(tmp_path / "mcm4")
    write_video(tmp_path / "mcm4" / "other.mp4", ramp(8))
    with pytest.raises(ValueError, match="other.mp4 does not say what it shows, as others of .* do"):
        open_samples(tmp_path / "mcm4")


@pytest.mark.parametrize("name", ["a-0.webp", "a-0"])
def test_a_broken_picture_is_the_videos_fault(tmp_path, name):
    write_video(tmp_path / name, ramp(8))
    broken = tmp_path / name / "0003.png" if name == "a-0" else tmp_path / name
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(UnusableItem, match="the video cannot be read"):
        open_samples(tmp_path).videos[0].read(WINDOW, 0)


def test_samples_of_several_sizes(tmp_path):
    write_samples(tmp_path / "a")
    write_video(tmp_path / "b" / "a-0.mp4", ramp(8))
    with pytest.raises(ValueError, match=r"samples of one size, got 64×64 in .*a, 16×16 in .*b: say with --size"):
        size_of([open_samples(tmp_path / "a"), open_samples(tmp_path / "b")])


def test_captions_are_the_same_however_unicode_writes_them(tmp_path):
    write_video(tmp_path / "a.mp4", ramp(8), metadata={"prompt": "cafe\u0301"})
    assert open_samples(tmp_path).videos[0].caption == "caf\u00e9"


def test_a_video_that_does_not_say_what_it_shows(tmp_path):
    write_video(tmp_path / "clip.mp4", ramp(8))
    with pytest.raises(ValueError, match=r"clip.mp4 does not say what it shows: .* metadata.csv with file_name"):
        open_samples(tmp_path)


def test_folders_without_videos(tmp_path):
    with pytest.raises(ValueError, match="holds no videos"):
        open_samples(tmp_path)
    with pytest.raises(ValueError, match="which is not there"):
        open_samples(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="which is a file"):
        open_samples(tmp_path / "file")


def test_the_size_of_what_cannot_be_read(tmp_path):
    (tmp_path / "a-0.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="none of the 1 videos of .* can be opened"):
        size_of([open_samples(tmp_path)])


def test_a_preview_among_frames_makes_them_no_samples(tmp_path):
    """As a tool writes it beside the frames, with a table of them."""
    for name in "ab":
        folder = tmp_path / name
        folder.mkdir()
        for number in range(8):
            Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / f"{number}.png")
        Image.new("RGB", (16, 16)).save(folder / "preview.gif")
        (folder / "metadata.csv").write_text("file_name,caption\n0.png,a picture\n1.png,a picture\n")
    (tmp_path / "metadata.csv").write_text("file_name,caption\na,a red ring\nb,a blue ring\n")
    found = open_samples(tmp_path, "theirs")
    assert [Path(video.name).name for video in found.videos] == ["a", "b"] and not found.remarks
