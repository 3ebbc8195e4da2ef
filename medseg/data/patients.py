"""Which cases look like the same patient, going by their ids."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_SEPARATOR = re.compile(r"[_\-. ]+")
_BIDS = re.compile(r"^sub-[A-Za-z0-9]+(?=$|[_\-. ])")
_PATIENT = re.compile(r"^(sub|subj|subject|patient|pat|pt)(?P<number>\d*)$", re.IGNORECASE)
_VISIT = re.compile(
    r"^(ses|sess|session|visit|study|scan|exam|tp|timepoint|time|date|day|week|month|year"
    r"|baseline|bl|followup|fu|pre|post|preop|postop|intraop|run|rep|acq|frame|phase|slice|slc|sl"
    r"|view|img|image|stack|part|crop|patch|tile|left|right|lt|rt|l|r|od|os|ed|es|sys|dia)"
    r"[0-9]*$",
    re.IGNORECASE,
)
_DATE = re.compile(r"^(19|20)\d{6}(\d{4,6})?$")
_SHORT_NUMBER = re.compile(r"^\d{1,3}$")
_MIN_PREFIXES = 5


def find_patients(case_ids: Iterable[str]) -> dict[str, str]:
    """Return case id -> patient, for the patients that seem to have more than one case.

    An id is read up to what names a visit ("patient01_study2", "sub-03_ses-2", "0017_L"), or up
    to its last number where most of what stands before it differs ("BraTS-00012-001").

    Examples:
        >>> find_patients(["patient01_study1", "patient01_study2", "patient03_study1"])
        {'patient01_study1': 'patient01', 'patient01_study2': 'patient01'}
        >>> find_patients(["liver_001", "liver_002", "liver_003"])
        {}
    """
    ids = sorted(set(case_ids))
    for rule in (_by_words, _by_last_number):
        found = {case: patient for case in ids if (patient := rule(case)) is not None}
        counts = Counter(found.values())
        repeated = {case: patient for case, patient in found.items() if counts[patient] > 1}
        if repeated and (rule is _by_words or _is_plausible(counts)):
            return repeated
    return {}


def patient_of(case_id: str) -> str:
    """Return the part of an id that names the patient; the whole id where nothing else is in it.

    Examples:
        >>> patient_of("sub-03_ses-2_acq-hr"), patient_of("SC-HF-I-04_ED"), patient_of("liver_7")
        ('sub-03', 'SC-HF-I-04', 'liver_7')
    """
    return _by_words(case_id) or case_id


def _by_words(case_id: str) -> str | None:
    """Return what stands before the first word for a visit, if it tells patients apart."""
    bids = _BIDS.match(case_id)
    if bids:
        return bids[0]
    tokens = _tokens(case_id)
    for number, (start, token) in enumerate(tokens):
        if _is_patient(tokens, number) and number + 1 < len(tokens):
            end = tokens[number + 1][0]
            return case_id[: end - 1].rstrip("_-. ")
        if number and (_VISIT.match(token) or _DATE.match(token)):
            head = case_id[:start].rstrip("_-. ")
            return head if any(letter.isdigit() for letter in head) else None
    return None


def _is_patient(tokens: list[tuple[int, str]], number: int) -> bool:
    """Return whether the patient's name ends with this token: "pat07", or "07" after "pat"."""
    match = _PATIENT.match(tokens[number][1])
    if match:
        return bool(match["number"])
    before = _PATIENT.match(tokens[number - 1][1]) if number else None
    return before is not None and not before["number"]


def _by_last_number(case_id: str) -> str | None:
    """Return what stands before a short last number, if a number stands there, too."""
    tokens = _tokens(case_id)
    if len(tokens) < 2 or not _SHORT_NUMBER.match(tokens[-1][1]):
        return None
    if sum(letter.isdigit() for letter in tokens[-2][1]) < 2:
        return None
    return case_id[: tokens[-1][0]].rstrip("_-. ")


def _is_plausible(counts: Counter[str]) -> bool:
    """Return whether prefixes are patients rather than sites: many, with few cases each."""
    return len(counts) >= max(_MIN_PREFIXES, counts.total() / len(counts))


def _tokens(case_id: str) -> list[tuple[int, str]]:
    """Return the parts of an id between separators, and where they begin."""
    tokens, start = [], 0
    for match in _SEPARATOR.finditer(case_id):
        tokens.append((start, case_id[start : match.start()]))
        start = match.end()
    tokens.append((start, case_id[start:]))
    return [(begin, token) for begin, token in tokens if token]
