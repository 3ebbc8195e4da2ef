"""Signal equations of magnetic resonance imaging, vectorised over tissues or voxels.

Times are in ms, angles in radians, b in s/mm^2, diffusion in mm^2/s, relaxivity in 1/(mM s),
concentration in mM. Every argument may be a number or an array; arrays broadcast.

Source: E. M. Haacke et al., Magnetic Resonance Imaging: Physical Principles and Sequence Design;
M. A. Bernstein, K. F. King, X. J. Zhou, Handbook of MRI Pulse Sequences.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Values = float | npt.NDArray[np.floating]


def spin_echo(pd: Values, t1_ms: Values, t2_ms: Values, *, tr_ms: Values, te_ms: Values) -> Array:
    """Return the signal of a spin echo.

    Args:
        pd: Proton density, relative.
        t1_ms: Longitudinal relaxation time.
        t2_ms: Transverse relaxation time.
        tr_ms: Repetition time.
        te_ms: Echo time.

    Examples:
        >>> round(float(spin_echo(1.0, 500.0, 70.0, tr_ms=1e6, te_ms=70.0)), 4)
        0.3679
    """
    t1 = np.asarray(t1_ms, np.float64)
    recovered = 1 - 2 * np.exp(-(tr_ms - np.multiply(te_ms, 0.5)) / t1) + np.exp(-tr_ms / t1)
    return np.asarray(pd * recovered * np.exp(-te_ms / np.asarray(t2_ms)), np.float64)


def inversion_recovery(
    pd: Values, t1_ms: Values, t2_ms: Values, *, tr_ms: Values, te_ms: Values, ti_ms: Values
) -> Array:
    """Return the magnitude of an inversion-recovery spin echo (FLAIR, STIR).

    Args:
        pd: Proton density, relative.
        t1_ms: Longitudinal relaxation time.
        t2_ms: Transverse relaxation time.
        tr_ms: Repetition time.
        te_ms: Echo time.
        ti_ms: Inversion time.

    Examples:
        >>> null = null_inversion_time(350.0, tr_ms=4000.0, te_ms=30.0)
        >>> abs(round(float(inversion_recovery(1, 350, 70, tr_ms=4000, te_ms=30, ti_ms=null)), 9))
        0.0
    """
    t1 = np.asarray(t1_ms, np.float64)
    echo = 2 * np.exp(-(tr_ms - np.multiply(te_ms, 0.5)) / t1)
    magnetisation = 1 - 2 * np.exp(-ti_ms / t1) + echo - np.exp(-tr_ms / t1)
    return np.asarray(pd * np.abs(magnetisation) * np.exp(-te_ms / np.asarray(t2_ms)), np.float64)


def null_inversion_time(t1_ms: Values, *, tr_ms: Values, te_ms: Values) -> Array:
    """Return the inversion time in ms at which a tissue gives no signal.

    For a long repetition time it is T1 times ln 2, about 0.69 T1.

    Examples:
        >>> round(float(null_inversion_time(1000.0, tr_ms=1e6, te_ms=0.0)), 1)
        693.1
    """
    t1 = np.asarray(t1_ms, np.float64)
    echo = 2 * np.exp(-(tr_ms - np.multiply(te_ms, 0.5)) / t1)
    return np.asarray(-t1 * np.log((1 + echo - np.exp(-tr_ms / t1)) / 2), np.float64)


def spoiled_gradient_echo(
    pd: Values,
    t1_ms: Values,
    t2star_ms: Values,
    *,
    tr_ms: Values,
    te_ms: Values,
    flip_angle: Values,
) -> Array:
    """Return the steady-state signal of a spoiled gradient echo.

    Args:
        pd: Proton density, relative.
        t1_ms: Longitudinal relaxation time.
        t2star_ms: Transverse relaxation time of the gradient echo.
        tr_ms: Repetition time.
        te_ms: Echo time.
        flip_angle: Flip angle in radians.

    Examples:
        >>> signal = spoiled_gradient_echo(1, 500, 60, tr_ms=1e6, te_ms=0, flip_angle=np.pi / 2)
        >>> round(float(signal), 4)
        1.0
    """
    e1 = np.exp(-tr_ms / np.asarray(t1_ms, np.float64))
    steady = np.sin(flip_angle) * (1 - e1) / (1 - np.cos(flip_angle) * e1)
    return np.asarray(pd * steady * np.exp(-te_ms / np.asarray(t2star_ms)), np.float64)


def diffusion_weighted(signal: Values, adc_mm2_per_s: Values, *, b_s_per_mm2: Values) -> Array:
    """Return a signal after diffusion weighting.

    Examples:
        >>> round(float(diffusion_weighted(1.0, 3e-3, b_s_per_mm2=1000.0)), 4)
        0.0498
    """
    return np.asarray(signal * np.exp(-np.multiply(b_s_per_mm2, adc_mm2_per_s)), np.float64)


def apparent_diffusion(signal_0: Values, signal_b: Values, *, b_s_per_mm2: Values) -> Array:
    """Return the diffusion coefficient in mm^2/s from signals without and with weighting.

    Examples:
        >>> round(float(apparent_diffusion(1.0, 0.0498, b_s_per_mm2=1000.0)), 4)
        0.003
    """
    return np.asarray(-np.log(np.divide(signal_b, signal_0)) / b_s_per_mm2, np.float64)


def with_contrast_agent(time_ms: Values, *, relaxivity: Values, concentration_mm: Values) -> Array:
    """Return a relaxation time shortened by a contrast agent.

    Args:
        time_ms: T1 or T2 without the agent.
        relaxivity: r1 for T1, r2 for T2, in 1/(mM s).
        concentration_mm: Concentration in mM (mmol/l).

    Examples:
        >>> float(with_contrast_agent(1000.0, relaxivity=4.0, concentration_mm=1.0))
        200.0
    """
    rate_per_ms = 1 / np.asarray(time_ms, np.float64)
    return np.asarray(1 / (rate_per_ms + np.multiply(relaxivity, concentration_mm) / 1000))


def rician(
    signal: npt.NDArray[np.floating], sigma: float, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Return the magnitude of a signal with Gaussian noise in both receiver channels.

    Args:
        signal: Noise-free magnitude, any shape.
        sigma: Standard deviation of the noise of each receiver channel, in units of the signal.
        rng: Source of randomness.

    Source:
        H. Gudbjartsson, S. Patz, Magn. Reson. Med. 34:910, 1995.
    """
    real = signal + sigma * rng.standard_normal(signal.shape, dtype=np.float32)
    imaginary = sigma * rng.standard_normal(signal.shape, dtype=np.float32)
    return np.asarray(np.hypot(real, imaginary), np.float32)
