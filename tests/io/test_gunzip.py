"""Gzip files as a stream: the same bytes as the standard library's, and the same complaints."""

import gzip
import zlib

import numpy as np
import pytest

from medseg.io import gunzip
from medseg.io.gunzip import GunzipFile


def noise(length, seed=0):
    return np.random.default_rng(seed).integers(0, 50, length, dtype=np.uint8).tobytes()


def write(path, content):
    path.write_bytes(content)
    return path


def read_all(path, step):
    with GunzipFile(path) as file:
        return b"".join(iter(lambda: file.read(step), b""))


@pytest.mark.parametrize(
    ("length", "step", "block"),
    [
        (0, 1, 1),
        (1, 9, 1),
        (5000, 1, 9),
        (5000, 999, 1),
        (300_001, 999, 2**18),
        (300_001, 2**20, 1000),
    ],
)
def test_all_bytes_come_whatever_the_blocks(tmp_path, monkeypatch, length, step, block):
    monkeypatch.setattr(gunzip, "_BLOCK", block)
    path = write(tmp_path / "x.gz", gzip.compress(noise(length)))
    assert read_all(path, step) == noise(length)


@pytest.mark.parametrize("block", [1, 2**18])
@pytest.mark.parametrize("padding", [b"", bytes(5), bytes(600)])
def test_several_members_and_zeros_between_them(tmp_path, monkeypatch, block, padding):
    """As the standard library has it: members are joined, zeros passed over."""
    monkeypatch.setattr(gunzip, "_BLOCK", block)
    parts = [noise(700, 1), b"", noise(800, 2)]
    path = write(tmp_path / "x.gz", b"".join(gzip.compress(part) + padding for part in parts))
    assert read_all(path, 64) == gzip.decompress(path.read_bytes()) == b"".join(parts)


def test_long_runs_unpack_in_small_pieces(tmp_path):
    """What one packed byte holds may be more than is asked for at once."""
    path = write(tmp_path / "x.gz", gzip.compress(bytes(3_000_000)))
    with GunzipFile(path) as file:
        assert file.read(10) == bytes(10)
        file.seek(2_999_990)
        assert file.tell() == 2_999_990
        assert file.read(100) == bytes(10)
        file.seek(2**40)
        assert (file.tell(), file.read(1)) == (3_000_000, b"")


@pytest.mark.parametrize("kept", range(1, 60))
def test_cut_anywhere(tmp_path, kept):
    packed = gzip.compress(noise(30))
    path = write(tmp_path / "x.gz", packed[: min(kept, len(packed) - 1)])
    with pytest.raises(EOFError):
        read_all(path, 7)


@pytest.mark.parametrize("position", [-1, -4, -5, -8])
def test_checksum_and_length_are_compared(tmp_path, position):
    packed = bytearray(gzip.compress(noise(3000)))
    packed[position] ^= 1
    with pytest.raises(zlib.error, match=r"incorrect (data|length) check"):
        read_all(write(tmp_path / "x.gz", bytes(packed)), 500)


def test_anything_behind_the_data_is_an_error(tmp_path):
    with pytest.raises(zlib.error, match="incorrect header"):
        read_all(write(tmp_path / "x.gz", gzip.compress(b"said") + b"\0\0more"), 500)
