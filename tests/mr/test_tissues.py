"""Tissue constants."""

import pytest

from medseg.mr.tissues import BONE, FLUID, GREY, LESION, TISSUES, WHITE, mix


@pytest.mark.parametrize("tissue", TISSUES.values(), ids=TISSUES)
def test_every_constant_has_a_source_and_a_sane_value(tissue):
    """T2* <= T2 <= T1, densities are relative to water, and every number says where it is from."""
    assert tissue.source
    assert 0 < tissue.t2star_ms <= tissue.t2_ms <= tissue.t1_ms
    assert 0 <= tissue.pd <= 1
    assert (tissue.adc_mm2_per_s is None) == (not tissue.adc_source)


def test_published_values_are_kept():
    """The table of the design, so that an edit by accident shows."""
    assert (FLUID.t1_ms, FLUID.t2_ms, FLUID.t2star_ms, FLUID.pd) == (2569, 329, 58, 1.0)
    assert (GREY.t1_ms, GREY.t2_ms, GREY.t2star_ms, GREY.pd) == (833, 83, 69, 0.86)
    assert (WHITE.t1_ms, WHITE.t2_ms, WHITE.t2star_ms, WHITE.pd) == (500, 70, 61, 0.77)
    assert (LESION.t1_ms, LESION.t2_ms, LESION.t2star_ms, LESION.pd) == (752, 237, 204, 0.76)
    assert BONE.pd == 0


def test_mixing_averages_rates():
    """The ends are the two tissues; between them rates, not times, are averaged."""
    start, end = mix(WHITE, LESION, 0.0, "a"), mix(WHITE, LESION, 1.0, "b")
    assert (start.t1_ms, start.pd) == pytest.approx((WHITE.t1_ms, WHITE.pd))
    assert (end.t2_ms, end.t2star_ms) == pytest.approx((LESION.t2_ms, LESION.t2star_ms))
    middle = mix(WHITE, LESION, 0.25, "c")
    assert 1 / middle.t1_ms == pytest.approx(0.75 / WHITE.t1_ms + 0.25 / LESION.t1_ms)
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\], got 1.5"):
        mix(WHITE, LESION, 1.5, "d")
