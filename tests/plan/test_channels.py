"""What channel names stand for: physical scales, and names that must never be taken for one."""

import pytest

from medseg.plan.channels import (
    NORMALIZATION_BY_NAME,
    describe_channel,
    describe_channels,
    physical_scale,
)
from medseg.schema.fingerprint import IntensityStatistics

STATISTICS = IntensityStatistics(
    mean=830, std=150, median=800, min=0, max=2900, percentile_00_5=310, percentile_99_5=1900
)
QUANTITIES = {
    "CT": ["CT", "ct", "CT (HU)", "CT_HU", "ct[HU]", "CTA", "NCCT", "abdomen-CT", "CT\u5e73\u626b"],
    "apparent diffusion coefficient": [
        "ADC", "adc", "ADC_map", "ADCmap", "ADC (1e-3 mm2/s)", "dwi-adc", "MRI (ADC)", "ADC\u56fe",
    ],
    "relaxation time T1": ["T1 map", "T1map", "t1-MAP", "T1_mapping", "qT1", "T1 (ms)", "map_T1"],
    "relaxation time T2": ["T2 map", "t2_map", "T2 relaxation time", "T2 [ms]", "quantitative T2"],
    "relaxation time T2*": ["T2* map", "T2star_map", "T2_star map", "T2starmap", "t2s map"],
    "proton density": ["PD map", "pd_map", "Proton density map", "ProtonDensity-Map (%)"],
    "quantitative susceptibility": ["QSM", "qsm_ppm", "QSM (ppm)"],
    "fractional anisotropy": ["FA", "FA map", "dti_fa", "FA (0-1)"],
    "mean diffusivity": ["MD", "md_map", "MD (mm2/s)"],
    "cerebral blood flow": ["CBF", "cbf map"],
    "cerebral blood volume": ["CBV"],
    "mean transit time": ["MTT", "MTT (s)"],
    "time to maximum": ["Tmax", "T-max", "TMAX_s"],
    "fat fraction": ["PDFF", "fat fraction", "Fat-Fraction (%)", "FatFraction_map"],
    "standardised uptake value": ["SUV", "SUVbw", "PET", "FDG-PET", "PET_SUV"],
    "relaxation rate R1": ["R1", "R1 map"],
    "relaxation rate R2*": ["R2*", "R2star", "R2* (1/s)", "r2*_map"],
}  # fmt: skip
RELATIVE = [
    "T1", "T1w", "t1_weighted", "T1-W", "T1Gd", "T1ce", "T1w map", "T1_MS", "T2", "T2w", "T2*",
    "T2*w", "T2starw", "T2 star weighted", "T2 FLAIR map", "PD", "PDw", "proton density", "FLAIR",
    "STIR", "DWI", "b1000", "SWI", "TOF", "MRI", "R", "G", "B", "red", "image", "", "0", "??",
    "CBCT", "PET-CT", "PET/CT", "SPECT", "rCBV", "relative CBF", "CT mask", "CT window", "ADC_norm",
    "T1_FA15", "site_MD", "T1 probability map", "heat map", "attention map T1", "US", "action",
]  # fmt: skip


def scheme_of(name, statistics=STATISTICS, **options):
    return describe_channel(name, statistics, **options).scheme


@pytest.mark.parametrize(
    ("name", "quantity"), [(name, key) for key, names in QUANTITIES.items() for name in names]
)
def test_names_of_physical_scales_are_known(name, quantity):
    assert physical_scale(name) == quantity
    assert scheme_of(name) == ("ct" if quantity == "CT" else "quantitative")


@pytest.mark.parametrize("name", RELATIVE)
def test_weighted_and_unknown_names_stay_relative(name):
    assert physical_scale(name) is None
    assert scheme_of(name) == "zscore"


@pytest.mark.parametrize("name", ["T1 map", "ADC", "FA", "QSM", "CT (HU)", "Tmax", "T2* map"])
@pytest.mark.parametrize("change", [str.upper, str.lower, lambda text: text.replace(" ", "_")])
def test_case_and_separators_do_not_matter(name, change):
    assert physical_scale(change(name)) == physical_scale(name) is not None


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("noNorm", "none"),
        ("ZScore", "zscore"),
        ("rescale_to_0_1", "rescale_0_1"),
        ("RGB_to_0_1", "rgb_0_1"),
    ],
)
def test_explicit_names_keep_their_meaning(name, scheme):
    channel = describe_channel(name, STATISTICS)
    assert (channel.scheme, channel.reason) == (scheme, "for its name says so")
    assert scheme_of(name, quantitative=False) == scheme


def test_without_recognition_names_mean_what_they_mean_to_nnunet():
    """Its rule, written out: five names in any letter case, z-score for the rest."""
    rule = {"ct": "ct", "nonorm": "none", "zscore": "zscore"}
    rule |= {"rescale_to_0_1": "rescale_0_1", "rgb_to_0_1": "rgb_0_1"}
    assert rule == NORMALIZATION_BY_NAME
    names = [*rule, "Ct", "ADC", "CTA", "T1 map", "PET", *RELATIVE]
    found = describe_channels(names, [STATISTICS] * len(names), quantitative=False)
    assert [c.scheme for c in found] == [rule.get(name.casefold(), "zscore") for name in names]


@pytest.mark.parametrize("name", ["CT", "ADC"])
@pytest.mark.parametrize(
    "change",
    [
        {"std": 0.0, "percentile_00_5": 830.0, "percentile_99_5": 830.0},
        {"percentile_00_5": 830.0, "percentile_99_5": 830.0},
        {"std": 1e-5},
        {"std": float("nan")},
    ],
    ids=["constant", "all but a few voxels", "rounding", "nan"],
)
def test_a_foreground_of_one_value_gives_no_scale(name, change):
    """Clipping to it would erase the image."""
    channel = describe_channel(name, STATISTICS.model_copy(update=change))
    assert channel.scheme == "zscore"
    assert "one value 830 in the whole data set" in channel.reason


def test_units_do_not_decide_whether_a_foreground_is_constant():
    """ADC in m^2/s: 8e-10 in the mean."""
    tiny = IntensityStatistics(
        **{name: value * 1e-12 for name, value in STATISTICS.model_dump().items()}
    )
    assert scheme_of("ADC", tiny) == "quantitative"
