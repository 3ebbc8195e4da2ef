"""Labels, regions and the ignore label: channels, targets and the way back."""

import numpy as np
import pytest
import torch

from medseg.errors import ConfigError, DatasetError
from medseg.labels import LabelScheme
from medseg.schema.dataset import DatasetSpec

ORGANS = LabelScheme(labels={"background": 0, "liver": 1, "spleen": 2, "kidney": (3,)})
PARTIAL = LabelScheme(labels={"background": 0, "liver": 1, "spleen": 2}, ignore_label=3)
TUMOUR = LabelScheme(
    labels={"background": 0, "whole": (1, 2, 3), "core": (2, 3), "enhancing": 3},
    regions_class_order=(1, 2, 3),
    ignore_label=4,
)


def test_channels_and_structures_of_labels():
    assert not ORGANS.has_regions
    assert ORGANS.num_logits == 4
    assert ORGANS.foreground == {"liver": (1,), "spleen": (2,), "kidney": (3,)}
    assert ORGANS.valid_values == {0, 1, 2, 3}
    assert ORGANS.dtype is np.uint8


def test_the_ignore_label_is_valid_but_has_no_channel():
    assert PARTIAL.num_logits == 3
    assert PARTIAL.valid_values == {0, 1, 2, 3}
    assert PARTIAL.foreground == {"liver": (1,), "spleen": (2,)}


def test_channels_of_regions_are_the_names_without_background():
    assert TUMOUR.has_regions
    assert TUMOUR.num_logits == 3
    assert TUMOUR.foreground == {"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)}
    assert TUMOUR.valid_values == {0, 1, 2, 3, 4}


def test_type_grows_with_the_highest_value():
    names = {"background": 0, **{f"part {value}": value for value in range(1, 256)}}
    assert LabelScheme(labels=names).dtype is np.uint8
    assert LabelScheme(labels=names, ignore_label=256).dtype is np.uint16


def test_from_spec_takes_the_labels_of_a_dataset():
    spec = DatasetSpec(
        name="Dataset007_Glioma",
        channels=("T1w",),
        labels=TUMOUR.labels,
        regions_class_order=(1, 2, 3),
        ignore_label=4,
    )
    scheme = LabelScheme.from_spec(spec)
    assert scheme.foreground == TUMOUR.foreground
    assert scheme.ignore_label == 4
    broken = spec.model_copy(update={"ignore_label": 9})
    with pytest.raises(
        ConfigError, match=r"1 problem in the labels of dataset 'Dataset007_Glioma'"
    ):
        LabelScheme.from_spec(broken)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"labels": {"liver": 1, "spleen": 0}}, r'background is missing; .*Add "background": 0'),
        ({"labels": {"background": 1, "liver": 0}}, "background is 1; expected 0"),
        ({"labels": {"background": 0, "a": 1, "b": 3}}, "values 0, 1, 3; expected 0, 1, 2"),
        ({"labels": {"background": 0, "a": -1}}, "values -1, 0; expected 0, 1, 2"),
        ({"labels": {"background": 0}}, "at least one above 0"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "a, b share the value 1"),
        ({"labels": {"background": 0, "a": 1, "b": ()}}, "labels.b has no value"),
        ({"labels": {"background": 0, "a": 1}, "ignore_label": 1}, "ignore label is 1; expected 2"),
        ({"labels": {"background": 0, "a": 1}, "ignore_label": 5}, "ignore label is 5; expected 2"),
        ({"labels": {"background": 0, "a": (1, 2)}}, "order is missing; expected 1 values.*: a"),
        (
            {"labels": {"background": 0, "a": (1, 2), "b": 2}, "regions_class_order": (1,)},
            "order has 1 values; expected 2 values, one for each of: a, b",
        ),
        (
            {"labels": {"background": 0, "a": (1, 2), "b": 2}, "regions_class_order": (1, 7)},
            "order holds 7; expected values of labels: 0, 1, 2",
        ),
        (
            {
                "labels": {"background": 0, "all": tuple(range(1, 65537))},
                "regions_class_order": (1,),
            },
            "highest value is 65536; at most 65535",
        ),
    ],
)
def test_a_scheme_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        LabelScheme(**values)


def test_all_problems_are_told_at_once():
    labels = {"background": 2, "a": (4, 5), "b": 7}
    with pytest.raises(ConfigError) as caught:
        LabelScheme(labels=labels, ignore_label=6, regions_class_order=(4,))
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 problems in labels:"
    assert len(lines) == 5


def test_an_order_without_regions_has_no_meaning_and_is_left_alone():
    scheme = LabelScheme(labels={"background": 0, "a": 1}, regions_class_order=(5, 6))
    assert scheme.num_logits == 2


def test_check_names_values_place_and_what_to_do():
    TUMOUR.check(np.array([0, 3, 4], dtype=np.uint8), "case_7.nii.gz")
    with pytest.raises(DatasetError) as caught:
        PARTIAL.check(np.array([0, 2, 5, 4], dtype=np.uint8), "case_7.nii.gz")
    message = str(caught.value)
    assert message.startswith(
        "case_7.nii.gz: the segmentation holds 4, 5; expected only 0, 1, 2, 3"
    )
    assert "2 spleen; 3 ignore" in message
    assert "dataset.json" in message


def test_check_shortens_long_lists():
    with pytest.raises(DatasetError, match=r"holds 10, 11, [0-9, ]+, \.\.\., 99; expected"):
        ORGANS.check(range(10, 100), "x.nrrd")


def test_target_of_labels_sets_ignored_voxels_to_background():
    segmentation = torch.tensor([[[0, 1, 3], [2, 3, 3]]], dtype=torch.uint8)
    target, valid = PARTIAL.target(segmentation)
    assert target.dtype == torch.int64
    assert target.tolist() == [[[0, 1, 0], [2, 0, 0]]]
    assert valid is not None
    assert valid.tolist() == [[[True, True, False], [True, False, False]]]
    assert segmentation.tolist() == [[[0, 1, 3], [2, 3, 3]]]


def test_target_without_ignore_label_has_no_mask():
    segmentation = torch.tensor([[[0, 1], [3, 2]]], dtype=torch.int16)
    target, valid = ORGANS.target(segmentation)
    assert valid is None
    assert target.dtype == torch.int64
    assert torch.equal(target, segmentation.long())


def test_target_of_regions_is_one_map_for_each_region():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 5, size=(2, 3, 4, 5))
    target, valid = TUMOUR.target(torch.from_numpy(values.astype(np.uint8)))
    assert target.dtype == torch.bool
    expected = np.stack([np.isin(values, region) for region in TUMOUR.foreground.values()], axis=1)
    np.testing.assert_array_equal(target.numpy(), expected)
    assert valid is not None
    np.testing.assert_array_equal(valid.numpy(), values != 4)


@pytest.mark.parametrize("kind", ["numpy", "read-only", "torch"])
def test_segment_takes_the_largest_logit_and_the_first_of_equals(kind):
    rng = np.random.default_rng(1)
    logits = rng.integers(-2, 3, size=(4, 5, 6, 7)).astype(np.float32)
    given = torch.from_numpy(logits).requires_grad_() if kind == "torch" else logits.copy()
    if kind == "read-only":
        given.flags.writeable = False
    segmentation = ORGANS.segment(given)
    assert segmentation.dtype == np.uint8
    np.testing.assert_array_equal(segmentation, logits.argmax(axis=0))


def test_segment_with_many_labels_uses_sixteen_bits():
    names = {"background": 0, **{f"s{i}": i for i in range(1, 300)}}
    logits = np.random.default_rng(2).normal(size=(300, 5, 4)).astype(np.float32)
    segmentation = LabelScheme(labels=names).segment(logits)
    assert segmentation.dtype == np.uint16
    np.testing.assert_array_equal(segmentation, logits.argmax(axis=0))


def test_segment_paints_regions_in_the_order_given():
    scheme = LabelScheme(
        labels={"background": 0, "enhancing": 3, "whole": (1, 2, 3), "core": (2, 3)},
        regions_class_order=(3, 1, 2),
    )
    logits = np.random.default_rng(3).normal(size=(3, 4, 5, 6)).astype(np.float32)
    logits[:, 0, 0, 0] = 0
    expected = np.zeros((4, 5, 6), dtype=np.uint8)
    for point in np.ndindex(expected.shape):
        for channel, value in enumerate((3, 1, 2)):
            if 1 / (1 + np.exp(-logits[(channel, *point)])) > 0.5:
                expected[point] = value
    np.testing.assert_array_equal(scheme.segment(torch.from_numpy(logits)), expected)


def test_segment_refuses_another_number_of_channels():
    with pytest.raises(ValueError, match="expected 4 logit channels, got 3"):
        ORGANS.segment(np.zeros((3, 2, 2), dtype=np.float32))


def test_probabilities_are_float32_softmax_or_sigmoid():
    logits = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = logits.double().numpy()
    softmax = np.exp(exact) / np.exp(exact).sum(axis=0)
    probabilities = ORGANS.activate(logits)
    assert probabilities.dtype == torch.float32
    np.testing.assert_allclose(probabilities.numpy(), softmax, atol=1e-6)
    sigmoid = TUMOUR.activate(logits[:3])
    np.testing.assert_allclose(sigmoid.numpy(), 1 / (1 + np.exp(-exact[:3])), atol=1e-6)
