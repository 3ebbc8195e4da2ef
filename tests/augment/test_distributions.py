"""What comes out of each transform is distributed as what comes out of batchgeneratorsv2's.

The reference was made by scripts/bench/augment_reference.py in an environment with nnU-Net 2.8.1:
how often each transform changes something, and quantiles of what is measured of its results, on
patches that are the same here. Sources are large enough for every deformation, because we cut
them so (and nnU-Net pads corners).
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from medseg.augment import intensity, morphology, previous
from medseg.augment.pipeline import Augmenter
from medseg.schema.recipe import AugmentationRecipe

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"
REFERENCE = json.loads(Path(__file__).with_name("reference_batchgeneratorsv2.json").read_text())
NEVER = {name: 0.0 for name in AugmentationRecipe.model_fields if name.endswith("_probability")}
NUM_SHARES, NUM_VALUES = 800, 500
MAX_SHARE_SIGMAS = 4.0
MAX_DISTANCE = 0.11
"""Of 500 and 2500 values of one distribution, fewer than 1 pair in 5000 is further apart."""
MAX_BEYOND = 0.012
"""Share of values beyond the smallest and largest one of the reference."""
INTENSITIES = (
    "noise",
    "blur",
    "brightness",
    "contrast",
    "low_resolution",
    "gamma",
    "inverted_gamma",
)
DEFORMATIONS = ("3d", "2d", "2d_elongated", "dummy_2d")


@pytest.fixture(scope="module")
def probe():
    sys.path.insert(0, str(BENCH))
    try:
        return import_module("augment_probe")
    finally:
        sys.path.remove(str(BENCH))


def augmenter(patch, chances, *, channels=2, dummy_2d=False, num_previous=0, **fields):
    recipe = AugmentationRecipe(**{**NEVER, "mirror_axes": (), **fields, **chances})
    return Augmenter(
        recipe,
        patch,
        mask_channels=tuple(k == 1 for k in range(channels)),
        dummy_2d=dummy_2d,
        num_previous=num_previous,
    )


def repeat(made, count, image, labels=None, outside=None, before=None):
    """Return image and labels of `count` samples."""
    if labels is None:
        labels = np.zeros(image.shape[1:], dtype=np.uint8)
    arrays = [torch.from_numpy(np.ascontiguousarray(x)) for x in (image, labels.astype(np.uint8))]
    mask, found_before = (None if x is None else [torch.from_numpy(x)] for x in (outside, before))
    for seed in range(count):
        images, found, _ = made(arrays[:1], arrays[1:], mask, seeds=[seed], previous=found_before)
        yield images[0].numpy(), found[0].numpy()


def default(*names):
    """Return the chances of a recipe without any change."""
    recipe = AugmentationRecipe().model_dump()
    return {f"{name}_probability": recipe[f"{name}_probability"] for name in names}


def certain(*names):
    return {f"{name}_probability": 1.0 for name in names}


def of_intensity(probe, name, dummy_2d=False):
    patch = probe.SPATIAL["dummy_2d"][0] if dummy_2d else probe.PATCH
    image = probe.images(patch)
    often = augmenter(patch, default(name), dummy_2d=dummy_2d)
    always = augmenter(patch, certain(name), dummy_2d=dummy_2d)
    shares = probe.shares(probe.changed(x, image) for x, _ in repeat(often, NUM_SHARES, image))
    found = [x for x, _ in repeat(always, NUM_VALUES, image)]
    return {
        "shares": shares,
        "certain": probe.shares(probe.changed(x, image) for x in found),
        "values": probe.collect(probe.of_intensities(x, image) for x in found),
    }


def of_deformation(probe, name, **fields):
    """Measure deformations; how often they happen in 3D alone, as the draws are the same."""
    patch, dummy_2d, _ = probe.SPATIAL[name]
    source, both = probe.source_shape(name), ("rotation", "scaling")
    image, labels = probe.ramps(source), probe.labels(source)
    kind = {"channels": len(patch), "dummy_2d": dummy_2d, **fields}
    often = augmenter(patch, default(*both), **kind)
    always = augmenter(patch, certain(*both), **kind)
    found = repeat(always, NUM_VALUES, image, labels)
    rows = [probe.of_positions(x) | probe.of_labels(y) for x, y in found]
    values = {"values": probe.collect(rows)}
    if name.startswith("2d"):
        return values
    found = repeat(often, NUM_SHARES, image, labels)
    return values | {"shares": probe.shares(probe.moved(x) for x, _ in found)}


def of_corruption(probe, name):
    labels = probe.labels(probe.PREVIOUS_PATCH)
    image = np.zeros((1, *labels.shape), dtype=np.float32)
    before = np.stack([labels == k for k in range(1, 4)]).astype(np.float32)
    found = []
    for chances, count in ((default(name), NUM_SHARES), (certain(name), NUM_VALUES)):
        made = augmenter(labels.shape, chances, channels=1, num_previous=3)
        found.append([x[1:] for x, _ in repeat(made, count, image, before=labels)])
    shares, sure = (probe.shares(probe.corrupted(x, before) for x in xs) for xs in found)
    rows = [probe.of_structures(x, before) for x in found[1]]
    return {"shares": shares, "certain": sure, "values": probe.collect(rows)}


def of_mirroring(probe):
    made = augmenter(probe.PATCH, {}, channels=3, mirror_axes=None)
    found = repeat(made, NUM_SHARES, probe.ramps(probe.PATCH))
    return {"shares": probe.mirror_shares(x for x, _ in found)}


def of_everything(probe):
    patch = probe.SPATIAL["3d"][0]
    image, labels, outside, before = probe.whole_sample(probe.source_shape("3d"))
    recipe = {name: getattr(AugmentationRecipe(), name) for name in NEVER}
    made = augmenter(patch, recipe, num_previous=3, mirror_axes=None)
    centre = probe.centre(image, patch)
    rows = [
        probe.of_everything(x, y, centre)
        for x, y in repeat(made, NUM_VALUES, image, labels, outside, before)
    ]
    return {"values": probe.collect(rows)}


RUNS = {
    **{name: lambda probe, name=name: of_intensity(probe, name) for name in INTENSITIES},
    "low_resolution_dummy_2d": lambda probe: of_intensity(probe, "low_resolution", dummy_2d=True),
    **{
        f"deformation_{name}": lambda probe, name=name: of_deformation(probe, name)
        for name in DEFORMATIONS
    },
    **{
        name: lambda probe, name=name: of_corruption(probe, name)
        for name in ("previous_operator", "previous_removal")
    },
    "mirroring": of_mirroring,
    "everything": of_everything,
}


def differences(probe, name, found):
    """Return what differs from the reference, in words."""
    expected = REFERENCE["runs"][name]
    left_out = {"shares"} if name.startswith("deformation_2d") else set()
    assert found.keys() == expected.keys() - left_out
    problems = []
    for kind, total in (("shares", NUM_SHARES), ("certain", NUM_VALUES)):
        for key, share in found.get(kind, {}).items():
            wanted = expected[kind][key]
            spread = max(wanted * (1 - wanted), 1e-4)
            key_count = "shares" if kind == "shares" else "values"
            sigma = (spread * (1 / total + 1 / REFERENCE["samples"][key_count])) ** 0.5
            if abs(share - wanted) > MAX_SHARE_SIGMAS * sigma:
                problems.append(f"{kind} of {key}: {share:.4f}, expected {wanted:.4f}")
    for key, reference in expected.get("values", {}).items():
        problems += compared(probe, key, found["values"].get(key, []), reference)
    return problems


def compared(probe, key, values, reference):
    """Compare the values of one measurement; few values are allowed more."""
    if not values:
        return [f"{key}: never measured"]
    room = max(1, (NUM_VALUES / len(values)) ** 0.5)
    problems = []
    if (gap := probe.distance(values, reference)) > MAX_DISTANCE * room:
        problems.append(f"{key}: distributions are {gap:.3f} apart")
    if (share := probe.beyond(values, reference)) > MAX_BEYOND * room:
        problems.append(f"{key}: {share:.3f} of the values are beyond the reference's")
    if room == 1 and not probe.reaches_tails(values, reference):
        problems.append(f"{key}: the lowest or highest 2 % of the reference are not reached")
    return problems


@pytest.mark.parametrize("name", RUNS)
def test_results_are_distributed_as_batchgeneratorsv2s(name, probe):
    assert differences(probe, name, RUNS[name](probe)) == []


def test_every_stored_run_is_compared():
    assert set(REFERENCE["runs"]) == set(RUNS)
    assert REFERENCE["versions"]["nnunetv2"] == "2.8.1"


WRONG = [
    ("noise", intensity, "NOISE_STD", (0.0, 0.11)),
    ("blur", intensity, "BLUR_SIGMA", (0.5, 1.5)),
    ("blur", intensity, "CHANNEL_PROBABILITY", 0.6),
    ("brightness", intensity, "BRIGHTNESS_FACTOR", (0.8, 1.25)),
    ("contrast", intensity, "CONTRAST_FACTOR", (0.75, 1.35)),
    ("low_resolution", intensity, "LOW_RESOLUTION_FACTOR", (0.4, 1.0)),
    ("inverted_gamma", intensity, "GAMMA_EXPONENT", (0.7, 1.7)),
    ("previous_operator", previous, "BALL_SIZE", (1.0, 10.0)),
    ("previous_operator", morphology, "OPERATORS", morphology.OPERATORS[:1] * 4),
    ("previous_removal", previous, "LARGEST_REMOVED", 0.02),
    ("previous_removal", previous, "STRUCTURE_PROBABILITY", 0.6),
]


@pytest.mark.parametrize(("name", "owner", "constant", "value"), WRONG)
def test_a_wrong_constant_is_noticed(name, owner, constant, value, probe, monkeypatch):
    """From the results of transforms that always happen; how often they do is the next test."""
    monkeypatch.setattr(owner, constant, value)
    monkeypatch.setitem(globals(), "NUM_SHARES", 1)
    assert differences(probe, name, RUNS[name](probe))


@pytest.mark.parametrize("fields", [{"rotation_max_deg": 33.0}, {"scaling_range": (0.7, 1.3)}])
def test_a_wrong_angle_or_zoom_is_noticed(fields, probe, monkeypatch):
    monkeypatch.setitem(globals(), "NUM_SHARES", 1)
    assert differences(probe, "deformation_3d", of_deformation(probe, "3d", **fields))


def test_a_wrong_chance_is_noticed(probe, monkeypatch):
    monkeypatch.setitem(globals(), "default", lambda name: {f"{name}_probability": 0.22})
    assert differences(probe, "brightness", of_intensity(probe, "brightness"))


def test_chances_are_those_of_nnunets_transforms():
    """They stand in nnU-Net's order, the inverted gamma first."""
    given = dict(
        zip(
            (
                "noise",
                "blur",
                "brightness",
                "contrast",
                "low_resolution",
                "inverted_gamma",
                "gamma",
            ),
            (chance for _, chance in REFERENCE["transforms"][1:8]),
            strict=True,
        )
    )
    given["previous_operator"], given["previous_removal"] = (
        chance for _, chance in REFERENCE["transforms"][-2:]
    )
    assert default(*given) == {f"{name}_probability": chance for name, chance in given.items()}
    assert AugmentationRecipe().elastic_probability == 0
