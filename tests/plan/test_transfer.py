"""Plans of a model, taken over for another data set."""

import pytest

from medseg.errors import PlanError
from medseg.plan.planner import make_plans
from medseg.plan.transfer import plan_from
from medseg.schema.dataset import DatasetSpec
from medseg.schema.fingerprint import CaseFingerprint, Fingerprint, IntensityStatistics

STATISTICS = IntensityStatistics(
    mean=60, std=20, median=58, min=-40, max=300, percentile_00_5=10, percentile_99_5=120
)


def spec(name, channels=("CT",), labels=("organ",)):
    numbered = {label: value for value, label in enumerate(labels, start=1)}
    return DatasetSpec(name=name, channels=channels, labels={"background": 0, **numbered})


def fingerprint(*cases, mean=60.0, num_channels=1):
    """Return a fingerprint of (shape, spacing) pairs on canonical axes (I, J, K)."""
    statistics = STATISTICS.model_copy(update={"mean": mean})
    return Fingerprint(
        cases={
            f"case_{index}": CaseFingerprint(shape=shape, shape_cropped=shape, spacing=spacing)
            for index, (shape, spacing) in enumerate(cases)
        },
        channels=(statistics,) * num_channels,
        median_relative_size_after_cropping=1.0,
    )


@pytest.fixture
def model():
    """Plans with the axes J, K, I: thick coronal slices."""
    plans = make_plans(fingerprint(*[((180, 30, 220), (0.9, 4.0, 0.8))] * 9), spec("Source"))
    assert plans.network_axes == (1, 2, 0)
    return plans


def test_what_weights_depend_on_stays_and_medians_follow_the_data(model):
    """Other voxels, another coarse axis: the model's order and voxel size hold all the same."""
    cases = [((100, 60, 40), (1.0, 2.0, 3.0)), ((110, 70, 50), (1.2, 2.2, 2.0))]
    cases.append(((90, 80, 60), (1.1, 2.1, 4.0)))
    plans = plan_from(model, fingerprint(*cases, mean=65), spec("Target"))
    assert plans.dataset == "Target"
    for field in ("name", "network_axes", "intensity"):
        assert getattr(plans, field) == getattr(model, field)
    assert plans.original_median_spacing == (2.1, 3.0, 1.1)
    assert plans.original_median_shape == (70, 50, 100)
    for name, entry in plans.configurations.items():
        before = model.configurations[name]
        assert entry == before.model_copy(update={"median_shape": entry.median_shape})
    spacing = model.configurations["3d_fullres"].spacing
    targets = list(zip((1, 2, 0), spacing, strict=True))
    shapes = [
        [round(shape[axis] * voxel[axis] / target) for axis, target in targets]
        for shape, voxel in cases
    ]
    median = tuple(sorted(column)[1] for column in zip(*shapes, strict=True))
    assert plans.configurations["3d_fullres"].median_shape == median
    assert plans.configurations["2d"].median_shape == median[1:]


def test_mirroring_follows_the_labels_of_the_data_set(model):
    labels = ("left eye", "right eye")
    plans = plan_from(
        model, fingerprint(((100, 60, 40), (1.0, 3.0, 1.0))), spec("T", labels=labels)
    )
    assert model.left_right is None
    assert plans.left_right.axis == 2
    assert any("left eye" in sentence for sentence in plans.why)


def test_data_unlike_the_models_is_said(model):
    far = fingerprint(((100, 60, 40), (1.0, 9.0, 1.0)), mean=-300)
    why = plan_from(model, far, spec("Target")).why
    assert "plans 'nnunet' of 'Source'" in why[0]
    assert sum("differ by more than a factor of 2" in sentence for sentence in why) == 1
    assert any("mean -300, the model's had 60" in sentence for sentence in why)
    near = fingerprint(((100, 60, 40), (0.9, 4.1, 0.8)))
    assert len(plan_from(model, near, spec("Target")).why) == 1


def test_a_data_set_the_model_cannot_take_is_refused(model):
    slices = fingerprint(*[((100, 60, 1), (1.0, 1.0, 5.0))] * 3, num_channels=2)
    with pytest.raises(PlanError) as caught:
        plan_from(model, slices, spec("Target", channels=("CT", "PET")))
    message = str(caught.value)
    assert "the model takes 1 channels, the data set has 2 (CT, PET)" in message
    assert "the model is for volumes (3d_fullres), every case is a single slice" in message
    with pytest.raises(PlanError, match="holds no case"):
        plan_from(model, fingerprint(), spec("Target"))


def test_channels_in_another_order_are_refused():
    pair = fingerprint(((100, 90, 80), (1.0, 1.0, 1.0)), num_channels=2)
    two = make_plans(pair, spec("Source", channels=("T1w", "FLAIR")))
    with pytest.raises(PlanError, match=r"order T1w, FLAIR, the data set has them in the order"):
        plan_from(two, pair, spec("T", ("flair", "t1w")), bundle_channels=("T1w", "FLAIR"))
    plan_from(two, pair, spec("T", ("T1", "T2")), bundle_channels=("T1w", "FLAIR"))
