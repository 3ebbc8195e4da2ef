"""Check a dataset: every problem of every case in one report, and a corrected copy."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from medseg.api.survey import described_by, survey
from medseg.check.fix import require_empty, write_fixed
from medseg.data.dataset import scan_dataset
from medseg.data.workspace import DEFAULT_WORKSPACE, Workspace
from medseg.execute.local import map_cases
from medseg.execute.progress import progress_bar
from medseg.report.check import all_problems, check_page
from medseg.report.thumbnail import thumbnail
from medseg.schema.base import write_text
from medseg.schema.check import CheckReport
from medseg.schema.dataset import DatasetSpec

logger = logging.getLogger(__name__)

_MAX_PICTURES = 400


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
    report, _ = check_with_page(
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
) -> tuple[CheckReport, Path]:
    """Return what `check` returns, and the page of HTML."""
    folder, source = Workspace(Path(workspace)).find(dataset)
    spec, scanned = scan_dataset(source if source is not None else described_by(folder.spec()))
    if fix is not None:
        require_empty(Path(fix), spec)
    found = survey(folder, spec, problems=scanned, exact=False, workers=workers, progress=progress)
    found.save(folder)
    report = found.report
    pictures = _pictures(spec, _pictured(report), workers, progress)
    page = folder.check_path.with_suffix(".html")
    write_text(page, check_page(report, pictures))
    if fix is not None:
        for message in write_fixed(spec, report, Path(fix)):
            logger.warning("%s", message)
    return report, page


def _pictured(report: CheckReport) -> list[str]:
    """Return the cases that get a picture: those with problems before the others."""
    bad = {problem.case for problem in all_problems(report)}
    return sorted(report.cases, key=lambda case: case not in bad)[:_MAX_PICTURES]


def _pictures(
    spec: DatasetSpec, cases: Sequence[str], workers: int | None, progress: bool
) -> dict[str, bytes]:
    pictures = {}
    with progress_bar(len(cases), "pictures", shown=progress and len(cases) > 0) as bar:
        for outcome in map_cases(partial(thumbnail, spec), cases, workers=workers):
            pictures[outcome.item] = outcome.value or b""
            bar.update()
    return pictures
