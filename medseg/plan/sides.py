"""Labels that come in a left and a right form, found by their names, and how to mirror them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from medseg.schema.dataset import DatasetSpec
from medseg.schema.plans import LeftRight

Side = Literal["left", "right"]
Pair = tuple[str, str]

_AXIS = "I (left-right)"
_LEFT = "left links linke linken linker linkes gauche gauches"
_RIGHT = "right rechts rechte rechten rechter rechtes droit droite droits droites"
_WORDS: dict[str, Side] = {
    **dict.fromkeys(_LEFT.split(), "left"),
    **dict.fromkeys(_RIGHT.split(), "right"),
}
_ABBREVIATIONS: dict[str, Side] = {"l": "left", "lh": "left", "lt": "left", "li": "left"}
_ABBREVIATIONS |= {"r": "right", "rh": "right", "rt": "right", "re": "right"}
_STEMS = (("left", "right"), ("links", "rechts"), ("gauche", "droit"))
_HAN = {"\u5de6": " left ", "\u53f3": " right "}
"""The Chinese (and Japanese) characters for left and right, written without spaces."""
_SPLIT = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_TOKEN = re.compile(r"[^\W_]+")
_INITIALS = re.compile(r"[A-Z]{2,3}")
_NUMBERED = re.compile(r"([LR])(\d+)")
_OTHER = {"L": "R", "R": "L"}

_ONE_SIDED = (
    "heart cardiac coronary myocardium endocardium epicardium atrium atria atrial auricle liver "
    "hepatic bronchus bronchi lobar adrenal suprarenal subclavian brachiocephalic innominate "
    "diaphragm colon colic gastric vorhof herz leber nebenniere coeur foie"
)
_UNLIKE = frozenset(_ONE_SIDED.split())
"""Words of what differs in form between the sides of a body."""
_UNLIKE_PARTS = frozenset({"lobe", "lobes", "segment", "segments", "artery", "vein", "fissure"})
_OF_LUNG = frozenset(
    {"lung", "lungs", "pulmonary", "upper", "lower", "middle", "superior", "inferior"}
)
_UNLIKE_HAN = ("\u5fc3", "\u809d", "\u80ba\u53f6", "\u4e0a\u53f6", "\u4e2d\u53f6", "\u4e0b\u53f6",
               "\u80be\u4e0a\u817a", "\u7ed3\u80a0")  # fmt: skip
"""Heart, liver, lung lobe, upper, middle and lower lobe, adrenal gland, colon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sides:
    """What the names of a data set say about left and right."""

    pairs: tuple[Pair, ...]
    """Left and right form of the same thing."""
    alone: tuple[str, ...]
    """Sided names whose other form is missing, or there more than once."""
    doubtful: tuple[Pair, ...]
    """Names that may be the two forms of the same thing."""


def find_left_right(spec: DatasetSpec, network_axes: Sequence[int]) -> LeftRight | None:
    """Find labels with sides and decide what mirroring does about them.

    Labels change places (`swap`) where each sided name has its partner, no label is a region, and
    nothing is known to differ in form between the sides; otherwise mirroring along the axis is
    forbidden. What is only abbreviated ("LV", "RV") counts as doubtful, and forbids too.

    Args:
        spec: The data set; only the names and values of its labels count.
        network_axes: Network axis d is canonical axis `network_axes[d]`; canonical axis 0 runs
            from left to right.

    Returns:
        None where no label has a side.

    Examples:
        >>> spec = DatasetSpec(
        ...     name="d", channels=("CT",), labels={"background": 0, "left eye": 1, "right eye": 2}
        ... )
        >>> find_left_right(spec, (2, 1, 0))
        LeftRight(axis=2, policy='swap', pairs=(('left eye', 'right eye'),))
    """
    sides = _find_sides(_names(spec))
    if sides is None:
        return None
    return LeftRight(
        axis=tuple(network_axes).index(0),
        policy="forbid" if _objections(spec, sides) else "swap",
        pairs=sides.pairs,
    )


def explain_left_right(spec: DatasetSpec) -> tuple[str, ...]:
    """Return the reason of the decision in one sentence; nothing where no label has a side."""
    sides = _find_sides(_names(spec))
    if sides is None:
        return ()
    objections = _objections(spec, sides)
    if objections:
        return (f"Never mirrored along {_AXIS}, for labels have sides: {'; '.join(objections)}.",)
    return (
        f"Mirrored along {_AXIS}, the two labels of each pair change places: "
        f"{_shown_pairs(sides.pairs)}.",
    )


def _names(spec: DatasetSpec) -> tuple[str, ...]:
    left_out = {"background", "ignore"}
    return tuple(name for name in spec.labels if name.casefold() not in left_out)


def _objections(spec: DatasetSpec, sides: _Sides) -> list[str]:
    """Return why the labels cannot change places, in words; empty if they can."""
    found = []
    if sides.alone:
        has = "has" if len(sides.alone) == 1 else "have"
        found.append(f"{_listed(repr(name) for name in sides.alone)} {has} no partner")
    if sides.doubtful:
        found.append(f"{_shown_pairs(sides.doubtful)} may be sides")
    if any(isinstance(value, tuple) and len(value) > 1 for value in spec.labels.values()):
        found.append("labels are regions, which do not change places")
    unlike = [pair for pair in sides.pairs if _differs_in_form(pair[0])]
    if unlike:
        found.append(f"{_shown_pairs(unlike)} differ in form")
    return found


def _shown_pairs(pairs: Iterable[Pair]) -> str:
    return _listed(f"{left!r} and {right!r}" for left, right in pairs)


def _listed(texts: Iterable[str], limit: int = 3) -> str:
    shown = list(texts)
    rest = len(shown) - limit
    return ", ".join(shown[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _find_sides(names: Sequence[str]) -> _Sides | None:
    read = {name: _read(name, _WORDS) for name in names}
    known = {name: found for name, found in read.items() if found is not None}
    known |= _by_stem(name for name in names if name not in known)
    short = {n: found for n in names if n not in known and (found := _read(n, _ABBREVIATIONS))}
    if _pair(short)[0]:  # a lone "L" may be a lumbar vertebra, or anything
        known |= short
    pairs, alone = _pair(known)
    doubtful = tuple(_doubtful([name for name in names if name not in known]))
    if not (known or doubtful):
        return None
    return _Sides(pairs=pairs, alone=alone, doubtful=doubtful)


def _words(name: str) -> list[str]:
    """Return the words of a name, letter case kept.

    Examples:
        >>> _words("FemoralHead_L"), _words("LKidney"), _words("\\u5de6\\u80be")
        (['Femoral', 'Head', 'L'], ['L', 'Kidney'], ['left', '\u80be'])
    """
    for character, word in _HAN.items():
        name = name.replace(character, word)
    return _TOKEN.findall(_SPLIT.sub(" ", name))


def _read(name: str, words: Mapping[str, Side]) -> tuple[Side, tuple[str, ...]] | None:
    """Return the side a name speaks of and its other words; None for no side, or for both."""
    tokens = [token.casefold() for token in _words(name)]
    sides = {words[token] for token in tokens if token in words}
    if len(sides) != 1:
        return None
    return sides.pop(), tuple(token for token in tokens if token not in words)


def _by_stem(names: Iterable[str]) -> dict[str, tuple[Side, tuple[str, ...]]]:
    """Find words grown together ("leftkidney"): only where the other form is there as well."""
    folded = {name.casefold(): name for name in names}
    found: dict[str, tuple[Side, tuple[str, ...]]] = {}
    for text, name in folded.items():
        for left, right in _STEMS:
            partner = folded.get(text.replace(left, right)) if left in text else None
            if partner is not None:
                found |= {name: ("left", (text,)), partner: ("right", (text,))}
    return found


def _pair(
    known: Mapping[str, tuple[Side, tuple[str, ...]]],
) -> tuple[tuple[Pair, ...], tuple[str, ...]]:
    """Return the pairs, and the names that are in none."""
    holders: dict[tuple[str, ...], dict[Side, list[str]]] = defaultdict(
        lambda: {"left": [], "right": []}
    )
    for name, (side, others) in known.items():
        holders[others][side].append(name)
    groups = [(held["left"], held["right"]) for held in holders.values()]
    pairs = tuple((a[0], b[0]) for a, b in groups if len(a) == len(b) == 1)
    paired = {name for pair in pairs for name in pair}
    return pairs, tuple(name for name in known if name not in paired)


def _doubtful(names: Sequence[str]) -> Iterator[Pair]:
    """Yield what differs by nothing but an L and an R among initials, or in numbered series."""
    read = {name: tuple(_words(name)) for name in names}
    for first, second in combinations(names, 2):
        if len(read[first]) != len(read[second]):
            continue
        words = zip(read[first], read[second], strict=True)
        differing = [(a, b) for a, b in words if a != b]
        if len(differing) == 1 and _are_initials(*differing[0]):
            yield first, second
        elif len(differing) == 1 and _are_initials(*reversed(differing[0])):
            yield second, first
    yield from _numbered(read)


def _are_initials(left: str, right: str) -> bool:
    """Return whether one L of a few capitals stands where the other word has an R.

    Examples:
        >>> _are_initials("LV", "RV"), _are_initials("AL", "AR"), _are_initials("AL", "BL")
        (True, True, False)
    """
    if not (_INITIALS.fullmatch(left) and _INITIALS.fullmatch(right)):
        return False
    return right in ("R" + left[1:], left[:-1] + "R") and "L" in (left[0], left[-1])


def _numbered(read: Mapping[str, tuple[str, ...]]) -> Iterator[Pair]:
    """Yield L1 and R1, L2 and R2 ...: where every L has its R (not so for vertebrae)."""
    series: dict[tuple[str, ...], dict[tuple[str, str], str]] = defaultdict(dict)
    for name, words in read.items():
        matches = [(place, match) for place, word in enumerate(words)
                   if (match := _NUMBERED.fullmatch(word))]  # fmt: skip
        if len(matches) == 1:
            place, match = matches[0]
            series[(*words[:place], "", *words[place + 1 :])][match[1], match[2]] = name
    for members in series.values():
        if all((_OTHER[letter], number) in members for letter, number in members):
            for (letter, number), name in members.items():
                if letter == "L":
                    yield name, members["R", number]


def _differs_in_form(name: str) -> bool:
    """Return whether a structure is known not to be its counterpart's mirror image.

    Examples:
        >>> [_differs_in_form(n) for n in ("left ventricle", "left lateral ventricle", "left eye")]
        [True, False, False]
    """
    words = {word.casefold() for word in _words(name)}
    if words & _UNLIKE or any(text in name for text in _UNLIKE_HAN):
        return True
    if words & {"ventricle", "ventricles", "ventrikel", "ventricule"}:
        return not words & {"lateral", "lat", "vent", "inf", "brain", "horn"}
    return bool(words & _OF_LUNG and words & _UNLIKE_PARTS)
