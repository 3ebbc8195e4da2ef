"""Draws on disk: they come back, thinned where there are many values, and never stop a run."""

from __future__ import annotations

import numpy as np
import pytest

from medseg.plan.fingerprint import Samples, pool_samples
from medseg.plan.record import MAX_VALUES, Drawn, read_draws, thin, write_draws
from medseg.schema.check import CaseFacts, Problem
from medseg.schema.fingerprint import CaseFingerprint

SHAPE = CaseFingerprint(shape=(9, 8, 7), shape_cropped=(9, 8, 6), spacing=(1.0, 1.5, 2.0))


def table(values, counts=None):
    values = np.asarray(values, np.float32)
    counts = np.ones(len(values)) if counts is None else counts
    return Samples(values=values, counts=np.asarray(counts, np.int32))


def drawn(*tables, num_samples=100, is_exact=True):
    return Drawn(samples=tables, num_samples=num_samples, is_exact=is_exact)


def test_draws_come_back(tmp_path):
    cases = {
        "b\u00e4r 1": drawn(table([1, 2.5], [3, 4]), table([-7])),
        "empty": drawn(table([]), table([])),
        "other": drawn(table([5]), table([6, 7, 8]), num_samples=50, is_exact=False),
    }
    write_draws(tmp_path / "draws.npz", cases)
    found = read_draws(tmp_path / "draws.npz")
    assert list(found) == list(cases)
    for case, expected in cases.items():
        assert found[case].num_samples == expected.num_samples
        assert found[case].is_exact == expected.is_exact
        for one, other in zip(found[case].samples, expected.samples, strict=True):
            np.testing.assert_array_equal(one.values, other.values)
            np.testing.assert_array_equal(one.counts, other.counts)


def test_no_case_at_all(tmp_path):
    write_draws(tmp_path / "draws.npz", {})
    assert read_draws(tmp_path / "draws.npz") == {}


@pytest.mark.parametrize("content", [None, b"", b"garbage", b"PK\x03\x04 cut"])
def test_a_damaged_file_is_no_file(tmp_path, content):
    path = tmp_path / "draws.npz"
    if content is not None:
        path.write_bytes(content)
    assert read_draws(path) == {}


def test_few_values_are_kept_as_they_are():
    one = drawn(table(np.arange(MAX_VALUES)))
    assert thin(one) is one


def test_many_values_are_merged_without_moving_the_statistics():
    rng = np.random.default_rng(1)
    values = np.unique(rng.gamma(2, 30, 60_000).astype(np.float32))
    full = table(values, rng.integers(1, 40, len(values)))
    thinned = thin(drawn(full, table([4])))
    assert not thinned.is_exact
    assert len(thinned.samples[0].values) <= MAX_VALUES + 1
    assert (np.diff(thinned.samples[0].values) > 0).all()
    assert thinned.samples[0].counts.sum() == full.counts.sum()
    before, after = pool_samples([full]), pool_samples([thinned.samples[0]])
    assert (after.min, after.max) == (before.min, before.max)
    assert after.mean == pytest.approx(before.mean, rel=1e-6)
    assert after.std == pytest.approx(before.std, rel=1e-4)
    for name in ("percentile_00_5", "median", "percentile_99_5"):
        assert getattr(after, name) == pytest.approx(getattr(before, name), rel=3e-3), name


def test_a_case_with_errors_contributes_nothing():
    facts = CaseFacts(fingerprint=SHAPE, relative_size=0.5)
    one = drawn(table([1]))
    statistics = one.statistics(facts)
    assert statistics is not None
    assert (statistics.case, statistics.relative_size) == (SHAPE, 0.5)
    assert one.statistics(CaseFacts()) is None
    problem = Problem(code="nan", level="error", message="3 voxels are NaN")
    assert one.statistics(facts.model_copy(update={"problems": (problem,)})) is None
