"""Check a dataset: every problem of every case in one report, and a corrected copy."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from medseg.api.survey import described_by, survey
from medseg.check.fix import require_empty, write_fixed
from medseg.data.case import case_paths
from medseg.data.dataset import scan_dataset
from medseg.data.workspace import DEFAULT_WORKSPACE, Workspace
from medseg.execute.local import map_cases
from medseg.execute.progress import progress_bar
from medseg.io.size import stored_bytes
from medseg.report.check import all_problems, check_page
from medseg.report.thumbnail import thumbnail
from medseg.schema.base import write_text
from medseg.schema.check import CheckReport, Problem
from medseg.schema.dataset import DatasetSpec

logger = logging.getLogger(__name__)

_MAX_PICTURES = 400
_NEED_FACTOR = 4
"""Memory a picture takes while it is drawn, as a multiple of its files' voxel data."""


def check(
    dataset: str | Path,
    *,
    fix: str | Path | None = None,
    workspace: str | Path = DEFAULT_WORKSPACE,
    workers: int | None = None,
    progress: bool = False,
) -> CheckReport:
    """Look for every problem of every case; write `check.json` and `check.html`.

    Cases that have not changed since they were last looked at are not read again, save for
    their pictures.

    Args:
        dataset: Path of raw data, or a name or number in the workspace.
        fix: Folder for a corrected copy of the dataset: new or empty. What can be corrected
            safely is; the rest is copied as it is.
        workspace: Folder that holds what medseg makes.
        workers: Processes; None uses the processors there are.
        progress: Show progress bars on standard error.

    Raises:
        DatasetError: If there is no dataset, or its description cannot be read.
        ConfigError: If `fix` is a folder that holds something.
    """
    report, _, _ = check_with_page(
        dataset, fix=fix, workspace=workspace, workers=workers, progress=progress
    )
    return report


def check_with_page(
    dataset: str | Path,
    *,
    fix: str | Path | None,
    workspace: str | Path,
    workers: int | None,
    progress: bool,
) -> tuple[CheckReport, Path, tuple[Problem, ...]]:
    """Return what `check` returns, the page of HTML, and the problems that `fix` corrected."""
    folder, source = Workspace(Path(workspace)).find(dataset)
    spec, scanned = scan_dataset(source if source is not None else described_by(folder.spec()))
    if fix is not None:
        require_empty(Path(fix), spec)
    found = survey(folder, spec, problems=scanned, exact=False, workers=workers, progress=progress)
    found = found.with_skipped(folder)
    found.save(folder)
    report = found.report
    pictures = _pictures(spec, _pictured(report), workers, progress)
    page = folder.check_path.with_suffix(".html")
    write_text(page, check_page(report, pictures))
    if fix is not None:
        fixed = write_fixed(spec, report, Path(fix))
        for message in fixed.failed:
            logger.warning("%s", message)
        return report, page, fixed.done
    return report, page, ()


def _pictured(report: CheckReport) -> list[str]:
    """Return the cases that get a picture: those with problems before the others."""
    bad = {problem.case for problem in all_problems(report)}
    return sorted(report.cases, key=lambda case: case not in bad)[:_MAX_PICTURES]


def _pictures(
    spec: DatasetSpec, cases: Sequence[str], workers: int | None, progress: bool
) -> dict[str, bytes]:
    pictures = {}
    needs = {case: _need(spec, case) for case in cases}
    with progress_bar(len(cases), "pictures", shown=progress and len(cases) > 0) as bar:
        for outcome in map_cases(partial(thumbnail, spec), cases, workers=workers, needs=needs):
            pictures[outcome.item] = outcome.value or b""
            bar.update()
    return pictures


def _need(spec: DatasetSpec, case: str) -> int:
    """Return roughly the memory in bytes that the picture of a case takes."""
    channels, segmentation = case_paths(spec, case)
    return _NEED_FACTOR * sum(stored_bytes(p) for p in [*channels[:1], segmentation] if p)
