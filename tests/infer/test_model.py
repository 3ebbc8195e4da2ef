"""`load` and `Model.predict`: every form of a case, options, errors, files."""

from __future__ import annotations

import gzip
import itertools
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from medseg.bundles.bundle import read_bundle, write_bundle
from medseg.errors import BundleError, ConfigError, DatasetError, GeometryError
from medseg.geometry import orient
from medseg.infer import engine as engine_module
from medseg.infer import member as member_module
from medseg.infer.export import reduce_parts
from medseg.infer.loading import load
from medseg.infer.model import CaseError, Result
from medseg.infer.predictor import predict_logits
from medseg.infer.source import case_name
from medseg.models.build import build_network
from medseg.models.weights import load_into, load_weights
from medseg.preprocess.pipeline import preprocess_case


@pytest.fixture(scope="module")
def model(bundle_folder):
    return load(bundle_folder, device="cpu", mode="exact")


@pytest.fixture(scope="module")
def image(make):
    return make.channels(), make.oblique()


@pytest.fixture(scope="module")
def expected(model, image):
    return model.predict(image)


def test_the_prediction_is_its_parts_put_together(bundle_folder, model, image):
    """Preprocess, predict with two networks, take the largest logit, look up each voxel."""
    channels, affine = image
    plans, configuration = model.bundle.plans, model.bundle.configuration
    prepared = preprocess_case(channels, affine, plans=plans, configuration=configuration)
    networks = []
    for fold in ("fold_0", "fold_1"):
        network = build_network(configuration.architecture, num_inputs=2, num_logits=4)
        path = bundle_folder / "weights" / f"{fold}.safetensors"
        load_into(network, load_weights(path), fold)
        networks.append(network)
    logits = predict_logits(
        networks,
        torch.from_numpy(prepared.image),
        configuration.patch_size,
        num_logits=4,
        mirror_axes=(0, 1, 2),
    )
    result = model.predict(image, probabilities=True, tta="flips")
    axes, flips = orient(affine, plans.network_axes)
    assert (result.record.axes, result.record.flips) == (axes, flips)
    assert result.record == prepared.record
    inside = 0
    for index in np.argwhere(np.ones(channels.shape[1:], bool))[::7]:
        oriented = [
            channels.shape[1 + axis] - 1 - index[axis] if flip else index[axis]
            for axis, flip in zip(axes, flips, strict=True)
        ]
        cropped = [o - low for o, (low, _) in zip(oriented, prepared.record.box, strict=True)]
        lengths = prepared.record.shape_cropped
        found = result.segmentation[tuple(index)]
        if any(not 0 <= c < n for c, n in zip(cropped, lengths, strict=True)):
            assert found == 0
            assert result.probabilities[0][tuple(index)] == 1
            continue
        values = logits.numpy().astype(np.float64)
        for position, length in zip(cropped, lengths, strict=True):
            values = linear_at(values, position, length)
        probabilities = np.exp(values) / np.exp(values).sum()
        found_here = result.probabilities[(slice(None), *index)]
        np.testing.assert_allclose(found_here, probabilities, atol=1e-5)
        first, second = np.sort(values)[:-3:-1]
        if first - second > 1e-5:
            assert found == values.argmax()
            inside += 1
    assert inside > 100


def linear_at(values, position, length):
    """Interpolate along axis 1 at the centre of voxel `position` of `length`."""
    size = values.shape[1]
    centre = np.clip((position + 0.5) * size / length - 0.5, 0, size - 1)
    low = int(np.floor(centre))
    high = min(low + 1, size - 1)
    return values[:, low] * (1 - (centre - low)) + values[:, high] * (centre - low)


def test_a_result_says_everything(expected, image, make):
    channels, affine = image
    assert isinstance(expected, Result)
    assert expected.segmentation.shape == channels.shape[1:]
    assert expected.segmentation.dtype == np.uint8
    np.testing.assert_array_equal(expected.affine, affine)
    assert expected.labels == make.spec().labels
    assert expected.probabilities is None
    assert [flag[:18] for flag in expected.flags] == ["the networks disag"], "random weights"
    voxel_ml = 0.85 * 1.3 * 2.4 / 1000
    counts = np.bincount(expected.segmentation.ravel(), minlength=4) * voxel_ml
    assert expected.volumes_ml == pytest.approx(
        {"left": counts[1], "right": counts[2], "lesion": counts[3]}
    )


def sitk_image(channel, affine):
    """Write out what SimpleITK wants: (k, j, i) arrays and LPS."""
    lps = np.diag([-1.0, -1.0, 1.0])
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    picture = sitk.GetImageFromArray(np.ascontiguousarray(channel.transpose(2, 1, 0)))
    picture.SetSpacing(spacing.tolist())
    picture.SetOrigin((lps @ affine[:3, 3]).tolist())
    picture.SetDirection((lps @ affine[:3, :3] / spacing).ravel().tolist())
    return picture


def test_every_form_of_a_case_gives_the_same_labels(model, image, expected, make, tmp_path):
    channels, affine = image
    paths = make.case(tmp_path, "anna", channels, affine, codes=(0, 2))
    forms = {
        "paths": list(paths),
        "strings": [str(path) for path in paths],
        "tuple of paths": tuple(paths),
        "float64": (channels.astype(np.float64), affine),
        "nibabel": [nib.Nifti1Image(channel, affine) for channel in channels],
        "mixed": [paths[0], nib.Nifti1Image(channels[1], affine)],
        "sitk": [sitk_image(channel, affine) for channel in channels],
    }
    for name, case in forms.items():
        result = model.predict(case)
        same = (result.segmentation == expected.segmentation).mean()
        assert same == 1 if name != "sitk" else same > 0.999, name
        np.testing.assert_allclose(result.affine, affine, atol=1e-5)
    assert model.predict(paths).case == "anna"
    assert expected.case == "case"


@pytest.fixture(scope="module")
def single(make, tmp_path_factory):
    """A model of one channel, regions, one fold."""
    spec = make.spec(
        channels=("T1w",),
        labels={"background": 0, "whole": (1, 2), "core": 2},
        regions_class_order=(1, 2),
    )
    plans = make.plans()
    one = plans.configurations["tiny"].model_copy(
        update={"normalization": ("zscore",), "use_mask_for_norm": (True,)}
    )
    plans = plans.model_copy(
        update={"configurations": {"tiny": one}, "intensity": plans.intensity[:1]}
    )
    folder = tmp_path_factory.mktemp("single") / "bundle"
    return load(
        make.bundle(folder, plans=plans, spec=spec, folds=1).folder, device="cpu", mode="exact"
    )


def test_one_channel_may_come_alone(single, image, make, tmp_path):
    channels, affine = image
    (path,) = make.case(tmp_path, "anna", channels[:1], affine, codes=(0, 2))
    expected = single.predict((channels[0], affine))
    assert set(np.unique(expected.segmentation)) == {0, 1, 2}
    for case in (path, str(path), [path], nib.Nifti1Image(channels[0], affine)):
        np.testing.assert_array_equal(single.predict(case).segmentation, expected.segmentation)


def test_regions_have_sigmoid_probabilities_and_volumes(single, image):
    channels, affine = image
    result = single.predict((channels[0], affine), probabilities=True)
    assert result.probabilities.shape == (2, *channels.shape[1:])
    core = result.probabilities[1] > 0.5
    np.testing.assert_array_equal(result.segmentation == 2, core)
    np.testing.assert_array_equal(result.segmentation == 1, (result.probabilities[0] > 0.5) & ~core)
    painted = np.count_nonzero(result.segmentation) * 0.85 * 1.3 * 2.4 / 1000
    assert result.volumes_ml["whole"] == pytest.approx(painted)


def test_folds_are_averaged_and_checkpoints_chosen(bundle_folder, image):
    def probabilities(**options):
        chosen = load(bundle_folder, device="cpu", mode="exact", **options)
        return chosen.folds, chosen.predict(image, probabilities=True).probabilities

    (names, both), (_, first), (_, second), (_, best) = (
        probabilities(),
        probabilities(folds=[0]),
        probabilities(folds=["fold_1"]),
        probabilities(folds=[0], checkpoint="best"),
    )
    assert names == ("fold_0", "fold_1")
    mean = np.sqrt(first * second)
    np.testing.assert_allclose(both, mean / mean.sum(axis=0), atol=1e-5)
    assert abs(first - best).max() > 0.01
    with pytest.raises(BundleError, match=r"no checkpoint 'bst'.*Did you mean 'best'"):
        load(bundle_folder, checkpoint="bst")


def test_default_mode_is_close_to_exact(bundle_folder, image, expected):
    found = load(bundle_folder, device="cpu").predict(image)
    assert (found.segmentation == expected.segmentation).mean() > 0.95


def test_loading_leaves_the_random_state_alone(bundle_folder):
    torch.manual_seed(4)
    before = torch.get_rng_state()
    load(bundle_folder, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_flips_change_the_result_and_auto_follows_the_work(
    bundle_folder, image, monkeypatch, caplog
):
    model = load(bundle_folder, device="cpu")
    exact = load(bundle_folder, device="cpu", mode="exact")
    caplog.set_level(logging.INFO, "medseg.infer.member")
    found = {
        tta: model.predict(image, probabilities=True, tta=tta).probabilities
        for tta in ("none", "flips", "auto")
    }
    assert abs(found["none"] - found["flips"]).max() > 0.01
    np.testing.assert_array_equal(found["auto"], found["flips"])
    assert "tta auto chose flips" in caplog.text
    monkeypatch.setattr(member_module, "CPU_FLIP_VOXELS", 1000)
    automatic = model.predict(image, probabilities=True).probabilities
    np.testing.assert_array_equal(automatic, found["none"])
    assert "tta auto chose none" in caplog.text
    mirrored = [exact.predict(image, tta=tta).segmentation for tta in ("auto", "flips")]
    np.testing.assert_array_equal(*mirrored)  # as the originals, however long it takes


def test_many_threads_may_predict_at_once(model, make):
    cases = [(make.channels(seed=seed), make.oblique()) for seed in range(4)]
    one_by_one = [model.predict(case).segmentation for case in cases]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda case: model.predict(case).segmentation, cases))
    for found, expected in zip(together, one_by_one, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert any((a != b).any() for a, b in itertools.pairwise(one_by_one))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tta": "flip"}, "tta is 'flip'; expected one of: auto, none, flips.*'flips'"),
        ({"step": 0}, "step is 0; expected"),
        ({"step": 1.5}, "step is 1.5; expected"),
    ],
)
def test_options_out_of_range_are_refused(model, image, options, message):
    with pytest.raises(ConfigError, match=message):
        model.predict(image, **options)
    with pytest.raises(ConfigError, match=message):
        model.predict_many([image], **options)


def test_a_missing_channel_is_named(model, image, make, tmp_path):
    channels, affine = image
    paths = make.case(tmp_path, "anna", channels[:1], affine)
    message = r"case 'anna': got 1 channel, expected 2 \(T1w, CT\)"
    with pytest.raises(DatasetError, match=message):
        model.predict(paths)
    with pytest.raises(DatasetError, match=r"case 'case': got 3 channels, expected 2"):
        model.predict((np.zeros((3, 5, 6, 7), np.float32), affine))


def bad_forms(make):
    channels, affine = make.channels((5, 6, 7)), make.oblique()
    broken = channels.copy()
    broken[1, 2, 3, 4] = np.nan
    shifted = affine.copy()
    shifted[0, 3] += 2
    picture = nib.Nifti1Image(channels[0], affine)
    other = nib.Nifti1Image(channels[0], shifted)
    return [
        ((channels[0, 0], affine), DatasetError, r"array is float32 \(6, 7\)"),
        ((channels.astype(complex), affine), DatasetError, "expected real numbers"),
        ((broken, affine), DatasetError, "1 voxels are NaN or infinite"),
        ((channels, np.zeros((4, 4))), GeometryError, "expected an invertible"),
        ((channels, affine[:3]), GeometryError, r"affine has shape \(3, 4\)"),
        ([picture, other], GeometryError, "channel 1 does not lie on the grid of channel 0"),
        ([], DatasetError, "empty list"),
        ("nowhere/anna_0000.nii.gz", DatasetError, "no such file"),
        ("nowhere/anna.jpg", DatasetError, "unknown ending|no such file"),
    ]


@pytest.mark.parametrize("number", range(9))
def test_a_case_that_is_no_image_is_refused(model, make, number):
    case, error, message = bad_forms(make)[number]
    with pytest.raises(error, match=message) as caught:
        model.predict(case)
    assert caught.value.__notes__ == [f"case: {case_name(case)}"]


def test_a_case_of_unknown_form_is_misuse(model):
    with pytest.raises(TypeError, match=r"got a builtins\.int; expected a path"):
        model.predict(7)


def test_an_unknown_mode_is_refused(bundle_folder):
    with pytest.raises(ConfigError, match="mode is 'fast'"):
        load(bundle_folder, mode="fast")


def test_weights_of_another_network_are_refused(make, tmp_path):
    plans = make.plans()
    wider = plans.configurations["tiny"].architecture.model_copy(update={"features": (4, 6, 9)})
    other = plans.configurations["tiny"].model_copy(update={"architecture": wider})
    bundle = make.bundle(tmp_path / "bundle", folds=1)
    weights = bundle.weights("fold_0")
    swapped = read_bundle(bundle.folder)
    plans = plans.model_copy(update={"configurations": {"tiny": other}})
    write_bundle(
        bundle.folder,
        spec=swapped.spec,
        plans=plans,
        configuration="tiny",
        weights={"fold_0": {"final": weights}},
        semantics=swapped.manifest.semantics,
    )
    with pytest.raises(BundleError, match=r"fold_0\.safetensors: \d+ tensors of \d+ do not fit"):
        load(bundle.folder)


def test_predict_many_keeps_order_and_survives_bad_cases(model, make, tmp_path):
    affine = make.oblique()
    good = [make.channels(seed=seed) for seed in range(3)]
    paths = make.case(tmp_path, "broken", good[0], affine)
    paths[1].write_bytes(paths[1].read_bytes()[:200])
    cases = [(good[0], affine), paths, 7, (good[1], affine), (good[2][:1], affine)]
    found = list(model.predict_many(iter(cases)))
    assert [type(item) for item in found] == [Result, CaseError, CaseError, Result, CaseError]
    assert [item.case for item in found] == ["case 0", "broken", "case 2", "case 3", "case 4"]
    assert "broken_0001.nii.gz" in found[1].message
    assert found[2].message.startswith("TypeError: got a builtins.int")
    assert "got 1 channel, expected 2" in found[4].message
    for number, position in ((0, 0), (1, 3)):
        expected = model.predict((good[number], affine)).segmentation
        np.testing.assert_array_equal(found[position].segmentation, expected)


def test_a_failing_network_does_not_stop_the_others(model, make, monkeypatch):
    calls = []

    def flaky(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return reduce_parts(*args, **kwargs)

    monkeypatch.setattr(engine_module, "reduce_parts", flaky)
    cases = [(make.channels(seed=seed), make.oblique()) for seed in range(3)]
    found = list(model.predict_many(cases))
    assert [type(item) for item in found] == [Result, CaseError, Result]
    assert found[1] == CaseError(case="case 1", message="RuntimeError: out of memory")


def test_few_cases_wait_and_the_threads_end(model, make):
    taken = []

    def cases():
        for seed in range(20):
            taken.append(seed)
            yield make.channels(seed=seed), make.oblique()

    results = model.predict_many(cases())
    next(results)
    assert len(taken) <= 7, "one in each stage, one between them, one ahead"
    results.close()
    assert len(taken) <= 8
    assert not [t for t in threading.enumerate() if t.name.startswith("medseg-")]


def test_a_channel_without_contrast_is_flagged(model, make):
    channels = make.channels((9, 10, 11))
    channels[1] = 7
    result = model.predict((channels, make.oblique()))
    assert "channel CT has the same value everywhere" in result.flags
    assert not any("T1w" in flag for flag in result.flags)
    assert result.segmentation.shape == (9, 10, 11)


def test_a_result_without_structures_is_flagged(bundle_folder, image, monkeypatch):
    single = load(bundle_folder, device="cpu", folds=[0])
    (network,) = single.members[0].networks
    bias = dict(network.named_parameters())
    last = [name for name, value in bias.items() if value.shape == (4,)][-1]
    with torch.no_grad():
        bias[last].copy_(torch.tensor([1e4, 0.0, 0.0, 0.0]))
    assert single.predict(image).flags == ("no structure was found",)


@pytest.mark.parametrize("codes", [(1, 2), (0, 1), (2, 0), (4, 3)])
@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_the_output_has_its_inputs_geometry(model, image, expected, make, tmp_path, codes, ending):
    channels, affine = image
    paths = make.case(tmp_path, "anna", channels, affine, ending=ending, codes=codes)
    target = tmp_path / "out" / f"anna{ending}"
    model.predict(paths).save(target)
    source, output = nib.load(paths[0]), nib.load(target)
    assert output.shape == source.shape
    np.testing.assert_allclose(output.affine, source.affine, atol=1e-6, rtol=0)
    for name in ("qform_code", "sform_code", "xyzt_units"):
        assert output.header[name] == source.header[name]
    assert output.header.get_xyzt_units() == ("mm", "sec")
    np.testing.assert_allclose(output.header["pixdim"], source.header["pixdim"], atol=1e-6)
    np.testing.assert_allclose(output.get_qform(), source.get_qform(), atol=1e-6)
    assert (output.dataobj.slope, output.dataobj.inter) == (1, 0)
    opened = gzip.open if ending == ".nii.gz" else open
    with opened(target, "rb") as file:
        raw = np.frombuffer(file.read(348)[112:120], "<f4")
    assert raw.tolist() == [1.0, 0.0], "scl_slope and scl_inter as stored"
    assert output.get_data_dtype() == np.uint8
    same = (np.asarray(output.dataobj) == expected.segmentation).mean()
    assert same > 0.999


def test_an_array_can_be_saved_too(expected, tmp_path):
    for ending in (".nii.gz", ".nrrd"):
        expected.save(tmp_path / f"case{ending}")
    output = nib.load(tmp_path / "case.nii.gz")
    np.testing.assert_allclose(output.affine, expected.affine, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(output.dataobj), expected.segmentation)
    itk = sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / "case.nrrd")).transpose(2, 1, 0)
    np.testing.assert_array_equal(itk, expected.segmentation)


def test_case_names_come_from_files():
    assert case_name("a/b/anna_0000.nii.gz") == "anna"
    assert case_name("a/b/anna.nii.gz") == "anna"
    assert case_name("a/b/anna_00000.nii.gz") == "anna_00000"
    assert case_name(["x/bert_12_0001.mha"]) == "bert_12"
    assert case_name("a/b/anna.jpg") == "anna"
    assert case_name("a/b/anna.txt") == "anna.txt"
    assert case_name((np.zeros(3), np.eye(4)), fallback="case 3") == "case 3"
    assert case_name([]) == "case"


def test_what_preprocessing_takes_is_told_before_it_runs(bundle_folder, make, monkeypatch):
    """A small file of thick slices becomes large where the plan is fine."""
    from medseg.infer import model as module
    from medseg.infer.source import read_case

    model = load(bundle_folder, device="cpu", max_memory="2GB")
    monkeypatch.setattr(module, "resident_bytes", lambda: 0)
    small = make.channels((20, 18, 16))
    member = model.members[0]
    plain = member.preprocess_bytes(read_case((small, make.oblique()), "a"))
    coarse = member.preprocess_bytes(read_case((small, make.oblique((9.0, 12.0, 20.0))), "a"))
    assert coarse > 100 * plain
    model.predict((small, make.oblique()))
    with pytest.raises(ConfigError, match=r"preprocessing take about .* 2 GB may be taken"):
        model.predict((small, make.oblique((90.0, 120.0, 200.0))))
