"""Look at every case once: check it, measure it, and remember what was seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from medseg.check.case import CHECK_VERSION, inspect_case
from medseg.check.dataset import compare_cases, unseen
from medseg.check.files import content_hash, signature
from medseg.data.case import Case
from medseg.data.dataset import scan_dataset
from medseg.data.facts import border_counts, rounded, voxel_ml
from medseg.data.store import digest
from medseg.data.workspace import DatasetFolder
from medseg.errors import ConfigError, DatasetError
from medseg.execute.local import map_cases
from medseg.execute.progress import progress_bar
from medseg.io.size import stored_bytes
from medseg.labels import LabelScheme
from medseg.plan.fingerprint import CaseStatistics, case_fingerprint, pool, samples_per_case
from medseg.plan.record import Drawn, read_draws, thin, write_draws
from medseg.schema.base import read, write
from medseg.schema.check import CaseFacts, CheckReport, Problem
from medseg.schema.dataset import DatasetSpec
from medseg.schema.fingerprint import CaseFingerprint, Fingerprint

_MAX_LISTED = 30
_NEED_FACTOR = 6
"""Memory a case takes while it is looked at, as a multiple of its files' voxel data."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Survey:
    """What the files of a dataset hold."""

    spec: DatasetSpec
    report: CheckReport
    draws: dict[str, Drawn]
    """Case id -> intensities drawn from it; cases with errors are left out."""
    looked_at: tuple[str, ...]
    """Cases that were read now; the others had not changed."""

    @property
    def errors(self) -> tuple[Problem, ...]:
        """Return every error of every case and of the dataset as a whole, skipped cases aside."""
        report = self.report
        whole = [problem for problem in report.problems if problem.level == "error"]
        of_cases = [problem for facts in report.cases.values() for problem in facts.errors]
        return tuple(
            problem
            for problem in (*of_cases, *whole)
            if problem.case is None or problem.case not in report.skipped
        )

    def fingerprint(self) -> Fingerprint:
        """Return the statistics of the dataset.

        Raises:
            DatasetError: If no case has foreground.
        """
        found: dict[str, CaseStatistics] = {}
        for case in self.spec.cases:
            if case in self.draws:
                statistics = self.draws[case].statistics(self.report.cases[case])
                if statistics is not None:
                    found[case] = statistics
        return pool(found)

    def without_bad(self) -> Survey:
        """Return the survey of the cases that have no error; the others are on record."""
        bad = tuple(dict.fromkeys(p.case for p in self.errors if p.case is not None))
        cases = {case: files for case, files in self.spec.cases.items() if case not in bad}
        return replace(
            self,
            spec=self.spec.model_copy(update={"cases": cases}),
            report=self.report.model_copy(update={"skipped": bad}),
        )

    def with_skipped(self, folder: DatasetFolder) -> Survey:
        """Return the survey with the cases on record that an earlier one left out."""
        before = _previous(folder, self.report.made_with)
        if before is None or not before.skipped:
            return self
        return replace(self, report=self.report.model_copy(update={"skipped": before.skipped}))

    def require_usable(self) -> None:
        """Refuse a dataset with errors.

        Raises:
            DatasetError: With every error of every case.
        """
        if not self.errors:
            return
        bad = {problem.case for problem in self.errors} - {None}
        whole = any(problem.case is None for problem in self.errors)
        count = f"{len(bad)} of {len(bad | set(self.spec.cases))} cases cannot be used"
        lines = [_line(problem) for problem in self.errors[:_MAX_LISTED]]
        if len(self.errors) > _MAX_LISTED:
            lines.append(f"  ... and {len(self.errors) - _MAX_LISTED} more")
        advice = "Correct them ('medseg dataset check' shows all, --fix corrects what is safe)"
        advice += (
            "."
            if whole
            else ", or leave these cases out with 'medseg plan-and-preprocess --skip-bad'."
        )
        head = f"dataset {self.spec.name!r}: {count}; nothing was written"
        raise DatasetError("\n".join([head, *lines, advice]))

    def save(self, folder: DatasetFolder) -> None:
        """Write `check.json` and the draws, where anything changed."""
        if self.looked_at or _previous(folder, self.report.made_with) != self.report:
            write_draws(folder.statistics_path, {c: thin(d) for c, d in self.draws.items()})
            write(folder.check_path, self.report)


def survey(
    folder: DatasetFolder,
    spec: DatasetSpec,
    *,
    problems: Sequence[Problem] = (),
    exact: bool = True,
    workers: int | None = None,
    progress: bool = False,
) -> Survey:
    """Check and measure every case; files that did not change are not read again.

    Nothing is written; `Survey.save` does that.

    Args:
        folder: Where an earlier survey is kept.
        spec: The dataset as it is now.
        problems: What was found before any file was opened, see `scan_dataset`.
        exact: Draw anew from cases whose kept draws were thinned, or were made when the dataset
            had another number of cases. Otherwise such draws are taken as they are.
        workers: Processes; None uses the processors there are.
        progress: Show a progress bar on standard error.
    """
    made_with = digest(
        [CHECK_VERSION, spec.channels, spec.labels, spec.regions_class_order, spec.ignore_label]
    )
    before = _previous(folder, made_with)
    known = read_draws(folder.statistics_path) if before is not None else {}
    num_samples = samples_per_case(len(spec.cases))
    facts = dict(before.cases) if before is not None else {}
    stale = [
        case
        for case in spec.cases
        if case not in facts
        or not is_unchanged(spec, case, facts[case])
        or not _is_good(facts[case], known.get(case), num_samples, exact)
    ]
    for case, (found, drawn) in _look(spec, stale, num_samples, workers, progress).items():
        facts[case] = found
        known.pop(case, None)
        if drawn is not None:
            known[case] = drawn
    kept = {case: facts[case] for case in spec.cases}
    report = CheckReport(
        dataset=spec.name,
        made_with=made_with,
        cases=kept,
        problems=(*unseen(problems, kept), *compare_cases(spec, kept)),
    )
    draws = {case: known[case] for case in spec.cases if case in known}
    return Survey(spec=spec, report=report, draws=draws, looked_at=tuple(stale))


def described_by(spec: DatasetSpec) -> Path:
    """Return the path a dataset is read from again."""
    return Path(spec.description or spec.source)


def require_same(spec: DatasetSpec, skipped: Sequence[str], path: Path) -> None:
    """Refuse to go on with a dataset whose description has changed since it was measured.

    Raises:
        DatasetError: With what differs.
    """
    if not path.exists():
        return
    now, _ = scan_dataset(path)
    kept = {case: files for case, files in now.cases.items() if case not in skipped}
    changed = [name for name in DatasetSpec.model_fields if name not in ("cases", "name")]
    differences = [name for name in changed if getattr(now, name) != getattr(spec, name)]
    cases = [case for case in {**spec.cases, **kept} if spec.cases.get(case) != kept.get(case)]
    if cases:
        more = f" and {len(cases) - 5} more" if len(cases) > 5 else ""
        differences.append(f"cases {', '.join(sorted(cases)[:5])}{more}")
    if differences:
        raise DatasetError(
            f"{path}: the dataset has changed since it was measured ({'; '.join(differences)}). "
            "Run 'medseg plan-and-preprocess' instead: it takes in what is new and keeps the rest."
        )


def _previous(folder: DatasetFolder, made_with: str) -> CheckReport | None:
    """Return the report of the last survey, if it was made by the same rules."""
    if not folder.check_path.is_file():
        return None
    try:
        report = read(CheckReport, folder.check_path)
    except ConfigError:
        return None
    return report if report.made_with == made_with else None


def is_unchanged(spec: DatasetSpec, case: str, facts: CaseFacts) -> bool:
    """Return whether the case has the files, sizes, times and annotated labels it had."""
    entry = spec.cases[case]
    if entry.annotated_labels != facts.annotated_labels:
        return False
    if tuple(file.path for file in facts.files) != entry.files:
        return False
    for file in facts.files:
        try:
            found = signature(Path(spec.source) / file.path)
        except OSError:
            return False
        if found != file.stamps:
            return False
    return True


def has_same_content(spec: DatasetSpec, case: str, facts: CaseFacts) -> bool:
    """Return whether the case's files hold the bytes they held, whatever their times say."""
    entry = spec.cases[case]
    try:
        found = tuple(content_hash(Path(spec.source) / name) for name in entry.files)
    except OSError:
        return False
    return found == facts.content and entry.annotated_labels == facts.annotated_labels


def _is_good(facts: CaseFacts, drawn: Drawn | None, num_samples: int, exact: bool) -> bool:
    if facts.errors or facts.fingerprint is None:
        return True
    if drawn is None or drawn.content != digest(facts.content):
        return False
    if not facts.fingerprint.intensities:  # looked at by a version that did not measure them
        return False
    return not exact or (drawn.is_exact and drawn.num_samples == num_samples)


def _look(
    spec: DatasetSpec, cases: Sequence[str], num_samples: int, workers: int | None, progress: bool
) -> dict[str, tuple[CaseFacts, Drawn | None]]:
    function = partial(_look_at, spec, num_samples)
    needs = {case: _need(spec, case) for case in cases}
    found = {}
    with progress_bar(len(cases), "check", shown=progress and len(cases) > 0) as bar:
        for outcome in map_cases(function, cases, workers=workers, needs=needs):
            if outcome.error is not None:
                raise outcome.error
            if outcome.value is not None:
                found[outcome.item] = outcome.value
            bar.update()
    return found


def _look_at(spec: DatasetSpec, num_samples: int, case_id: str) -> tuple[CaseFacts, Drawn | None]:
    """Check one case and, if it can be used, draw from it."""
    inspection = inspect_case(spec, case_id)
    facts, case = inspection.facts, inspection.case
    if case is None or facts.errors:
        return facts, None
    found = case_fingerprint(
        case.channels, case.grid.affine, case.segmentation, num_samples=num_samples
    )
    drawn = Drawn(
        samples=found.samples,
        num_samples=num_samples,
        is_exact=True,
        content=digest(facts.content),
    )
    update = {
        "fingerprint": _with_structures(found.case, spec, case, facts),
        "relative_size": found.relative_size,
    }
    return facts.model_copy(update=update), drawn


def _with_structures(
    measured: CaseFingerprint, spec: DatasetSpec, case: Case, facts: CaseFacts
) -> CaseFingerprint:
    """Add what was segmented: volumes from the values that were counted, and the border."""
    if case.segmentation is None:
        return measured
    scheme = LabelScheme.from_spec(spec.model_copy(update={"cases": {}}))
    voxel, annotated = voxel_ml(case.grid.affine), facts.annotated_labels
    volumes = {
        name: rounded(voxel * _count(facts, set(values)))
        for name, values in scheme.structures.items()
        if annotated is None or name in annotated
    }
    values, indices = _union(scheme.structures), _union(scheme.foreground)
    share = None
    if annotated is None and (total := _count(facts, values)):
        share = rounded(sum(border_counts(case.segmentation, indices).values()) / total)
    return measured.model_copy(update={"volumes_ml": volumes, "border_share": share})


def _count(facts: CaseFacts, values: Iterable[int]) -> int:
    return sum(facts.labels.get(value, 0) for value in values)


def _union(structures: Mapping[str, tuple[int, ...]]) -> set[int]:
    return {value for values in structures.values() for value in values}


def _need(spec: DatasetSpec, case: str) -> int:
    """Return roughly the memory in bytes that looking at a case takes."""
    root = Path(spec.source)
    return _NEED_FACTOR * sum(stored_bytes(root / name) for name in spec.cases[case].files)


def _line(problem: Problem) -> str:
    where = f"case {problem.case!r}: " if problem.case is not None else ""
    return f"  {where}{problem.message}"
