"""Bundles: written whole, verified when read, every damage named."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch

from medseg.bundles.bundle import find_bundle, read_bundle, write_bundle
from medseg.errors import BundleError, PlanError
from medseg.models.weights import load_weights
from medseg.schema.bundle import Semantics
from medseg.schema.postprocessing import Postprocessing, RemoveSmall
from medseg.schema.training_cases import ChannelSpread, Spread, StructureSpread, TrainingCases

WEIGHTS = "weights/fold_0.safetensors"
SPREAD = Spread(min=0.5, percentile_05=0.75, median=1, percentile_95=2, max=3)


def again(make, bundle, tmp_path, **parts):
    """Write a bundle with the same weights and further parts."""
    return write_bundle(
        tmp_path / "again",
        spec=make.spec(),
        plans=make.plans(),
        configuration="tiny",
        weights={"fold_0": {"final": bundle.weights("fold_0")}},
        semantics=Semantics(),
        **parts,
    )


def change(path, **values):
    """Edit a JSON file and leave its checksum in the manifest as it is."""
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps(content))


def test_a_bundle_comes_back_as_it_was_written(make, bundle):
    found = read_bundle(bundle.folder)
    plans = make.plans()
    assert found == bundle
    assert found.configuration_name == "tiny"
    assert found.configuration == plans.configurations["tiny"]
    assert list(found.plans.configurations) == ["tiny"]
    assert found.spec == make.spec(source="")
    assert found.manifest.recipe == "fast"
    assert found.manifest.folds == ("fold_0", "fold_1")
    assert found.manifest.checkpoints == ("final", "best")
    expected = make.weights(plans, make.spec(), seed=51)
    weights = load_weights(found.weights("fold_1", "best"))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_files_have_the_documented_names(bundle):
    files = {path.relative_to(bundle.folder).as_posix() for path in bundle.folder.rglob("*.*")}
    assert files == {
        "bundle.json",
        "dataset.json",
        "plans.json",
        "weights/fold_0.safetensors",
        "weights/fold_0.best.safetensors",
        "weights/fold_1.safetensors",
        "weights/fold_1.best.safetensors",
    }
    assert set(bundle.manifest.sha256) == files - {"bundle.json"}


TRAINING = TrainingCases(
    num_cases=3,
    spacing=(SPREAD, SPREAD, SPREAD),
    channels=(ChannelSpread(percentile_00_5=SPREAD, median=SPREAD, percentile_99_5=SPREAD),),
    structures={"left": StructureSpread(num_annotated=3, num_present=0)},
)
STEPS = Postprocessing(reason="measured", steps=(RemoveSmall(structures=("left",), min_ml=0.5),))


@pytest.mark.parametrize(
    ("parts", "files"),
    [
        ({"training": TRAINING}, {"training_cases.json"}),
        ({"postprocessing": STEPS}, {"postprocessing.json"}),
        (
            {"training": TRAINING, "postprocessing": STEPS},
            {"training_cases.json", "postprocessing.json"},
        ),
    ],
    ids=["training cases", "postprocessing", "both"],
)
def test_optional_files_come_back_and_are_verified(make, bundle, tmp_path, parts, files):
    found = read_bundle(again(make, bundle, tmp_path, **parts).folder)
    assert (found.training, found.postprocessing) == (
        parts.get("training"), parts.get("postprocessing"),
    )  # fmt: skip
    assert set(found.manifest.sha256) == {*files, "dataset.json", "plans.json", WEIGHTS}
    for name in files:
        content = (found.folder / name).read_text()
        change(found.folder / name, format_version=0)
        with pytest.raises(BundleError, match=f"{name}: sha256 is "):
            read_bundle(found.folder)
        (found.folder / name).write_text(content)
    for name in files:
        (found.folder / name).unlink()
        with pytest.raises(BundleError, match=f"{name}: missing"):
            read_bundle(found.folder)


def test_bundles_without_the_optional_files_have_none_of_them(bundle):
    """Also where a file of that name lies beside a bundle's own."""
    assert (bundle.training, bundle.postprocessing) == (None, None)
    for name in ("training_cases.json", "postprocessing.json"):
        (bundle.folder / name).write_text("{}")
    assert read_bundle(bundle.folder) == bundle


def test_an_optional_file_that_makes_no_sense_is_named(make, bundle, tmp_path):
    found = again(make, bundle, tmp_path, training=TRAINING)
    path = found.folder / "training_cases.json"
    change(path, num_cases=-1)
    sums = {**found.manifest.sha256, path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    change(found.folder / "bundle.json", sha256=sums)
    with pytest.raises(BundleError, match=r"training_cases\.json:\n  num_cases: got -1"):
        read_bundle(found.folder)


def test_weight_files_are_copied(make, bundle, tmp_path):
    copy = write_bundle(
        tmp_path / "copy",
        spec=make.spec(),
        plans=make.plans(),
        configuration="tiny",
        weights={"all": {"final": bundle.weights("fold_1", "best")}},
        semantics=Semantics(),
    )
    assert copy.manifest.folds == ("all",)
    assert copy.manifest.checkpoints == ("final",)
    original = bundle.weights("fold_1", "best").read_bytes()
    assert copy.weights("all").read_bytes() == original


def test_a_checkpoint_some_folds_lack_is_offered_for_those_that_have_it(make, bundle, tmp_path):
    paths = {name: bundle.weights("fold_0", name) for name in ("final", "best")}
    part = write_bundle(
        tmp_path / "part",
        spec=make.spec(),
        plans=make.plans(),
        configuration="tiny",
        weights={"fold_0": paths, "fold_1": {"final": paths["final"]}},
        semantics=Semantics(),
    )
    assert part.manifest.checkpoints == ("final",)
    assert part.weights("fold_0", "best").is_file()
    with pytest.raises(BundleError, match="no checkpoint 'best' of fold_1"):
        part.weights("fold_1", "best")


def test_an_existing_bundle_is_replaced_whole(make, tmp_path):
    first = make.bundle(tmp_path / "runs" / "bundle", folds=3)
    (first.folder / "postprocessing.json").write_text("{}")
    second = make.bundle(tmp_path / "runs" / "bundle", folds=1)
    assert second.manifest.folds == ("fold_0",)
    assert not (second.folder / "postprocessing.json").exists()
    assert not (second.folder / "weights" / "fold_2.safetensors").exists()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["bundle"]


def test_a_failure_leaves_the_old_bundle_and_nothing_else(make, bundle, tmp_path):
    with pytest.raises(BundleError, match=r"missing\.safetensors: weights of fold_0 are missing"):
        write_bundle(
            bundle.folder,
            spec=make.spec(),
            plans=make.plans(),
            configuration="tiny",
            weights={"fold_0": {"final": tmp_path / "missing.safetensors"}},
            semantics=Semantics(),
        )
    assert read_bundle(bundle.folder) == bundle
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_something_else_is_never_replaced(make, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("words")
    with pytest.raises(BundleError, match=r"will not be replaced.*thesis\.txt"):
        make.bundle(tmp_path / "precious")
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "words"


def test_an_empty_folder_is_a_good_place(make, tmp_path):
    (tmp_path / "empty").mkdir()
    assert make.bundle(tmp_path / "empty", folds=1).manifest.folds == ("fold_0",)


@pytest.mark.parametrize(
    ("weights", "message"),
    [({}, "at least one fold"), ({"fold_0": {"best": {}}}, "no 'final' weights for fold_0")],
)
def test_weights_must_be_there(make, tmp_path, weights, message):
    with pytest.raises(BundleError, match=message):
        write_bundle(
            tmp_path / "bundle",
            spec=make.spec(),
            plans=make.plans(),
            configuration="tiny",
            weights=weights,
            semantics=Semantics(),
        )


def test_an_unknown_configuration_is_named(make, tmp_path):
    with pytest.raises(PlanError, match=r"no configuration 'tinny'.*Did you mean 'tiny'"):
        write_bundle(
            tmp_path / "bundle",
            spec=make.spec(),
            plans=make.plans(),
            configuration="tinny",
            weights={"fold_0": {"final": {}}},
            semantics=Semantics(),
        )
    assert not (tmp_path / "bundle").exists()


def test_all_damaged_files_are_listed(bundle):
    weights = bundle.weights("fold_0")
    content = bytearray(weights.read_bytes())
    content[-7] ^= 1
    weights.write_bytes(bytes(content))
    bundle.weights("fold_1", "best").unlink()
    change(bundle.folder / "plans.json", name="other")
    with pytest.raises(BundleError) as caught:
        read_bundle(bundle.folder)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("3 damaged files")
    assert "plans.json: sha256 is" in lines[1]
    assert "weights/fold_0.safetensors: sha256 is" in lines[2]
    assert "weights/fold_1.best.safetensors: missing" in lines[3]
    assert "again" in lines[4]


@pytest.mark.parametrize("name", ["../secret.json", "/etc/hosts"])
def test_a_listed_file_outside_the_bundle_is_refused(bundle, name):
    checksums = {**bundle.manifest.sha256, name: "0" * 64}
    change(bundle.folder / "bundle.json", sha256=checksums)
    with pytest.raises(BundleError, match="lies outside the bundle"):
        read_bundle(bundle.folder)


def test_a_file_that_is_needed_must_be_listed(bundle):
    checksums = {k: v for k, v in bundle.manifest.sha256.items() if k != "dataset.json"}
    change(bundle.folder / "bundle.json", sha256=checksums)
    with pytest.raises(BundleError, match=r"dataset\.json: not listed"):
        read_bundle(bundle.folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format_version": 2}, "format_version is 2, this medseg reads up to 1.*Update medseg"),
        ({"kind": "orchestra"}, "kind: got 'orchestra'"),
        ({"colour": "blue"}, "colour: got 'blue'"),
        ({"configuration": "2d"}, "expected exactly the configuration '2d'"),
    ],
)
def test_a_manifest_this_version_does_not_know_is_refused(bundle, values, message):
    change(bundle.folder / "bundle.json", **values)
    with pytest.raises(BundleError, match=message):
        read_bundle(bundle.folder)


def test_a_manifest_that_is_no_json_is_refused(bundle):
    (bundle.folder / "bundle.json").write_text("{")
    with pytest.raises(BundleError, match="not valid JSON"):
        read_bundle(bundle.folder)


def test_a_run_stands_for_its_bundle(bundle, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(bundle.folder, run / "bundle")
    assert find_bundle(run) == run / "bundle"
    assert find_bundle(run / "bundle") == run / "bundle"
    assert find_bundle(run / "bundle" / "bundle.json") == run / "bundle"


def test_what_is_no_model_is_described(tmp_path):
    (tmp_path / "file.txt").write_text("four")
    (tmp_path / "folder" / "fold_0").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for name, words in {
        "nothing": "no such file or folder",
        "file.txt": "a file of 4 bytes",
        "folder": "a folder with fold_0",
        "empty": "an empty folder",
    }.items():
        with pytest.raises(BundleError, match=rf"no model there \({words}\)\. Expected a bundle"):
            find_bundle(tmp_path / name)
        with pytest.raises(BundleError, match=rf"not a bundle \({words}\)"):
            read_bundle(tmp_path / name)


def test_folds_are_chosen_by_number_or_name(bundle):
    assert bundle.select_folds(None) == ("fold_0", "fold_1")
    assert bundle.select_folds([1]) == ("fold_1",)
    assert bundle.select_folds(["1", "fold_0", 1]) == ("fold_1", "fold_0")
    with pytest.raises(BundleError, match="no weights for fold_4, all; it holds fold_0, fold_1"):
        bundle.select_folds([0, 4, "all"])
    with pytest.raises(BundleError, match="an empty list of folds"):
        bundle.select_folds([])


@pytest.mark.parametrize(
    "semantics", [{"average": "votes"}, {"accumulator": "bfloat16"}, {"previous": "guess"}]
)
def test_semantics_of_another_program_are_refused_by_name(bundle, semantics):
    change(bundle.folder / "bundle.json", semantics=semantics)
    with pytest.raises(BundleError, match=f"semantics.{next(iter(semantics))}"):
        read_bundle(bundle.folder)
