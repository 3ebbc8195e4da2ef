"""Every schema: written and read again it is the same; every field says what it is."""

from __future__ import annotations

import importlib
import json
import pkgutil

import pytest

import medseg.schema
from medseg.errors import ConfigError, PlanError
from medseg.schema.base import Schema, read, validate, write, write_json
from medseg.schema.bundle import BundleManifest, Resampling, Semantics
from medseg.schema.dataset import CaseFiles, DatasetSpec
from medseg.schema.fingerprint import (
    CaseFingerprint,
    ChannelIntensities,
    Fingerprint,
    IntensityStatistics,
)
from medseg.schema.metrics import (
    MEASURES,
    CaseMetrics,
    ForegroundMean,
    Metrics,
    Statistic,
    StructureMetrics,
    StructureSummary,
)
from medseg.schema.plans import Architecture, Configuration, Plans, read_plans, write_plans
from medseg.schema.recipe import Recipe
from medseg.schema.training_cases import ChannelSpread, Spread, StructureSpread, TrainingCases

STATISTICS = IntensityStatistics(
    mean=0.1 + 0.2, std=1e-9, median=2.0, min=-3e38, max=5, percentile_00_5=-1, percentile_99_5=4
)
CONFIGURATION = Configuration(
    patch_size=(20, 24, 16),
    batch_size=2,
    spacing=(3.0, 0.9, 1.1),
    median_shape=(31.0, 112.5, 97.0),
    normalization=("zscore", "ct"),
    use_mask_for_norm=(True, False),
    batch_dice=False,
    architecture=Architecture(
        kind="plain_unet",
        features=(32, 64),
        kernel_sizes=((1, 3, 3), (3, 3, 3)),
        strides=((1, 1, 1), (1, 2, 2)),
        blocks_encoder=(2, 2),
        blocks_decoder=(2,),
    ),
)
PLANS = Plans(
    name="nnunet",
    dataset="Dataset001_X",
    network_axes=(2, 1, 0),
    original_median_spacing=(3.0, 0.9, 1.1),
    original_median_shape=(31, 120, 99),
    intensity=(STATISTICS, STATISTICS),
    configurations={"3d_fullres": CONFIGURATION},
    why=("one axis is coarse",),
)
STRUCTURE = StructureMetrics(
    dice=0.9,
    iou=0.8,
    precision=None,
    recall=1.0,
    hd95_mm=None,
    nsd=0.5,
    true_positives=9,
    false_positives=1,
    false_negatives=0,
    true_negatives=90,
    volume_prediction_ml=0.01,
    volume_reference_ml=0.009,
)
STATISTIC = Statistic(n=1, mean=0.9, std=None, min=0.9, max=0.9)
INTENSITIES = ChannelIntensities(percentile_00_5=-90.5, median=35.0, percentile_99_5=160.0)
SPREAD = Spread(min=-0.5, percentile_05=0.25, median=1.0, percentile_95=2.0, max=3.5)
VALUES = [
    DatasetSpec(
        name="Dataset001_X",
        source="/data/x",
        channels=("T1w", "CT"),
        labels={"background": 0, "whole": (1, 2), "core": 2},
        regions_class_order=(1, 2),
        ignore_label=3,
        cases={
            "a": CaseFiles(channels=("a_0000.nii.gz", "a_0001.nii.gz"), segmentation="a.nii.gz")
        },
    ),
    Fingerprint(
        cases={
            "a": CaseFingerprint(shape=(9, 8, 7), shape_cropped=(5, 8, 7), spacing=(0.3, 1, 2)),
            "b": CaseFingerprint(
                shape=(9, 8, 7),
                shape_cropped=(5, 8, 7),
                spacing=(0.3, 1, 2),
                intensities=(INTENSITIES, INTENSITIES),
                volumes_ml={"whole": 1.5, "core": 0.0},
                border_share=0.25,
            ),
        },
        channels=(STATISTICS, STATISTICS),
        median_relative_size_after_cropping=0.7,
    ),
    TrainingCases(
        num_cases=2,
        spacing=(SPREAD, SPREAD, SPREAD),
        channels=(ChannelSpread(percentile_00_5=SPREAD, median=SPREAD, percentile_99_5=SPREAD),),
        structures={"core": StructureSpread(num_annotated=2, num_present=1, volume_ml=SPREAD)},
        border_share=SPREAD,
    ),
    PLANS,
    Recipe(epochs=7, network={"base_features": 8}, augmentation={"mirror_axes": [0, 2]}),
    BundleManifest(
        configuration="3d_fullres",
        semantics=Semantics(activation="sigmoid", mirror_axes=(0, 1)),
        folds=("fold_0", "all"),
        checkpoints=("final", "best"),
        sha256={"weights/fold_0.safetensors": "ab" * 32},
    ),
    Metrics(
        structures={"whole": (1, 2)},
        ignore_label=3,
        nsd_tolerance_mm=1.0,
        foreground_mean=ForegroundMean(**dict.fromkeys(MEASURES, 0.5)),
        summary={"whole": StructureSummary(**dict.fromkeys(MEASURES, STATISTIC))},
        cases={"a": CaseMetrics(structures={"whole": STRUCTURE})},
        failed={"b": "no such file"},
    ),
]


def all_schemas():
    for module in pkgutil.iter_modules(medseg.schema.__path__):
        found = vars(importlib.import_module(f"medseg.schema.{module.name}")).values()
        for value in found:
            if isinstance(value, type) and issubclass(value, Schema) and value is not Schema:
                yield value


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_round_trip_is_exact(tmp_path, value):
    write(tmp_path / "file.json", value)
    assert read(type(value), tmp_path / "file.json") == value
    assert '"format_version": 1' in (tmp_path / "file.json").read_text()


@pytest.mark.parametrize("schema", sorted(set(all_schemas()), key=lambda s: s.__name__))
def test_every_field_is_described(schema):
    assert schema.__doc__
    missing = [name for name, field in schema.model_fields.items() if not field.description]
    assert missing == []


def inheriting(**configurations):
    values = PLANS.model_dump(mode="json")
    values["configurations"].update(configurations)
    return values


def test_a_configuration_inherits_what_it_does_not_say(tmp_path):
    path = tmp_path / "plans.json"
    small = {"inherits_from": "3d_fullres", "patch_size": [8, 8, 8]}
    write_json(path, inheriting(small=small, tiny={"inherits_from": "small", "batch_size": 9}))
    plans = read_plans(path)
    expected = CONFIGURATION.model_copy(update={"patch_size": (8, 8, 8)})
    assert plans.configuration("small") == expected
    assert plans.configuration("tiny") == expected.model_copy(update={"batch_size": 9})
    assert plans.configuration("3d_fullres") == CONFIGURATION


def test_what_is_inherited_is_not_repeated_and_read_back_as_it_was(tmp_path):
    """A cascade, and a grandchild that turns one of its parent's changes back."""
    path = tmp_path / "plans.json"
    second = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    third = {"inherits_from": "second", "previous_stage": None, "patch_size": [8, 8, 8]}
    write_json(path, inheriting(second=second, third=third, same={"inherits_from": "second"}))
    plans = read_plans(path)
    assert plans.configuration("third").previous_stage is None
    assert plans.configuration("same") == plans.configuration("second")
    write_plans(path, plans)
    assert read_plans(path) == plans
    written = json.loads(path.read_text())["configurations"]
    assert (written["second"], written["third"]) == (second, third)
    assert written["same"] == {"inherits_from": "second"}
    assert "previous_stage" not in written["3d_fullres"]


def test_one_configuration_alone_is_written_whole(tmp_path):
    """As in a bundle: the parent is not there."""
    second = {"inherits_from": "3d_fullres", "batch_size": 9}
    plans = validate(Plans, inheriting(second=second), "plans")
    alone = plans.model_copy(update={"configurations": {"second": plans.configuration("second")}})
    write_plans(tmp_path / "plans.json", alone)
    found = read_plans(tmp_path / "plans.json").configurations
    assert found == {"second": CONFIGURATION.model_copy(update={"batch_size": 9})}


@pytest.mark.parametrize(
    "entries",
    [
        {"a": {"inherits_from": "a"}},
        {"a": {"inherits_from": "b"}, "b": {"inherits_from": "a"}},
        {"a": {"inherits_from": "b"}, "b": {"inherits_from": "c"}, "c": {"inherits_from": "b"}},
        {"a": {"inherits_from": "nowhere"}},
    ],
    ids=["itself", "two", "later", "missing"],
)
def test_circles_and_missing_parents_are_refused(tmp_path, entries):
    path = tmp_path / "plans.json"
    write_json(path, inheriting(**entries))
    with pytest.raises(
        ConfigError, match="which is missing, no configuration, or inherits from it"
    ):
        read_plans(path)


def test_an_unknown_configuration_names_the_known_ones():
    with pytest.raises(PlanError, match=r"have no configuration '3d_fulres'") as caught:
        PLANS.configuration("3d_fulres")
    assert "expected one of: 3d_fullres. Did you mean '3d_fullres'?" in str(caught.value)


def test_plans_of_another_shape_are_refused(tmp_path):
    path = tmp_path / "plans.json"
    write_json(path, inheriting(bad={"inherits_from": "3d_fullres", "batch_size": 0}, worse=3))
    with pytest.raises(ConfigError) as caught:
        read_plans(path)
    text = str(caught.value)
    assert text.startswith("2 problems in")
    assert "configurations.bad.batch_size: got 0" in text
    assert "configurations.worse" in text


def test_dimension_follows_the_patch():
    assert CONFIGURATION.num_dimensions == 3
    assert CONFIGURATION.model_copy(update={"patch_size": (8, 8)}).num_dimensions == 2


def edit(values, change):
    """Apply {"patch_size": ..., "architecture.strides": ...} to the configuration."""
    for place, value in change.items():
        *parents, key = place.split(".")
        target = values["configurations"]["3d_fullres"]
        for parent in parents:
            target = target[parent]
        target[key] = value
    return values


@pytest.mark.parametrize(
    ("change", "places"),
    [
        ({"patch_size": [20, 24]}, ["spacing", "median_shape", "architecture"]),
        ({"patch_size": [20]}, ["patch_size"]),
        ({"patch_size": [20, 0, 16]}, ["patch_size.1"]),
        ({"spacing": [3.0, 0.9]}, ["spacing"]),
        ({"spacing": [3.0, 0, 1.1]}, ["spacing.1"]),
        ({"spacing": [3.0, float("inf"), 1.1]}, ["spacing.1"]),
        ({"median_shape": [31, -5.0, 97]}, ["median_shape.1"]),
        ({"median_shape": [31, 97]}, ["median_shape"]),
        ({"normalization": ["ct"] * 3, "use_mask_for_norm": [False] * 3}, [""]),
        ({"use_mask_for_norm": []}, ["use_mask_for_norm"]),
        ({"use_mask_for_norm": [True]}, ["use_mask_for_norm"]),
        ({"architecture.strides": [[1, 1], [2, 2]]}, ["architecture"]),
        ({"architecture.strides": [[1, 1, 1]]}, ["architecture.strides"]),
        ({"architecture.strides": [[1, 1, 1], [0, 2, 2]]}, ["architecture.strides.1.0"]),
        ({"architecture.kernel_sizes": [[3, 3, 3]] * 3}, ["architecture.kernel_sizes"]),
        ({"architecture.blocks_encoder": [2]}, ["architecture.blocks_encoder"]),
        ({"architecture.blocks_decoder": [2, 2]}, ["architecture.blocks_decoder"]),
        (
            {"spacing": [0, 0.9, 1.1], "use_mask_for_norm": [], "batch_size": 0},
            ["batch_size", "spacing.0", "use_mask_for_norm"],
        ),
    ],
    ids=str,
)
def test_a_configuration_that_contradicts_itself_is_refused_place_by_place(
    tmp_path, change, places
):
    """With the file's name and one line per problem."""
    path = tmp_path / "nnunet.json"
    path.write_text(json.dumps(edit(inheriting(), change)))
    with pytest.raises(ConfigError) as caught:
        read_plans(path)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{len(places)} problem{'s' * (len(places) > 1)} in {path}:"
    wanted = [f"  configurations.3d_fullres{'.' * bool(place)}{place}: got" for place in places]
    assert [line[: len(start)] for line, start in zip(lines, wanted, strict=True)] == wanted


def test_a_length_that_does_not_fit_names_both_sides(tmp_path):
    path = tmp_path / "nnunet.json"
    write_json(path, edit(inheriting(), {"use_mask_for_norm": [True], "patch_size": [8, 8]}))
    with pytest.raises(ConfigError) as caught:
        read_plans(path)
    text = str(caught.value)
    assert "it has 3 entries, patch_size has 2; expected as many" in text
    assert "it has 1 entry, normalization has 2; expected as many" in text
    assert "kernel_sizes and strides are for 3 axes, patch_size has 2 entries" in text


@pytest.mark.parametrize("parent", [["3d_fullres"], {"a": 1}, 3, None, "number", "list"], ids=repr)
def test_an_inheritance_that_is_no_configurations_name_is_refused(tmp_path, parent):
    """Each configuration on its own line; what inherits from a broken one says where it ends."""
    path = tmp_path / "nnunet.json"
    bad, child = {"inherits_from": parent}, {"inherits_from": "bad", "batch_size": 3}
    write_json(path, inheriting(bad=bad, child=child, number=3, list=[]))
    with pytest.raises(ConfigError) as caught:
        read_plans(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"4 problems in {path}:"
    assert [line.split(":")[0] for line in lines[1:]] == [
        f"  configurations.{name}" for name in ("bad", "child", "number", "list")
    ]
    for line in lines[1:3]:
        assert f"it inherits from {parent!r}, which is missing, no configuration" in line


# -- semantics of imported models ------------------------------------------------------------------

FIRST_VERSION = {
    "average": "logits",
    "activation": "softmax",
    "normalise_first": True,
    "accumulator": "float32",
    "gaussian_peak": 1.0,
    "label_resize": "argmax",
    "mirror_axes": [],
    "swap_axes": [],
}
"""The keys of `semantics` in a `bundle.json` of the first version of the format."""
FOREIGN = {
    "least_std": "added",
    "keeps_slices": True,
    "resample_image": Resampling(order=1, method="interpolate"),
    "resample_labels": Resampling(order=0),
    "resample_result": Resampling(separate="never"),
    "separate_by": "image",
    "previous": "labels_uncropped",
    "low_precision": "checked",
}
"""What came later, each with a value that is not the usual one."""


def test_the_usual_semantics_are_written_as_before():
    """Key by key and in order, so that a bundle's `bundle.json` keeps its checksum."""
    written = json.loads(Semantics().model_dump_json())
    assert list(written.items()) == list(FIRST_VERSION.items())
    assert Semantics().model_dump(mode="json") == FIRST_VERSION
    again = Semantics(**{name: getattr(Semantics(), name) for name in Semantics.model_fields})
    assert list(json.loads(again.model_dump_json())) == list(FIRST_VERSION)


def test_every_later_field_is_known_here():
    assert set(Semantics.model_fields) == {*FIRST_VERSION, *FOREIGN}


def test_a_bundle_of_the_first_version_is_read_as_the_usual_semantics():
    found = validate(Semantics, FIRST_VERSION, "bundle.json")
    assert found == Semantics()
    assert found.resample_image == Resampling(order=3)
    assert found.resample_labels == found.resample_result == Resampling()


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_unusual_is_written_and_read_again(tmp_path, name):
    semantics = Semantics(**{name: FOREIGN[name]})
    manifest = BundleManifest(
        configuration="one", semantics=semantics, folds=("fold_0",), sha256={}
    )
    path = tmp_path / "bundle.json"
    write(path, manifest)
    written = json.loads(path.read_text())["semantics"]
    assert set(written) == {*FIRST_VERSION, name}
    assert read(BundleManifest, path) == manifest
    assert read(BundleManifest, path).semantics != Semantics()


def test_everything_unusual_at_once_survives(tmp_path):
    semantics = Semantics(
        average="probabilities", activation="sigmoid", normalise_first=False,
        accumulator="float16", gaussian_peak=10, label_resize="threshold", mirror_axes=(0, 2),
        swap_axes=(2,), **FOREIGN,
    )  # fmt: skip
    path = tmp_path / "semantics.json"
    write(path, semantics)
    assert read(Semantics, path) == semantics


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"resample_result": {"order": 2}}, "resample_result.order"),
        ({"resample_image": {"method": "cubic"}}, "resample_image.method"),
        ({"resample_labels": {"kind": "spline"}}, "resample_labels.kind"),
        ({"previous": "probabilities"}, "previous"),
        ({"separate_by": "stored"}, "separate_by"),
        ({"accumulator": "bfloat16"}, "accumulator"),
    ],
)
def test_semantics_that_mean_nothing_are_refused_by_their_place(change, place):
    with pytest.raises(ConfigError, match=place.replace(".", r"\.")):
        validate(Semantics, {**FIRST_VERSION, **change}, "bundle.json")
