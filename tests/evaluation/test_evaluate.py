"""A whole evaluation on tiny networks, and what is refused before any of its work."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from diffusers_mcm.commands.prompts import read_prompts
from diffusers_mcm.evaluation.distances import frechet_distance
from diffusers_mcm.evaluation.evaluate import Options, evaluate, write_prompts
from diffusers_mcm.evaluation.measuring import Processes
from diffusers_mcm.evaluation.networks import load_videomae
from diffusers_mcm.evaluation.samples import open_samples
from diffusers_mcm.evaluation.videos import Window, open_reference
from diffusers_mcm.shapes.render import render_video
from diffusers_mcm.video_io import write_video
from tests.evaluation.conftest import CAPTIONS, write_samples


@pytest.fixture
def options(videomae):
    return dict(
        metrics=("fvd", "clipsim", "fid"),
        num_frames=8,
        video_networks=(f"videomae={videomae}",),
        frame_networks=("dinov2=mcm-shapes-features",),
        clip="mcm-shapes-clip",
        resamples=20,
    )


def folders(samples):
    return {name: samples / name for name in ("mcm4", "mcm1")}


def test_scores_are_those_of_the_features(samples, world, tmp_path, options, videomae):
    found = evaluate(folders(samples), str(world), tmp_path / "results", Options(**options))
    window = Window(8, 1, None, "centre", 64, 64)
    network = load_videomae(videomae)

    def features(videos, start):
        return network(np.stack([video.read(window, start) for video in videos]))

    truth = features(open_reference(str(world), None, 0).videos, 0.5)
    expected = frechet_distance(features(open_samples(samples / "mcm4").videos, 0.0), truth)
    # float32 features in batches of another size
    assert found.methods["mcm4"].values["fvd.videomae"] == pytest.approx(expected, rel=1e-2)
    assert set(found.methods["mcm4"].values) == {
        *("fvd.videomae", "fid.dinov2", "clipsim", "motion.change", "motion.near_still", "motion.flicker")
    }
    assert found.methods["mcm4"].steps == 4 and found.methods["mcm1"].steps == 1


def test_a_frozen_video_is_seen_by_its_motion_alone(samples, world, tmp_path, options):
    found = evaluate(folders(samples), str(world), tmp_path / "results", Options(**options))
    moving, frozen = (found.methods[name].values for name in ("mcm4", "mcm1"))
    assert frozen["motion.near_still"] == 1 and moving["motion.near_still"] == 0
    assert frozen["clipsim"] > 0.97 * moving["clipsim"]
    assert found.reference.values["motion.change"] == pytest.approx(moving["motion.change"], rel=0.5)
    (change,) = [each for each in found.differences if each.column == "motion.change"]
    assert (change.method, change.less) == ("mcm1", "mcm4") and change.is_clear and change.interval.high < 0


def test_files_are_written_and_a_further_method_is_put_beside(samples, world, tmp_path, options):
    output = tmp_path / "results"
    evaluate({"mcm4": samples / "mcm4"}, str(world), output, Options(**options), versions={"diffusers_mcm": "0.8"})
    again = evaluate(
        {"mcm1": samples / "mcm1"}, str(world), output, Options(**options), versions={"diffusers_mcm": "0.9"}
    )
    assert list(again.methods) == ["mcm4", "mcm1"]
    assert [method.versions["diffusers_mcm"] for method in again.methods.values()] == ["0.8", "0.9"]
    written = json.loads((output / "evaluation.json").read_text())
    assert written["versions"]["CLIPSIM"] == "mcm-shapes-clip"
    assert [row[0] for row in written["table"]["rows"]] == ["(reference)", "mcm4", "mcm1"]
    assert Image.open(output / "evaluation.png").size[1] > 100
    page = (output / "evaluation.md").read_text()
    assert "| mcm1 | 1 | 6 |" in page and "| `resamples` | 20 of" in page
    assert (
        "| versions | diffusers_mcm 0.9, torch " in page
        and "| versions that measured mcm4 | diffusers_mcm 0.8," in page
    )
    assert "versions that measured mcm1" not in page
    kept = evaluate(folders(samples), str(world), output, Options(**options), versions={"diffusers_mcm": "1.0"})
    assert {name: method.versions["diffusers_mcm"] for name, method in kept.methods.items()} == {
        "mcm4": "0.8",
        "mcm1": "0.9",
    }  # whose features were all there
    assert "- mcm4: num_inference_steps 4, model mcm-shapes, seeds 0 to 5, 8 frames a second" in page


def test_a_video_that_cannot_be_read_again_makes_no_new_versions(samples, world, tmp_path, options):
    shutil.copytree(samples / "mcm4", tmp_path / "mcm4")
    (tmp_path / "mcm4" / "0002-clip.mp4").write_bytes(b"no video")
    some, output = {"mcm4": tmp_path / "mcm4"}, tmp_path / "results"
    for version in ("0.8", "0.9"):
        found = evaluate(some, str(world), output, Options(**options), versions={"diffusers_mcm": version})
    assert found.methods["mcm4"].num_videos == 5 and found.methods["mcm4"].versions["diffusers_mcm"] == "0.8"


def test_what_is_measured_later_is_scored_as_in_one_call(samples, world, tmp_path, options):
    """From the features that are kept: differences, scores and what is said of the samples are the same."""
    together = evaluate(folders(samples), str(world), tmp_path / "together", Options(**options))
    output = tmp_path / "results"
    for name in ("mcm4", "mcm1", "mcm4"):  # the first of them again
        found = evaluate({name: samples / name}, str(world), output, Options(**options))
    assert found.methods == together.methods and found.protocol == together.protocol
    told = {frozenset((d.method, d.less)): abs(d.interval.estimate) for d in found.differences}
    assert told == {frozenset((d.method, d.less)): abs(d.interval.estimate) for d in together.differences}
    assert len(found.differences) == len(together.differences) == 6


def test_where_features_are_gone_scores_stay_and_the_page_says_what_has_no_interval(samples, world, tmp_path, options):
    output, options = tmp_path / "results", options | dict(metrics=("clipsim",))
    evaluate(folders(samples), str(world), output, Options(**options))
    shutil.rmtree(output / "features" / "mcm4")
    kept = evaluate({"mcm1": samples / "mcm1"}, str(world), output, Options(**options | dict(resamples=30)))
    assert len(kept.differences) == 4  # neither has changed
    assert {difference.resamples for difference in kept.differences} == {20} and kept.resamples == 30
    assert "(resampled 20 times)" in (output / "evaluation.md").read_text()
    third = write_samples(tmp_path / "third4", seeds=range(20, 26))
    evaluate({"third4": third}, str(world), output, Options(**options))
    page = (output / "evaluation.md").read_text()
    assert page.count("Each method less mcm4") == page.count("Each method less mcm1") == 1
    assert "There are no intervals of third4 less mcm4: the features of the methods that were measured earlier" in page
    shutil.rmtree(output)
    evaluate({"mcm4": samples / "mcm4"}, str(world), output, Options(**options))
    shutil.rmtree(output / "features" / "mcm4")
    evaluate({"mcm1": samples / "mcm1"}, str(world), output, Options(**options))
    page = (output / "evaluation.md").read_text()
    assert "There are no intervals: the features of the methods that were measured earlier" in page


def test_other_captions_than_those_of_earlier_methods_are_refused_before_the_work(samples, world, tmp_path, options):
    output = tmp_path / "results"
    evaluate({"mcm4": samples / "mcm4"}, str(world), output, Options(**options))
    write_samples(tmp_path / "other", captions=[*CAPTIONS[:5], CAPTIONS[0]])
    with pytest.raises(ValueError, match="mcm4 does not show '.*', as .*other does: .*; mcm4 were measured before"):
        evaluate({"other": tmp_path / "other"}, str(world), output, Options(**options))
    assert not (output / "features" / "other").exists()


@pytest.mark.parametrize("change, rates, told", [({}, [24, 24], True), ({"frame_interval": 3}, [8, 8], False),
                                                 ({"fps": 8.0}, [8, 8], False)])  # fmt: skip
def test_clips_of_other_frame_rates_are_told(change, rates, told, samples, tmp_path, options, caplog):
    """Samples have 8 frames a second, the reference 24, of which every third is taken, or 8 a second."""
    lines = ["file_name,caption"]
    for number, caption in enumerate(CAPTIONS):
        write_video(tmp_path / "world" / f"{number}.mp4", render_video(caption, number, "video", 64, 16), fps=24)
        lines.append(f"{number}.mp4,{caption}")
    (tmp_path / "world" / "metadata.csv").write_text("\n".join(lines) + "\n")
    options |= dict(metrics=("clipsim",), num_frames=4) | change
    one = {"mcm4": samples / "mcm4"}
    found = evaluate(one, str(tmp_path / "world"), tmp_path / "results", Options(**options))
    assert found.protocol["reference_fps"] == found.reference.fps == rates
    assert found.methods["mcm4"].fps == [8, 8]
    sentence = f"The clips of the reference have {rates[0]} frames a second, but those of mcm4 8: at two rates"
    assert (sentence in caplog.text) == (sentence in found.summary()) == told


def test_another_protocol_is_refused_before_the_work(samples, world, tmp_path, options):
    one = {"mcm4": samples / "mcm4"}
    evaluate(one, str(world), tmp_path / "results", Options(**options))
    before = sorted(path.name for path in (tmp_path / "results").rglob("*.safetensors"))
    with pytest.raises(ValueError, match="window.place: 'centre' there, 'start' now"):
        evaluate(one, str(world), tmp_path / "results", Options(**options, window="start"))
    assert sorted(path.name for path in (tmp_path / "results").rglob("*.safetensors")) == before


def test_the_first_process_scores_when_nobody_waits_for_it(samples, world, tmp_path, options):
    """All part with each other after the last time that they wait, and the others leave with nothing."""
    told = []

    def progress(items, name):
        told.append(name)
        return items

    def by(index):
        processes = Processes(index, 2, lambda: told.append("wait"), lambda: told.append("part"))
        given = (folders(samples), str(world), tmp_path / "results", Options(**options))
        return evaluate(*given, processes=processes, progress=progress)

    assert list(by(0).methods) == ["mcm4", "mcm1"]
    assert told[-3:] == ["wait", "part", "intervals"] and told.count("part") == 1
    told.clear()
    assert by(1) is None
    assert told[-2:] == ["wait", "part"] and told.count("part") == 1


def test_images_instead_of_the_frames_of_the_reference(samples, world, tmp_path, options):
    from diffusers_mcm.shapes.render import render_image

    folder = tmp_path / "images"
    folder.mkdir()
    for number, caption in enumerate(CAPTIONS):
        Image.fromarray(render_image(caption, number, "cartoon", 64)).save(folder / f"{number}.png")
    one = {"mcm4": samples / "mcm4"}
    options |= dict(metrics=("fid", "kid"))
    own = evaluate(one, str(world), tmp_path / "own", Options(**options))
    data = dict(split="train", caption_column="caption", revision=None)
    other = evaluate(one, str(world), tmp_path / "other", Options(**options), images=str(folder), data=data)
    against = f"| measured against | {world.name}, split train, caption_column caption, images.source images |"
    assert against in (tmp_path / "other" / "evaluation.md").read_text()
    assert f"videos of `{world.name}`, " in other.card_table()["about"]
    fid = [found.methods["mcm4"].values["fid.dinov2"] for found in (own, other)]
    assert fid[1] > 1.2 * fid[0]
    assert (
        own.protocol["kernel distances"] == "unbiased, every two different rows a pair, frames of one video among them"
    )
    assert own.protocol["images"] is None and other.protocol["images"]["num_videos"] == 6
    (folder / "4.png").write_bytes(b"no picture")
    fewer = evaluate(one, str(world), tmp_path / "fewer", Options(**options), images=str(folder))
    assert list(fewer.reference.skipped) == ["4.png"] and fewer.protocol["contents"][1]["num_videos"] == 5


def test_a_reference_of_broken_videos_is_counted(samples, world, tmp_path, options):
    shutil.copytree(world, tmp_path / "world")
    (tmp_path / "world" / "3.mp4").write_bytes(b"no video")
    found = evaluate({"mcm4": samples / "mcm4"}, str(tmp_path / "world"), tmp_path / "results", Options(**options))
    assert found.reference.num_videos == 5
    assert list(found.reference.skipped) == ["3.mp4"]
    assert "Skipped: 1 of the reference." in found.summary()
    assert "- the reference: 3.mp4: " in (tmp_path / "results" / "evaluation.md").read_text()


def test_what_counts_several_times_is_on_the_page(samples, world, tmp_path, options):
    shutil.copytree(world, tmp_path / "world")
    with (tmp_path / "world" / "metadata.csv").open("a") as table:
        table.write(f"3.mp4,{CAPTIONS[3]} again\n")
    shutil.copytree(samples / "mcm4", tmp_path / "twice")
    shutil.copy(tmp_path / "twice" / "0002-clip.mp4", tmp_path / "twice" / "again.mp4")
    options |= dict(metrics=("clipsim",))
    evaluate({"twice": tmp_path / "twice"}, str(tmp_path / "world"), tmp_path / "results", Options(**options))
    page = (tmp_path / "results" / "evaluation.md").read_text()
    assert "The 7 videos of (reference) are 6 files" in page and "again.mp4" in page
    assert "1 of the 7 videos of twice have the caption and the seed of another one" in page


def test_videos_that_no_table_names_are_on_the_page(world, tmp_path, options):
    shutil.copytree(world, tmp_path / "some")
    lines = (tmp_path / "some" / "metadata.csv").read_text().splitlines()
    (tmp_path / "some" / "metadata.csv").write_text("\n".join([*lines[:4], "3.mp4,"]))
    some, results, options = tmp_path / "some", tmp_path / "results", Options(**options | dict(metrics=("motion",)))
    found = evaluate({"some": some}, str(some), results, options)
    assert list(found.methods["some"].skipped) == list(found.reference.skipped) == ["3.mp4"]
    page = (results / "evaluation.md").read_text()
    assert "Skipped: 1 of the reference, 1 of some." in page and str(tmp_path) not in page
    for name in ("some", "(reference)"):
        told = f"{name}: 2 of the 6 video files are not used, for no row of the metadata names them: 4.mp4, 5.mp4."
        assert told in found.notes and told in page
    shutil.copytree(some, tmp_path / "others")
    again = evaluate({"others": tmp_path / "others"}, str(some), results, options)
    assert [note for note in again.notes if note.startswith("some: 2 of the 6 video files are not used")]


def test_folders_of_other_numbers_are_refused_before_the_work(tmp_path, world, samples):
    few = write_samples(tmp_path / "few", captions=CAPTIONS[:5])
    with pytest.raises(ValueError, match=r"as many videos in every folder, got 6 in .*mcm4 and 5 in .*few"):
        evaluate({"mcm4": samples / "mcm4", "few": few}, str(world), tmp_path / "results")
    with pytest.raises(ValueError, match="at least one folder of samples"):
        evaluate({}, str(world), tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_video_that_one_method_lacks_counts_for_none(samples, world, tmp_path, options):
    shutil.copytree(samples / "mcm4", tmp_path / "broken")
    (tmp_path / "broken" / "0002-clip.mp4").write_bytes(b"no video")
    both = {"mcm4": samples / "mcm4", "broken": tmp_path / "broken"}
    found = evaluate(both, str(world), tmp_path / "results", Options(**options))
    assert [method.num_videos for method in found.methods.values()] == [5, 5]
    assert found.methods["mcm4"].values == found.methods["broken"].values
    assert list(found.methods["broken"].skipped) == ["0002-clip.mp4"]  # and no path of this machine
    assert "1 videos count for no method" in (tmp_path / "results" / "evaluation.md").read_text()
    later = evaluate({"mcm1": samples / "mcm1"}, str(world), tmp_path / "results", Options(**options))
    assert {method.num_videos for method in later.methods.values()} == {5}
    shutil.rmtree(tmp_path / "results" / "features" / "broken")
    shutil.rmtree(tmp_path / "results" / "features" / "mcm4")
    with pytest.raises(ValueError, match="samples.num_videos: 5 there, 6 now"):
        evaluate({"mcm1": samples / "mcm1"}, str(world), tmp_path / "results", Options(**options))


def test_other_pixels_under_the_same_names_are_another_reference(samples, world, tmp_path, options):
    shutil.copytree(world, tmp_path / "world")
    evaluate({"mcm4": samples / "mcm4"}, str(tmp_path / "world"), tmp_path / "results", Options(**options))
    shutil.copy(tmp_path / "world" / "1.mp4", tmp_path / "world" / "0.mp4")
    with pytest.raises(ValueError, match="contents: "):
        evaluate({"mcm1": samples / "mcm1"}, str(tmp_path / "world"), tmp_path / "results", Options(**options))


def test_a_moved_reference_is_the_same(samples, world, tmp_path, options):
    evaluate({"mcm4": samples / "mcm4"}, str(world), tmp_path / "results", Options(**options))
    shutil.copytree(world, tmp_path / "moved")
    every = Options(**options, num_videos=6)  # all that there are, in an order of the seed's
    found = evaluate({"mcm1": samples / "mcm1"}, str(tmp_path / "moved"), tmp_path / "results", every)
    assert list(found.methods) == ["mcm4", "mcm1"]


def test_one_network_twice(options, videomae):
    twice = Options(**options | dict(video_networks=(f"videomae={videomae}", "videomae")))
    with pytest.raises(ValueError, match="each network once in --video_network, got videomae several times"):
        twice.chosen()


def test_the_number_of_frames_is_checked_before_the_work(samples, world, tmp_path, options):
    with pytest.raises(ValueError, match="videomae takes 8 frames, not 16"):
        evaluate(folders(samples), str(world), tmp_path / "results", Options(**options | dict(num_frames=16)))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_frames=2), "--num_frames of at least 3, got 2"),
        (dict(num_videos=1), "--num_videos of at least 2, got 1"),
        (dict(fps=0.0), "--fps of at least 0.01, got 0.0"),
        (dict(window="end"), "--window out of centre, start, random, got 'end'"),
        (dict(covariance="biased"), "--covariance out of sample, population, got 'biased'"),
    ],
)
def test_options_out_of_their_range(change, message):
    with pytest.raises(ValueError, match=message):
        Options(**change)


def test_prompts_have_a_seed_each_and_are_those_that_will_be_compared(world, tmp_path):
    assert write_prompts(tmp_path / "prompts.jsonl", str(world), 4, 7) == 4
    prompts = read_prompts([], str(tmp_path / "prompts.jsonl"))
    assert [p.prompt for p in prompts] == [video.caption for video in open_reference(str(world), 4, 7).videos]
    assert len({p.seed for p in prompts}) == 4
    write_prompts(tmp_path / "again.jsonl", str(world), 4, 7)
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "prompts.jsonl").read_text()
