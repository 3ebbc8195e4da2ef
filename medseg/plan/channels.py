"""What a channel's name says about its intensities: relative to the image, or a physical scale."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from medseg.schema.fingerprint import IntensityStatistics
from medseg.schema.plans import Normalization

NORMALIZATION_BY_NAME: dict[str, Normalization] = {
    "ct": "ct",
    "nonorm": "none",
    "zscore": "zscore",
    "rescale_to_0_1": "rescale_0_1",
    "rgb_to_0_1": "rgb_0_1",
}
"""Channel name, in lower case -> normalisation. Source: nnU-Net 2.8.1, which z-scores the rest."""
CT_WORDS = frozenset({"ct", "cect", "ncct", "ldct", "hrct", "cta", "ctpa", "hounsfield"})
"""Words for CT in Hounsfield units; cone-beam CT ("cbct") is not calibrated to them."""
MAP_WORDS = {
    "adc": "apparent diffusion coefficient",
    "suv": "standardised uptake value",
    "suvbw": "standardised uptake value",
    "qsm": "quantitative susceptibility",
    "pdff": "fat fraction",
    "fatfraction": "fat fraction",
    "cbf": "cerebral blood flow",
    "cbv": "cerebral blood volume",
    "mtt": "mean transit time",
    "tmax": "time to maximum",
    "ktrans": "transfer constant",
}
"""Words that name a parameter map wherever they stand in a name."""
MAP_NAMES = {
    "fa": "fractional anisotropy",
    "md": "mean diffusivity",
    "pet": "standardised uptake value",
    "r1": "relaxation rate R1",
    "r2": "relaxation rate R2",
    "r2star": "relaxation rate R2*",
    "ecv": "extracellular volume",
    "mwf": "myelin water fraction",
}
"""Words that name a parameter map only as the whole name: "FA", but not "T1_FA_15"."""
MAPPED = {
    "t1": "relaxation time T1",
    "t2": "relaxation time T2",
    "t2star": "relaxation time T2*",
    "t1rho": "relaxation time T1rho",
    "pd": "proton density",
}
"""Words that alone name a weighting, and a parameter map only beside one of `MAPPING_WORDS`."""
MAPPING_WORDS = frozenset(
    {"map", "maps", "mapping", "quantitative", "relaxation", "relaxometry", "[ms]", "[s]"}
)
"""Words that make a map of a weighting; units count in brackets only ("MS" is a disease)."""
WEIGHTED = re.compile(r"w|wi|weighted|flair|stir|swi|tof|(t1|t2|t2star|pd)(w|wi|weighted|c|ce|gd)")
"""Words that say an image is weighted, whatever else its name holds."""
_DERIVED = (
    "mask label seg segmentation prob probability prior window windowed norm normalised normalized "
    "zscore scaled rescaled uint8 8bit synthetic heat attention relative"
)
DERIVED_WORDS = frozenset(_DERIVED.split())
"""Words that say the values are no longer those of the scanner."""
FILLERS = frozenset({"image", "mri", "mr", "dti", "dwi", "fdg", "psma", "the", "of"})
"""Words that may stand beside one of `MAP_NAMES`."""
MIN_RELATIVE_STD = 1e-6
"""Below this share of its largest absolute value a foreground's spread counts as none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Channel:
    """How one channel is normalised, and why."""

    name: str
    """Channel name."""
    scheme: Normalization
    """Normalisation."""
    reason: str
    """End of a sentence that begins with the channel and what is done to it."""


def describe_channel(
    name: str, statistics: IntensityStatistics, *, quantitative: bool = True
) -> Channel:
    """Return how a channel is normalised.

    Values on a physical scale (CT, parameter maps) mean the same in every case and are normalised
    with the dataset's statistics; a z-score of each case would take that meaning away.

    Args:
        name: Channel name.
        statistics: Foreground intensities of the channel in the whole dataset.
        quantitative: Recognise physical scales by name; if not, names mean what they mean to
            nnU-Net, for which CT is the only one.
    """
    explicit = NORMALIZATION_BY_NAME.get(name.casefold())
    if not quantitative:
        return Channel(name=name, scheme=explicit or "zscore", reason="for its name says so")
    if explicit is not None and explicit != "ct":
        return Channel(name=name, scheme=explicit, reason="for its name says so")
    found = physical_scale(name)
    if found is None:
        reason = "for its name stands for no fixed intensity scale"
        return Channel(name=name, scheme="zscore", reason=reason)
    scheme: Normalization = "ct" if found == "CT" else "quantitative"
    if _is_constant(statistics):
        return Channel(
            name=name,
            scheme="zscore",
            reason=f"for its foreground has the one value {statistics.mean:.4g} in the whole data "
            f"set, which gives no scale, though the name stands for {_words(found)}",
        )
    return Channel(
        name=name, scheme=scheme, reason=f"for {_words(found)} means the same in every case"
    )


def physical_scale(name: str) -> str | None:
    """Return the quantity a channel name stands for; None if it is weighted, or not known.

    Examples:
        >>> physical_scale("CT (HU)"), physical_scale("dwi_ADC"), physical_scale("T1map [ms]")
        ('CT', 'apparent diffusion coefficient', 'relaxation time T1')
        >>> [physical_scale(name) for name in ("T1", "T2w", "T1w map", "CBCT", "PET-CT", "T1_MS")]
        [None, None, None, None, None, None]
    """
    words = split_name(name)
    if DERIVED_WORDS & set(words):
        return None
    found = {MAP_WORDS[word] for word in words if word in MAP_WORDS}
    if CT_WORDS & set(words):
        found.add("CT")
    rest = [word for word in words if word not in FILLERS | MAPPING_WORDS]
    if not any(WEIGHTED.fullmatch(word) for word in words):
        if MAPPING_WORDS & set(words):
            found |= {MAPPED[word] for word in words if word in MAPPED}
        if len(rest) == 1 and rest[0] in MAP_NAMES:
            found.add(MAP_NAMES[rest[0]])
    if "pet" in words and found != {MAP_NAMES["pet"]}:
        return None
    return found.pop() if len(found) == 1 else None


def split_name(name: str) -> list[str]:
    """Return the words of a channel name, in lower case and one spelling.

    Examples:
        >>> split_name("T2* map"), split_name("qT1"), split_name("Fat-Fraction (%)")
        (['t2star', 'map'], ['t1', 'quantitative'], ['fatfraction'])
    """
    text = re.sub(r"[\s_./-]+", " ", name.casefold())
    words = []
    for inside in re.findall(_UNIT, text):
        words += [f"[{inside}]"]
    for pattern, replacement in _SPELLINGS:
        text = re.sub(pattern, replacement, text)
    return [part for word in re.findall(r"[a-z0-9]+", text) for part in _parts(word)] + words


_UNIT = r"[(\[] ?(ms|s) ?[)\]]"
_SPELLINGS = (
    (r"[(\[](?:[^)\]]*[\d%][^)\]]*| ?(?:hu|ms|s|ppm) ?)[)\]]", " "),
    (r"\b([tr])([12]) ?(\*|star(?![a-ln-z])|s(?= ?map|\b))", r"\1\2star "),
    (r"\bproton ?density", "pd"),
    (r"\bfat ?fraction", "fatfraction"),
    (r"\bt max\b", "tmax"),
)
"""Pattern -> what it is replaced by: units in brackets, then words of more than one spelling."""


def _parts(word: str) -> list[str]:
    """Return "adcmap" and "qt1" as two words each."""
    if match := re.fullmatch(r"(.{2,}?)(map|maps|mapping)", word):
        return [match[1], "map"]
    if match := re.fullmatch(r"map(.{2,})", word):
        return [match[1], "map"] if match[1] in {**MAPPED, **MAP_WORDS} else [word]
    if word[:1] == "q" and word[1:] in MAPPED:
        return [word[1:], "quantitative"]
    return [word]


def describe_channels(
    names: Sequence[str],
    statistics: Sequence[IntensityStatistics],
    *,
    quantitative: bool = True,
) -> tuple[Channel, ...]:
    """Return how each channel is normalised."""
    return tuple(
        describe_channel(name, item, quantitative=quantitative)
        for name, item in zip(names, statistics, strict=True)
    )


def _is_constant(statistics: IntensityStatistics) -> bool:
    largest = max(abs(statistics.min), abs(statistics.max))
    spread = min(statistics.std, statistics.percentile_99_5 - statistics.percentile_00_5)
    return not (math.isfinite(spread) and spread > MIN_RELATIVE_STD * largest)


def _words(quantity: str) -> str:
    return "CT (Hounsfield units)" if quantity == "CT" else f"a map of {quantity}"
