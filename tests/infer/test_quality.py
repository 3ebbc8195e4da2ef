"""Quality control: silent on healthy cases, and for each planted defect exactly its flag."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from medseg.data.facts import border_counts, intensities, summarise, voxel_ml
from medseg.geometry import Grid
from medseg.infer import quality
from medseg.infer.quality import disagreement_flags, image_flags, segmentation_flags
from medseg.schema.fingerprint import CaseFingerprint
from medseg.schema.training_cases import Spread

NAMES = ("CT", "T2w")
STRUCTURES = {"organ": (1, 5), "lesion": (5,), "gland": (-2,)}
SHAPE = (34, 28, 22)


@dataclass(frozen=True, kw_only=True)
class Study:
    """One subject: an organ (1, with a lesion 5 in every other one) and a gland (-2)."""

    channels: np.ndarray
    grid: Grid
    labels: np.ndarray

    @property
    def volumes_ml(self):
        voxel = voxel_ml(self.grid.affine)
        return {name: np.isin(self.labels, v).sum() * voxel for name, v in STRUCTURES.items()}

    @property
    def fingerprint(self):
        foreground = {value for values in STRUCTURES.values() for value in values}
        touching = sum(border_counts(self.labels, foreground).values())
        return CaseFingerprint(
            shape=SHAPE,
            shape_cropped=SHAPE,
            spacing=self.grid.spacing,
            intensities=intensities(self.channels, self.grid.affine),
            volumes_ml=self.volumes_ml,
            border_share=touching / np.isin(self.labels, list(foreground)).sum(),
        )

    def flags(self, training):
        found = segmentation_flags(
            self.labels, self.grid.affine, STRUCTURES, self.volumes_ml, training
        )
        return image_flags(self.channels, self.grid, NAMES, training) + found


def ball(center, radii):
    axes = np.meshgrid(*(np.arange(length) for length in SHAPE), indexing="ij")
    return sum(((a - c) / r) ** 2 for a, c, r in zip(axes, center, radii, strict=True)) < 1


def study(make, seed, *, gain_spread=0.3):
    rng = np.random.default_rng(seed)
    labels = np.zeros(SHAPE, np.int16)
    labels[ball(rng.normal((13, 13, 11), 0.4), (8, 7, 6) * rng.normal(1, 0.05, 3))] = 1
    if seed % 2:
        labels[ball((13, 13, 11), rng.uniform(1, 4, 3))] = 5
    labels[ball((27, 14, 12), (4.2, 4, 5) * rng.normal(1, 0.04, 3))] = -2
    body = ball((17, 14, 11), (18, 15, 13))
    ct = np.where(body, rng.normal(rng.normal(20, 10), 60, SHAPE), -1000)
    ct[body & (rng.random(SHAPE) < 0.03)] = rng.normal(800, 100)
    t2 = np.where(body, rng.gamma(3, 60, SHAPE), 0) * np.exp(rng.normal(0, gain_spread))
    affine = make.oblique((0.8, 0.8 * np.exp(rng.normal(0, 0.1)), rng.choice([2.5, 3.0])))
    channels = np.stack([np.maximum(ct, -1024), t2]).astype(np.float32)
    return Study(channels=channels, grid=Grid(SHAPE, affine), labels=labels)


@pytest.fixture(scope="module")
def studies(make):
    return [study(make, seed) for seed in range(40)]


@pytest.fixture(scope="module")
def training(studies):
    return summarise([one.fingerprint for one in studies])


@pytest.fixture
def healthy(make, training):
    """A subject who is not among the training cases."""
    found = study(make, 101)
    assert found.flags(training) == ()
    return found


def only(flags):
    (flag,) = flags
    assert len(flag) <= 110
    return flag


def test_training_cases_are_silent(studies, training):
    assert [one.flags(training) for one in studies] == [()] * len(studies)


def test_healthy_cases_left_out_of_the_record_are_almost_always_silent(studies):
    facts = [one.fingerprint for one in studies]
    flagged = [
        flags
        for number, one in enumerate(studies)
        if (flags := one.flags(summarise(facts[:number] + facts[number + 1 :])))
    ]
    assert len(flagged) <= 2, flagged


def test_a_constant_channel(healthy, training):
    channels = healthy.channels.copy()
    channels[1] = 7
    for record in (training, None):
        found = replace(healthy, channels=channels).flags(record)
        assert only(found) == "channel T2w has the same value everywhere"


def test_a_wrong_rescale_intercept(healthy, training):
    channels = healthy.channels + np.float32([1024, 0])[:, None, None, None]
    flag = only(replace(healthy, channels=channels).flags(training))
    assert flag.startswith("channel CT: darkest intensities (0.5th percentile) 24, usually -1000")


def test_intensities_scaled_to_one(healthy, training):
    channels = healthy.channels.copy()
    channels[0] = (channels[0] + 1024) / 4096
    flag = only(replace(healthy, channels=channels).flags(training))
    assert flag.startswith("channel CT: ")


@pytest.mark.parametrize("factor", [1000, 0.01])
def test_magnetic_resonance_in_other_units(healthy, training, factor):
    channels = healthy.channels * np.float32([1, factor])[:, None, None, None]
    flag = only(replace(healthy, channels=channels).flags(training))
    assert flag.startswith("channel T2w: ")


def test_a_hundredth_flags_also_where_units_differ_by_a_factor_of_ten(make):
    """Differences are no measure there: 0 is as near to the median as many training cases are."""
    studies = [study(make, seed, gain_spread=0.7) for seed in range(40)]
    record = summarise([one.fingerprint for one in studies])
    medians = record.channels[1].median
    assert medians.max > 9 * medians.min
    one = study(make, 101)
    assert one.flags(record) == ()
    channels = one.channels * np.float32([1, 0.01])[:, None, None, None]
    assert only(replace(one, channels=channels).flags(record)).startswith("channel T2w: ")


def test_exchanged_channels(healthy, training):
    flag = only(replace(healthy, channels=healthy.channels[::-1]).flags(training))
    expected = "channels CT and T2w seem exchanged: each has the usual intensities of the other"
    assert flag == expected


def test_one_channel_given_twice_is_not_called_exchanged(healthy, training):
    channels = healthy.channels[[1, 1]]
    flag = only(replace(healthy, channels=channels).flags(training))
    assert flag.startswith("channel CT: darkest")


def test_swapped_spacing(make, healthy, training):
    grid = Grid(SHAPE, make.oblique((3.0, 0.8, 0.8)))
    flag = only(image_flags(healthy.channels, grid, NAMES, training))
    assert flag.startswith("voxel size (I x J x K) is 3 x 0.8 x 0.8 mm, training cases have 0.8 x ")


def test_spacing_is_compared_on_canonical_axes(healthy, training):
    """The same subject, its slices along the first axis of the file, is as silent."""
    affine = healthy.grid.affine[:, [2, 0, 1, 3]]
    channels = healthy.channels.transpose(0, 3, 1, 2)
    grid = Grid(channels.shape[1:], affine)
    assert grid.spacing[0] > quality.SPACING_FACTOR * training.spacing[0].max
    assert image_flags(channels, grid, NAMES, training) == ()


def test_spacing_within_the_factor_is_fine(make, healthy, training):
    limit = training.spacing[2].max * quality.SPACING_FACTOR
    for length, count in ((limit * 0.99, 0), (limit * 1.01, 1)):
        grid = Grid(SHAPE, make.oblique((0.8, 0.8, length)))
        assert len(image_flags(healthy.channels, grid, NAMES, training)) == count


def test_half_the_volume(healthy, training):
    labels = healthy.labels.copy()
    labels[:, 14:][labels[:, 14:] == -2] = 0
    flag = only(replace(healthy, labels=labels).flags(training))
    usual = training.structures["gland"].volume_ml
    found = replace(healthy, labels=labels).volumes_ml["gland"]
    words = f"gland: {found:.3g} ml, usually {usual.percentile_05:.3g} to {usual.percentile_95:.3g}"
    assert flag == f"{words} ml"


def test_twice_the_volume(healthy, training):
    volumes = {**healthy.volumes_ml, "organ": 2 * healthy.volumes_ml["organ"]}
    affine = healthy.grid.affine
    flag = only(segmentation_flags(healthy.labels, affine, STRUCTURES, volumes, training))
    assert flag.startswith("organ: ")


@pytest.mark.parametrize(("factor", "count"), [(1.45, 0), (1 / 1.45, 0), (1.55, 1), (1 / 1.55, 1)])
def test_volumes_near_the_median_are_fine_where_all_training_cases_are_alike(
    healthy, training, factor, count
):
    alike = Spread(min=2.0, percentile_05=2.0, median=2.0, percentile_95=2.0, max=2.0)
    entry = training.structures["gland"].model_copy(update={"volume_ml": alike})
    record = training.model_copy(update={"structures": {"gland": entry}})
    volumes = {"gland": 2.0 * factor}
    flags = segmentation_flags(healthy.labels, healthy.grid.affine, STRUCTURES, volumes, record)
    assert len(flags) == count


def test_a_missing_structure(healthy, training):
    labels = np.where(healthy.labels == -2, 0, healthy.labels)
    flag = only(replace(healthy, labels=labels).flags(training))
    assert flag == "gland was not found, all 40 training cases have it"


def test_a_structure_some_training_cases_lack_may_be_missing(healthy, training):
    assert training.structures["lesion"].num_present == 20
    assert (healthy.labels == 5).any()
    labels = np.where(healthy.labels == 5, 1, healthy.labels)
    assert replace(healthy, labels=labels).flags(training) == ()


def test_foreground_cut_by_the_border(make, healthy, training):
    """The gland reaches the last voxels of axis I; reversed in storage, it is the same side."""
    labels = np.roll(healthy.labels, 3, axis=0)
    flag = only(replace(healthy, labels=labels).flags(training))
    assert flag.endswith("% of the foreground touches the image border, mostly right; usually 0%")
    reverse = np.eye(4)
    reverse[0, 0], reverse[0, 3] = -1, SHAPE[0] - 1
    grid = Grid(SHAPE, healthy.grid.affine @ reverse)
    channels = healthy.channels[:, ::-1]
    assert only(Study(channels=channels, grid=grid, labels=labels[::-1]).flags(training)) == flag


def test_a_border_that_training_cases_touch_as_well_is_usual(healthy, training):
    labels = np.roll(healthy.labels, 3, axis=0)
    spread = Spread(min=0, percentile_05=0, median=0.01, percentile_95=0.03, max=0.04)
    usual = training.model_copy(update={"border_share": spread})
    assert replace(healthy, labels=labels).flags(usual) == ()
    more = Spread(min=0.3, percentile_05=0.3, median=0.32, percentile_95=0.34, max=0.4)
    cropped = training.model_copy(update={"border_share": more})
    assert healthy.flags(cropped) == ()  # less than usual is no defect
    unknown = training.model_copy(update={"border_share": None})
    assert replace(healthy, labels=labels).flags(unknown) == ()


def test_nothing_found_is_the_only_flag_then(healthy, training):
    labels = np.zeros_like(healthy.labels)
    for record in (training, None):
        assert only(replace(healthy, labels=labels).flags(record)) == "no structure was found"


def test_disagreement_of_the_folds():
    flag = only(disagreement_flags(0.314))
    assert flag == "the networks disagree by 31% within what was found, usual is less than 20%"
    for silent in (0.0, quality.DISAGREEMENT, float("nan")):
        assert disagreement_flags(silent) == ()


def test_without_a_record_or_with_a_short_one_nothing_is_compared(studies, healthy):
    channels = healthy.channels * 1000 + 1
    labels = np.where(healthy.labels == -2, 0, np.roll(healthy.labels, 4, axis=0))
    wrong = replace(healthy, channels=channels, labels=labels)
    short = summarise([one.fingerprint for one in studies[: quality.MIN_CASES - 1]])
    enough = summarise([one.fingerprint for one in studies[: quality.MIN_CASES]])
    assert wrong.flags(None) == wrong.flags(short) == ()
    assert len(wrong.flags(enough)) >= 3


def test_a_record_of_other_channels_or_structures_is_not_compared(healthy, training):
    other = training.model_copy(update={"channels": training.channels[:1], "structures": {}})
    channels = healthy.channels * 1000
    labels = np.where(healthy.labels == -2, 0, healthy.labels)
    assert replace(healthy, channels=channels, labels=labels).flags(other) == ()


@pytest.mark.parametrize("num_cases", [10, 20, 100])
@pytest.mark.parametrize("num_structures", [1, 20])
def test_false_alarms_stay_few_however_many_structures(make, num_cases, num_structures):
    """Volumes of healthy cases, log-normal, against records of other such cases."""
    rng = np.random.default_rng(num_cases + num_structures)
    names = [f"structure {number}" for number in range(num_structures)]
    old = summarise([study(make, 0).fingerprint])
    flagged = []
    for _ in range(10):
        volumes = np.exp(rng.normal(0, 0.5, (num_cases + 20, num_structures)))
        spread = [np.percentile(column, (0, 5, 50, 95, 100)) for column in volumes[:num_cases].T]
        structures = {}
        for name, (low, five, half, most, high) in zip(names, spread, strict=True):
            volume = Spread(min=low, percentile_05=five, median=half, percentile_95=most, max=high)
            structures[name] = {
                "num_annotated": num_cases, "num_present": num_cases, "volume_ml": volume,
            }  # fmt: skip
        values = {**old.model_dump(), "num_cases": num_cases, "structures": structures}
        record = type(old).model_validate(values, from_attributes=True)
        for row in volumes[num_cases:]:
            found = dict(zip(names, row.tolist(), strict=True))
            flagged.append(bool(quality._volume_flags(found, record)))
    assert np.mean(flagged) <= (0.05 if num_cases > 10 else 0.15)
