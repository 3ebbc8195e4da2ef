"""Whole plans: against nnU-Net's, and where ours differ on purpose."""

import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from medseg.errors import ConfigError, PlanError
from medseg.plan.frame import choose_spacing
from medseg.plan.memory import feature_map_voxels
from medseg.plan.operations import step_operations
from medseg.plan.planner import make_plans
from medseg.schema.base import validate
from medseg.schema.dataset import DatasetSpec
from medseg.schema.fingerprint import CaseFingerprint, Fingerprint, IntensityStatistics
from medseg.schema.plans import Plans

ROOT = Path(__file__).resolve().parents[2]
STORED = Path(__file__).parent / "data" / "nnunet_2.8.1_plans.json"
SHARED = ROOT.parent / "shared" / "data" / "planner" / "nnunet_2.8.1_plans.json"
SCRIPT = ROOT / "scripts" / "bench" / "planner_parity.py"


@pytest.fixture(scope="module")
def parity():
    """The comparison script, as a module."""
    spec = importlib.util.spec_from_file_location("planner_parity", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _fingerprint(shapes, spacings, *, kept_share=0.9, num_channels=1):
    """Return a fingerprint from shapes and spacings on canonical axes (I, J, K)."""
    statistics = {"mean": 100, "std": 20, "median": 98, "min": 3, "max": 220}
    statistics |= {"percentile_00_5": 40, "percentile_99_5": 170}
    return Fingerprint(
        cases={
            f"case_{index}": CaseFingerprint(shape=shape, shape_cropped=shape, spacing=spacing)
            for index, (shape, spacing) in enumerate(zip(shapes, spacings, strict=True))
        },
        channels=(IntensityStatistics(**statistics),) * num_channels,
        median_relative_size_after_cropping=kept_share,
    )


def _spec(channels=("T1w",), labels=None, **fields):
    labels = {"background": 0, "organ": 1} if labels is None else labels
    return DatasetSpec(name="Task", channels=channels, labels=labels, **fields)


def _json(plans):
    return json.loads(plans.model_dump_json())


# Equal to nnU-Net


def test_equals_stored_plans_of_nnunet(parity):
    """Seven data sets: flat, regions with ignore label, given spacing, low resolution, and more."""
    for entry in json.loads(STORED.read_text()):
        assert list(parity.compare(entry)) == [], entry["kind"]


@pytest.mark.skipif(not SHARED.exists(), reason=f"no reference plans at {SHARED}")
def test_equals_all_shared_plans_of_nnunet(parity, capsys):
    assert parity.main([str(SHARED)]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "with the shipped rule for parameter maps: 5 of 45 differ, in the normalisation of ADC "
        "alone",
        "equal 45 of 45",
    ]


def test_the_comparison_notices_a_difference(parity, tmp_path, capsys):
    entries = json.loads(STORED.read_text())[:2]
    entries[1]["plans"]["ExperimentPlanner"]["configurations"]["2d"]["batch_size"] += 1
    path = tmp_path / "plans.json"
    path.write_text(json.dumps(entries))
    assert parity.main([str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "configurations.2d.batch_size: expected" in lines[0]
    assert lines[-1] == "equal 1 of 2"


def _compared(parity, entries, tmp_path, capsys):
    path = tmp_path / "plans.json"
    path.write_text(json.dumps(entries))
    status = parity.main([str(path)])
    return status, capsys.readouterr().out.splitlines()


def test_nothing_compared_is_not_equal(parity, tmp_path, capsys):
    """An empty list, an entry without plans, and plans without content."""
    assert _compared(parity, [], tmp_path, capsys) == (2, [])
    entries = json.loads(STORED.read_text())[:2]
    for plans, said in (({}, "no plans"), ({"ExperimentPlanner": {}}, "configurations: expected")):
        status, lines = _compared(
            parity, [entries[0], entries[1] | {"plans": plans}], tmp_path, capsys
        )
        assert status == 1
        assert lines[-1] == "equal 1 of 2"
        assert any(said in line for line in lines)


@pytest.mark.parametrize("kept_share", [0.5, 0.9])
def test_the_shipped_rule_may_change_the_normalisation_of_maps_and_nothing_else(
    parity, tmp_path, capsys, kept_share
):
    """Below three quarters a z-score uses the mask and a map does not: normalisation as well."""
    entry = json.loads(STORED.read_text())[0]
    names = ("T2w", "ADC", "qT1", "CT")
    entry["dataset"]["channel_names"] = {str(index): name for index, name in enumerate(names)}
    entry["fingerprint"]["median_relative_size_after_cropping"] = kept_share
    spec = parity.read_spec(entry["dataset"])
    fingerprint = parity.read_fingerprint(entry["fingerprint"], 4)
    plans = make_plans(fingerprint, spec, quantitative=False)
    entry["plans"] = {"ExperimentPlanner": json.loads(json.dumps(parity.as_reference(plans)))}
    status, lines = _compared(parity, [entry], tmp_path, capsys)
    assert (status, lines[-2:]) == (
        0,
        [
            "with the shipped rule for parameter maps: 1 of 1 differ, in the normalisation of ADC, "
            "qT1 alone",
            "equal 1 of 1",
        ],
    )
    found = [
        "ExperimentPlanner: configurations.2d.normalization_schemes[1]: expected a, found b",
        "ExperimentPlanner: configurations.2d.normalization_schemes[3]: expected a, found b",
        "ExperimentPlanner: configurations.2d.batch_size: expected 2, found 3",
    ]
    assert parity.by_own_rule(found, names) == ({"ADC"}, found[1:])


def test_a_shipped_rule_that_changes_more_fails(parity, tmp_path, capsys, monkeypatch):
    def make(*arguments, quantitative, **options):
        plans = make_plans(*arguments, quantitative=quantitative, **options)
        first = plans.configurations["2d"]
        larger = first.model_copy(update={"batch_size": first.batch_size + quantitative})
        return plans.model_copy(update={"configurations": {**plans.configurations, "2d": larger}})

    monkeypatch.setattr(parity, "make_plans", make)
    status, lines = _compared(parity, json.loads(STORED.read_text())[:1], tmp_path, capsys)
    assert status == 1
    assert "with the shipped rule: ExperimentPlanner: configurations.2d.batch_size" in lines[0]
    assert lines[-1] == "equal 1 of 1"


def test_planning_imports_no_torch_and_takes_less_than_a_second():
    """The largest search: a low-resolution stage for images of 900 voxels a side."""
    fingerprint = _fingerprint([(900, 880, 910)] * 5, [(0.3, 0.31, 0.29)] * 5)
    start = time.perf_counter()
    plans = make_plans(fingerprint, _spec(("CT",)))
    assert time.perf_counter() - start < 1
    assert "3d_lowres" in plans.configurations
    code = "import sys, medseg.plan.planner; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_made_up_data_sets_are_of_many_kinds_and_planned_in_less_than_a_second(parity):
    """Each kind of `--random`, with each of its planners; what nnU-Net plans is compared there."""
    rng = np.random.default_rng(3)
    for kind in parity.KINDS:
        entry = parity.random_entry(rng, kind)
        assert json.loads(json.dumps(entry)) == entry
        spec = parity.read_spec(entry["dataset"])
        fingerprint = parity.read_fingerprint(entry["fingerprint"], len(spec.channels))
        for name in (*map(parity.PRESETS.get, entry["planners"]), "cpu"):
            start = time.perf_counter()
            plans = make_plans(fingerprint, spec, name=name, quantitative=False)
            assert time.perf_counter() - start < 1, (kind, name)
            assert (list(plans.configurations) == ["2d"]) == kind.startswith("2d")


# Machines without GPU


@pytest.mark.parametrize("num_channels", [1, 4])
@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((512, 512, 210), (0.8, 0.8, 1.5)),
        ((170, 210, 150), (1.0, 1.0, 1.0)),
        ((220, 210, 10), (1.4, 1.4, 9.0)),
        ((35, 51, 36), (1.0, 1.0, 1.0)),
        ((900, 700, 1), (0.3, 0.3, 1.0)),
    ],
    ids=["ct", "brain", "heart", "hippocampus", "slices"],
)
def test_a_step_of_the_cpu_preset_is_small_whatever_the_data(shape, spacing, num_channels):
    """At most 1e11 operations, 1 to 2 s on two cores, and 2 GB of feature maps."""
    fingerprint = _fingerprint([shape] * 30, [spacing] * 30, num_channels=num_channels)
    spec = _spec(tuple(f"c{n}" for n in range(num_channels)))
    plans = make_plans(fingerprint, spec, name="cpu")
    for name, entry in plans.configurations.items():
        net = entry.architecture
        step = {"batch_size": entry.batch_size, "num_inputs": num_channels, "num_logits": 2}
        assert 1e10 < step_operations(net, entry.patch_size, **step) <= 1e11, name
        voxels = feature_map_voxels(
            net.kind,
            entry.patch_size,
            features=net.features,
            strides=net.strides,
            blocks_encoder=net.blocks_encoder,
            blocks_decoder=net.blocks_decoder,
            num_logits=2,
        )
        assert 8 * voxels * entry.batch_size < 2.1e9
        assert net.features[0] == 16
        assert max(net.features) <= 256
    text = "\n".join(plans.why)
    assert "Made for a machine without GPU" in text
    assert "GB" not in text


def test_the_cpu_preset_knows_no_gpu_memory():
    fingerprint = _fingerprint([(60, 70, 80)], [(1.0, 1.0, 1.0)])
    with pytest.raises(PlanError, match=r"16 GB, but 'cpu' plans for a machine without GPU"):
        make_plans(fingerprint, _spec(), name="cpu", gpu_memory_gb=16)


# Frame


def test_network_axes_start_with_the_largest_voxels_and_keep_k_j_i():
    def axes(spacing):
        fingerprint = _fingerprint([(60, 70, 80)], [spacing])
        return make_plans(fingerprint, _spec()).network_axes

    assert axes((1.0, 1.1, 1.2)) == (2, 1, 0)
    assert axes((1.0, 1.2, 1.1)) == (1, 2, 0)
    assert axes((1.2, 1.1, 1.0)) == (0, 2, 1)
    assert axes((1.0, 1.0, 1.0)) == (2, 1, 0)


def test_per_axis_lists_are_in_network_order():
    fingerprint = _fingerprint([(50, 300, 280)] * 3, [(3.0, 0.5, 0.6)] * 3)
    plans = make_plans(fingerprint, _spec())
    assert plans.network_axes == (0, 2, 1)
    assert plans.original_median_spacing == (3.0, 0.6, 0.5)
    assert plans.original_median_shape == (50, 280, 300)
    full = plans.configurations["3d_fullres"]
    assert full.spacing == (3.0, 0.6, 0.5)
    assert full.median_shape == (50, 280, 300)
    assert plans.configurations["2d"].spacing == (0.6, 0.5)
    assert plans.configurations["2d"].median_shape == (280, 300)


def test_a_coarse_short_axis_gets_its_tenth_percentile():
    spacings = np.array([[8.0, 1, 1]] * 9 + [[3.0, 1, 1]])
    shapes = np.full((10, 3), (20.0, 200, 200))
    target, axis = choose_spacing(spacings, shapes)
    assert axis == 0
    assert target == pytest.approx((7.5, 1, 1))
    long, axis = choose_spacing(spacings, np.full((10, 3), (150.0, 200, 200)))
    assert axis is None
    assert long == pytest.approx((8, 1, 1))


def test_the_tenth_percentile_never_undercuts_the_other_axes():
    spacings = np.array([[8.0, 1, 1]] * 8 + [[0.5, 1, 1]] * 2)
    target, _ = choose_spacing(spacings, np.full((10, 3), (20.0, 200, 200)))
    assert target == pytest.approx((1.00001, 1, 1), abs=1e-9)


def test_given_spacing_is_on_canonical_axes():
    fingerprint = _fingerprint([(100, 110, 120)], [(1.0, 1.0, 1.0)])
    plans = make_plans(fingerprint, _spec(), target_spacing=(2.0, 0.5, 1.0))
    full = plans.configurations["3d_fullres"]
    assert plans.network_axes == (0, 2, 1)
    assert full.spacing == (2.0, 1.0, 0.5)
    assert full.median_shape == (50, 120, 220)
    assert plans.original_median_spacing == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("flat_axis", [0, 1, 2])
@pytest.mark.parametrize("thickness", [0.1, 5.0])
def test_single_slices_give_2d_alone_whichever_axis_and_thickness(flat_axis, thickness):
    shape, spacing = [300, 310, 320], [0.5, 0.6, 0.7]
    shape[flat_axis], spacing[flat_axis] = 1, thickness
    plans = make_plans(_fingerprint([tuple(shape)] * 4, [tuple(spacing)] * 4), _spec())
    assert list(plans.configurations) == ["2d"]
    assert plans.network_axes[0] == flat_axis
    in_plane = tuple(spacing[axis] for axis in plans.network_axes[1:])
    assert plans.configurations["2d"].spacing == in_plane
    assert "No 3D configuration: the images are single slices." in plans.why


def test_single_slices_of_different_thickness_stay_2d():
    """10 mm slices count two voxels at a target of 5 mm; they are single slices all the same."""
    spacings = [(0.5, 0.5, 5.0)] * 3 + [(0.5, 0.5, 10.0)] * 2
    plans = make_plans(_fingerprint([(200, 210, 1)] * 5, spacings), _spec())
    assert list(plans.configurations) == ["2d"]


def test_single_slices_of_all_directions_stay_2d():
    shapes = [(1, 200, 200), (200, 1, 200), (200, 200, 1), (200, 190, 1)]
    plans = make_plans(_fingerprint(shapes, [(1.0, 1.0, 1.0)] * 4), _spec())
    assert list(plans.configurations) == ["2d"]
    assert plans.network_axes == (2, 1, 0)


# Other decisions


def test_low_resolution_brings_the_cascade_and_batch_dice():
    plans = make_plans(_fingerprint([(512, 512, 400)] * 20, [(0.8, 0.8, 1.0)] * 20), _spec())
    configurations = plans.configurations
    assert list(configurations) == ["2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres"]
    assert {name: c.batch_dice for name, c in configurations.items()} == {
        "2d": True,
        "3d_lowres": False,
        "3d_fullres": True,
        "3d_cascade_fullres": True,
    }
    cascade, full = configurations["3d_cascade_fullres"], configurations["3d_fullres"]
    assert cascade.previous_stage == "3d_lowres"
    assert cascade == full.model_copy(update={"previous_stage": "3d_lowres"})
    assert plans.inherits == {"3d_cascade_fullres": "3d_fullres"}
    low = configurations["3d_lowres"]
    assert np.prod(low.patch_size) / np.prod(low.median_shape) >= 0.24


def test_normalisation_follows_the_channel_name_and_the_crop():
    channels = ("CT", "T1w", "noNorm", "rescale_to_0_1", "RGB_to_0_1", "zscore")
    fingerprint = _fingerprint(
        [(60, 70, 80)], [(1.0, 1.0, 1.0)], kept_share=0.7, num_channels=len(channels)
    )
    full = make_plans(fingerprint, _spec(channels)).configurations["3d_fullres"]
    assert full.normalization == ("ct", "zscore", "none", "rescale_0_1", "rgb_0_1", "zscore")
    assert full.use_mask_for_norm == (False, True, False, False, False, True)
    wide = fingerprint.model_copy(update={"median_relative_size_after_cropping": 0.75})
    full = make_plans(wide, _spec(channels)).configurations["3d_fullres"]
    assert full.use_mask_for_norm == (False,) * 6


def test_parameter_maps_are_normalised_with_the_data_set_unless_nnunets_way_is_asked_for():
    channels = ("ADC", "T1 map", "T1w", "CT (HU)", "noNorm")
    fingerprint = _fingerprint(
        [(60, 70, 80)], [(1.0, 1.0, 1.0)], kept_share=0.5, num_channels=len(channels)
    )
    plans = make_plans(fingerprint, _spec(channels))
    full = plans.configurations["3d_fullres"]
    assert full.normalization == ("quantitative", "quantitative", "zscore", "ct", "none")
    assert full.use_mask_for_norm == (False, False, True, False, False)
    assert any(
        sentence.startswith("Channel 'ADC' is z-scored with the data set's mean")
        and "a map of apparent diffusion coefficient means the same in every case" in sentence
        for sentence in plans.why
    )
    full = make_plans(fingerprint, _spec(channels), quantitative=False).configurations["3d_fullres"]
    assert full.normalization == ("zscore", "zscore", "zscore", "zscore", "none")


def test_what_was_asked_for_is_on_record():
    fingerprint = _fingerprint([(100, 110, 120)], [(1.0, 1.0, 1.0)])
    plans = make_plans(fingerprint, _spec(), gpu_memory_gb=11, target_spacing=(2, 0.5, 1))
    assert (plans.asked_gpu_memory_gb, plans.asked_target_spacing) == (11, (2.0, 0.5, 1.0))
    plans = make_plans(fingerprint, _spec())
    assert (plans.asked_gpu_memory_gb, plans.asked_target_spacing) == (None, None)


def test_an_ignore_label_counts_as_a_logit_whether_listed_or_not():
    fingerprint = _fingerprint([(200, 210, 190)] * 9, [(1.0, 1.0, 1.0)] * 9)
    labels = {"background": 0, **{f"l{n}": n for n in range(1, 40)}}
    listed = make_plans(fingerprint, _spec(labels={**labels, "ignore": 40}, ignore_label=40))
    apart = make_plans(fingerprint, _spec(labels=labels, ignore_label=40))
    assert listed == apart


def test_presets_differ_in_network_and_memory():
    fingerprint = _fingerprint([(300, 310, 320)] * 30, [(1.0, 1.0, 1.0)] * 30)
    patches = {}
    for name in ("nnunet", "resenc_m", "resenc_l", "resenc_xl"):
        plans = make_plans(fingerprint, _spec(), name=name)
        full = plans.configurations["3d_fullres"]
        patches[name] = np.prod(full.patch_size)
        assert plans.name == name
        assert full.architecture.kind == ("plain_unet" if name == "nnunet" else "residual_unet")
    assert patches["resenc_m"] < patches["resenc_l"] < patches["resenc_xl"]
    wide = make_plans(fingerprint, _spec(), gpu_memory_gb=16)
    assert np.prod(wide.configurations["3d_fullres"].patch_size) > patches["nnunet"]


def test_plans_survive_json():
    plans = make_plans(_fingerprint([(60, 70, 80)], [(1.0, 1.1, 1.2)]), _spec())
    assert validate(Plans, _json(plans), "plans.json") == plans


# Reasons


def test_why_gives_one_sentence_for_each_decision():
    shapes, spacings = [(512, 512, 60)] * 8, [(0.8, 0.8, 5.0)] * 7 + [(0.8, 0.8, 2.5)]
    fingerprint = _fingerprint(shapes, spacings, kept_share=0.5, num_channels=2)
    why = make_plans(fingerprint, _spec(("CT", "T2w"))).why
    for sentence in why:
        assert re.fullmatch(r"\S.*[^.]\.", sentence), sentence
        assert ". " not in sentence, sentence
        assert "_by(" not in sentence
    text = "\n".join(why)
    for words in (
        "Target voxel size 4.25 x 0.8 x 0.8 mm",
        "10th percentile",
        "Axis order K (inferior-superior), J (posterior-anterior), I (left-right)",
        "2d: patch ",
        "3d_fullres: patch ",
        "3d_fullres: batch size ",
        "3d_lowres",
        "Channel 'CT' is clipped",
        "Channel 'T2w' is z-scored",
        "non-zero",
        "Batch Dice in 2d",
    ):
        assert words in text


@pytest.mark.parametrize(("name", "batch"), [("nnunet", 2), ("resenc_l", 12)])
def test_why_names_the_batch_a_2d_patch_was_made_for(name, batch):
    fingerprint = _fingerprint([(900, 1000, 30)] * 9, [(1.0, 1.0, 4.0)] * 9)
    why = make_plans(fingerprint, _spec(), name=name).why
    assert any(s.startswith("2d: patch") and f"a batch of {batch} fit" in s for s in why)


@pytest.mark.parametrize(
    ("shape", "num_cases", "expected"),
    [
        ((40, 42, 44), 50, "a step may see at most 5% of the data set's voxels"),
        ((40, 42, 44), 2, "the smallest allowed"),
        ((300, 310, 320), 50, "as many patches as fit 8 GB"),
    ],
)
def test_why_names_what_limits_the_batch(shape, num_cases, expected):
    fingerprint = _fingerprint([shape] * num_cases, [(1.0, 1.0, 1.0)] * num_cases)
    why = make_plans(fingerprint, _spec()).why
    assert any(s.startswith("3d_fullres: batch size") and expected in s for s in why)


# Errors


def test_an_unknown_preset_names_the_known_ones():
    fingerprint = _fingerprint([(60, 70, 80)], [(1.0, 1.0, 1.0)])
    with pytest.raises(ConfigError, match=r"no planner preset 'resenc_x'.*nnunet.*Did you mean"):
        make_plans(fingerprint, _spec(), name="resenc_x")


def test_all_problems_are_reported_at_once():
    fingerprint = _fingerprint([(60, 70, 80)], [(1.0, 0.0, 1.0)])
    with pytest.raises(PlanError) as caught:
        make_plans(
            fingerprint,
            _spec(("T1w", "T2w")),
            gpu_memory_gb=-1,
            target_spacing=(1.0, 1.0),
        )
    message = str(caught.value)
    for words in ("1 channels, the data set 2", "'case_0' has spacing (1.0, 0.0, 1.0)", "-1 GB"):
        assert words in message
    assert "expected 3 positive numbers (I, J, K), in mm" in message


def test_an_empty_fingerprint_is_an_error():
    with pytest.raises(PlanError, match="holds no case"):
        make_plans(_fingerprint([], []), _spec())
