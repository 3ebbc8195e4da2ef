"""Plans as text, and what differs in two, side by side."""

import pytest

from medseg.plan.planner import make_plans
from medseg.report.plan_diff import format_difference
from medseg.report.plans import format_plans
from medseg.schema.dataset import DatasetSpec
from medseg.schema.fingerprint import CaseFingerprint, Fingerprint, IntensityStatistics
from medseg.schema.plans import LeftRight

LABELS = {
    "background": 0,
    "left kidney": 1,
    "right kidney": 2,
    "\u5de6\u80ba": 3,
    "\u53f3\u80ba": 4,
}
STATISTICS = IntensityStatistics(
    mean=-61.25, std=312.5, median=2, min=-3024, max=32767, percentile_00_5=-9, percentile_99_5=4
)
A, B = "Dataset007_Abdomen:nnunet", "/data/models/somewhere/rather/far/down/the/tree/bundle"


def columns(line):
    """Return the columns a terminal needs, where Chinese letters take two."""
    return sum(2 if letter > "\u2e80" else 1 for letter in line)


def plan(shape=(512, 500, 210), spacing=(0.7625, 0.7625, 1.5), name="nnunet", **options):
    """Return plans of volumes, or of slices, with four channels and labels that have sides."""
    case = CaseFingerprint(shape=shape, shape_cropped=shape, spacing=spacing)
    fingerprint = Fingerprint(
        cases={f"case_{n}": case for n in range(40)},
        channels=(STATISTICS,) * 4,
        median_relative_size_after_cropping=0.4,
    )
    spec = DatasetSpec(
        name="Dataset007_Abdomen", channels=("CT", "T1w", "FLAIR", "ADC"), labels=LABELS
    )
    return make_plans(fingerprint, spec, name=name, **options)


def changed(plans, configuration, **fields):
    """Return plans with other values in one configuration."""
    entry = plans.configurations[configuration].model_copy(update=fields)
    return plans.model_copy(
        update={"configurations": {**plans.configurations, configuration: entry}}
    )


@pytest.fixture(scope="module")
def plans():
    return plan()


@pytest.mark.parametrize("name", ["nnunet", "resenc_xl", "cpu"])
def test_no_line_is_wider_than_a_terminal(name):
    for found in (plan(name=name), plan((3000, 4000, 1), (0.001, 0.001, 5.0), name)):
        lines = format_plans(found).splitlines()
        assert max(map(columns, lines)) <= 80
        assert all(line == line.rstrip() for line in lines)


def test_every_configuration_is_shown_with_what_decides_it(plans):
    text = format_plans(plans)
    full = plans.configurations["3d_fullres"]
    assert "\n  axes          K, J, I of RAS\n" in text
    assert "left kidney / right kidney, \u5de6\u80ba / \u53f3\u80ba" in " ".join(text.split())
    blocks = dict(block.split("\n", 1) for block in text.split("\n\n"))
    rows = blocks["3d_fullres"]
    assert "  spacing       1.5 x 0.7625 x 0.7625 mm\n" in rows
    assert f"  patch size    {' x '.join(map(str, full.patch_size))}\n" in rows
    assert "zscore (inside the\n                non-zero mask)" in rows.replace(
        "  zscore", " zscore"
    )
    assert blocks["3d_cascade_fullres: as 3d_fullres, but for"] == (
        "  cascade       second stage, after 3d_lowres"
    )
    for sentence in plans.why:
        assert f"- {sentence[:40]}" in text


def test_equal_plans_have_no_difference(plans):
    named = {"name": "mine", "dataset": "Other", "why": ("No reason.",), "inherits": {}}
    asked = {"asked_gpu_memory_gb": 8.0, "asked_target_spacing": (1.0, 1.0, 1.0)}
    assert format_difference(plans, plans.model_copy(update={**named, **asked}), (A, B)) == ""


def test_only_what_differs_is_shown_side_by_side(plans):
    other = changed(plans, "2d", batch_size=3, batch_dice=False)
    assert format_difference(plans, other, ("one", "other")) == "\n".join(
        [
            "                one                             other",
            "",
            "2d",
            f"  batch size    {plans.configurations['2d'].batch_size:<32}3",
            "  Dice          over the batch                  per sample",
        ]
    )


def test_numbers_that_differ_in_the_last_digit_are_shown_whole(plans):
    spacing = (1.5, 0.7625, 0.7625000001)
    text = format_difference(plans, changed(plans, "3d_fullres", spacing=spacing), (A, B))
    assert text.splitlines()[-1].endswith("mm        1.5 x 0.7625 x 0.7625000001 mm")


def test_a_configuration_on_one_side_takes_one_line(plans):
    fewer = {k: v for k, v in plans.configurations.items() if k == "3d_fullres"}
    text = format_difference(plans, plans.model_copy(update={"configurations": fewer}), (A, B))
    assert "\n2d\n                only here                       not there\n" in text
    assert "3d_fullres\n" not in text.replace("3d_cascade_fullres\n", "")


def test_a_cascade_that_differs_as_its_parent_does_refers_to_it(plans):
    other = plan(gpu_memory_gb=11)
    text = format_difference(plans, other, (A, B))
    assert text.endswith("3d_cascade_fullres\n  as 3d_fullres")
    alone = format_difference(plans, changed(plans, "3d_cascade_fullres", batch_size=9), (A, B))
    assert alone.endswith("9")
    assert "3d_fullres\n" not in alone.replace("3d_cascade_fullres\n", "")


def test_no_line_of_a_difference_is_wider_than_a_terminal(plans):
    sides = LeftRight(axis=0, policy="forbid", pairs=(("\u5de6" * 30, "\u53f3" * 30),))
    other = plan((200, 900, 800), (3.0, 0.5, 0.5), "resenc_l").model_copy(
        update={"left_right": sides}
    )
    for line in format_difference(plans, other, (A, B)).splitlines():
        assert columns(line) <= 80, line


ARCHITECTURE = {
    "kind": "residual_unet",
    "features": (8, 16, 32, 64, 64, 63),
    "kernel_sizes": ((3, 3, 1),) * 6,
    "strides": ((1, 1, 1),) * 6,
    "blocks_encoder": (1,) * 6,
    "blocks_decoder": (3,) * 5,
    "options": {"checkpointing": True},
}
CONFIGURATION = {
    "patch_size": (8, 8, 16),
    "batch_size": 99,
    "spacing": (3.0, 3.0, 3.5),
    "median_shape": (1.5, 2.0, 3.0),
    "normalization": ("none", "ct", "none", "none"),
    "use_mask_for_norm": (True, True, True, True),
    "batch_dice": False,
    "previous_stage": "2d",
}
SHARED = {
    "network_axes": (0, 2, 1),
    "original_median_spacing": (1.0, 2.0, 3.0),
    "original_median_shape": (1.0, 2.0, 3.5),
    "intensity": (STATISTICS.model_copy(update={"std": 312.5000001}), *[STATISTICS] * 3),
    "left_right": None,
}


def test_the_lists_above_hold_every_field_that_matters(plans):
    entry = plans.configurations["3d_fullres"]
    assert set(ARCHITECTURE) == set(type(entry.architecture).model_fields)
    assert {*CONFIGURATION, "architecture"} == set(type(entry).model_fields)
    others = {"format_version", "name", "dataset", "why", "inherits", "configurations"}
    others |= {"asked_gpu_memory_gb", "asked_target_spacing", "taken_from"}
    assert set(SHARED) | others == set(type(plans).model_fields)


@pytest.mark.parametrize(
    ("level", "field"),
    [(level, f) for level in (ARCHITECTURE, CONFIGURATION, SHARED) for f in level],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_change_of_any_field_is_a_difference(plans, level, field):
    change = {field: level[field]}
    if level is SHARED:
        other = plans.model_copy(update=change)
    elif level is CONFIGURATION:
        other = changed(plans, "3d_fullres", **change)
    else:
        net = plans.configurations["3d_fullres"].architecture.model_copy(update=change)
        other = changed(plans, "3d_fullres", architecture=net)
    assert format_difference(plans, other, (A, B))
