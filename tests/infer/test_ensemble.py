"""Several models at once, maps, and equality with the naive way: all classes at full size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from medseg.errors import BundleError, ConfigError
from medseg.infer import export, memory
from medseg.infer.loading import load
from medseg.infer.maps import entropy
from medseg.schema.postprocessing import KeepLargest, Postprocessing

REGIONS = {
    "labels": {"background": 0, "whole": (1, 2, 3), "core": (2, 3), "tip": 3},
    "regions_class_order": (1, 2, 3),
}


@pytest.fixture(scope="module")
def folders(make, tmp_path_factory):
    """Bundles of other spacings, tiles, axes and dimensions, for the same labels."""
    root = tmp_path_factory.mktemp("ensemble")
    plans = {
        "fine": make.plans(),
        "coarse": make.plans(
            spacing=(3.0, 1.7, 1.4), patch_size=(8, 12, 16), network_axes=(1, 2, 0)
        ),
        "thick": make.plans(spacing=(7.0, 1.0, 1.1), patch_size=(4, 12, 8), network_axes=(0, 1, 2)),
        "slices": make.plans(spacing=(0.9, 1.3), patch_size=(12, 16), network_axes=(2, 1, 0)),
    }
    kinds = {"labels": {}, "regions": REGIONS}
    return {
        (name, kind): make.bundle(
            root / f"{name}_{kind}", plans=own, spec=make.spec(**changes), folds=2 - number % 2
        ).folder
        for number, (name, own) in enumerate(plans.items())
        for kind, changes in kinds.items()
    }


def image(make, shape, seed=0):
    return make.channels(shape, seed=seed), make.oblique()


def naive(model, case, weights, tta):
    """Resample the logits of every class of every model, activate, average, decide."""
    total, labels = None, model.labels
    for member, weight in zip(model.members, weights, strict=True):
        alone = type(model)([member])
        found = alone.predict(case, probabilities=True, tta=tta)
        part = weight * found.probabilities.astype(np.float64)
        total = part if total is None else total + part
    if labels.has_regions:
        decided = np.zeros(total.shape[1:], np.uint8)
        for value, region in zip(REGIONS["regions_class_order"], total, strict=True):
            decided[region > 0.5] = value
        return total, decided, np.abs(total - 0.5).min(axis=0)
    first, second = np.sort(total, axis=0)[:-3:-1]
    return total, total.argmax(axis=0), first - second


AWKWARD = [
    pytest.param((19, 15, 11), id="several-tiles"),
    pytest.param((5, 6, 7), id="smaller-than-the-patch"),
    pytest.param((23, 17, 1), id="one-slice"),
    pytest.param((13, 29, 7), id="prime"),
]


@pytest.mark.parametrize("kind", ["labels", "regions"])
@pytest.mark.parametrize("shape", AWKWARD)
def test_several_models_equal_their_probabilities_averaged(folders, make, shape, kind):
    """Other spacings, axes and a 2D one; cut along every axis, in windows, in files."""
    paths = [folders[name, kind] for name in ("fine", "coarse", "thick", "slices")]
    weights = (0.4, 0.3, 0.2, 0.1)
    model = load(paths, device="cpu", mode="exact", weights=[4, 3, 2, 1])
    case = image(make, shape)
    expected, decided, close = naive(model, case, weights, "none")
    found = model.predict(case, probabilities=True, disagreement=True, tta="none")
    np.testing.assert_allclose(found.probabilities, expected, atol=2e-6)
    differs = found.segmentation != decided
    assert (close[differs] < 1e-5).all()
    assert 0 <= found.disagreement.min() <= found.disagreement.max() <= 1


SPACINGS = [
    pytest.param((0.85, 1.3, 2.4), id="similar"),
    pytest.param((3.1, 2.7, 5.9), id="coarser-than-the-plan"),
    pytest.param((0.4, 0.5, 0.9), id="finer-than-the-plan"),
    pytest.param((1.0, 1.1, 8.0), id="thick-slices"),
]


@pytest.mark.parametrize("name", ["fine", "coarse", "thick", "slices"])
@pytest.mark.parametrize(
    ("shape", "spacing"),
    [(case.values[0], SPACINGS[0].values[0]) for case in AWKWARD]
    + [((17, 14, 13), case.values[0]) for case in SPACINGS[1:]],
)
def test_every_way_of_keeping_sums_gives_the_same(folders, make, shape, spacing, name, monkeypatch):
    """Whole, in windows along each axis, in a scratch file; slabs of one row or more.

    Where the image is coarser than the plan, export skips rows that tiles still to come will touch.
    """
    case = (make.channels(shape), make.oblique(spacing))
    model = load(folders[name, "labels"], device="cpu", mode="exact")
    expected = model.predict(case, probabilities=True, tta="none")
    first, second = np.sort(expected.probabilities, axis=0)[:-3:-1]
    for axis, kind in itertools.product(range(3), ("window", "file")):
        for elements in (2000,) if axis else (1, 2000):
            monkeypatch.setattr(export, "SLAB_ELEMENTS", elements)
            monkeypatch.setattr(memory, "_image_axes", lambda *_, axis=axis: [axis])
            monkeypatch.setattr(memory, "KINDS", (kind,))
            found = model.predict(case, probabilities=elements == 1, tta="none")
            differs = found.segmentation != expected.segmentation
            assert ((first - second)[differs] < 1e-5).all()
            if found.probabilities is not None:
                np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=3e-6)


def test_one_model_twice_is_that_model(folders, make):
    path, case = folders["fine", "labels"], image(make, (19, 15, 11))
    once = load(path, device="cpu", mode="exact").predict(case, probabilities=True)
    twice = load([path, path], device="cpu", mode="exact").predict(case, probabilities=True)
    np.testing.assert_allclose(twice.probabilities, once.probabilities, atol=1e-6)


def test_a_weight_of_nothing_leaves_a_model_out(folders, make):
    paths, case = [folders[name, "labels"] for name in ("fine", "thick")], image(make, (9, 15, 11))
    both = load(paths, device="cpu", mode="exact", weights=[0, 3])
    alone = load(paths[1], device="cpu", mode="exact")
    np.testing.assert_array_equal(both.predict(case).segmentation, alone.predict(case).segmentation)


@pytest.mark.parametrize("weights", [[1], [1, 2, 3], [-1, 2], [0, 0], [float("nan"), 1]])
def test_weights_that_make_no_sense_are_refused(folders, weights):
    paths = [folders[name, "labels"] for name in ("fine", "thick")]
    with pytest.raises(ConfigError, match=r"weights are .*expected 2 numbers"):
        load(paths, device="cpu", weights=weights)


def test_models_of_other_labels_are_refused(folders):
    paths = [folders["fine", "labels"], folders["thick", "regions"]]
    with pytest.raises(BundleError, match=r"must agree with the first(.|\n)*labels is"):
        load(paths, device="cpu")


class TestMaps:
    @pytest.fixture
    def found(self, folders, make):
        model = load(folders["fine", "labels"], device="cpu", mode="exact")
        case = image(make, (19, 15, 11))
        return model.predict(case, probabilities=True, entropy=True, disagreement=True, tta="none")

    def test_entropy_is_that_of_the_probabilities(self, found):
        p = found.probabilities.astype(np.float64)
        expected = -(p * np.log(np.clip(p, 1e-300, 1))).sum(axis=0) / np.log(4)
        np.testing.assert_allclose(found.entropy, expected, atol=1e-5)
        assert found.entropy[0, 0, 0] == 0, "outside the crop all is certain"

    def test_disagreement_of_two_folds_counts_them(self, folders, make, found):
        """Without resampling and within one tile each voxel's share is that of its own folds."""
        model = load(folders["fine", "labels"], device="cpu", mode="exact")
        affine = np.diag([0.9, 1.2, 2.0, 1.0])
        values = np.random.default_rng(3).normal(50, 40, (2, 16, 12, 8)).astype(np.float32)
        together = model.predict((values, affine), disagreement=True, tta="none")
        folds = [
            load(folders["fine", "labels"], device="cpu", mode="exact", folds=[fold])
            .predict((values, affine), tta="none").segmentation
            for fold in (0, 1)
        ]  # fmt: skip
        expected = np.mean([fold != together.segmentation for fold in folds], axis=0)
        np.testing.assert_allclose(together.disagreement, expected, atol=1e-6)
        assert {0, 0.5} <= set(np.unique(expected)) <= {0, 0.5, 1}
        assert 0 < found.disagreement.mean() < 1

    def test_a_single_network_cannot_disagree(self, folders, make):
        model = load(folders["coarse", "labels"], device="cpu")
        with pytest.raises(ConfigError, match="disagreement needs several networks"):
            model.predict(image(make, (9, 8, 7)), disagreement=True)

    def test_entropy_of_regions_is_a_mean(self, folders, make):
        model = load(folders["fine", "regions"], device="cpu", mode="exact")
        found = model.predict(image(make, (9, 8, 7)), probabilities=True, entropy=True)
        p = np.clip(found.probabilities.astype(np.float64), 1e-12, 1 - 1e-12)
        expected = -(p * np.log2(p) + (1 - p) * np.log2(1 - p)).mean(axis=0)
        np.testing.assert_allclose(found.entropy, expected, atol=1e-5)

    def test_entropy_is_from_none_to_one(self):
        import torch

        from medseg.labels import LabelScheme

        labels = LabelScheme(labels={"background": 0, "a": 1, "b": 2})
        probabilities = torch.tensor([[1.0, 1 / 3], [0.0, 1 / 3], [0.0, 1 / 3]])
        torch.testing.assert_close(entropy(probabilities, labels), torch.tensor([0.0, 1.0]))


def test_stored_postprocessing_is_applied_with_a_switch(folders, make, tmp_path):
    from medseg.bundles.bundle import read_bundle, write_bundle

    source = read_bundle(folders["coarse", "labels"])
    steps = (KeepLargest(structures=("left",), connectivity=1),)
    bundle = write_bundle(
        tmp_path / "bundle",
        spec=source.spec,
        plans=source.plans,
        configuration="tiny",
        weights={fold: {"final": source.weights(fold)} for fold in source.manifest.folds},
        semantics=source.manifest.semantics,
        postprocessing=Postprocessing(steps=steps),
    )
    model, case = load(bundle.folder, device="cpu", mode="exact"), image(make, (29, 25, 21))
    with_it, without = model.predict(case), model.predict(case, postprocess=False)
    assert (with_it.is_postprocessed, without.is_postprocessed) == (True, False)
    plain = load(source.folder, device="cpu", mode="exact").predict(case)
    np.testing.assert_array_equal(without.segmentation, plain.segmentation)
    removed = with_it.segmentation != without.segmentation
    assert removed.any()
    assert set(without.segmentation[removed]) == {1}
    assert with_it.volumes_ml["left"] < without.volumes_ml["left"]


def test_small_images_that_share_batches_come_out_as_they_do_alone(folders, make, monkeypatch):
    """Slices of a 2D configuration, four at once; a bad case among them stays alone."""
    from medseg.infer import engine
    from medseg.infer.result import CaseError, Result

    sizes = []

    def noted(many):
        sizes.append(len(many))
        return together(many)

    together = engine.evaluate_together
    monkeypatch.setattr(engine, "evaluate_together", noted)
    model = load(folders["slices", "labels"], device="cpu")
    model.members[0].dtype = None
    shapes = [(9, 7, 3), (15, 12, 2), (5, 6, 1), (8, 13, 4), (7, 9, 2), (11, 5, 3)]
    cases = [image(make, shape, seed) for seed, shape in enumerate(shapes)]
    cases.insert(2, (cases[0][0][:1], cases[0][1]))
    alone = [model.predict(case) for number, case in enumerate(cases) if number != 2]
    sizes.clear()
    model.members[0].batch = 4
    found = list(model.predict_many(cases))
    assert [type(item) for item in found] == [Result] * 2 + [CaseError] + [Result] * 4
    for one, expected in zip([item for item in found if isinstance(item, Result)], alone,
                             strict=True):  # fmt: skip
        assert (one.segmentation != expected.segmentation).mean() < 0.002
    assert max(sizes) > 1, "some were ready together"
    assert max(sizes) <= 4
