"""Large maps part by part: numbers, geometry, memory, and what is left after trouble."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
import threading
from collections import namedtuple
from xml.etree import ElementTree

import nibabel
import numpy as np
import pytest
import SimpleITK

from medseg.errors import DatasetError
from medseg.io import maps as maps_module
from medseg.io.image import Header
from medseg.io.maps import MapWriter
from medseg.io.read import read_image
from medseg.io.write import as_shares, write_shares

NAMES = ("background", "liver", "a <b>")
STEP = 1 / 65535


@pytest.fixture
def header(sample, tmp_path):
    path = sample.write_nifti(
        tmp_path / "in.nii", sample.values(), sample.oblique(), sform=4, qform=1
    )
    return read_image(path).header


@pytest.fixture
def numbers(sample):
    return np.random.default_rng(0).random((*sample.shape, 3), dtype=np.float32)


def parts(shape, axis, thickness):
    for start in range(0, shape[axis], thickness):
        yield (slice(None),) * axis + (slice(start, start + thickness),)


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("thickness", [1, 3])
@pytest.mark.parametrize("few", [True, False])
def test_parts_along_any_axis_make_the_whole(
    header, numbers, tmp_path, monkeypatch, axis, thickness, few
):
    if few:
        monkeypatch.setattr(maps_module, "_PART_BYTES", 2 * 5 * 6 * 2)
    path = tmp_path / "new" / "x.nii"
    with MapWriter(path, header, NAMES) as maps:
        for index in reversed(list(parts(numbers.shape, axis, thickness))):
            maps.write(index, numbers[index])
    found = nibabel.load(path)
    assert found.get_data_dtype() == np.uint16
    np.testing.assert_allclose(found.get_fdata(), numbers, atol=0.51 * STEP)
    assert [entry.name for entry in path.parent.iterdir()] == ["x.nii"]


def test_numbers_and_slices_mix(header, tmp_path):
    with MapWriter(tmp_path / "x.nii", header, NAMES) as maps:
        maps.write((1, slice(2, 5), -1, np.int64(2)), np.full(3, 0.5, np.float32))
        maps.write((slice(4, 9), 0), np.ones((1, 7, 3), np.float32))
        maps.write((slice(2, 2),), np.ones((0, 6, 7, 3), np.float32))
    expected = np.zeros((5, 6, 7, 3))
    expected[1, 2:5, 6, 2] = 0.5
    expected[4, 0] = 1
    np.testing.assert_allclose(nibabel.load(tmp_path / "x.nii").get_fdata(), expected, atol=STEP)


def test_what_is_not_written_has_its_initial_value(header, tmp_path):
    with MapWriter(tmp_path / "x.nii", header, NAMES, initial=(1, 0, 0.25)) as maps:
        maps.write(np.s_[1:3, :, 2, 0], np.zeros((2, 6), np.float32))
    found = nibabel.load(tmp_path / "x.nii").get_fdata()
    assert found[0, 0, 0] == pytest.approx([1, 0, 0.25], abs=STEP)
    assert found[1, 3, 2] == pytest.approx([0, 0, 0.25], abs=STEP)
    assert (found[..., 0] == 0).sum() == 12


def test_geometry_is_that_of_the_image_and_maps_have_names(header, sample, numbers, tmp_path):
    path = tmp_path / "x.nii"
    with MapWriter(path, header, NAMES) as maps:
        maps.write((), numbers)
    before, after = sample.header_of(tmp_path / "in.nii"), sample.header_of(path)
    for name in ("xyzt_units", "qform_code", "sform_code", "quaternion", "offset", "srow"):
        assert after[name] == before[name], name
    assert after["pixdim"][:4] == before["pixdim"][:4]
    assert after["dim"] == (4, *sample.shape, 3, 1, 1, 1)
    image = nibabel.load(path)
    (extension,) = image.header.extensions
    assert extension.get_code() == 30
    root = ElementTree.fromstring(extension.content)
    assert [entry.text for entry in root.iter("GuiLabel")] == list(NAMES)
    assert [entry.get("Index") for entry in root.iter("VolumeInformation")] == ["0", "1", "2"]
    itk = SimpleITK.ReadImage(str(path))
    assert itk.GetSize() == (*sample.shape, 3)
    found = SimpleITK.GetArrayFromImage(itk).transpose(3, 2, 1, 0)
    np.testing.assert_allclose(found, numbers, atol=0.51 * STEP)
    assert path.stat().st_mode == (tmp_path / "in.nii").stat().st_mode


def test_a_slice_has_maps_too(tmp_path):
    header = Header(shape=(5, 6), affine=tuple(map(tuple, np.diag([2.0, 3, 4, 1]))))
    numbers = np.random.default_rng(1).random((5, 6, 1, 1))
    with MapWriter(tmp_path / "x.nii", header, ("only",)) as maps:
        maps.write((), numbers)
    found = nibabel.load(tmp_path / "x.nii")
    assert found.shape == (5, 6, 1, 1)
    np.testing.assert_allclose(found.get_fdata(), numbers, atol=STEP)


def test_threads_may_write_parts_of_one_slice(header, numbers, tmp_path):
    with MapWriter(tmp_path / "x.nii", header, NAMES) as maps:
        threads = [
            threading.Thread(target=maps.write, args=(index, numbers[index]))
            for index in parts(numbers.shape, 0, 1)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    np.testing.assert_allclose(nibabel.load(tmp_path / "x.nii").get_fdata(), numbers, atol=STEP)


@pytest.mark.parametrize(
    ("values", "stored"), [((-0.5, 0, 1e-6), (0, 0, 0)), ((0.5, 1, 1.5), (32768, 65535, 65535))]
)
def test_shares_are_rounded_and_cut_off(values, stored):
    assert as_shares(np.array(values)).tolist() == list(stored)


def test_every_share_is_as_near_as_said():
    values = np.linspace(0, 1, 100_003)
    assert np.abs(as_shares(values) * STEP - values).max() <= 0.505 * STEP  # float32


class TestTrouble:
    """After trouble the folder is as it was before, an older file included."""

    @pytest.fixture
    def target(self, tmp_path):
        path = tmp_path / "out" / "x.nii"
        path.parent.mkdir()
        path.write_text("old")
        return path

    def is_as_before(self, target):
        return [p.name for p in target.parent.iterdir()] == ["x.nii"] and (
            target.read_text() == "old"
        )

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_an_error_in_the_block(self, header, numbers, target, error):
        def interrupted():
            with MapWriter(target, header, NAMES) as maps:
                maps.write((0,), numbers[0])
                raise error

        with pytest.raises(error):
            interrupted()
        assert self.is_as_before(target)

    @pytest.mark.parametrize("call", ["pwrite", "ftruncate", "fsync"])
    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
    def test_a_full_disk(self, header, numbers, target, monkeypatch, call, code):
        def full(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, call, full)
        with (
            pytest.raises(DatasetError, match=r"x.nii: not written, the disk is full .*Free some"),
            MapWriter(target, header, NAMES) as maps,
        ):
            maps.write((0,), numbers[0])
        monkeypatch.undo()
        assert self.is_as_before(target)

    def test_another_error_of_the_system_stays_what_it_is(
        self, header, numbers, target, monkeypatch
    ):
        def broken(*_):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "pwrite", broken)
        with pytest.raises(OSError, match="Input/output"), MapWriter(target, header, NAMES) as maps:
            maps.write((0,), numbers[0])
        monkeypatch.undo()
        assert self.is_as_before(target)

    def test_a_disk_without_room_is_noticed_before(self, header, target, monkeypatch):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9 - 1500, 1500))
        expected = r"needs 2\.\d+ kB \((\d+) bytes\), and .* has 1\.5 kB \(1500 bytes\) left\. Free"
        with pytest.raises(DatasetError, match=expected), MapWriter(target, header, NAMES):
            raise AssertionError("the block must not be entered")
        assert self.is_as_before(target)

    @pytest.mark.parametrize("name", ["x.nii.gz", "x.nrrd"])
    def test_another_ending(self, header, tmp_path, name):
        with pytest.raises(DatasetError, match=r"as \.nii; name it so"):
            MapWriter(tmp_path / name, header, NAMES)

    def test_wrong_parts(self, header, numbers, target):
        with pytest.raises(ValueError, match="the shape"), MapWriter(target, header, NAMES) as maps:
            maps.write((slice(0, 2),), numbers[:3])
        with pytest.raises(ValueError, match="step 2"), MapWriter(target, header, NAMES) as maps:
            maps.write((slice(None, None, 2),), numbers[::2])
        with pytest.raises(IndexError), MapWriter(target, header, NAMES) as maps:
            maps.write((9,), numbers[0])
        with pytest.raises(ValueError, match="inside the block"):
            MapWriter(target, header, NAMES).write((), numbers)
        assert self.is_as_before(target)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
@pytest.mark.parametrize("axis", [0, 2])
def test_memory_does_not_grow_with_the_file(tmp_path, axis):
    """200 MB of maps in at most 60 MB, whichever way the parts lie."""
    code = """
        import re, sys
        import numpy as np
        from medseg.geometry import Grid
        from medseg.io import nifti
        from medseg.io.image import Header
        from medseg.io.maps import MapWriter

        def peak_mb():
            return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1000

        axis, path = int(sys.argv[1]), sys.argv[2]
        shape = (200, 250, 100)
        header = Header.of_grid(Grid(shape, np.eye(4)))
        before = peak_mb()
        with MapWriter(path, header, [str(n) for n in range(20)], initial=[1] + [0] * 19) as maps:
            for start in range(0, shape[axis], shape[axis] // 2):
                index = [slice(None)] * 4
                for number in range(20):
                    index[axis], index[3] = slice(start, start + shape[axis] // 2), number
                    size = [n // 2 if d == axis else n for d, n in enumerate(shape)]
                    maps.write(tuple(index), np.full(size, 0.5, np.float32))
        print(peak_mb() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(axis), str(tmp_path / "x.nii")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (tmp_path / "x.nii").stat().st_size > 200e6
    assert float(done.stdout) < 60


class TestShares:
    def test_a_map_of_shares_is_read_scaled(self, header, sample, tmp_path):
        values = np.random.default_rng(2).random(sample.shape)
        write_shares(tmp_path / "x.nii.gz", values, header)
        found = nibabel.load(tmp_path / "x.nii.gz")
        np.testing.assert_allclose(found.get_fdata(), values, atol=0.51 * STEP)
        np.testing.assert_allclose(
            read_image(tmp_path / "x.nii.gz").array, values, atol=0.51 * STEP + 1e-7
        )
        np.testing.assert_allclose(found.affine, sample.oblique(), atol=1e-6)

    def test_only_nifti_scales(self, header, sample, tmp_path):
        with pytest.raises(DatasetError, match="name it so"):
            write_shares(tmp_path / "x.png", np.zeros(sample.shape), header)
