"""The picture of a run's progress."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from medseg.report import figures
from medseg.report.figures import progress_figure, smoothed


def row(epoch, **changes):
    dice = {"liver": 0.5 + 0.01 * epoch, "tumour": None if epoch == 2 else 0.1 * epoch}
    return {
        "epoch": epoch,
        "iteration": 250 * (epoch + 1),
        "lr": 0.01 * (1 - epoch / 10),
        "train_loss": 1 / (epoch + 1),
        "validation_loss": 1.1 / (epoch + 1),
        "patch_dice": dice,
        "mean_patch_dice": 0.3 + 0.05 * epoch,
        "seconds": 12.5 + epoch,
        "wait_seconds": 0.5,
        **changes,
    }


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw a figure and return its axes by title, for a look at what was drawn."""

    def draw(rows):
        kept = []
        monkeypatch.setattr(figures, "save_png", lambda figure, path: kept.append(figure))
        progress_figure(rows, tmp_path / "unused.png")
        return {axes.get_title(): axes for axes in kept[0].axes}

    return draw


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def test_every_curve_shows_its_column(drawn):
    rows = [row(epoch) for epoch in range(5)]
    axes = drawn(rows)
    dice, loss = lines(axes["Dice of validation patches"]), lines(axes["loss"])
    assert loss["training"].get_xdata().tolist() == [1, 2, 3, 4, 5]
    assert loss["training"].get_ydata().tolist() == [r["train_loss"] for r in rows]
    assert loss["validation"].get_ydata().tolist() == [r["validation_loss"] for r in rows]
    assert set(dice) == {"liver", "tumour", "mean", "mean, smoothed"}
    np.testing.assert_allclose(dice["tumour"].get_ydata(), [0, 0.1, np.nan, 0.3, 0.4])
    mean = np.array([r["mean_patch_dice"] for r in rows])
    np.testing.assert_allclose(dice["mean, smoothed"].get_ydata(), smoothed(mean))
    rate = axes["learning rate"].get_lines()[0]
    assert rate.get_ydata().tolist() == [r["lr"] for r in rows]
    assert lines(axes["seconds per epoch"])["waiting for data"].get_ydata().tolist() == [0.5] * 5


def test_smoothing_equals_the_recursion_written_out():
    values = np.random.default_rng(0).random(40)
    values[[0, 7, 8]] = np.nan
    expected, current = [], None
    for value in values.tolist():
        if value == value:
            current = value if current is None else 0.9 * current + 0.1 * value
        expected.append(np.nan if current is None else current)
    np.testing.assert_allclose(smoothed(values), expected)


def test_many_structures_stay_readable(drawn):
    names = [f"s{number}" for number in range(24)]
    axes = drawn([row(epoch, patch_dice=dict.fromkeys(names, 0.5)) for epoch in range(4)])
    dice = axes["Dice of validation patches"]
    assert len(dice.get_lines()) == 26
    shown = [text.get_text() for text in dice.get_legend().get_texts()]
    assert shown == ["each structure", "mean", "mean, smoothed"]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row(0)],
        [row(0, validation_loss=None, patch_dice={}, mean_patch_dice=None), row(1)],
        [row(0, train_loss=float("nan")), {"epoch": 1}],
    ],
)
def test_short_and_patchy_journals_are_drawn(rows, tmp_path):
    progress_figure(rows, tmp_path / "deep" / "progress.png")
    picture = imread(tmp_path / "deep" / "progress.png")
    assert picture.shape[:2] == (1050, 1500)
    assert picture.std() > 0.01
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["progress.png"]


def test_no_global_state_of_matplotlib_is_touched():
    code = (
        "import sys, medseg.report.figures; "
        "sys.exit('matplotlib.pyplot' in sys.modules or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
