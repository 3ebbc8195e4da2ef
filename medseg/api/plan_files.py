"""Plans wherever they lie: in a workspace, a file, a run or a bundle; and what differs in two."""

from __future__ import annotations

from pathlib import Path

from medseg.data.workspace import DEFAULT_WORKSPACE, Workspace
from medseg.errors import ConfigError, DatasetError
from medseg.report.plan_diff import format_difference
from medseg.schema.plans import Plans, read_plans

_PLACES = ("plans.json", "bundle/plans.json")


def find_plans(
    source: str | Path, *, plans: str = "nnunet", workspace: str | Path = DEFAULT_WORKSPACE
) -> Plans:
    """Return the plans a user means.

    Args:
        source: A plans file, the folder of a bundle or of a run, or a dataset, after which
            ":PLANS" may name its plans.
        plans: Name of a dataset's plans where `source` names none.
        workspace: Folder that holds what medseg makes.

    Raises:
        ConfigError: If there are no plans there, or they cannot be read.
    """
    path = Path(source)
    if path.is_file():
        return read_plans(path.with_name("plans.json") if path.name == "bundle.json" else path)
    for place in _PLACES:
        if (path / place).is_file():
            return read_plans(path / place)
    dataset, colon, name = str(source).rpartition(":")
    if not colon or path.is_dir():
        dataset, name = str(source), plans
    try:
        folder, _ = Workspace(Path(workspace)).find(dataset)
    except DatasetError as error:
        raise ConfigError(
            f"no plans {str(source)!r}: expected a plans file, a bundle, a run, or a dataset with "
            f"or without ':PLANS'. As a dataset: {error}"
        ) from None
    return folder.plans(name)


def compare_plans(
    first: str | Path, second: str | Path, *, workspace: str | Path = DEFAULT_WORKSPACE
) -> str:
    """Return what differs between two plans as a table; an empty text if they are equal.

    Args:
        first: Plans, as in `find_plans`.
        second: Plans, as in `find_plans`.
        workspace: Folder that holds what medseg makes.

    Raises:
        ConfigError: If either cannot be found or read.
    """
    pair = [find_plans(source, workspace=workspace) for source in (first, second)]
    return format_difference(pair[0], pair[1], (str(first), str(second)))
