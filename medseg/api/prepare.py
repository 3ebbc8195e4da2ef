"""From raw data to a store of preprocessed cases: check, fingerprint, plan, preprocess."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from medseg.data.case import case_paths, load_case
from medseg.data.dataset import read_dataset
from medseg.data.store import CaseStore, digest, hash_files
from medseg.data.workspace import DEFAULT_WORKSPACE, DatasetFolder, Workspace
from medseg.errors import DatasetError, MedsegError, PlanError
from medseg.execute.local import map_cases
from medseg.execute.progress import progress_bar
from medseg.plan.fingerprint import CaseStatistics, case_fingerprint, pool, samples_per_case
from medseg.plan.planner import make_plans
from medseg.plan.presets import get_preset
from medseg.preprocess.pipeline import parameters, preprocess_case
from medseg.schema.base import write
from medseg.schema.dataset import DatasetSpec
from medseg.schema.fingerprint import Fingerprint
from medseg.schema.plans import Configuration, Plans

logger = logging.getLogger(__name__)

_MAX_LISTED = 30


def fingerprint(
    dataset: str | Path,
    *,
    workspace: str | Path = DEFAULT_WORKSPACE,
    workers: int | None = None,
    progress: bool = False,
) -> Fingerprint:
    """Check every case of a dataset and write its `dataset.json` and `fingerprint.json`.

    Args:
        dataset: Path of raw data, or a name or number in the workspace.
        workspace: Folder that holds what medseg makes.
        workers: Processes; None uses the processors there are.
        progress: Show a progress bar on standard error.

    Raises:
        DatasetError: With every problem of every case; nothing is written then.
    """
    folder, spec, result = _measure(dataset, workspace, workers, progress)
    write(folder.spec_path, spec)
    write(folder.fingerprint_path, result)
    return result


def plan(
    dataset: str | Path,
    *,
    plans: str = "nnunet",
    gpu_memory: str | float | None = None,
    target_spacing: Sequence[float] | None = None,
    workspace: str | Path = DEFAULT_WORKSPACE,
) -> Plans:
    """Plan from a fingerprint and write `plans/PLANS.json`.

    Args:
        dataset: Path of raw data, or a name or number in the workspace.
        plans: Preset: nnunet, resenc_m, resenc_l or resenc_xl.
        gpu_memory: Memory the training may take, such as "16GB"; None takes the preset's.
        target_spacing: Spacing of the full-resolution configurations in mm, canonical I, J, K.
        workspace: Folder that holds what medseg makes.

    Raises:
        DatasetError: If there is no fingerprint.
        PlanError: If nothing fits.
    """
    folder, _ = Workspace(Path(workspace)).find(dataset)
    result = make_plans(
        folder.fingerprint(),
        folder.spec(),
        name=plans,
        gpu_memory_gb=_gigabytes(gpu_memory),
        target_spacing=None if target_spacing is None else tuple(target_spacing),
    )
    write(folder.plans_path(plans), result)
    return result


def read_plans(
    dataset: str | Path,
    *,
    plans: str = "nnunet",
    workspace: str | Path = DEFAULT_WORKSPACE,
) -> Plans:
    """Return plans that are there.

    Raises:
        ConfigError: If there are none of that name.
    """
    folder, _ = Workspace(Path(workspace)).find(dataset)
    return folder.plans(plans)


def preprocess(
    dataset: str | Path,
    *,
    configurations: Sequence[str] | None = None,
    plans: str = "nnunet",
    workspace: str | Path = DEFAULT_WORKSPACE,
    workers: int | None = None,
    progress: bool = False,
) -> dict[str, int]:
    """Preprocess every case for some configurations; what is in the store already is kept.

    Args:
        dataset: Path of raw data, or a name or number in the workspace.
        configurations: Names; None takes all of the plans.
        plans: Name of the plans.
        workspace: Folder that holds what medseg makes.
        workers: Processes; None uses the processors there are.
        progress: Show progress bars on standard error.

    Returns:
        Configuration -> number of cases.

    Raises:
        DatasetError: If a case cannot be read.
        PlanError: If the plans lack a configuration.
    """
    folder, _ = Workspace(Path(workspace)).find(dataset)
    spec, resolved = folder.spec(), folder.plans(plans)
    names = list(configurations or resolved.configurations)
    chosen = {name: resolved.configuration(name) for name in names}
    counts = {}
    for name, configuration in chosen.items():
        function = partial(_store_case, spec, resolved, configuration, folder)
        keys = dict(_map(function, spec, f"preprocess {name}", workers, progress))
        made_with = digest(parameters(resolved, configuration))
        CaseStore(folder.store_path).write_index(f"{plans}__{name}", keys, made_with)
        counts[name] = len(keys)
    return counts


def plan_and_preprocess(  # noqa: PLR0913 - one option of the command each
    dataset: str | Path,
    *,
    configurations: Sequence[str] | None = None,
    plans: str = "nnunet",
    gpu_memory: str | float | None = None,
    target_spacing: Sequence[float] | None = None,
    workspace: str | Path = DEFAULT_WORKSPACE,
    workers: int | None = None,
    progress: bool = False,
) -> Plans:
    """Check, fingerprint, plan and preprocess a dataset.

    Arguments, errors and results are those of `fingerprint`, `plan` and `preprocess`; nothing is
    written before all cases are checked and the plans hold every configuration asked for.
    """
    get_preset(plans)
    memory = _gigabytes(gpu_memory)
    folder, spec, measured = _measure(dataset, workspace, workers, progress)
    spacing = None if target_spacing is None else tuple(target_spacing)
    result = make_plans(measured, spec, name=plans, gpu_memory_gb=memory, target_spacing=spacing)
    for name in configurations or ():
        result.configuration(name)
    write(folder.spec_path, spec)
    write(folder.fingerprint_path, measured)
    write(folder.plans_path(plans), result)
    preprocess(
        dataset,
        configurations=configurations,
        plans=plans,
        workspace=workspace,
        workers=workers,
        progress=progress,
    )
    return result


def _measure(
    dataset: str | Path, workspace: str | Path, workers: int | None, progress: bool
) -> tuple[DatasetFolder, DatasetSpec, Fingerprint]:
    """Read and check every case; write nothing."""
    folder, source = Workspace(Path(workspace)).find(dataset)
    spec = read_dataset(source if source is not None else Path(folder.spec().source))
    function = partial(_sample_case, spec, samples_per_case(len(spec.cases)))
    samples = dict(_map(function, spec, "fingerprint", workers, progress))
    return folder, spec, pool({case: samples[case] for case in spec.cases})


def _gigabytes(memory: str | float | None) -> float | None:
    """Return "16GB", "16" or 16 as a number.

    Examples:
        >>> _gigabytes("16GB"), _gigabytes(8)
        (16.0, 8.0)
    """
    if memory is None:
        return None
    text = str(memory).strip().upper().removesuffix("B").removesuffix("I").removesuffix("G")
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise PlanError(f"gpu memory is {memory!r}; expected a size such as 8GB or 24GB.")
    return value


def _sample_case(spec: DatasetSpec, num_samples: int, case_id: str) -> CaseStatistics:
    case = load_case(spec, case_id)
    return case_fingerprint(
        case.channels, case.grid.affine, case.segmentation, num_samples=num_samples
    )


def _store_case(
    spec: DatasetSpec,
    plans: Plans,
    configuration: Configuration,
    folder: DatasetFolder,
    case_id: str,
) -> str:
    store = CaseStore(folder.store_path)
    channels, segmentation = case_paths(spec, case_id)
    content = hash_files([*channels, *([segmentation] if segmentation else [])])
    key = digest([content, spec.ignore_label, parameters(plans, configuration)])
    if store.has(key):
        return key
    case = load_case(spec, case_id)
    if case.segmentation is None:
        raise DatasetError(f"case {case_id!r}: no segmentation. Training cases need one.")
    prepared = preprocess_case(
        case.channels,
        case.grid.affine,
        plans=plans,
        configuration=configuration,
        segmentation=case.segmentation,
    )
    if prepared.segmentation is None:  # pragma: no cover - a segmentation went in
        raise DatasetError(f"case {case_id!r}: its segmentation was lost in preprocessing.")
    chunk = (1,) * (3 - configuration.num_dimensions) + configuration.patch_size
    store.put(
        key,
        image=prepared.image,
        segmentation=prepared.segmentation,
        outside=prepared.outside,
        record=prepared.record,
        chunk=chunk,
        ignore_label=spec.ignore_label,
    )
    return key


def _map(
    function: Any, spec: DatasetSpec, title: str, workers: int | None, progress: bool
) -> list[tuple[str, Any]]:
    """Map over all cases; all problems are raised as one error."""
    values, problems = [], []
    with progress_bar(len(spec.cases), title, shown=progress) as bar:
        for outcome in map_cases(function, list(spec.cases), workers=workers):
            if outcome.error is None:
                values.append((outcome.item, outcome.value))
            else:
                problems.append((outcome.item, outcome.error))
            bar.update()
    if problems:
        kept = "the others are kept" if title.startswith("preprocess") else "nothing was written"
        raise _all_problems(spec, sorted(problems, key=lambda item: item[0]), kept)
    return values


def _all_problems(
    spec: DatasetSpec, problems: list[tuple[str, MedsegError]], kept: str
) -> DatasetError:
    lines = [f"  case {case!r}: {error}" for case, error in problems[:_MAX_LISTED]]
    if len(problems) > _MAX_LISTED:
        lines.append(f"  ... and {len(problems) - _MAX_LISTED} more")
    count = f"{len(problems)} of {len(spec.cases)} cases cannot be used"
    return DatasetError("\n".join([f"dataset {spec.name!r}: {count}; {kept}", *lines]))
