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
    dice, loss = lines(axes["Dice of patches"]), lines(axes["loss"])
    assert loss["training"].get_xdata().tolist() == [1, 2, 3, 4, 5]
    assert loss["training"].get_ydata().tolist() == [r["train_loss"] for r in rows]
    assert loss["validation"].get_ydata().tolist() == [r["validation_loss"] for r in rows]
    assert set(dice) == {"liver", "tumour", "mean", "mean, smoothed"}
    np.testing.assert_allclose(dice["tumour"].get_ydata(), [0, 0.1, np.nan, 0.3, 0.4])
    mean = np.array([r["mean_patch_dice"] for r in rows])
    np.testing.assert_allclose(dice["mean, smoothed"].get_ydata(), smoothed(mean))
    rate = axes["learning rate"].get_lines()[0]
    assert rate.get_ydata().tolist() == [r["lr"] for r in rows]


def test_time_is_stacked_by_what_it_went_into(drawn):
    parts = {"augment_seconds": 2.0, "forward_seconds": 3.0, "backward_seconds": 4.0}
    rows = [row(epoch, seconds=12.5, **parts, validate_seconds=1.0) for epoch in range(5)]
    time = drawn(rows)["seconds per epoch"]
    found = {
        container.get_label(): [(bar.get_y(), bar.get_height()) for bar in container]
        for container in time.containers
    }
    assert found == {
        "waiting for data 4%": [(0.0, 0.5)] * 5,
        "augmentation 16%": [(0.5, 2.0)] * 5,
        "forward 24%": [(2.5, 3.0)] * 5,
        "backward 32%": [(5.5, 4.0)] * 5,
        "validation 8%": [(9.5, 1.0)] * 5,
        "other 16%": [(10.5, 2.0)] * 5,
    }


def test_time_of_an_old_journal_is_one_line(drawn):
    rows = [{**row(epoch), "wait_seconds": None} for epoch in range(5)]
    (line,) = drawn(rows)["seconds per epoch"].get_lines()
    assert line.get_ydata().tolist() == [r["seconds"] for r in rows]


def test_full_volumes_are_points_where_they_were_measured(drawn):
    full = {1: {"liver": 0.7, "tumour": 0.3}, 3: {"liver": 0.8, "tumour": None}}
    mean = {1: 0.5, 3: 0.8}
    rows = [row(e, full_dice=full.get(e), mean_full_dice=mean.get(e)) for e in range(5)]
    axes = drawn(rows)["Dice of patches; diamonds: full volumes"]
    points = [line for line in axes.get_lines() if line.get_marker() == "D"]
    found = [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in points]
    assert found == [([2, 4], [0.7, 0.8]), ([2], [0.3]), ([2, 4], [0.5, 0.8])]
    assert [text.get_text() for text in axes.texts] == ["0.800"]


def test_interruptions_and_extensions_are_marked_in_every_panel(drawn):
    sessions, progress = [1, 1, 2, 2, 3, 3], [0.25, 0.5, 0.75, 1.0, 0.5, 1.0]
    rows = [row(e, session=sessions[e], progress=progress[e]) for e in range(6)]
    for axes in drawn(rows).values():
        marks = {
            line.get_xdata()[0]: line.get_linestyle()
            for line in axes.get_lines()
            if len(line.get_xdata()) == 2 and line.get_xdata()[0] == line.get_xdata()[1]
        }
        assert marks == {2.5: ":", 4.5: "-"}


def test_alarms_are_written_below_in_a_taller_picture(monkeypatch, tmp_path):
    kept = []
    monkeypatch.setattr(figures, "save_png", lambda figure, path: kept.append(figure))
    say = "epoch 3: the loss of $a_1$ and \u8111 rises " + "and rises " * 30
    progress_figure([row(0), row(1), row(2, alarms=[say]), row(3)], tmp_path / "a.png")
    progress_figure([row(e, alarms=[f"epoch {e}: bad"]) for e in range(20)], tmp_path / "b.png")
    (one, many) = kept
    shown = [text.get_text() for text in one.texts][::-1]
    assert shown[0].startswith("epoch 3: the loss of \\$a_1\\$ and ? rises")
    assert " ".join(part.strip() for part in shown).endswith("and rises")
    assert one.get_figheight() > 7
    assert all(0 < text.get_position()[1] < 0.2 for text in one.texts)
    shown = [text.get_text() for text in many.texts][::-1]
    assert shown == ["(earlier alarms stand in journal.jsonl)"] + [
        f"epoch {e}: bad" for e in range(13, 20)
    ]
    marks = [line for line in one.axes[0].get_lines() if line.get_marker() == "^"]
    assert marks[0].get_xdata() == [3]


def test_one_huge_loss_does_not_press_the_others_flat(drawn):
    rows = [row(epoch, train_loss=4e5 if epoch == 3 else 1.0 - 0.1 * epoch) for epoch in range(9)]
    low, high = drawn(rows)["loss"].get_ylim()
    assert low < 0.2
    assert 1.1 <= high < 5


def test_names_that_matplotlib_would_read_are_shown_as_they_are(tmp_path, drawn):
    names = ["_hidden", "$x$", "\u8111", "a name that goes on for much longer than a legend"]
    axes = drawn([row(epoch, patch_dice=dict.fromkeys(names, 0.5)) for epoch in range(4)])
    shown = [text.get_text() for text in axes["Dice of patches"].get_legend().get_texts()]
    assert shown[:3] == [" _hidden", "\\$x\\$", "?"]
    assert len(shown[3]) == 18


def test_smoothing_equals_the_recursion_written_out():
    values = np.random.default_rng(0).random(40)
    values[[0, 7, 8]] = np.nan
    expected, current = [], None
    for value in values.tolist():
        if value == value:
            current = value if current is None else 0.9 * current + 0.1 * value
        expected.append(np.nan if current is None else current)
    np.testing.assert_allclose(smoothed(values), expected)


def test_many_structures_are_a_band_with_the_lowest_by_name(drawn):
    names = [f"s{number}" for number in range(24)]
    values = {name: 0.9 - 0.03 * number for number, name in enumerate(names)}
    values["s5"] = None
    axes = drawn([row(epoch, patch_dice=values) for epoch in range(4)])["Dice of patches"]
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    named = ["low: s23", "low: s22", "low: s21"]
    assert shown == ["all 24", "middle half", *named, "mean", "mean, smoothed"]
    outer, inner = (band.get_paths()[0].get_extents() for band in axes.collections)
    known = [value for value in values.values() if value is not None]
    np.testing.assert_allclose([outer.y0, outer.y1], [min(known), max(known)])
    np.testing.assert_allclose([inner.y0, inner.y1], np.quantile(known, [0.25, 0.75]))


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row(0)],
        [row(0, validation_loss=None, patch_dice={}, mean_patch_dice=None), row(1)],
        [row(0, train_loss=float("nan")), {"epoch": 1}],
        [row(0, patch_dice={f"s{n}": None for n in range(30)}, mean_patch_dice=None)],
        [row(0, patch_dice={f"s{n}": 0.01 * n for n in range(100)}, full_dice={"s1": 0.5})],
    ],
)
def test_short_and_patchy_journals_are_drawn(rows, tmp_path):
    progress_figure(rows, tmp_path / "deep" / "progress.png")
    picture = imread(tmp_path / "deep" / "progress.png")
    assert picture.shape[:2] == (1050, 1650)
    assert picture.std() > 0.01
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["progress.png"]


def test_no_global_state_of_matplotlib_is_touched():
    code = (
        "import sys, medseg.report.figures; "
        "sys.exit('matplotlib.pyplot' in sys.modules or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
