"""Own configurations, kept where plans are made anew."""

import json

import pytest

from medseg.errors import PlanError
from medseg.plan.merge import keep_own_configurations
from medseg.schema.fingerprint import IntensityStatistics
from medseg.schema.plans import Architecture, Configuration, Plans, read_plans, write_plans

STATISTICS = IntensityStatistics(**dict.fromkeys(IntensityStatistics.model_fields, 1.0))
FULL = Configuration(
    patch_size=(32, 64, 48),
    batch_size=2,
    spacing=(2.5, 0.8, 0.9),
    median_shape=(40, 300, 310),
    normalization=("ct",),
    use_mask_for_norm=(False,),
    batch_dice=True,
    architecture=Architecture(
        kind="plain_unet",
        features=(8, 16),
        kernel_sizes=((1, 3, 3), (3, 3, 3)),
        strides=((1, 1, 1), (2, 2, 2)),
        blocks_encoder=(2, 2),
        blocks_decoder=(2,),
    ),
)
LOW = FULL.model_copy(update={"spacing": (5.0, 2.0, 2.0), "batch_dice": False})
CASCADE = FULL.model_copy(update={"previous_stage": "3d_lowres"})


def make(full=FULL, axes=(2, 1, 0), low=True, **more):
    cascade = full.model_copy(update={"previous_stage": "3d_lowres"})
    found = {"3d_lowres": LOW, "3d_fullres": full, "3d_cascade_fullres": cascade}
    return Plans(
        name="nnunet",
        dataset="Liver",
        network_axes=axes,
        original_median_spacing=(2.5, 0.8, 0.9),
        original_median_shape=(40, 300, 310),
        intensity=(STATISTICS,) * len(full.normalization),
        configurations=(found if low else {"3d_fullres": full}) | more.pop("configurations", {}),
        inherits={"3d_cascade_fullres": "3d_fullres"} if low else {},
        why=("Because.",),
        **more,
    )


def edited(tmp_path, **entries):
    """Return plans after a person has written configurations into their file."""
    path = tmp_path / "nnunet.json"
    write_plans(path, make())
    values = json.loads(path.read_text())
    values["configurations"] |= entries
    path.write_text(json.dumps(values))
    return read_plans(path)


def test_without_own_configurations_the_new_plans_are_as_made():
    new = make(FULL.model_copy(update={"batch_size": 5}))
    assert keep_own_configurations(make(), new) is new


def test_an_own_configuration_goes_on_to_inherit(tmp_path):
    """What it says itself stays; the rest follows the new plans, also through another own one."""
    old = edited(
        tmp_path,
        small={"inherits_from": "3d_fullres", "patch_size": [16, 32, 32]},
        smaller={"inherits_from": "small", "batch_size": 9},
    )
    full = FULL.model_copy(update={"batch_size": 5, "spacing": (2.0, 0.7, 0.7)})
    kept = keep_own_configurations(old, make(full))
    expected = full.model_copy(update={"patch_size": (16, 32, 32)})
    assert kept.configurations["small"] == expected
    assert kept.configurations["smaller"] == expected.model_copy(update={"batch_size": 9})
    assert kept.inherits == {
        "3d_cascade_fullres": "3d_fullres",
        "small": "3d_fullres",
        "smaller": "small",
    }
    assert kept.why == (
        "Because.",
        "small: kept from the plans before, as 3d_fullres, but for patch size.",
        "smaller: kept from the plans before, as small, but for batch size.",
    )
    path = tmp_path / "again.json"
    write_plans(path, kept)
    assert read_plans(path) == kept
    again = json.loads(path.read_text())["configurations"]
    assert again["smaller"] == {"inherits_from": "small", "batch_size": 9}


def test_an_own_configuration_that_stands_alone_is_kept_as_it_is():
    own = FULL.model_copy(update={"batch_size": 7})
    old = make(configurations={"mine": own})
    kept = keep_own_configurations(old, make(FULL.model_copy(update={"spacing": (9.0, 9.0, 9.0)})))
    assert kept.configurations["mine"] == own
    assert kept.why[-1] == "mine: kept from the plans before, as it was."


def test_edits_and_leftovers_of_the_planner_are_not_kept():
    """A low-resolution stage that is no longer planned goes; an edited batch size as well."""
    old = make(FULL.model_copy(update={"batch_size": 77}))
    new = make(low=False)
    assert keep_own_configurations(old, new) == new


def test_configurations_that_no_longer_fit_are_all_listed(tmp_path):
    old = edited(
        tmp_path,
        after={"inherits_from": "3d_lowres", "batch_size": 4},
        alone=FULL.model_dump(mode="json"),
    )
    two = FULL.model_copy(
        update={"normalization": ("ct", "zscore"), "use_mask_for_norm": (False, False)}
    )
    with pytest.raises(PlanError) as caught:
        keep_own_configurations(old, make(two, axes=(0, 2, 1), low=False))
    message = str(caught.value)
    for words in (
        "'after' needs '3d_lowres', which the new plans do not hold",
        "'alone' is for 1 channels, the new plans are for 2",
        "written for the axis order (2, 1, 0), the new plans have (0, 2, 1)",
        "Take them out of the file",
    ):
        assert words in message
