"""Bundles made of bundles: chains of models on one resampled image, and stored ensembles."""

from __future__ import annotations

import hashlib
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from medseg.bundles.bundle import Bundle, check_supported, find_bundle, read_bundle
from medseg.bundles.members import read_any, write_chain, write_ensemble
from medseg.errors import BundleError, ConfigError, DatasetError
from medseg.geometry import Grid
from medseg.infer.chain import load_composite
from medseg.infer.chain_grid import grid_of, nearest_places, record_of
from medseg.infer.loading import Loading, load, load_member
from medseg.infer.memory import Limits
from medseg.schema.base import validate
from medseg.schema.bundle import Chain, ChainPart
from medseg.schema.dataset import DatasetSpec
from medseg.schema.postprocessing import KeepLargest, Postprocessing, RemoveSmall

VALUES = {
    "soft": {1: 1, 2: 2, 3: 3},
    "hard": {1: 4, 2: 5},
}
"""The label 3 of "hard" is dropped."""
SPEC = DatasetSpec(
    name="Dataset900_Whole",
    source="/somewhere",
    channels=("T1w", "CT"),
    labels={"background": 0, "a": 1, "b": 2, "c": 3, "d": 4, "e": 5},
)
POSTPROCESSING = Postprocessing(
    steps=(
        KeepLargest(structures=("a",), connectivity=1),
        RemoveSmall(structures=("d",), connectivity=1, min_ml=0.2),
    )
)


def chain_of(**changes):
    parts = tuple(ChainPart(member=name, values=values) for name, values in VALUES.items())
    values = {"spacing": (2.0, 1.7, 2.6), "order": 1, "truncate": True, "step": 0.8}
    return Chain(**{**values, "mirror": False, "parts": parts, **changes})


@pytest.fixture(scope="module")
def parts(make, tmp_path_factory):
    """Two models with other plans and other weights."""
    root = tmp_path_factory.mktemp("parts")
    soft = make.bundle(root / "soft", plans=make.plans(spacing=(2.6, 1.7, 2.0)), folds=1)
    plans = make.plans(spacing=(3.0, 2.0, 1.9), patch_size=(8, 12, 16), network_axes=(1, 2, 0))
    hard = make.bundle(root / "hard", plans=plans, folds=2)
    return {"soft": soft.folder, "hard": hard.folder}


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    place = tmp_path_factory.mktemp("chain") / "whole"
    return write_chain(
        place, spec=SPEC, chain=chain_of(), members=parts, postprocessing=POSTPROCESSING
    ).folder


def opened(folder, mode="exact"):
    """Load a bundle made of bundles."""
    bundle = read_any(folder)

    def member(part):
        check_supported(part)
        how = Loading(
            folds=part.select_folds(None), device=torch.device("cpu"), mode=mode, trust_code=False
        )
        return load_member(part, how, "final")

    return load_composite(bundle, member, limits=Limits(), checkpoint="final")


def rotated(orientation, spacing, angles):
    """Return the affine of an image stored in some orientation, turned out of the axes."""
    codes = nib.orientations.axcodes2ornt(tuple(orientation))
    affine = np.zeros((4, 4))
    for axis, (world, sign) in enumerate(codes):
        affine[int(world), axis] = sign * spacing[axis]
    a, b = np.deg2rad(angles)
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine[:3, :3] = about_z @ about_x @ affine[:3, :3]
    affine[:, 3] = (12.5, -40.25, 7.0, 1.0)
    return affine


IMAGES = [
    pytest.param("RAS", (17, 22, 13), (1.9, 1.3, 2.4), (0, 0), id="canonical"),
    pytest.param("LPS", (19, 15, 11), (0.85, 1.3, 2.4), (0, 0), id="as-of-dicom"),
    pytest.param("PIR", (14, 18, 21), (1.1, 0.7, 1.9), (9, -6), id="oblique"),
    pytest.param("SLA", (9, 23, 16), (5.5, 0.9, 1.2), (17, 11), id="thick-slices"),
    pytest.param("RAS", (12, 17, 13), (2.0, 1.7, 2.6), (0, 0), id="spacing-of-the-chain"),
]


def canonical(array, affine):
    """Return an image in closest canonical orientation, by nibabel."""
    return nib.as_closest_canonical(nib.Nifti1Image(array, affine))


def slow_chain(parts, chain, channels, affine, *, postprocess):
    """Do what a chain does, with nibabel and scipy and whole images, a step after another."""
    images = [canonical(channel.astype(np.float64), affine) for channel in channels]
    zooms = np.array(images[0].header.get_zooms())
    grid, before = images[0].affine.copy(), images[0].shape
    arrays = [image.get_fdata() for image in images]
    if chain.spacing is not None and not np.array_equal(zooms, chain.spacing):
        factor = zooms / np.array(chain.spacing)
        arrays = [ndimage.zoom(a, factor, order=chain.order, mode="nearest") for a in arrays]
        arrays = [array.astype(np.int32) for array in arrays] if chain.truncate else arrays
        grid[:3, :3] = grid[:3, :3] / factor
    merged = np.zeros(arrays[0].shape, np.uint8)
    for part in chain.parts:
        model = load(parts[part.member], device="cpu", mode="exact")
        case = (np.stack(arrays).astype(np.float32), grid)
        found = model.predict(case, tta="none", step=chain.step).segmentation
        for own, value in part.values.items():
            merged[found == own] = value
    if postprocess:
        largest, count = ndimage.label(merged == 1)
        sizes = ndimage.sum_labels(merged == 1, largest, np.arange(1, count + 1))
        merged[(merged == 1) & ~np.isin(largest, 1 + np.flatnonzero(sizes == sizes.max()))] = 0
        pieces, count = ndimage.label(merged == 4)
        for number in range(1, count + 1):
            if (pieces == number).sum() * abs(np.linalg.det(grid[:3, :3])) < 200:
                merged[pieces == number] = 0
    if merged.shape != before:
        merged = ndimage.zoom(merged, np.array(before) / merged.shape, order=0, mode="nearest")
    back = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.io_orientation(affine)
    )
    return nib.orientations.apply_orientation(merged, back)


class TestPrediction:
    @pytest.mark.parametrize(("orientation", "shape", "spacing", "angles"), IMAGES)
    def test_equals_the_obvious_way(self, make, parts, folder, orientation, shape, spacing, angles):
        affine = rotated(orientation, spacing, angles)
        channels = make.channels(shape) - 20
        found = opened(folder).predict((channels, affine))
        expected = slow_chain(parts, chain_of(), channels, affine, postprocess=True)
        assert len(np.unique(expected)) > 4
        np.testing.assert_array_equal(found.segmentation, expected)
        assert found.segmentation.shape == shape
        assert found.is_postprocessed
        assert not found.is_mirrored
        np.testing.assert_array_equal(found.affine, affine)

    @pytest.mark.parametrize(
        "changes",
        [
            {"order": 3, "truncate": False},
            {"spacing": None},
            {"spacing": 2.2, "step": 0.5},
            {"spacing": (0.9, 3.1, 1.4)},
        ],
        ids=["cubic", "not-resampled", "cubes", "finer-and-coarser"],
    )
    def test_equals_the_obvious_way_in_other_settings(self, make, parts, tmp_path, changes):
        chain = chain_of(**changes)
        written = write_chain(tmp_path / "other", spec=SPEC, chain=chain, members=parts)
        affine = rotated("IPR", (1.9, 1.1, 1.4), (8, 3))
        channels = make.channels((15, 20, 13), seed=3)
        found = opened(written.folder).predict((channels, affine))
        expected = slow_chain(parts, chain, channels, affine, postprocess=False)
        np.testing.assert_array_equal(found.segmentation, expected)
        assert not found.is_postprocessed

    def test_a_later_part_has_the_last_word_where_it_finds_something(self, make, parts, tmp_path):
        case = (make.channels(), make.oblique())
        order = ("soft", "hard")
        maps = {}
        for name in (*order, "both", "reversed"):
            names = {"both": order, "reversed": order[::-1]}.get(name, (name,))
            own = tuple(ChainPart(member=part, values=VALUES[part]) for part in names)
            members = {part: parts[part] for part in names}
            place = write_chain(
                tmp_path / name, spec=SPEC, chain=chain_of(parts=own), members=members
            )
            maps[name] = opened(place.folder).predict(case).segmentation
        soft, hard = maps["soft"], maps["hard"]
        assert ((soft > 0) & (hard > 0)).any()
        np.testing.assert_array_equal(maps["both"], np.where(hard > 0, hard, soft))
        np.testing.assert_array_equal(maps["reversed"], np.where(soft > 0, soft, hard))

    def test_options_nobody_asks_for_are_those_of_the_chain(self, folder):
        model = opened(folder)
        assert (model.options().step, model.options().tta) == (0.8, "none")
        asked = model.options(tta="flips", step=0.6, postprocess=False)
        assert (asked.step, asked.tta, asked.postprocess) == (0.6, "flips", False)

    def test_flips_are_those_of_the_parts(self, make, folder):
        case = (make.channels(), make.oblique())
        model = opened(folder)
        plain, mirrored = model.predict(case), model.predict(case, tta="flips")
        assert (plain.is_mirrored, mirrored.is_mirrored) == (False, True)
        assert (plain.segmentation != mirrored.segmentation).any()

    def test_without_postprocessing_small_pieces_stay(self, make, folder):
        case = (make.channels(), make.oblique())
        model = opened(folder)
        plain = model.predict(case, postprocess=False)
        assert not plain.is_postprocessed
        assert plain.volumes_ml["d"] > model.predict(case).volumes_ml["d"]

    @pytest.mark.parametrize("kind", ["probabilities", "entropy", "disagreement"])
    def test_maps_of_real_numbers_are_refused(self, make, folder, kind):
        with pytest.raises(ConfigError, match=f"{kind}: a chain of models merges label maps"):
            opened(folder).predict((make.channels(), make.oblique()), **{kind: True})

    def test_a_previous_stage_is_refused(self, make, folder):
        case = (make.channels(), make.oblique())
        with pytest.raises(ConfigError, match="a chain has no stage before it"):
            opened(folder).predict(case, previous_stage=np.zeros((19, 15, 11), np.uint8))

    def test_another_number_of_channels_is_refused(self, make, folder):
        with pytest.raises(DatasetError, match=r"got 1 channel, expected 2 \(T1w, CT\)"):
            opened(folder).predict((make.channels(channels=1), make.oblique()))

    def test_many_cases_equal_each_alone_and_a_bad_one_stays_alone(self, make, folder):
        model = opened(folder)
        cases = [(make.channels(seed=seed), make.oblique()) for seed in range(3)]
        found = list(model.predict_many([cases[0], cases[1][:1] * 2, cases[2]]))
        assert "CaseError" in type(found[1]).__name__
        for number in (0, 2):
            expected = model.predict(cases[number]).segmentation
            np.testing.assert_array_equal(found[number].segmentation, expected)

    def test_tells_of_its_tiles_until_all_are_done(self, make, folder):
        model, told = opened(folder), []
        options = model.options()
        from medseg.infer.jobs import Job

        job = Job(
            name="case",
            case=(make.channels(), make.oblique()),
            progress=lambda done, total: told.append(done / total),
        )
        (computed,) = model.compute([(job, model.prepare(job))], options)
        assert not isinstance(computed, Exception)
        assert told == sorted(told)
        assert told[-1] == 1
        assert 0.5 in told

    def test_says_what_it_is_made_of(self, folder):
        model = opened(folder)
        assert model.folds == ("soft/fold_0", "hard/fold_0", "hard/fold_1")
        assert model.bundle.spec.name == "Dataset900_Whole"
        assert model.bundle.configuration_name == "chain"
        assert model.labels.structures["e"] == (5,)
        assert [entry.name for entry in model.entries][-1] == "e"
        content = (folder / "bundle.json").read_bytes()
        assert model.sha256 == hashlib.sha256(content).hexdigest()
        assert model.previous is None

    def test_only_one_part_is_prepared_at_a_time(self, make, folder, monkeypatch):
        model, alive = opened(folder), []
        import weakref

        from medseg.infer.model import Model

        plain = Model.prepare

        def prepare(self, job):
            assert not any(reference() is not None for reference in alive)
            prepared = plain(self, job)
            alive.append(weakref.ref(prepared.readies[0].image))
            return prepared

        monkeypatch.setattr(Model, "prepare", prepare)
        model.predict((make.channels(), make.oblique()))
        assert len(alive) == 2


class TestGrid:
    @pytest.mark.parametrize(("before", "after"), [(3, 5), (7, 7), (1, 4), (9, 1), (13, 40)])
    def test_nearest_places_are_those_of_a_whole_image(self, before, after):
        labels = np.random.default_rng(0).integers(0, 9, (before, 2, 3)).astype(np.uint8)
        expected = ndimage.zoom(labels, (after / before, 1, 1), order=0, mode="nearest")
        np.testing.assert_array_equal(labels[nearest_places(before, after)], expected)

    def test_the_first_voxel_stays_in_its_place_and_voxels_get_their_size(self):
        affine = rotated("PIR", (1.1, 0.7, 1.9), (9, -6))
        record = record_of(Grid((14, 18, 21), affine), (2.0, 1.5, 3.0))
        grid = grid_of(record, (2.0, 1.5, 3.0))
        image = canonical(np.zeros((14, 18, 21)), affine)
        np.testing.assert_allclose(grid.affine[:, 3], image.affine[:, 3])
        np.testing.assert_allclose(grid.spacing, (2.0, 1.5, 3.0), rtol=1e-6)
        cosines = image.affine[:3, :3] / np.linalg.norm(image.affine[:3, :3], axis=0)
        np.testing.assert_allclose(grid.affine[:3, :3] / grid.spacing, cosines, atol=1e-7)
        assert record.shape_network == (20, 10, 4)

    def test_halves_are_rounded_to_even_and_no_axis_vanishes(self):
        record = record_of(Grid((5, 7, 1), np.eye(4)), (2.0, 2.0, 6.0))
        assert record.shape_network == (2, 4, 1)


class TestBundle:
    def test_a_chain_comes_back_as_it_was_written(self, parts, folder):
        found = read_any(folder)
        assert find_bundle(folder) == folder
        assert found.manifest.chain == chain_of()
        assert found.spec == SPEC.model_copy(update={"source": ""})
        assert found.postprocessing == POSTPROCESSING
        assert found.training is None
        assert list(found.members) == ["soft", "hard"]
        for name, member in found.members.items():
            assert isinstance(member, Bundle)
            assert member.manifest == read_bundle(parts[name]).manifest
        assert set(found.manifest.sha256) == {
            "dataset.json", "postprocessing.json", "members/soft/bundle.json",
            "members/hard/bundle.json",
        }  # fmt: skip
        assert not (folder / "plans.json").exists()

    def test_the_manifest_is_plain_data(self, folder):
        values = json.loads((folder / "bundle.json").read_text())
        assert values["kind"] == "chain"
        assert values["chain"]["parts"][1] == {"member": "hard", "values": {"1": 4, "2": 5}}
        assert values["chain"]["spacing"] == [2.0, 1.7, 2.6]

    def test_a_damaged_member_is_found(self, folder, tmp_path):
        copy = shutil.copytree(folder, tmp_path / "copy")
        weights = copy / "members" / "hard" / "weights" / "fold_0.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        with pytest.raises(BundleError, match=r"fold_0\.safetensors: sha256 is"):
            read_any(copy)
        shutil.rmtree(copy / "members" / "soft")
        with pytest.raises(BundleError, match=r"members/soft/bundle\.json: missing"):
            read_any(copy)

    def test_another_member_in_its_place_is_found(self, folder, parts, tmp_path):
        copy = shutil.copytree(folder, tmp_path / "copy")
        shutil.rmtree(copy / "members" / "hard")
        shutil.copytree(parts["soft"], copy / "members" / "hard")
        with pytest.raises(BundleError, match=r"members/hard/bundle\.json: sha256 is"):
            read_any(copy)

    def test_chains_are_made_of_anything(self, make, folder, parts, tmp_path):
        """Also of a chain and of an ensemble, whose members are found and verified too."""
        pair = write_ensemble(tmp_path / "pair", members=parts)
        values = {1: 7, 5: 9}
        outer = write_chain(
            tmp_path / "outer",
            spec=SPEC.model_copy(update={"labels": {"background": 0, "x": 7, "y": 9, "z": 8}}),
            chain=chain_of(
                parts=(
                    ChainPart(member="whole", values=values),
                    ChainPart(member="pair", values={2: 8}),
                )
            ),
            members={"whole": folder, "pair": pair.folder},
        )
        case = (make.channels(), make.oblique())
        assert set(np.unique(opened(outer.folder).predict(case).segmentation)) <= {0, 7, 8, 9}
        (outer.folder / "members/whole/members/soft/dataset.json").unlink()
        with pytest.raises(BundleError, match=r"dataset\.json: missing"):
            read_any(outer.folder)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"parts": (ChainPart(member="soft", values={4: 1}),)},
                r"parts\.0\.values holds 4; expected values of soft: 0, 1, 2, 3",
            ),
            (
                {"parts": (ChainPart(member="soft", values={1: 6}),)},
                r"parts\.0\.values holds 6; expected values of the chain: 1, 2, 3, 4, 5",
            ),
            (
                {"parts": (ChainPart(member="bones", values={1: 1}),)},
                r"bones, soft: named as a part or given as a member, but not both",
            ),
        ],
        ids=["value-of-the-part", "value-of-the-chain", "member"],
    )
    def test_parts_that_do_not_fit_are_not_written(self, parts, tmp_path, changes, message):
        with pytest.raises(BundleError, match=message):
            write_chain(
                tmp_path / "bad", spec=SPEC, chain=chain_of(**changes),
                members={"soft": parts["soft"]},
            )  # fmt: skip
        assert list(tmp_path.iterdir()) == []

    def test_members_of_other_channels_are_not_written(self, parts, tmp_path):
        with pytest.raises(BundleError, match=r"members/soft: takes 2 channels, the bundle 1"):
            write_chain(
                tmp_path / "bad", spec=SPEC.model_copy(update={"channels": ("CT",)}),
                chain=chain_of(), members=parts,
            )  # fmt: skip

    def test_postprocessing_of_unknown_structures_is_not_written(self, parts, tmp_path):
        steps = Postprocessing(steps=(KeepLargest(structures=("liver",)),))
        with pytest.raises(BundleError, match="names 'liver'"):
            write_chain(
                tmp_path / "bad", spec=SPEC, chain=chain_of(), members=parts, postprocessing=steps
            )

    def test_no_members_are_refused(self, tmp_path):
        with pytest.raises(BundleError, match="at least one member"):
            write_chain(tmp_path / "bad", spec=SPEC, chain=chain_of(), members={})

    def test_something_else_is_never_replaced_and_a_bundle_is_replaced_whole(
        self, parts, folder, tmp_path
    ):
        (tmp_path / "precious").mkdir()
        (tmp_path / "precious" / "thesis.txt").write_text("words")
        with pytest.raises(BundleError, match="will not be replaced"):
            write_chain(tmp_path / "precious", spec=SPEC, chain=chain_of(), members=parts)
        place = shutil.copytree(folder, tmp_path / "place")
        write_ensemble(place, members={"one": place / "members" / "soft"})
        assert sorted(path.name for path in (place / "members").iterdir()) == ["one"]

    def test_what_needs_a_single_model_says_so(self, folder):
        with pytest.raises(BundleError, match=r"kind 'chain'.*Give one of its members"):
            read_bundle(folder)

    @pytest.mark.parametrize("name", ["../soft", "/soft", "a/b", "", ".hidden"])
    def test_a_member_has_no_path_for_a_name(self, name):
        with pytest.raises(ConfigError, match="member: got"):
            validate(ChainPart, {"member": name, "values": {"1": 1}}, "bundle.json")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("spacing", 0), ("spacing", [1.5, 1.5]), ("spacing", float("nan")),
            ("spacing", float("inf")), ("order", 2), ("step", 0), ("step", 1.5), ("parts", []),
        ],
    )  # fmt: skip
    def test_settings_out_of_range_are_named(self, name, value):
        values = chain_of().model_dump(mode="json")
        with pytest.raises(ConfigError, match=f"{name}.*: got"):
            validate(Chain, {**values, name: value}, "bundle.json")


class TestEnsemble:
    def test_equals_its_members_loaded_together(self, make, parts, tmp_path):
        written = write_ensemble(tmp_path / "pair", members=parts, weights={"soft": 3, "hard": 1})
        case = (make.channels(), make.oblique())
        paths = [parts["soft"], parts["hard"]]
        loose = load(paths, device="cpu", mode="exact", weights=[3, 1])
        model = opened(written.folder)
        expected = loose.predict(case, probabilities=True)
        found = model.predict(case, probabilities=True)
        np.testing.assert_array_equal(found.segmentation, expected.segmentation)
        np.testing.assert_array_equal(found.probabilities, expected.probabilities)
        assert model.shares == (0.75, 0.25)
        assert model.folds == loose.folds
        assert model.bundle.folder == written.folder
        content = (written.folder / "bundle.json").read_bytes()
        assert model.sha256 == hashlib.sha256(content).hexdigest()

    def test_has_a_postprocessing_of_its_own(self, make, parts, tmp_path):
        """And takes no notice of that of its members."""
        steps = Postprocessing(steps=(RemoveSmall(structures=("left", "lesion"), min_ml=1e6),))
        cleaned = write_ensemble(tmp_path / "cleaned", members=parts, postprocessing=steps)
        case = (make.channels(), make.oblique())
        plain = opened(write_ensemble(tmp_path / "plain", members=parts).folder).predict(case)
        found = opened(cleaned.folder).predict(case)
        assert (plain.is_postprocessed, found.is_postprocessed) == (False, True)
        expected = np.where(np.isin(plain.segmentation, (1, 3)), 0, plain.segmentation)
        np.testing.assert_array_equal(found.segmentation, expected)
        assert (expected != plain.segmentation).any()

    def test_comes_back_as_it_was_written(self, parts, tmp_path):
        written = write_ensemble(tmp_path / "pair", members=parts)
        found = read_any(written.folder)
        assert found == written
        assert found.manifest.weights == {"soft": 1.0, "hard": 1.0}
        assert found.manifest.members == ("soft", "hard")
        assert found.spec == read_bundle(parts["soft"]).spec
        assert found.configuration_name == "ensemble"

    def test_members_of_other_labels_are_not_written(self, make, parts, tmp_path):
        other = make.bundle(
            tmp_path / "other", spec=make.spec(labels={"background": 0, "left": 1}), folds=1
        )
        with pytest.raises(BundleError, match="members/other: labels is"):
            write_ensemble(tmp_path / "bad", members={"soft": parts["soft"], "other": other.folder})

    def test_chains_are_not_averaged(self, folder, tmp_path):
        with pytest.raises(BundleError, match="kind is 'chain'; expected 'single' or 'cascade'"):
            write_ensemble(tmp_path / "bad", members={"whole": folder})

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ({"soft": 1.0}, "weights are for soft; expected one for each of: soft, hard"),
            ({"soft": 1.0, "hard": 0.0}, r"weights\.hard is 0\.0; input should be greater"),
            ({"soft": 1.0, "hard": float("inf")}, r"weights\.hard is inf; input should be"),
        ],
    )
    def test_weights_must_make_sense(self, parts, tmp_path, weights, message):
        with pytest.raises(BundleError, match=message):
            write_ensemble(tmp_path / "bad", members=parts, weights=weights)
        assert list(tmp_path.iterdir()) == []
