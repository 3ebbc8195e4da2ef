"""Signal equations against a simulation of the magnetisation, and the contrast they must give."""

import itertools

import numpy as np
import pytest

from medseg.mr.signal import (
    apparent_diffusion,
    diffusion_weighted,
    inversion_recovery,
    null_inversion_time,
    rician,
    spin_echo,
    spoiled_gradient_echo,
    with_contrast_agent,
)
from medseg.mr.tissues import (
    ACUTE_INFARCT,
    BONE,
    FAT,
    FLUID,
    GADOBUTROL_R1,
    GADOBUTROL_R2,
    GREY,
    LESION,
    WHITE,
)


def recover(magnetisation, t1, time):
    """Let longitudinal magnetisation relax for a time."""
    return 1 + (magnetisation - 1) * np.exp(-time / t1)


def simulated_spin_echo(t1, t2, tr, te, ti=None):
    """Play the pulses of many repetitions one after another: the slow, obvious oracle."""
    along = 1.0
    for _ in range(60):
        if ti is not None:
            along = recover(-along, t1, ti)
        excited = along
        along = -recover(0.0, t1, te / 2)
        along = recover(along, t1, tr - te / 2 - (ti or 0.0))
    return abs(excited) * np.exp(-te / t2)


def simulated_gradient_echo(t1, t2star, tr, te, angle):
    """Excite with perfect spoiling until the steady state is reached."""
    along = 1.0
    for _ in range(3000):
        excited = along * np.sin(angle)
        along = recover(along * np.cos(angle), t1, tr)
    return excited * np.exp(-te / t2star)


@pytest.mark.parametrize("tissue", [FLUID, GREY, WHITE, FAT], ids=lambda tissue: tissue.name)
def test_equations_are_the_steady_state_of_the_pulses(tissue):
    """Spin echo, inversion recovery and gradient echo equal the simulated magnetisation."""
    t1, t2, t2star = tissue.t1_ms, tissue.t2_ms, tissue.t2star_ms
    found = spin_echo(1.0, t1, t2, tr_ms=530.0, te_ms=17.0)
    assert found == pytest.approx(simulated_spin_echo(t1, t2, 530.0, 17.0), rel=1e-9)
    found = spoiled_gradient_echo(1.0, t1, t2star, tr_ms=21.0, te_ms=6.0, flip_angle=0.5)
    assert found == pytest.approx(simulated_gradient_echo(t1, t2star, 21.0, 6.0, 0.5), rel=1e-6)
    found = inversion_recovery(1.0, t1, t2, tr_ms=9000.0, te_ms=110.0, ti_ms=1800.0)
    expected = simulated_spin_echo(t1, t2, 9000.0, 110.0, 1800.0)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def flair(tissue, tr_ms=9000.0, te_ms=110.0):
    """Signal at the inversion time that nulls fluid."""
    ti_ms = null_inversion_time(FLUID.t1_ms, tr_ms=tr_ms, te_ms=te_ms)
    times = {"tr_ms": tr_ms, "te_ms": te_ms, "ti_ms": ti_ms}
    return inversion_recovery(tissue.pd, tissue.t1_ms, tissue.t2_ms, **times)


def stir(tissue):
    """Signal at the inversion time that nulls fat."""
    ti_ms = null_inversion_time(FAT.t1_ms, tr_ms=4500.0, te_ms=40.0)
    times = {"tr_ms": 4500.0, "te_ms": 40.0, "ti_ms": ti_ms}
    return inversion_recovery(tissue.pd, tissue.t1_ms, tissue.t2_ms, **times)


def weighted(tr_ms, te_ms):
    """Return a spin echo as a function of the tissue."""
    return lambda t: spin_echo(t.pd, t.t1_ms, t.t2_ms, tr_ms=tr_ms, te_ms=te_ms)


def gradient_t1(tissue):
    """Signal of a T1-weighted gradient echo."""
    times = {"tr_ms": 18.0, "te_ms": 6.0, "flip_angle": np.deg2rad(30)}
    return spoiled_gradient_echo(tissue.pd, tissue.t1_ms, tissue.t2star_ms, **times)


@pytest.mark.parametrize(
    ("sequence", "order"),
    [
        (weighted(500.0, 14.0), (FAT, WHITE, GREY, FLUID, BONE)),
        (gradient_t1, (FAT, WHITE, GREY, FLUID, BONE)),
        (weighted(4500.0, 95.0), (FLUID, LESION, GREY, WHITE, BONE)),
        (weighted(4500.0, 15.0), (FLUID, GREY, WHITE, BONE)),
        (flair, (LESION, GREY, WHITE, FLUID)),
        (stir, (FLUID, GREY, FAT)),
    ],
    ids=["T1w spin echo", "T1w gradient echo", "T2w", "PDw", "FLAIR", "STIR"],
)
def test_brightness_orders(sequence, order):
    """Every sequence shows the tissues in the order a radiologist expects, brightest first."""
    values = [float(sequence(tissue)) for tissue in order]
    assert values == sorted(values, reverse=True)
    assert all(a > b + 0.003 for a, b in itertools.pairwise(values))


def test_nulled_tissues_vanish():
    """FLAIR removes fluid and STIR fat; with a long repetition the null is at 0.69 T1."""
    assert float(flair(FLUID)) == pytest.approx(0, abs=1e-12)
    assert float(stir(FAT)) == pytest.approx(0, abs=1e-12)
    null = null_inversion_time(FLUID.t1_ms, tr_ms=1e6, te_ms=0.0)
    assert float(null) / FLUID.t1_ms == pytest.approx(0.693, abs=1e-3)


def test_contrast_agent_makes_a_lesion_brighter_than_white_matter():
    """The order of T1w flips with the agent; rates add, in 1/s against times in ms."""
    t1 = with_contrast_agent(LESION.t1_ms, relaxivity=GADOBUTROL_R1, concentration_mm=0.8)
    t2 = with_contrast_agent(LESION.t2_ms, relaxivity=GADOBUTROL_R2, concentration_mm=0.8)
    assert 1000 / t1 == pytest.approx(1000 / LESION.t1_ms + GADOBUTROL_R1 * 0.8)
    t1w = weighted(500.0, 14.0)
    assert t1w(LESION) < t1w(WHITE)
    assert spin_echo(LESION.pd, t1, t2, tr_ms=500.0, te_ms=14.0) > t1w(WHITE)


def test_diffusion_contrast():
    """Acute infarct: bright on DWI, dark on ADC; fluid the other way round."""
    t2w = weighted(6000.0, 90.0)

    def dwi(tissue):
        return diffusion_weighted(t2w(tissue), tissue.adc_mm2_per_s, b_s_per_mm2=1000.0)

    assert dwi(ACUTE_INFARCT) > dwi(GREY) > dwi(FLUID)
    for tissue in (ACUTE_INFARCT, GREY, WHITE, FLUID):
        adc = apparent_diffusion(t2w(tissue), dwi(tissue), b_s_per_mm2=1000.0)
        assert float(adc) == pytest.approx(tissue.adc_mm2_per_s, rel=1e-9)
    assert ACUTE_INFARCT.adc_mm2_per_s < WHITE.adc_mm2_per_s < GREY.adc_mm2_per_s


def test_equations_broadcast_over_arrays():
    """Tissues along one axis and echo times along another give the table of single calls."""
    tissues = [FLUID, GREY, WHITE]
    pd, t1, t2 = (np.array([getattr(t, n) for t in tissues]) for n in ("pd", "t1_ms", "t2_ms"))
    echo_times = np.array([[10.0], [40.0], [90.0], [120.0]])
    table = spin_echo(pd, t1, t2, tr_ms=3000.0, te_ms=echo_times)
    assert table.shape == (4, 3)
    single = spin_echo(WHITE.pd, WHITE.t1_ms, WHITE.t2_ms, tr_ms=3000.0, te_ms=90.0)
    assert table[2, 2] == pytest.approx(float(single))


def test_rician_noise_has_its_moments():
    """Mean square is signal^2 + 2 sigma^2; without signal the mean is sigma sqrt(pi / 2)."""
    rng = np.random.default_rng(5)
    sigma, level = 3.0, 4.0
    noisy = rician(np.full((60, 50, 40), level, np.float32), sigma, rng)
    assert noisy.dtype == np.float32
    assert np.mean(noisy.astype(float) ** 2) == pytest.approx(level**2 + 2 * sigma**2, rel=0.02)
    air = rician(np.zeros((60, 50, 40), np.float32), sigma, rng)
    assert air.mean() == pytest.approx(sigma * np.sqrt(np.pi / 2), rel=0.01)
