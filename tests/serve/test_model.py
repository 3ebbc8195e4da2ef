"""A real model behind the queue: what comes out is what `predict` finds; bad files are named."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import SimpleITK as sitk
from starlette.testclient import TestClient

import medseg
from medseg.io.read import read_segmentation
from medseg.serve.app import create_app
from medseg.serve.jobs import JobQueue
from medseg.serve.limits import Limits
from medseg.serve.server import served_by
from tests.infer.conftest import make_bundle, make_channels, make_oblique, make_spec, write_case
from tests.serve.conftest import Serving


class RealServing(Serving):
    """As `Serving`, with a model that segments."""

    def __init__(self, folder, model):
        self.folder, self.model = folder, model
        limits = Limits(max_upload_bytes=10_000_000)
        self.queue = JobQueue(
            model.predict, folder, channels=model.bundle.spec.channels, limits=limits
        )
        served = served_by(model, tta="auto", token=None, is_local=True)
        self.client = TestClient(create_app(self.queue, served, version="9.9"))
        self.client.base_url = "http://localhost"


@pytest.fixture(scope="module")
def model(tmp_path_factory, one_thread):
    return medseg.load(make_bundle(tmp_path_factory.mktemp("model") / "bundle").folder)


@pytest.fixture
def server(model, tmp_path):
    folder = tmp_path / "server"
    folder.mkdir()
    server = RealServing(folder, model)
    yield server
    assert server.queue.close(20)


@pytest.fixture
def case(tmp_path):
    """Two channels on an oblique grid of three lengths and spacings."""
    return write_case(tmp_path / "in", "anna", make_channels(), make_oblique())


def downloaded(server, job, folder):
    path = folder / "downloaded.nii.gz"
    path.write_bytes(server.client.get(job["links"]["segmentation"]).content)
    return read_segmentation(path)


def test_segmentation_is_that_of_predict(server, model, case, tmp_path):
    expected = model.predict(case)
    files = [(n, p.name, p.read_bytes()) for n, p in zip(("T1w", "CT"), case, strict=True)]
    job = server.wait_for(server.post(*reversed(files)).json()["id"])
    assert job["state"] == "done", job["message"]
    found = downloaded(server, job, tmp_path)
    np.testing.assert_array_equal(found.array, expected.segmentation)
    assert len(np.unique(found.array)) > 1
    np.testing.assert_allclose(found.grid.affine, expected.affine, atol=1e-5)
    assert job["volumes_ml"] == pytest.approx(expected.volumes_ml)
    result = server.client.get(job["links"]["result"]).json()
    assert result["labels"] == {"background": 0, "left": 1, "right": 2, "lesion": 3}
    np.testing.assert_allclose(result["affine"], expected.affine)
    swapped = model.predict(case[::-1])
    assert (swapped.segmentation != expected.segmentation).any()


def test_garbage_fails_in_words(server, case):
    files = [("T1w", "a.nii.gz", case[0].read_bytes()), ("CT", "b.nii.gz", b"\x1f\x8bgarbage")]
    job = server.wait_for(server.post(*files).json()["id"])
    assert job["state"] == "failed"
    assert job["message"].startswith("channel 'CT': ")
    assert "damaged" in job["message"]
    assert str(server.folder) not in job["message"]


def test_truncated_file_fails_in_words(server, case):
    packed = case[0].read_bytes()
    files = [("T1w", "a.nii.gz", packed[: len(packed) // 2]), ("CT", "b.nii", case[1].read_bytes())]
    message = server.wait_for(server.post(*files).json()["id"])["message"]
    assert message.startswith("channel 'T1w': ")
    assert "cut short" in message


def test_grids_that_differ_fail_in_words(server, case, tmp_path):
    (other,) = write_case(tmp_path, "b", make_channels((19, 15, 12), channels=1), make_oblique())
    files = [("T1w", "a.nii.gz", case[0].read_bytes()), ("CT", "b.nii.gz", other.read_bytes())]
    message = server.wait_for(server.post(*files).json()["id"])["message"]
    assert message.startswith("channel 'CT' does not lie on the grid of channel 'T1w': ")


def test_too_few_channels_in_one_file_fail_in_words(server, case):
    job = server.wait_for(server.post(("image", "a.nii.gz", case[0].read_bytes())).json()["id"])
    assert "got 1 channel, expected 2 (T1w, CT)" in job["message"]


def write_series(folder, array, *, uid, spacing=(0.7, 1.1, 3.0)):
    """Write (I, J, K) int16 as one DICOM file per slice."""
    folder.mkdir(parents=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in range(array.shape[2]):
        image = sitk.GetImageFromArray(np.ascontiguousarray(array[:, :, k : k + 1].T))
        image.SetSpacing(spacing)
        position = f"-12\\7\\{spacing[2] * k:g}"
        tags = {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.4", "0008|0018": f"{uid}.{k + 1}",
            "0008|0060": "MR", "0020|000d": "1.2.3", "0020|000e": uid, "0020|0013": str(k + 1),
            "0020|0032": position, "0020|0037": "1\\0\\0\\0\\1\\0",
            "0018|0050": f"{spacing[2]:g}",
        }  # fmt: skip
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"slice{(k * 7) % array.shape[2]}.dcm"))
        writer.Execute(image)


def test_zipped_dicom(tmp_path, one_thread):
    """One series of one channel, in the folders of some other machine."""
    spec = make_spec(channels=("T1w",))
    from tests.infer.conftest import make_plans

    plans = make_plans()
    configuration = plans.configurations["tiny"].model_copy(
        update={"normalization": ("zscore",), "use_mask_for_norm": (True,)}
    )
    plans = plans.model_copy(
        update={"configurations": {"tiny": configuration}, "intensity": plans.intensity[:1]}
    )
    model = medseg.load(make_bundle(tmp_path / "bundle", plans=plans, spec=spec, folds=1).folder)
    array = make_channels((19, 15, 11), channels=1)[0].astype(np.int16)
    write_series(tmp_path / "dicom/IMAGES", array, uid="1.2.3.4")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((tmp_path / "dicom/IMAGES").iterdir()):
            archive.write(path, f"PATIENT/STUDY 1/{path.name}")
    (tmp_path / "server").mkdir()
    server = RealServing(tmp_path / "server", model)
    try:
        job = server.wait_for(server.post(("image", "study.zip", buffer.getvalue())).json()["id"])
        assert job["state"] == "done", job["message"]
        found = downloaded(server, job, tmp_path)
    finally:
        assert server.queue.close(20)
    assert found.array.shape == (19, 15, 11)
    expected = model.predict(tmp_path / "dicom/IMAGES")
    np.testing.assert_array_equal(found.array, expected.segmentation)
    np.testing.assert_allclose(found.grid.affine, expected.affine, atol=1e-5)
    np.testing.assert_allclose(np.abs(np.diag(found.grid.affine)[:3]), (0.7, 1.1, 3.0))
