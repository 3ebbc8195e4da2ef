"""Labels with sides are found by their names, and mirroring follows."""

from __future__ import annotations

import pytest

from medseg.plan.planner import make_plans
from medseg.plan.sides import explain_left_right, find_left_right
from medseg.report.plans import format_plans
from medseg.schema.dataset import DatasetSpec
from medseg.schema.fingerprint import CaseFingerprint, Fingerprint, IntensityStatistics

AXES = (2, 0, 1)


def make_spec(*names, **changes):
    labels = {"background": 0, **{name: number for number, name in enumerate(names, start=1)}}
    return DatasetSpec(**{"name": "Sided", "channels": ("CT",), "labels": labels, **changes})


def decide(*names, **changes):
    return find_left_right(make_spec(*names, **changes), AXES)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("left kidney", "right kidney"),
        ("Left Kidney", "Right Kidney"),
        ("kidney_left", "kidney_right"),
        ("kidney-left", "right-kidney"),
        ("kidneyLeft", "kidneyRight"),
        ("leftkidney", "rightkidney"),
        ("kidney (left)", "kidney (right)"),
        ("Parotid_L", "Parotid_R"),
        ("parotid_l", "parotid_r"),
        ("L_Parotid", "R_Parotid"),
        ("ParotidL", "ParotidR"),
        ("LParotid", "RParotid"),
        ("R. Parotid", "Parotid L")[::-1],
        ("lh_hippocampus", "rh_hippocampus"),
        ("ctx-lh-bankssts", "ctx-rh-bankssts"),
        ("Eye Lt", "Eye Rt"),
        ("left", "right"),
        ("L", "R"),
        ("rib_left_3", "rib_right_3"),
        ("\u5de6\u80be", "\u53f3\u80be"),
        ("\u80be\uff08\u5de6\uff09", "\u80be\uff08\u53f3\uff09"),
        ("\u53f3\u4fa7\u9888\u52a8\u8109", "\u5de6\u4fa7\u9888\u52a8\u8109")[::-1],
        ("linke Niere", "rechte Niere"),
        ("Niere links", "Niere rechts"),
        ("rein gauche", "rein droit"),
        ("Left-Lateral-Ventricle", "Right-Lateral-Ventricle"),
        ("Left-Inf-Lat-Vent", "Right-Inf-Lat-Vent"),
        ("left temporal lobe", "right temporal lobe"),
        ("left lung", "right lung"),
    ],
)
def test_pairs_change_places_whatever_the_spelling_and_the_order(left, right):
    for names in ((left, "spine", right), (right, left)):
        found = decide(*names)
        assert found.policy == "swap", explain_left_right(make_spec(*names))
        assert found.pairs == ((left, right),)


@pytest.mark.parametrize(
    "names",
    [
        ("liver", "tumour"),
        ("cleft", "bright spot"),
        ("leftover", "upright"),
        ("Anterior", "Posterior"),
        ("L1", "L2", "L3", "L4", "L5"),
        ("vertebra_L1", "vertebra_L2", "rib_R1"),
        ("L1", "L2", "L3", "L4", "L5", "R1"),
        ("L1", "L2", *(f"R{number}" for number in range(1, 13))),
        ("lesion L", "lesion M"),
        ("RV", "MLV", "LVC"),
        ("left and right kidney",),
        ("\u5de6\u53f3\u80be",),
        ("left-right shunt", "shunt"),
        ("CSF", "GM", "WM"),
        ("re-irradiated", "edema"),
        ("ALL", "ARM"),
    ],
)
def test_false_friends_have_no_side(names):
    assert decide(*names) is None
    assert explain_left_right(make_spec(*names)) == ()


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("left kidney", "right kidney", "left cyst"), "'left cyst' has no partner"),
        (("left atrium",), "'left atrium' has no partner"),
        (("Parotid_L", "Parotid_R", "Cochlea_L"), "'Cochlea_L' has no partner"),
        (("left eye", "eye_left", "right eye"), "'left eye', 'eye_left', 'right eye' have no"),
        (("left ventricle", "right ventricle"), "'left ventricle' and 'right ventricle' differ"),
        (("left atrium", "right atrium", "left eye", "right eye"), "and 'right atrium' differ"),
        (("lung_upper_lobe_left", "lung_upper_lobe_right"), "differ in form"),
        (("left lower lobe", "right lower lobe"), "differ in form"),
        (("adrenal_gland_left", "adrenal_gland_right"), "differ in form"),
        (("\u5de6\u5fc3\u623f", "\u53f3\u5fc3\u623f"), "differ in form"),
        (("LV", "RV"), "'LV' and 'RV' may be sides"),
        (("RA", "LA"), "'LA' and 'RA' may be sides"),
        (("Eye_AL", "Eye_AR", "Parotid_L", "Parotid_R"), "'Eye_AL' and 'Eye_AR' may be sides"),
        (("rib_L1", "rib_R1", "rib_L2", "rib_R2"), "'rib_L1' and 'rib_R1', 'rib_L2' and 'rib_R2'"),
    ],
)
def test_what_is_in_doubt_is_not_mirrored_and_the_reason_is_said(names, reason):
    assert decide(*names).policy == "forbid"
    (sentence,) = explain_left_right(make_spec(*names))
    assert sentence.startswith("Never mirrored along I (left-right), for labels have sides: ")
    assert reason in sentence


def test_regions_forbid_mirroring():
    labels = {"background": 0, "kidneys": (1, 2), "left kidney": 1, "right kidney": 2}
    found = decide(labels=labels, regions_class_order=(1, 1, 2))
    assert (found.policy, found.pairs) == ("forbid", (("left kidney", "right kidney"),))
    (sentence,) = explain_left_right(make_spec(labels=labels, regions_class_order=(1, 1, 2)))
    assert "labels are regions" in sentence


def test_every_pair_is_found_and_a_long_list_is_cut_in_words():
    parts = ("kidney", "eye", "hip", "rib", "lens")
    names = [f"{part}_{side}" for part in parts for side in ("right", "left")]
    assert decide(*names).pairs == tuple((f"{part}_left", f"{part}_right") for part in parts)
    (sentence,) = explain_left_right(make_spec(*names))
    assert sentence.endswith("'hip_left' and 'hip_right' and 2 more.")


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (2, 0, 1)])
def test_the_axis_is_where_the_network_has_canonical_left_right(axes):
    found = find_left_right(make_spec("left eye", "right eye"), axes)
    assert axes[found.axis] == 0


def test_background_and_ignore_are_no_labels():
    assert decide(labels={"background": 0, "lens": 1, "ignore": 2}, ignore_label=2) is None


STATISTICS = IntensityStatistics(
    mean=0.0, std=1.0, median=0.0, min=-3.0, max=3.0, percentile_00_5=-2.0, percentile_99_5=2.0
)


def plan(spec, spacing):
    case = CaseFingerprint(shape=(90, 80, 70), shape_cropped=(90, 80, 70), spacing=spacing)
    return make_plans(
        Fingerprint(
            cases={"a": case, "b": case},
            channels=(STATISTICS,),
            median_relative_size_after_cropping=1.0,
        ),
        spec,
    )


@pytest.mark.parametrize("spacing", [(1.0, 1.1, 3.0), (3.0, 1.1, 1.0), (1.1, 3.0, 1.0)])
def test_plans_hold_the_decision_its_reason_and_a_row(spacing):
    spec = make_spec("left eye", "right eye")
    plans = plan(spec, spacing)
    assert plans.network_axes[plans.left_right.axis] == 0
    assert plans.why[-1:] == explain_left_right(spec)
    assert plan(make_spec("eye"), spacing).left_right is None
    rows = {}
    for row in format_plans(plans).split("\n\n"):
        name, *lines = row.splitlines()
        text = " ".join(" ".join(lines).split())
        rows[name] = text[text.index("mirroring") :] if "mirroring" in text else text
    swap = "mirroring all axes; along I (left-right) the two labels of a pair change places"
    assert rows["3d_fullres"] == swap
    sagittal = spacing[0] == 3.0
    assert rows["2d"] == ("mirroring all axes" if sagittal else swap)
    lone = format_plans(plan(make_spec("left eye"), spacing))
    assert ("all axes but I (left-right)" in lone.split("2d\n")[1].split("\n\n")[0]) != sagittal
