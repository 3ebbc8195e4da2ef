"""The benchmark of the way to nnU-Net and back judges what it measures, on fair images."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "bench"
NAMES = ("costs", "nnunet_round_trip", "peer", "predict_alone")


@pytest.fixture
def bench(monkeypatch):
    """Import the benchmark as it is when it is run: its folder is searched first."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("nnunet_round_trip")
    for name in NAMES:
        sys.modules.pop(name, None)


def case(exact, default, foreground=9):
    return {"dice": {"exact": exact, "default": default}, "foreground": foreground}


@pytest.mark.parametrize(
    ("cases", "verdicts"),
    [
        ({"a": case(0.999, 0.998), "b": case(1.0, 1.0)}, [True, True]),
        ({"a": case(0.9989, 1.0), "b": case(1.0, 1.0)}, [False, True]),
        ({"a": case(1.0, 0.997), "b": case(1.0, 1.0)}, [True, False]),
        ({"a": case(1.0, 1.0, foreground=0), "b": case(1.0, 1.0)}, [False, False]),
    ],
    ids=["both", "one case in float32", "mean by default", "nothing to agree on"],
)
def test_the_worst_case_in_float32_and_the_mean_by_default_are_judged(bench, cases, verdicts):
    assert list(bench.judged("labels", cases).values()) == verdicts


def test_examinations_are_stored_in_many_ways_and_hold_all_labels(bench, tmp_path):
    codes = set()
    for number, (name, (directions, spacing)) in enumerate(bench.CASES.items()):
        labels = bench.write_case(str(tmp_path / name), number, directions, spacing)
        assert np.unique(labels).tolist() == [0, 1, 2]
        for channel in range(2):
            image = nib.load(tmp_path / f"{name}_{channel:04d}.nii.gz")
            assert image.shape == labels.shape
            np.testing.assert_allclose(image.header.get_zooms(), spacing, rtol=1e-5)
            values = np.asarray(image.dataobj)
            assert values[0, 0, 0] == 0
            assert abs(values[labels == 1].mean() - (130, 90)[channel]) < 3
        codes.add(nib.aff2axcodes(image.affine))
    assert len(codes) == len(bench.CASES)
