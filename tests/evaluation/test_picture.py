"""The picture: a chart for each column with scores at known steps."""

import numpy as np
from PIL import Image

from diffusers_mcm.evaluation.metrics import columns_of
from diffusers_mcm.evaluation.picture import COLOURS, HEIGHT, WIDTH, draw

COLUMNS = columns_of(["fvd"], ["i3d"], [])[:1]


def pixels_of(picture, colour):
    """Rows and columns of the pixels of a colour."""
    rgb = np.array(Image.new("RGB", (1, 1), colour))[0, 0]
    return np.argwhere((np.asarray(picture.convert("RGB")) == rgb).all(-1))


def chart(path, series, truth=None):
    lines = {name: [(steps, {"fvd.i3d": fvd}) for steps, fvd in line.items()] for name, line in series.items()}
    draw(path, lines, {} if truth is None else {"fvd.i3d": truth}, COLUMNS)
    return Image.open(path)


def test_a_lower_score_lies_lower_and_more_steps_to_the_right(tmp_path):
    found = pixels_of(chart(tmp_path / "a.png", {"mcm": {1: 500.0, 8: 300.0}}), COLOURS[0])
    found = found[found[:, 0] < HEIGHT]  # without the legend
    left, right = found[found[:, 1].argmin()], found[found[:, 1].argmax()]
    assert right[0] > left[0] + 100 and right[1] > left[1] + 200


def test_methods_have_colours_of_their_own_and_a_legend(tmp_path):
    picture = chart(tmp_path / "a.png", {"mcm": {1: 100.0, 4: 400.0}, "lcm": {1: 200.0, 4: 300.0}})
    assert picture.size[0] == WIDTH and picture.size[1] > HEIGHT
    assert len(pixels_of(picture, COLOURS[0])) and len(pixels_of(picture, COLOURS[1]))
    assert not len(pixels_of(picture, COLOURS[2]))


def test_the_reference_is_a_line(tmp_path):
    picture = chart(tmp_path / "a.png", {"mcm": {4: 500.0}}, 490.0)
    rows, counts = np.unique(pixels_of(picture, "#aaaaaa")[:, 0], return_counts=True)
    assert counts.max() > 300 and len(rows) >= 2


def test_without_scores_there_is_no_picture(tmp_path):
    draw(tmp_path / "a.png", {"theirs": [(4, {})]}, {"fvd.i3d": 1.0}, COLUMNS)
    assert not (tmp_path / "a.png").exists()
