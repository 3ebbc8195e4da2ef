"""Cases are worked on side by side only as memory allows: what each takes is told beforehand."""

from __future__ import annotations

import shutil

import pytest
import SimpleITK as sitk

from medseg.api import checking, layouts
from medseg.data.layouts import contents
from medseg.io.read import read_segmentation


@pytest.fixture
def raw(tmp_path, prepared):
    return shutil.copytree(prepared / "Dataset004_Tiny", tmp_path / "raw/Dataset004_Tiny")


def watch(monkeypatch, module):
    """Keep the needs that a module tells `map_cases`."""
    told, map_cases = {}, module.map_cases

    def watched(function, items, **options):
        told.update(options.get("needs") or {})
        return map_cases(function, items, **options)

    monkeypatch.setattr(module, "map_cases", watched)
    return told


def test_pictures(raw, tmp_path, monkeypatch):
    told = watch(monkeypatch, checking)
    checking.check(raw, workspace=tmp_path / "work", workers=1)
    voxels = {
        f"case_{n}": read_segmentation(raw / f"labelsTr/case_{n}.nii.gz").array.size
        for n in range(1, 7)
    }
    # four times a float32 image and a uint8 label map; the second channel is not drawn
    assert told == {case: 4 * (5 * count + 2 * 352) for case, count in voxels.items()}


def test_labels_of_a_folder_whose_voxels_lie_beside_their_headers(raw, tmp_path, monkeypatch):
    for path in (raw / "labelsTr").iterdir():
        image = sitk.ReadImage(str(path))
        for key in image.GetMetaDataKeys():
            image.EraseMetaData(key)
        sitk.WriteImage(image, str(path).replace(".nii.gz", ".mhd"))
        path.unlink()
    (raw / "dataset.json").unlink()
    told = watch(monkeypatch, contents)
    layouts.init_dataset(raw)
    voxels = [(raw / f"labelsTr/case_{n}.raw").stat().st_size for n in range(1, 7)]
    assert sorted(told) == [f"case_{n}" for n in range(1, 7)]
    for need, count in zip((told[case] for case in sorted(told)), voxels, strict=True):
        assert 4 * count < need < 4 * count + 8000
