"""Labels, regions and the ignore label: channels, targets and the way back."""

import numpy as np
import pytest
import torch

from medseg.errors import ConfigError, DatasetError
from medseg.labels import LabelScheme
from medseg.schema.dataset import CaseFiles, DatasetSpec
from medseg.schema.plans import Configuration

ORGANS = LabelScheme(labels={"background": 0, "liver": 1, "spleen": 2, "kidney": (3,)})
PARTIAL = LabelScheme(labels={"background": 0, "liver": 1, "spleen": 2}, ignore_label=3)
TUMOUR = LabelScheme(
    labels={"background": 0, "whole": (1, 2, 3), "core": (2, 3), "enhancing": 3},
    regions_class_order=(1, 2, 3),
    ignore_label=4,
)
ODD = LabelScheme(
    labels={"vein": 1017, "background": 255, "artery": (-3,), "bone": 0}, ignore_label=7
)
ODD_REGIONS = LabelScheme(
    labels={"enhancing": 40, "background": 0, "whole": (1000, 20, 40), "core": (20, 40)},
    regions_class_order=(40, 1000, 20),
    ignore_label=-1,
)


def test_channels_and_structures_of_labels():
    assert not ORGANS.has_regions
    assert ORGANS.num_logits == 4
    assert ORGANS.foreground == {"liver": (1,), "spleen": (2,), "kidney": (3,)}
    assert ORGANS.valid_values == {0, 1, 2, 3}
    assert ORGANS.structures == ORGANS.foreground
    assert ORGANS.values == (0, 1, 2, 3)
    assert (ORGANS.index_dtype, ORGANS.value_dtype) == (np.uint8, np.uint8)


def test_the_ignore_label_is_valid_but_has_no_channel():
    assert PARTIAL.num_logits == 3
    assert PARTIAL.ignore_index == 3
    assert PARTIAL.valid_values == {0, 1, 2, 3}
    assert PARTIAL.foreground == {"liver": (1,), "spleen": (2,)}


def test_channels_of_regions_are_the_names_without_background():
    assert TUMOUR.has_regions
    assert TUMOUR.num_logits == 3
    assert TUMOUR.foreground == {"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)}
    assert TUMOUR.valid_values == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("scheme", "count"),
    [(ORGANS, 3), (PARTIAL, 2), (TUMOUR, 3), (ODD, 3), (ODD_REGIONS, 3)],
    ids=["labels", "with ignore", "regions", "odd values", "regions of odd values"],
)
def test_a_cascade_is_told_of_every_value_but_background_and_ignore(scheme, count):
    """Also with regions; only a configuration with a stage before it takes these channels."""
    single = Configuration.model_construct(previous_stage=None)
    second = Configuration.model_construct(previous_stage="3d_lowres")
    assert scheme.num_foreground == count
    assert (scheme.num_previous(single), scheme.num_previous(second)) == (0, count)


def test_type_grows_with_the_highest_value():
    names = {"background": 0, **{f"part {value}": value for value in range(1, 256)}}
    assert LabelScheme(labels=names).index_dtype == np.uint8
    ignoring = LabelScheme(labels=names, ignore_label=256)
    assert (ignoring.index_dtype, ignoring.value_dtype) == (np.uint16, np.uint16)


def test_indices_are_the_background_then_the_values_in_order_then_the_ignore_label():
    assert ODD.values == (255, -3, 0, 1017, 7)
    assert ODD.foreground == {"vein": (3,), "artery": (1,), "bone": (2,)}
    assert ODD.structures == {"vein": (1017,), "artery": (-3,), "bone": (0,)}
    assert ODD.channels == {"vein": 3, "artery": 1, "bone": 2}
    assert (ODD.background, ODD.num_logits, ODD.ignore_index) == (255, 4, 4)
    assert ODD.valid_values == {255, -3, 0, 1017, 7}
    assert not ODD.has_regions


def test_regions_may_have_values_with_gaps():
    assert ODD_REGIONS.values == (0, 20, 40, 1000, -1)
    assert ODD_REGIONS.foreground == {"enhancing": (2,), "whole": (3, 1, 2), "core": (1, 2)}
    assert ODD_REGIONS.channels == {"enhancing": 0, "whole": 1, "core": 2}
    assert ODD_REGIONS.regions_order_indices == (2, 3, 1)
    assert ORGANS.regions_order_indices == ()


def test_lists_of_one_value_make_no_regions():
    """Only a name with several values does; beside one, a name with one value is a region."""
    flat = LabelScheme(labels={"background": (0,), "a": (5,), "b": 9}, regions_class_order=(9,))
    assert not flat.has_regions
    assert (flat.num_logits, flat.foreground) == (3, {"a": (1,), "b": (2,)})
    nested = LabelScheme(
        labels={"background": 0, "a": (5, 9), "b": (9,)}, regions_class_order=(5, 9)
    )
    assert nested.has_regions
    assert (nested.num_logits, nested.foreground) == (2, {"a": (1, 2), "b": (2,)})


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ((0, 255), np.uint8),
        ((0, 256), np.uint16),
        ((3, 65536), np.uint32),
        ((0, 4294967295), np.uint32),
        ((0, -1), np.int16),
        ((-40000, 1), np.int32),
        ((-1, 32768), np.int32),
    ],
)
def test_files_get_the_smallest_type_that_holds_the_values(values, kind):
    scheme = LabelScheme(labels={"background": values[0], "a": values[1]})
    assert scheme.value_dtype == kind
    assert scheme.index_dtype == np.uint8
    written = scheme.to_values(np.array([[0, 1, 1]], np.uint8))
    assert written.dtype == kind
    assert written.tolist() == [[values[0], values[1], values[1]]]


@pytest.mark.parametrize("scheme", [ORGANS, PARTIAL, TUMOUR, ODD, ODD_REGIONS])
@pytest.mark.parametrize("order", ["C", "F"])
def test_values_become_indices_and_come_back(scheme, order):
    drawn = np.random.default_rng(0).choice(scheme.values, size=(5, 7, 3)).astype(np.int64)
    file = np.asarray(drawn, scheme.value_dtype, order=order)
    indices = scheme.to_indices(file, "a.nii.gz")
    assert indices.dtype == scheme.index_dtype
    expected = [scheme.values.index(value) for value in drawn.reshape(-1).tolist()]
    assert indices.reshape(-1).tolist() == expected
    back = scheme.to_values(indices)
    assert back.dtype == scheme.value_dtype
    np.testing.assert_array_equal(back, drawn)
    assert indices.flags.f_contiguous == back.flags.f_contiguous == (order == "F")


def test_consecutive_values_are_not_copied():
    file = np.random.default_rng(0).integers(0, 4, size=(5, 7, 3)).astype(np.uint8)
    assert ORGANS.to_indices(file, "a.nii.gz") is file
    assert ORGANS.to_values(file) is file
    assert ORGANS.to_indices(file.astype(np.int16), "a.nii.gz").dtype == np.uint8


@pytest.mark.parametrize("scheme", [ORGANS, ODD, ODD_REGIONS])
def test_values_the_dataset_does_not_have_are_named_with_the_file(scheme):
    file = np.full((4, 3, 2), scheme.background, dtype=np.int32)
    file[1, 2, 0], file[3, 0, 1] = 99, -77
    with pytest.raises(DatasetError, match=r"^b\.nrrd: the segmentation holds -77, 99; expected"):
        scheme.to_indices(file, "b.nrrd")


def spec_of(scheme, **annotated):
    cases = {
        case: CaseFiles(channels=(f"{case}.nii",), annotated_labels=names)
        for case, names in annotated.items()
    }
    return DatasetSpec(
        name="Dataset009_Odd",
        channels=("T1w",),
        labels=scheme.labels,
        regions_class_order=scheme.regions_class_order,
        ignore_label=scheme.ignore_label,
        cases=cases,
    )


def test_names_that_are_no_labels_are_told_for_all_cases_at_once():
    with pytest.raises(ConfigError) as caught:
        LabelScheme.from_spec(
            spec_of(ODD, a=("vein", "bones"), b=None, c=("bone",), d=(), e=("background",))
        )
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 problems in the labels of dataset 'Dataset009_Odd':"
    assert lines[1].startswith("  case 'a': annotated_labels holds 'bones'; expected one of: vein")
    assert "Did you mean 'bone'?" in lines[1]
    assert [line[:11] for line in lines[2:]] == ["  case 'd':", "  case 'e':"]
    assert "names no structure" in lines[3]


def test_a_label_called_ignore_is_the_ignore_label():
    """nnU-Net spells it so; a spec may come from a manifest that does."""
    plain = spec_of(ORGANS)
    spec = plain.model_copy(update={"labels": {**plain.labels, "ignore": 77}})
    scheme = LabelScheme.from_spec(spec)
    assert scheme.ignore_label == 77
    assert scheme.num_logits == 4
    twice = spec.model_copy(update={"ignore_label": 78})
    assert LabelScheme.from_spec(twice).structures["ignore"] == (77,)


def test_the_mask_has_one_entry_for_each_logit_channel():
    assert ODD.structure_mask(None) == (True,) * 4
    assert ODD.structure_mask(("vein", "bone")) == (True, False, True, True)
    assert ODD_REGIONS.structure_mask(None) == (True,) * 3
    assert ODD_REGIONS.structure_mask(("core", "background")) == (False, False, True)
    assert ODD.sought(("vein", "bone")) == ((3,), (2,))
    assert ODD.sought(None) == ((3,), (1,), (2,))
    assert ODD_REGIONS.sought(("core",)) == ((1, 2),)


def test_values_of_what_was_not_annotated_are_refused():
    ODD.check([255, 1017, 7], "a.nii.gz", ("vein",))
    with pytest.raises(DatasetError) as caught:
        ODD.check([255, 1017, -3, 0], "a.nii.gz", ("vein",))
    message = str(caught.value)
    assert message.startswith("a.nii.gz: the segmentation holds -3, 0 (artery, bone), but")
    assert "annotated only for vein" in message
    assert "annotated_labels" in message


def test_values_of_a_region_may_be_those_of_smaller_ones():
    ODD_REGIONS.check([0, 20, 40, 1000, -1], "a.nii.gz", ("whole",))
    with pytest.raises(DatasetError, match=r"holds 1000 \(whole\), but"):
        ODD_REGIONS.check([0, 20, 1000], "a.nii.gz", ("core",))


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
    broken = spec.model_copy(update={"ignore_label": 2})
    with pytest.raises(
        ConfigError, match=r"1 problem in the labels of dataset 'Dataset007_Glioma'"
    ):
        LabelScheme.from_spec(broken)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"labels": {"liver": 1, "spleen": 0}}, r'background is missing; add .*"background": 0'),
        ({"labels": {"liver": (1, 2), "spleen": 2}}, "background is missing"),
        ({"labels": {"background": (0, 9), "a": 1}}, "background is 0, 9; expected one value"),
        ({"labels": {"background": (), "a": 1, "b": 2}}, "background is nothing; expected one"),
        ({"labels": {"background": 0}}, "values 0; expected the background's and at least one"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "a, b share the value 1"),
        ({"labels": {"background": 0, "a": 1, "b": ()}}, "labels.b has no value"),
        (
            {"labels": {"background": 0, "a": 1}, "ignore_label": 1},
            "ignore label is 1, which a has",
        ),
        ({"labels": {"background": 0, "a": 1}, "ignore_label": 0}, "is 0, which background has"),
        ({"labels": {"background": 0, "a": 2**32}}, "reach from 0 to 4294967296; expected 0 to 42"),
        ({"labels": {"background": 0, "a": -(2**31) - 1}}, "reach from -2147483649 to 0"),
        ({"labels": {"background": -1, "a": 2**31}}, "reach from -1 to 2147483648"),
        (
            {"labels": {"background": 0, "a": 1}, "ignore_label": 2**40},
            "reach from 0 to 1099511627776",
        ),
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
            "there are 65537 values; at most 65536",
        ),
    ],
)
def test_a_scheme_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        LabelScheme(**values)


def test_all_problems_are_told_at_once():
    labels = {"background": 2, "a": (4, -5), "b": 2**33, "c": ()}
    with pytest.raises(ConfigError) as caught:
        LabelScheme(labels=labels, ignore_label=4, regions_class_order=(4,))
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


def test_segments_hold_indices_and_files_hold_values():
    logits = np.random.default_rng(5).normal(size=(4, 5, 4, 3)).astype(np.float32)
    segmentation = ODD.segment(logits)
    np.testing.assert_array_equal(segmentation, logits.argmax(axis=0))
    expected = np.array([255, -3, 0, 1017])[logits.argmax(axis=0)]
    np.testing.assert_array_equal(ODD.to_values(segmentation), expected)


def test_regions_with_gaps_are_painted_with_their_values():
    logits = np.random.default_rng(6).normal(size=(3, 4, 5, 6)).astype(np.float32)
    expected = np.zeros((4, 5, 6), np.int16)
    for value, region in zip((40, 1000, 20), logits, strict=True):
        expected[region > 0] = value
    written = ODD_REGIONS.to_values(ODD_REGIONS.segment(logits))
    assert written.dtype == np.int16
    np.testing.assert_array_equal(written, expected)


def test_targets_of_odd_values_are_those_of_consecutive_ones():
    file = np.random.default_rng(7).choice(ODD_REGIONS.values, size=(2, 3, 4, 5))
    segmentation = torch.from_numpy(ODD_REGIONS.to_indices(file, "a.nii.gz"))
    target, valid = ODD_REGIONS.target(segmentation)
    regions = [(40,), (1000, 20, 40), (20, 40)]
    expected = np.stack([np.isin(file, region) for region in regions], axis=1)
    np.testing.assert_array_equal(target.numpy(), expected)
    np.testing.assert_array_equal(valid.numpy(), file != -1)


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


def test_pairs_of_names_become_pairs_of_channels():
    scheme = LabelScheme(labels={"background": 0, "left eye": 300, "nose": 5, "right eye": 7})
    assert scheme.channel_pairs([("left eye", "right eye")]) == ((3, 2),)
    assert scheme.channel_pairs(()) == ()


def test_pairs_that_do_not_fit_the_labels_are_refused_all_at_once():
    scheme = LabelScheme(labels={"background": 0, "left eye": 1, "right eye": 2})
    with pytest.raises(ConfigError, match=r"(?s)has 'left ear'.*has 'left eye'.*has 'right ear'"):
        scheme.channel_pairs([("left eye", "right eye"), ("left eye", "right eye"),
                              ("left ear", "right ear")])  # fmt: skip
    regions = {"background": 0, "eyes": (1, 2), "left eye": 1, "right eye": 2}
    scheme = LabelScheme(labels=regions, regions_class_order=(1, 1, 2))
    with pytest.raises(ConfigError, match="but labels are regions; use 'forbid'"):
        scheme.channel_pairs([("left eye", "right eye")])
