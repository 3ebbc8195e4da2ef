"""Which image belongs to which segmentation, in the folders people have."""

from __future__ import annotations

import pytest

from medseg.data.layouts.pairing import pair_files
from medseg.errors import ConfigError, DatasetError


def tree(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


LAYOUTS = {
    "nnU-Net raw": (
        ["imagesTr/a_1_0000.nii.gz", "imagesTr/a_1_0001.nii.gz", "labelsTr/a_1.nii.gz"],
        {"a_1": ("imagesTr/a_1_0000.nii.gz", "imagesTr/a_1_0001.nii.gz", "labelsTr/a_1.nii.gz")},
        ("0000", "0001"),
    ),
    "images and labels": (
        ["images/t1.nii.gz", "images/t2.nii", "labels/t1.nii.gz", "labels/t2.nii"],
        {
            "t1": ("images/t1.nii.gz", "labels/t1.nii.gz"),
            "t2": ("images/t2.nii", "labels/t2.nii"),
        },
        ("",),
    ),
    "img and seg, other endings": (
        ["img/x 1.png", "seg/x 1.bmp"],
        {"x_1": ("img/x 1.png", "seg/x 1.bmp")},
        ("",),
    ),
    "words before the number": (
        ["imgs/img001.png", "imgs/img002.png", "masks/mask001.png", "masks/mask002.png"],
        {
            "001": ("imgs/img001.png", "masks/mask001.png"),
            "002": ("imgs/img002.png", "masks/mask002.png"),
        },
        ("",),
    ),
    "LiTS": (
        ["volume-0.nii", "segmentation-0.nii", "volume-10.nii", "segmentation-10.nii"],
        {
            "0": ("volume-0.nii", "segmentation-0.nii"),
            "10": ("volume-10.nii", "segmentation-10.nii"),
        },
        ("",),
    ),
    "suffix in one folder": (
        ["p1.mha", "p1_seg.mha", "p2.mha", "p2-mask.mha"],
        {"p1": ("p1.mha", "p1_seg.mha"), "p2": ("p2.mha", "p2-mask.mha")},
        ("",),
    ),
    "labels beside images in the top folder": (
        ["a.nrrd", "b.nrrd", "GroundTruth/a.nrrd", "GroundTruth/b.nrrd"],
        {"a": ("a.nrrd", "GroundTruth/a.nrrd"), "b": ("b.nrrd", "GroundTruth/b.nrrd")},
        ("",),
    ),
    "folder per patient": (
        [f"P{n}/{name}.nii.gz" for n in (1, 2) for name in ("t1", "flair", "seg")],
        {
            "P1": ("P1/flair.nii.gz", "P1/t1.nii.gz", "P1/seg.nii.gz"),
            "P2": ("P2/flair.nii.gz", "P2/t1.nii.gz", "P2/seg.nii.gz"),
        },
        ("flair", "t1"),
    ),
    "BraTS": (
        [f"B-0{n}-000/B-0{n}-000-{x}.nii.gz" for n in (1, 2) for x in ("t1c", "t2f", "seg")],
        {
            f"B-0{n}-000": tuple(f"B-0{n}-000/B-0{n}-000-{x}.nii.gz" for x in ("t1c", "t2f", "seg"))
            for n in (1, 2)
        },
        ("t1c", "t2f"),
    ),
    "folders in each patient's folder": (
        [f"{p}/{f}/{s}.png" for p in "ab" for f in ("images", "masks") for s in (1, 2)],
        {f"{p}_{s}": (f"{p}/images/{s}.png", f"{p}/masks/{s}.png") for p in "ab" for s in (1, 2)},
        ("",),
    ),
    "BIDS": (
        [
            *(f"sub-0{n}/ses-1/anat/sub-0{n}_ses-1_T1w.nii.gz" for n in (1, 2)),
            *(
                f"derivatives/x/sub-0{n}/ses-1/anat/sub-0{n}_ses-1_desc-les_dseg.nii.gz"
                for n in (1, 2)
            ),
            "derivatives/x/sub-01/ses-1/anat/sub-01_ses-1_desc-les_probseg.nii.gz",
            "derivatives/y/sub-01/ses-1/anat/sub-01_ses-1_desc-brain_mask.nii.gz",
        ],
        {
            f"sub-0{n}_ses-1": (
                f"sub-0{n}/ses-1/anat/sub-0{n}_ses-1_T1w.nii.gz",
                f"derivatives/x/sub-0{n}/ses-1/anat/sub-0{n}_ses-1_desc-les_dseg.nii.gz",
            )
            for n in (1, 2)
        },
        ("t1w",),
    ),
    "BIDS, segmentation of one of several images": (
        [
            "sub-1/anat/sub-1_T1w.nii.gz",
            "sub-1/anat/sub-1_T2w.nii.gz",
            "derivatives/labels/sub-1/anat/sub-1_T2w_seg-manual.nii.gz",
        ],
        {
            "sub-1_T2w": (
                "sub-1/anat/sub-1_T2w.nii.gz",
                "derivatives/labels/sub-1/anat/sub-1_T2w_seg-manual.nii.gz",
            )
        },
        ("",),
    ),
    "more words in the segmentation's name": (
        ["scans/7.png", "scans/8.png", "labels/7_liver.png", "labels/8_liver.png"],
        {
            "7_liver": ("scans/7.png", "labels/7_liver.png"),
            "8_liver": ("scans/8.png", "labels/8_liver.png"),
        },
        ("",),
    ),
    "channel before the id": (
        [f"image/{c}_{n}.nii" for c in ("adc", "dwi") for n in (1, 2)] + ["gt/1.nii", "gt/2.nii"],
        {
            "1": ("image/adc_1.nii", "image/dwi_1.nii", "gt/1.nii"),
            "2": ("image/adc_2.nii", "image/dwi_2.nii", "gt/2.nii"),
        },
        ("adc", "dwi"),
    ),
    "same names in other folders": (
        [f"{part}/{role}/1.png" for part in ("train", "val") for role in ("image", "label")],
        {
            "train_1": ("train/image/1.png", "train/label/1.png"),
            "val_1": ("val/image/1.png", "val/label/1.png"),
        },
        ("",),
    ),
    "test images and hidden files aside": (
        ["imagesTr/a.nii", "labelsTr/a.nii", "imagesTs/b.nii", ".x/images/c.nii", "images/._a.nii"],
        {"a": ("imagesTr/a.nii", "labelsTr/a.nii")},
        ("",),
    ),
    "other scripts": (
        ["images/\u809d 1.nii.gz", "labels/\u809d 1.nii.gz"],
        {"\u809d_1": ("images/\u809d 1.nii.gz", "labels/\u809d 1.nii.gz")},
        ("",),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_understood(tmp_path, layout):
    names, expected, channels = LAYOUTS[layout]
    pairing = pair_files(tree(tmp_path, *names))
    found = {
        case: (*(one.images[channel] for channel in pairing.channels), one.segmentation)
        for case, one in pairing.cases.items()
    }
    assert found == expected
    assert pairing.channels == channels
    used = {name for case in found.values() for name in case}
    left = [name for one in pairing.left_over for name in one.files]
    shown = {name for name in names if not any(p.startswith(".") for p in name.split("/"))}
    assert sorted([*used, *left]) == sorted(shown), "every file is used or left over, once"


def left_over(pairing):
    return {one.reason: list(one.files) for one in pairing.left_over}


def test_what_does_not_pair_is_listed(tmp_path):
    pairing = pair_files(
        tree(tmp_path, "images/a.png", "images/b.png", "labels/a.png", "labels/c.png", "x/d.png")
    )
    assert list(pairing.cases) == ["a"]
    assert left_over(pairing) == {
        "neither image nor segmentation by name": ["x/d.png"],
        "images without a segmentation": ["images/b.png"],
        "segmentations without an image": ["labels/c.png"],
    }


def test_case_that_lacks_a_channel_is_left_out(tmp_path):
    names = [f"p{n}/{name}.nii" for n in range(6) for name in ("t1", "t2", "seg")]
    names.remove("p3/t2.nii")
    pairing = pair_files(tree(tmp_path, *names, "p0/extra.nii"))
    assert list(pairing.cases) == ["p0", "p1", "p2", "p4", "p5"]
    assert left_over(pairing) == {
        "not in every case": ["p0/extra.nii"],
        "cases that lack a channel": ["p3/seg.nii", "p3/t1.nii"],
    }


def test_one_segmentation_a_case_is_chosen_and_the_others_named(tmp_path):
    names = [f"p{n}/{name}.nii" for n in (1, 2) for name in ("t1", "brain_mask", "seg", "mask")]
    pairing = pair_files(tree(tmp_path, *names))
    assert pairing.cases["p1"].segmentation == "p1/seg.nii"
    assert "p1/mask.nii" in left_over(pairing)["other segmentations of the same case"]


def test_binary_masks_of_several_structures_are_not_paired_at_random(tmp_path):
    names = ["images/1.png", "images/2.png", "labels/2.png"]
    pairing = pair_files(tree(tmp_path, *names, "labels/1_liver.png", "labels/1_spleen.png"))
    assert list(pairing.cases) == ["2"]
    assert left_over(pairing)["several segmentations of one image"] == [
        "labels/1_liver.png",
        "labels/1_spleen.png",
    ]


def test_different_single_images_make_one_channel(tmp_path):
    """Each case has one image, of whatever contrast: one channel, not several."""
    pairing = pair_files(tree(tmp_path, "a/t1.nii", "a/seg.nii", "b/t2.nii", "b/seg.nii"))
    assert pairing.channels == ("",)
    assert pairing.cases["b"].images == {"": "b/t2.nii"}


def test_too_different_cases_are_refused(tmp_path):
    names = ["a/t1.nii", "a/t2.nii", "a/seg.nii", "b/t1.nii", "b/seg.nii", "c/t2.nii", "c/seg.nii"]
    with pytest.raises(DatasetError, match=r"t1 2, t2 2\. Say which of them every case has"):
        pair_files(tree(tmp_path, *names))


def test_nothing_to_pair_says_what_was_seen(tmp_path):
    with pytest.raises(DatasetError, match="no image file there, at any depth"):
        pair_files(tree(tmp_path, "notes.txt"))
    with pytest.raises(DatasetError, match="of 2 image files none could be paired") as caught:
        pair_files(tree(tmp_path, "a.nii", "b.nii"))
    assert "taken for images: 2 (a.nii, b.nii)" in str(caught.value)
    assert "taken for segmentations: none" in str(caught.value)


class TestPatterns:
    def test_patterns_say_what_is_what(self, tmp_path):
        names = ["in/a_x.nii", "in/b_x.nii", "in/a_y.nii", "out/b_final.nii", "out/a_final.nii"]
        pairing = pair_files(
            tree(tmp_path, *names),
            images="in/{case}_x.nii",
            segmentations="out/{case}_final.nii",
        )
        assert {
            c: (*one.images.values(), one.segmentation) for c, one in pairing.cases.items()
        } == {
            "a": ("in/a_x.nii", "out/a_final.nii"),
            "b": ("in/b_x.nii", "out/b_final.nii"),
        }
        assert left_over(pairing) == {"named by no pattern": ["in/a_y.nii"]}

    def test_channels_and_groups_from_fields(self, tmp_path):
        names = [f"s{p}/v{v}/{c}.nii" for p in (1, 2) for v in (1, 2) for c in ("p", "q", "m")]
        pairing = pair_files(
            tree(tmp_path, *names),
            images="s{group}/v{case}/{channel}.nii",
            segmentations="s{group}/v{case}/m.nii",
        )
        assert pairing.channels == ("p", "q")
        assert {case: one.group for case, one in pairing.cases.items()} == {
            "1_1": "1",
            "1_2": "1",
            "2_1": "2",
            "2_2": "2",
        }

    def test_one_pattern_is_enough(self, tmp_path):
        names = ["a.nii", "a_auto_seg.nii", "a_hand_seg.nii"]
        pairing = pair_files(tree(tmp_path, *names), segmentations="*_hand_seg.nii")
        assert pairing.cases["a_hand"].segmentation == "a_hand_seg.nii"
        assert pairing.cases["a_hand"].images == {"": "a.nii"}

    def test_bids_pattern_of_one_contrast(self, tmp_path):
        names = [f"sub-{n}/anat/sub-{n}_{c}.nii.gz" for n in (1, 2) for c in ("T1w", "FLAIR")]
        names += [f"derivatives/m/sub-{n}/anat/sub-{n}_desc-a_dseg.nii.gz" for n in (1, 2)]
        pairing = pair_files(
            tree(tmp_path, *names),
            images="sub-*/anat/*_T1w.nii.gz",
            segmentations="derivatives/*/sub-*/anat/*_desc-*_dseg.nii.gz",
        )
        assert list(pairing.cases) == ["sub-1", "sub-2"]
        assert pairing.channels == ("t1w",)

    @pytest.mark.parametrize(
        ("images", "segmentations", "message"),
        [
            ("{patient}.nii", None, "unknown field {patient}"),
            ("{case}.nii", "*_seg.nii", "only one of the patterns"),
            (" ", None, "the pattern is empty"),
        ],
    )
    def test_unusable_pattern_is_refused(self, tmp_path, images, segmentations, message):
        with pytest.raises(ConfigError, match=message):
            pair_files(tree(tmp_path, "a.nii"), images=images, segmentations=segmentations)
