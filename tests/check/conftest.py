"""A healthy dataset, and ways to spoil a copy of it."""

from __future__ import annotations

import gzip
import shutil
import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medseg.check.case import inspect_case
from medseg.check.dataset import compare_cases, unseen
from medseg.data.dataset import scan_dataset
from medseg.io.read import read_stored
from medseg.io.write import write_nifti

NUM_CASES = 10


class Raw:
    """A dataset on disk in which case_2 is to be spoiled."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def channel(self, number=0, case="case_2"):
        return self.folder / f"imagesTr/{case}_{number:04d}.nii.gz"

    def segmentation(self, case="case_2"):
        return self.folder / f"labelsTr/{case}.nii.gz"

    def values(self, path):
        """Return the array of a file in C order, and its affine."""
        stored = read_stored(path)
        return np.ascontiguousarray(stored.array), np.array(stored.header.affine)

    def change(self, path, array=None, affine=None):
        """Write a file anew with its array or its affine changed by a function."""
        values, place = self.values(path)
        values = values if array is None else array(values)
        write_nifti(path, values, place if affine is None else affine(place))

    def save(self, path, image):
        nibabel.save(image, path)

    def patch(self, path, offset, form, *values):
        """Change bytes of the header, leaving all others as they are."""
        content = bytearray(gzip.decompress(path.read_bytes()))
        struct.pack_into(form, content, offset, *values)
        path.write_bytes(gzip.compress(bytes(content), mtime=0))

    def rename(self, old, new):
        """Rename a case."""
        for path in sorted(self.folder.glob(f"*Tr/{old}[._]*")):
            path.rename(path.with_name(path.name.replace(old, new, 1)))


def look(folder):
    """Return the dataset, the facts of every case, and every problem."""
    spec, scanned = scan_dataset(Path(folder))
    facts = {case: inspect_case(spec, case).facts for case in spec.cases}
    found = [problem for entry in facts.values() for problem in entry.problems]
    return spec, facts, [*found, *compare_cases(spec, facts), *unseen(scanned, facts)]


@pytest.fixture(scope="session")
def healthy(tmp_path_factory, datasets):
    folder = tmp_path_factory.mktemp("healthy") / "Dataset007_Tiny"
    return datasets.write(folder, num_cases=NUM_CASES)


@pytest.fixture
def raw(healthy, tmp_path):
    return Raw(shutil.copytree(healthy, tmp_path / "Dataset007_Tiny"))


@pytest.fixture(scope="session")
def check():
    """Return every problem of a dataset."""
    return lambda raw: look(raw.folder)[2]
