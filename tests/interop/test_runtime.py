"""The reference runtime gives what medseg gives, on images and models of every kind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from medseg.infer.loading import load
from medseg.infer.tiles import importance, tile_starts
from medseg.interop import runtime
from medseg.interop.description import normalization_of
from medseg.preprocess.normalize import normalize
from medseg.resample import resize, separate_axis
from medseg.schema.fingerprint import IntensityStatistics
from medseg.schema.plans import LeftRight

ALLOWED = 1e-4
SIDES = {"background": 0, "left": 40, "right": 7, "lesion": 300}
PAIRS = LeftRight(axis=1, policy="swap", pairs=(("left", "right"),))
REGIONS = {"background": 0, "whole": (1, 2, 3), "core": (2, 3), "enhancing": 3}


def run(make, folder, paths, model=None):
    """Return label map and probabilities of an exported folder, and the description it used."""
    module = make.runtime(folder)
    model = model or json.loads((folder / "model.json").read_text())
    channels, affine, _ = module.read_images(paths, model["channels"])
    networks = [module.load_network(folder / n["file"], n["sha256"]) for n in model["networks"]]
    return module.predict(channels, affine, model, networks, probabilities=True)


def require_equal(expected, segmentation, probabilities, *, regions=False):
    """Compare with a result of medseg; labels may differ where the decision is a close one."""
    assert np.abs(probabilities - expected.probabilities).max() <= ALLOWED
    assert segmentation.dtype == expected.segmentation.dtype
    ordered = np.sort(expected.probabilities, axis=0)
    margin = np.abs(expected.probabilities - 0.5).min(0) if regions else ordered[-1] - ordered[-2]
    assert ((segmentation == expected.segmentation) | (margin <= ALLOWED)).all()


CASES = {
    "oblique, cropped, resampled, two folds": ({}, {"folds": 2}, {}),
    "every axis mirrored": ({}, {"mirror_axes": (0, 1, 2)}, {"shape": (13, 9, 8)}),
    "slices gained along the separate axis": (
        {"spacing": (2.0, 0.9, 1.2)}, {}, {"shape": (17, 15, 5), "spacing": (0.8, 1.1, 5.0)},
    ),
    "slices lost along the separate axis": (
        {"spacing": (6.0, 0.9, 1.2)}, {}, {"shape": (17, 15, 13), "spacing": (0.8, 1.1, 4.1)},
    ),
    "the separate axis is that of the plans": (
        {"spacing": (1.2, 4.0, 1.1)}, {}, {"shape": (17, 19, 13), "spacing": (1.3, 1.1, 1.0)},
    ),
    "two axes share the longest voxels": (
        {"spacing": (2.0, 0.9, 1.2)}, {}, {"shape": (9, 7, 18), "spacing": (4.0, 4.0, 1.0)},
    ),
    "nothing to resample": ({"spacing": (2.4, 0.85, 1.3)}, {}, {}),
    "smaller than the patch": ({}, {"mirror_axes": (0,)}, {"shape": (5, 4, 3)}),
    "one slice": ({}, {}, {"shape": (19, 15, 1)}),
    "other axes": ({"network_axes": (0, 2, 1)}, {"mirror_axes": (1,)}, {"shape": (9, 15, 11)}),
    "2D": ({"patch_size": (16, 12)}, {"mirror_axes": (0, 1)}, {}),
    "2D, smaller than the patch": ({"patch_size": (16, 12)}, {}, {"shape": (9, 8, 4)}),
    "2D, thick slices": (
        {"patch_size": (16, 12)}, {}, {"shape": (17, 15, 5), "spacing": (0.8, 1.1, 5.0)},
    ),
    "plain z-score and parameter map": (
        {"normalization": ("zscore", "quantitative"), "use_mask_for_norm": (False, False)}, {}, {},
    ),
    "range and colours": (
        {"normalization": ("rescale_0_1", "rgb_0_1"), "use_mask_for_norm": (False, False)}, {}, {},
    ),
    "as it is, and masked z-score": (
        {"normalization": ("none", "zscore"), "use_mask_for_norm": (False, True)}, {}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_probabilities_and_labels_are_those_of_medseg(make, tmp_path, name):
    plans, bundle, image = CASES[name]
    folder = make.bundle(tmp_path / "bundle", plans=make.plans(**plans), **bundle)
    affine = make.affine(image.get("spacing", (0.85, 1.3, 2.4)))
    channels = make.channels(image.get("shape", (27, 21, 15)))
    paths = make.case(tmp_path / "case", channels, affine)
    expected = load(folder, mode="exact", device="cpu").predict(
        paths, probabilities=True, tta="flips"
    )
    found = run(make, make.exported(folder, tmp_path / "out"), paths)
    require_equal(expected, *found)
    assert np.ptp(found[1][:, found[0] > -1]) > 0.1


def test_labels_with_sides_change_places_in_mirrored_images(make, tmp_path):
    """Label values are not their indices here; without the exchange the result is another one."""
    folder = make.bundle(
        tmp_path / "bundle",
        plans=make.plans(left_right=PAIRS),
        spec=make.spec(labels=SIDES),
        mirror_axes=(0, 1),
        swap_axes=(1,),
    )
    paths = make.case(tmp_path / "case", make.channels((13, 9, 8)), make.affine())
    expected = load(folder, mode="exact", device="cpu").predict(
        paths, probabilities=True, tta="flips"
    )
    out = make.exported(folder, tmp_path / "out")
    segmentation, probabilities = run(make, out, paths)
    require_equal(expected, segmentation, probabilities)
    assert segmentation.dtype == np.uint16
    model = json.loads((out / "model.json").read_text())
    assert model["mirrors"]["swap_channels"] == [[2, 1]]
    model["mirrors"]["swap_channels"] = []
    assert np.abs(run(make, out, paths, model)[1] - probabilities).max() > 0.01


def test_regions_are_painted_in_their_order(make, tmp_path):
    spec = make.spec(labels=REGIONS, regions_class_order=(1, 2, 3))
    folder = make.bundle(tmp_path / "bundle", spec=spec, mirror_axes=(2,))
    paths = make.case(tmp_path / "case", make.channels(), make.affine())
    expected = load(folder, mode="exact", device="cpu").predict(
        paths, probabilities=True, tta="flips"
    )
    segmentation, probabilities = run(make, make.exported(folder, tmp_path / "out"), paths)
    require_equal(expected, segmentation, probabilities, regions=True)
    assert probabilities[:, 0, 0, 0].tolist() == [0, 0, 0]  # outside the crop there is no region
    assert len(np.unique(segmentation)) > 2


@pytest.fixture(scope="module")
def plain(make, tmp_path_factory):
    """A model that mirrors, and what it was exported to."""
    folder = tmp_path_factory.mktemp("plain")
    bundle = make.bundle(folder / "bundle", folds=2, mirror_axes=(1,))
    return bundle, make.exported(bundle, folder / "out")


def test_an_empty_image_is_predicted(make, tmp_path, plain):
    bundle, out = plain
    paths = make.case(tmp_path, np.zeros((2, 9, 8, 7), np.float32), make.affine())
    expected = load(bundle, mode="exact", device="cpu").predict(
        paths, probabilities=True, tta="flips"
    )
    require_equal(expected, *run(make, out, paths))


CHANGES = {
    "orientation.network_axes": [1, 0, 2],
    "normalization.0.use_mask": False,
    "normalization.1.clip": [-60.0, 20.0],
    "normalization.1.divide": 10.0,
    "spacing": [3.0, 0.9, 1.2],
    "resampling.separate_above": 1.5,
    "resampling.image_order": 1,
    "resampling.logits_order": 0,
    "tiles.step": 1.0,
    "tiles.weight_sigma": 1.0,
    "mirrors.axes": [],
}


@pytest.mark.parametrize("field", CHANGES)
def test_every_number_of_the_description_matters(make, tmp_path, plain, field):
    """So that equality with medseg says something about each of them."""
    paths = make.case(tmp_path, make.channels(), make.affine())
    model = json.loads((plain[1] / "model.json").read_text())
    _, probabilities = run(make, plain[1], paths, model)
    *path, last = [int(part) if part.isdigit() else part for part in field.split(".")]
    part = model
    for name in path:
        part = part[name]
    assert part[last] != CHANGES[field]
    part[last] = CHANGES[field]
    assert np.abs(run(make, plain[1], paths, model)[1] - probabilities).max() > 10 * ALLOWED


IMPORTS = """
import runpy, sys
class Refuse:
    def find_spec(self, name, *others):
        if name.split(".")[0] in ("torch", "medseg"):
            raise ImportError(f"{name} is not there")
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_command_runs_in_a_copy_without_torch_and_medseg(make, tmp_path, plain):
    """As a user runs it; the label map is placed exactly as medseg's."""
    bundle, out = plain
    copy = shutil.copytree(out, tmp_path / "elsewhere" / "model")
    paths = make.case(tmp_path / "case", make.channels(), make.affine())
    files = [*paths, str(tmp_path / "found.nii.gz")]
    options = ["--probabilities", str(tmp_path / "found.npy")]
    command = [sys.executable, "-W", "error", "-c", IMPORTS, str(copy / "predict.py")]
    done = subprocess.run(
        [*command, *files, *options], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    expected = load(bundle, mode="exact", device="cpu").predict(
        paths, probabilities=True, tta="flips"
    )
    expected.save(tmp_path / "expected.nii.gz")
    ours, theirs = (nib.load(tmp_path / f"{name}.nii.gz") for name in ("expected", "found"))
    require_equal(expected, np.asanyarray(theirs.dataobj), np.load(tmp_path / "found.npy"))
    assert ours.header.binaryblock == theirs.header.binaryblock
    plain_run = [sys.executable, str(copy / "predict.py"), "--no-mirrors", *files]
    assert subprocess.run(plain_run, check=False).returncode == 0
    unmirrored = load(bundle, mode="exact", device="cpu").predict(paths, tta="none")
    found = np.asanyarray(nib.load(tmp_path / "found.nii.gz").dataobj)
    assert (found == unmirrored.segmentation).mean() > 0.999


@pytest.mark.parametrize(
    ("codes", "units", "kind"),
    [((1, 0), ("mm", "sec"), None), ((0, 4), ("meter", "unknown"), None),
     ((0, 0), ("unknown", "unknown"), None), ((3, 1), ("micron", "msec"), nib.Nifti2Image)],
)  # fmt: skip
def test_headers_are_read_and_written_as_medseg_does(make, tmp_path, plain, codes, units, kind):
    """Which affine counts, in which unit, and what the output's header holds."""
    scale = {"meter": 0.001, "micron": 1000.0}.get(units[0], 1.0)
    affine = np.diag([scale, scale, scale, 1.0]) @ make.affine()
    paths = make.case(
        tmp_path, make.channels().astype(np.int16), affine, codes=codes, units=units, kind=kind
    )
    bundle, out = plain
    expected = load(bundle, mode="exact", device="cpu").predict(
        paths, probabilities=True, tta="flips"
    )
    require_equal(expected, *run(make, out, paths))
    module = make.runtime(out)
    _, found, header = module.read_images(paths, ["T1w", "CT"])
    np.testing.assert_allclose(found, expected.affine, rtol=1e-12)
    module.write_labels(str(tmp_path / "found.nii"), expected.segmentation, header)
    expected.save(tmp_path / "expected.nii")
    ours, theirs = (nib.load(tmp_path / f"{name}.nii") for name in ("expected", "found"))
    assert ours.header.binaryblock == theirs.header.binaryblock
    np.testing.assert_array_equal(ours.dataobj, theirs.dataobj)


class TestParts:
    """Each step against medseg's, on values that the whole way does not reach."""

    @pytest.mark.parametrize("seed", range(40))
    def test_orientation(self, seed):
        from medseg.geometry import orient

        rng = np.random.default_rng(seed)
        rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        if seed % 4 == 0:  # exactly between two axes
            half = np.sqrt(0.5)
            rotation = np.array([[half, -half, 0], [half, half, 0], [0, 0, 1]])
            rotation = rotation[:, rng.permutation(3)] * rng.choice([-1.0, 1.0], 3)
        affine = np.eye(4)
        affine[:3, :3] = rotation * rng.uniform(0.5, 3, 3)
        axes = tuple(rng.permutation(3).tolist())
        rule = {"tie_tolerance": 1e-3, "network_axes": axes}
        found = runtime.orientation(affine, rule)
        assert (tuple(found[0]), tuple(found[1])) == orient(affine, axes)

    @pytest.mark.parametrize("scheme", ["zscore", "ct", "quantitative", "none", "rescale_0_1",
                                        "rgb_0_1"])  # fmt: skip
    @pytest.mark.parametrize("use_mask", [True, False])
    @pytest.mark.parametrize("kind", ["usual", "tiny", "constant", "nothing inside"])
    def test_normalisation(self, scheme, use_mask, kind):
        values = np.random.default_rng(1).normal(50, 40, (7, 6, 5)).astype(np.float32)
        inside = values > 20
        scale = 1e-9 if kind == "tiny" else 1.0
        values *= np.float32(scale)
        if kind == "nothing inside":
            inside[:] = False
        mean, std, low, high = 40 * scale, 30 * scale, -10 * scale, 60 * scale
        if kind == "constant":
            values[:], (mean, std, low, high) = 7, (7, 0, 7, 7)
        statistics = IntensityStatistics(
            mean=mean, std=std, median=0, min=0, max=0, percentile_00_5=low, percentile_99_5=high
        )
        expected = normalize(
            values[None], inside, schemes=[scheme], use_mask=[use_mask], intensity=[statistics]
        )[0]
        rule = normalization_of(scheme, use_mask, statistics).model_dump(mode="json")
        found = runtime.normalised(values, inside, rule)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6 * np.abs(expected).max())

    @pytest.mark.parametrize("separate", [None, 0, 1, 2])
    @pytest.mark.parametrize("order", [1, 3])
    @pytest.mark.parametrize("shape", [(5, 9, 7), (12, 4, 20), (1, 13, 7), (30, 2, 3)])
    def test_resampling(self, shape, order, separate):
        values = np.random.default_rng(2).normal(size=(1, 9, 6, 7)).astype(np.float32)
        expected = resize(values, shape, order=order, separate=separate)[0]
        found = runtime.resized(values[0], shape, order, separate)
        np.testing.assert_allclose(found, expected, atol=1e-5)

    @pytest.mark.parametrize("now", [(5.0, 1.0, 1.1), (3.0, 1.0, 1.0), (4.0, 4.0, 1.0)])
    @pytest.mark.parametrize("asked", [(1.0, 1.0, 1.0), (1.0, 1.0, 3.5), (9.0, 1.0, 9.0)])
    def test_separate_axis(self, now, asked):
        assert runtime.separate_axis(list(now), list(asked), {"separate_above": 3.0}) == (
            separate_axis(now, asked)
        )

    @pytest.mark.parametrize("size", [(8, 16, 12), (5, 3, 31), (20, 7)])
    def test_tiles(self, size):
        rule = {"size": list(size), "weight_sigma": 1 / 8, "weight_truncate": 4.0}
        np.testing.assert_array_equal(runtime.tile_weight(rule), importance(size))
        for length in (size[0], size[0] + 1, 3 * size[0] + 5, 97):
            assert tuple(runtime.starts(length, size[0], 0.5)) == tile_starts(length, size[0], 0.5)


class TestErrors:
    def refused(self, out, *arguments):
        done = subprocess.run(
            [sys.executable, str(out / "predict.py"), *map(str, arguments)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
        return done.stderr

    def test_images_that_do_not_fit(self, make, tmp_path, plain):
        out, output = plain[1], tmp_path / "x.nii.gz"
        paths = make.case(tmp_path / "a", make.channels(), make.affine())
        assert "got 1 images; expected one for each of: T1w, CT" in self.refused(
            out, paths[0], output
        )
        assert "expected a name in .nii or .nii.gz" in self.refused(out, *paths, tmp_path / "x.png")
        moved = make.affine()
        moved[0, 3] += 0.2
        other = make.case(tmp_path / "b", make.channels(), moved)
        assert "does not lie on the grid of" in self.refused(out, paths[0], other[1], output)
        bad = make.channels()
        bad[0, 3, 3, 3] = np.nan
        other = make.case(tmp_path / "c", bad, make.affine())
        assert "values that are not finite" in self.refused(out, *other, output)
        series = make.case(tmp_path / "d", np.zeros((2, 4, 5, 6, 3), np.float32), make.affine())
        assert "expected one number per voxel" in self.refused(out, *series, output)
        assert not output.exists()

    def test_a_damaged_network(self, make, tmp_path, plain):
        copy = shutil.copytree(plain[1], tmp_path / "copy")
        with (copy / "network_fold_1.onnx").open("ab") as file:
            file.write(b"x")
        paths = make.case(tmp_path / "a", make.channels(), make.affine())
        message = self.refused(copy, *paths, tmp_path / "x.nii.gz")
        assert "network_fold_1.onnx: damaged or exchanged" in message
