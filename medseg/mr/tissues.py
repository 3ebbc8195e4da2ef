"""Magnetic resonance constants of the tissues of a head at 1.5 T, each with its source."""

from __future__ import annotations

from dataclasses import dataclass

BRAINWEB = (
    "BrainWeb tissue table, 1.5 T: R. K.-S. Kwan, A. C. Evans, G. B. Pike, IEEE Trans. Med. "
    "Imaging 18(11):1085, 1999; D. L. Collins et al., IEEE Trans. Med. Imaging 17(3):463, 1998"
)
HELENIUS = "J. Helenius et al., AJNR Am. J. Neuroradiol. 23(2):194, 2002 (80 healthy adults, 1.5 T)"
FREE_WATER = "free water at body temperature, M. Holz et al., Phys. Chem. Chem. Phys. 2:4740, 2000"
ASSUMED = "assumed by medseg"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tissue:
    """What a tissue looks like to a scanner."""

    name: str
    """Name in lower case."""
    t1_ms: float
    """Longitudinal relaxation time in ms, positive."""
    t2_ms: float
    """Transverse relaxation time in ms, positive."""
    t2star_ms: float
    """Transverse relaxation time of a gradient echo in ms, positive."""
    pd: float
    """Proton density relative to water; 0 gives no signal, whatever the times are."""
    source: str
    """Where the relaxation times and the density come from."""
    adc_mm2_per_s: float | None = None
    """Apparent diffusion coefficient in mm^2/s; None where it is not known."""
    adc_source: str = ""
    """Where the diffusion coefficient comes from."""


AIR = Tissue(name="air", t1_ms=1.0, t2_ms=1.0, t2star_ms=1.0, pd=0.0, source=BRAINWEB)
BONE = Tissue(name="bone", t1_ms=1.0, t2_ms=1.0, t2star_ms=1.0, pd=0.0, source=BRAINWEB)
FLUID = Tissue(
    name="fluid",
    t1_ms=2569.0,
    t2_ms=329.0,
    t2star_ms=58.0,
    pd=1.0,
    source=f"{BRAINWEB} (cerebrospinal fluid)",
    adc_mm2_per_s=3.0e-3,
    adc_source=FREE_WATER,
)
GREY = Tissue(
    name="grey",
    t1_ms=833.0,
    t2_ms=83.0,
    t2star_ms=69.0,
    pd=0.86,
    source=BRAINWEB,
    adc_mm2_per_s=0.89e-3,
    adc_source=f"{HELENIUS}: cortical grey matter",
)
WHITE = Tissue(
    name="white",
    t1_ms=500.0,
    t2_ms=70.0,
    t2star_ms=61.0,
    pd=0.77,
    source=BRAINWEB,
    adc_mm2_per_s=0.70e-3,
    adc_source=f"{HELENIUS}: white matter",
)
LESION = Tissue(
    name="lesion",
    t1_ms=752.0,
    t2_ms=237.0,
    t2star_ms=204.0,
    pd=0.76,
    source=f"{BRAINWEB} (multiple-sclerosis lesion)",
)
FAT = Tissue(name="fat", t1_ms=350.0, t2_ms=70.0, t2star_ms=58.0, pd=1.0, source=BRAINWEB)
MUSCLE = Tissue(
    name="muscle",
    t1_ms=900.0,
    t2_ms=47.0,
    t2star_ms=30.0,
    pd=1.0,
    source=f"{BRAINWEB} (muscle / skin)",
)
GLIAL = Tissue(
    name="glial",
    t1_ms=833.0,
    t2_ms=83.0,
    t2star_ms=69.0,
    pd=0.86,
    source=f"{BRAINWEB} (glial matter; the same numbers as grey matter)",
)
CONNECTIVE = Tissue(
    name="connective",
    t1_ms=500.0,
    t2_ms=70.0,
    t2star_ms=61.0,
    pd=0.77,
    source=f"{BRAINWEB} (connective tissue and bone marrow; the same numbers as white matter)",
)
SPONGY_BONE = Tissue(
    name="spongy bone",
    t1_ms=500.0,
    t2_ms=70.0,
    t2star_ms=20.0,
    pd=0.4,
    source=f"{ASSUMED}: marrow between bone trabeculae, half of the volume without signal; "
    f"times of connective tissue, {BRAINWEB}; T2* shortened by the trabeculae",
)
MUCOSA = Tissue(
    name="mucosa",
    t1_ms=1000.0,
    t2_ms=150.0,
    t2star_ms=80.0,
    pd=0.9,
    source=f"{ASSUMED}: between muscle and fluid, bright on T2w and FLAIR as swollen mucosa is",
)
ACUTE_INFARCT = Tissue(
    name="acute infarct",
    t1_ms=900.0,
    t2_ms=100.0,
    t2star_ms=80.0,
    pd=0.86,
    source=f"{ASSUMED}: grey matter with slightly prolonged times",
    adc_mm2_per_s=0.4e-3,
    adc_source=f"{ASSUMED}: about half of normal brain; that it is low in the first week: "
    "M. G. Lansberg et al., AJNR Am. J. Neuroradiol. 22(4):637, 2001",
)
OEDEMA = Tissue(
    name="oedema",
    t1_ms=900.0,
    t2_ms=160.0,
    t2star_ms=120.0,
    pd=0.85,
    source=f"{ASSUMED}: white matter with more free water",
    adc_mm2_per_s=1.45e-3,
    adc_source=f"{ASSUMED}: middle of 1.3e-3 to 1.6e-3, the usual range of vasogenic oedema",
)

TISSUES = {
    tissue.name: tissue
    for tissue in (
        AIR,
        BONE,
        FLUID,
        GREY,
        WHITE,
        LESION,
        FAT,
        MUSCLE,
        GLIAL,
        CONNECTIVE,
        SPONGY_BONE,
        MUCOSA,
        ACUTE_INFARCT,
        OEDEMA,
    )
}
"""Every tissue by name."""

GADOBUTROL_R1 = 4.78
"""Longitudinal relaxivity in 1/(mM s), human plasma, 37 C, 1.5 T.

Source: P. Szomolanyi et al., Invest. Radiol. 54(9):559, 2019.
"""
GADOBUTROL_R2 = 6.1
"""Transverse relaxivity in 1/(mM s), bovine plasma, 37 C, 1.5 T.

Source: M. Rohrer et al., Invest. Radiol. 40(11):715, 2005.
"""


def mix(first: Tissue, second: Tissue, share: float, name: str) -> Tissue:
    """Return a tissue between two others: rates and densities are averaged, not times.

    Args:
        first: Tissue at share 0.
        second: Tissue at share 1.
        share: Share of the second tissue, 0 to 1.
        name: Name of the new tissue.

    Raises:
        ValueError: If the share is out of range.

    Examples:
        >>> round(mix(WHITE, LESION, 0.5, "faint lesion").t2_ms, 1)
        108.1
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")

    def time(a: float, b: float) -> float:
        return 1 / ((1 - share) / a + share / b)

    return Tissue(
        name=name,
        t1_ms=time(first.t1_ms, second.t1_ms),
        t2_ms=time(first.t2_ms, second.t2_ms),
        t2star_ms=time(first.t2star_ms, second.t2star_ms),
        pd=(1 - share) * first.pd + share * second.pd,
        source=f"{1 - share:.2f} {first.name}, {share:.2f} {second.name}",
    )
