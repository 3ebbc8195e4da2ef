"""From raw data to a store of preprocessed cases: check, fingerprint, plan, preprocess."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from medseg.api.planning import Request, settle_plans
from medseg.api.survey import Survey, described_by, require_same, survey
from medseg.data.case import load_case
from medseg.data.dataset import scan_dataset
from medseg.data.splits import settle_splits
from medseg.data.store import CaseStore
from medseg.data.workspace import DEFAULT_WORKSPACE, DatasetFolder, Workspace
from medseg.errors import DatasetError, MedsegError, PlanError
from medseg.execute.local import map_cases
from medseg.execute.progress import progress_bar
from medseg.labels import LabelScheme
from medseg.preprocess.keys import entry_key, index_mark
from medseg.preprocess.pipeline import preprocess_case
from medseg.schema.base import write
from medseg.schema.check import CaseFacts
from medseg.schema.dataset import DatasetSpec
from medseg.schema.fingerprint import CaseFingerprint, Fingerprint
from medseg.schema.plans import Configuration, Plans, write_plans

logger = logging.getLogger(__name__)

_MAX_LISTED = 30


def fingerprint(
    dataset: str | Path,
    *,
    skip_bad: bool = False,
    workspace: str | Path = DEFAULT_WORKSPACE,
    workers: int | None = None,
    progress: bool = False,
) -> Fingerprint:
    """Check and measure every case; write `dataset.json`, `check.json` and `fingerprint.json`.

    Args:
        dataset: Path of raw data, or a name or number in the workspace.
        skip_bad: Leave out cases with errors, on record in `check.json`.
        workspace: Folder that holds what medseg makes.
        workers: Processes; None uses the processors there are.
        progress: Show a progress bar on standard error.

    Raises:
        DatasetError: With every problem of every case; nothing is written then.
    """
    folder, found = _survey(
        dataset, workspace, skip_bad=skip_bad, exact=True, workers=workers, progress=progress
    )
    result = found.fingerprint()
    _save(folder, found, result)
    return result


def plan(
    dataset: str | Path,
    *,
    plans: str = "nnunet",
    gpu_memory: str | float | None = None,
    target_spacing: Sequence[float] | None = None,
    from_bundle: str | Path | None = None,
    replan: bool = False,
    workspace: str | Path = DEFAULT_WORKSPACE,
) -> Plans:
    """Plan from a fingerprint and write `plans/PLANS.json`; plans that are there are kept.

    Args:
        dataset: Path of raw data, or a name or number in the workspace.
        plans: Preset: nnunet, resenc_m, resenc_l, resenc_xl or cpu; or own plans that are there.
        gpu_memory: Memory the training may take, such as "16GB"; None takes the preset's.
        target_spacing: Spacing of the full-resolution configurations in mm, canonical I, J, K.
        from_bundle: Model whose plans are taken over, for fine-tuning.
        replan: Replace plans that are there.
        workspace: Folder that holds what medseg makes.

    Raises:
        DatasetError: If there is no fingerprint.
        PlanError: If nothing fits, or plans that are there were made with other options.
    """
    request = _request(plans, gpu_memory, target_spacing, from_bundle, replan)
    folder, _ = Workspace(Path(workspace)).find(dataset)
    request.check(folder)
    measured = folder.fingerprint()
    result, messages = settle_plans(folder, folder.spec(), measured, request)
    _tell(messages)
    write_plans(folder.plans_path(plans), result)
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
    folder, source = Workspace(Path(workspace)).find(dataset)
    resolved = folder.plans(plans)
    chosen = _chosen(resolved, configurations)
    spec = folder.spec()
    found = survey(folder, spec, exact=False, workers=workers, progress=progress)
    found = found.with_skipped(folder)
    require_same(spec, found.report.skipped, source or described_by(spec))
    found.require_usable()
    if found.looked_at:
        _save(folder, found, found.fingerprint())
    return _fill_store(folder, found, resolved, chosen, workers=workers, progress=progress)


def plan_and_preprocess(  # noqa: PLR0913 - one option of the command each
    dataset: str | Path,
    *,
    configurations: Sequence[str] | None = None,
    plans: str = "nnunet",
    gpu_memory: str | float | None = None,
    target_spacing: Sequence[float] | None = None,
    from_bundle: str | Path | None = None,
    replan: bool = False,
    skip_bad: bool = False,
    workspace: str | Path = DEFAULT_WORKSPACE,
    workers: int | None = None,
    progress: bool = False,
) -> Plans:
    """Check, fingerprint, plan and preprocess a dataset.

    Arguments, errors and results are those of `fingerprint`, `plan` and `preprocess`; nothing is
    written before all cases are checked and the plans hold every configuration asked for. Plans
    and splits that are there are kept unless `replan`; files that did not change are not read
    again.
    """
    request = _request(plans, gpu_memory, target_spacing, from_bundle, replan)
    folder, _ = Workspace(Path(workspace)).find(dataset)
    request.check(folder)
    is_new = replan or not folder.plans_path(plans).is_file()
    folder, found = _survey(
        dataset, workspace, skip_bad=skip_bad, exact=is_new, workers=workers, progress=progress
    )
    measured = found.fingerprint()
    result, messages = settle_plans(folder, found.spec, measured, request)
    chosen = _chosen(result, configurations)
    _, told = settle_splits(folder.splits_path, found.spec)
    _save(folder, found, measured)
    if is_new:
        write_plans(folder.plans_path(plans), result)
    _tell((*messages, *told))
    _fill_store(folder, found, result, chosen, workers=workers, progress=progress)
    return result


def _request(
    plans: str,
    gpu_memory: str | float | None,
    target_spacing: Sequence[float] | None,
    from_bundle: str | Path | None,
    replan: bool,
) -> Request:
    return Request(
        name=plans,
        gpu_memory_gb=gigabytes(gpu_memory),
        target_spacing=None if target_spacing is None else tuple(map(float, target_spacing)),
        bundle=None if from_bundle is None else Path(from_bundle),
        replan=replan,
    )


def _survey(
    dataset: str | Path,
    workspace: str | Path,
    *,
    skip_bad: bool,
    exact: bool,
    workers: int | None,
    progress: bool,
) -> tuple[DatasetFolder, Survey]:
    """Look at every case; write nothing."""
    folder, source = Workspace(Path(workspace)).find(dataset)
    spec, problems = scan_dataset(source if source is not None else described_by(folder.spec()))
    found = survey(folder, spec, problems=problems, exact=exact, workers=workers, progress=progress)
    if skip_bad:
        found = found.without_bad()
        if skipped := found.report.skipped:
            logger.warning(
                "%d of %d cases are left out for their errors (see check.json): %s",
                len(skipped), len(spec.cases), ", ".join(skipped[:10]),
            )  # fmt: skip
    found.require_usable()
    warnings = sum(len(facts.problems) - len(facts.errors) for facts in found.report.cases.values())
    warnings += len(found.report.problems)
    if found.looked_at and warnings:
        logger.warning(
            "%d warning%s about the data: 'medseg dataset check %s' shows %s",
            warnings, "s" * (warnings > 1), dataset, "them" if warnings > 1 else "it",
        )  # fmt: skip
    return folder, found


def _save(folder: DatasetFolder, found: Survey, measured: Fingerprint) -> None:
    write(folder.spec_path, found.spec)
    found.save(folder)
    write(folder.fingerprint_path, measured)


def _tell(messages: Sequence[str]) -> None:
    for message in messages:
        logger.warning("%s", message)


def _chosen(plans: Plans, names: Sequence[str] | None) -> dict[str, Configuration]:
    """Return configurations by name, and the first stages of cascades among them."""
    chosen = {name: plans.configuration(name) for name in names or plans.configurations}
    stages = [entry.previous_stage for entry in chosen.values()]
    first = {name: plans.configuration(name) for name in stages if name is not None}
    return {**first, **chosen}


def gigabytes(memory: str | float | None) -> float | None:
    """Return "16GB", "16" or 16 as a number.

    Examples:
        >>> gigabytes("16GB"), gigabytes(8)
        (16.0, 8.0)
    """
    if memory is None:
        return None
    text = str(memory).strip().upper().removesuffix("B").removesuffix("I").removesuffix("G")
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise PlanError(f"gpu memory is {memory!r}; expected a size such as 8GB or 24GB.")
    return value


def _fill_store(
    folder: DatasetFolder,
    found: Survey,
    plans: Plans,
    chosen: Mapping[str, Configuration],
    *,
    workers: int | None,
    progress: bool,
) -> dict[str, int]:
    """Preprocess what the store lacks and write the index of each configuration."""
    store = CaseStore(folder.store_path)
    store.sweep()
    labels = LabelScheme.from_spec(found.spec)
    for name, configuration in chosen.items():
        facts = found.report.cases
        keys = {
            case: entry_key(facts[case], labels, plans, configuration) for case in found.spec.cases
        }
        missing = {case: key for case, key in keys.items() if not store.has(key)}
        needs = {case: _need(facts[case], plans, configuration) for case in missing}
        function = partial(_store_case, found.spec, plans, configuration, folder, missing)
        _map(function, needs, f"preprocess {name}", workers, progress)
        store.write_index(f"{plans.name}__{name}", keys, index_mark(plans, configuration))
    return dict.fromkeys(chosen, len(found.spec.cases))


def _need(facts: CaseFacts, plans: Plans, configuration: Configuration) -> int:
    """Return roughly the memory in bytes that preprocessing a case takes."""
    case = facts.fingerprint
    if case is None:
        return 0
    return (
        4
        * len(facts.channels)
        * (3 * math.prod(case.shape) + 2 * _resized(case, plans, configuration))
    )


def _resized(case: CaseFingerprint, plans: Plans, configuration: Configuration) -> int:
    lead = 3 - len(configuration.spacing)
    axes = plans.network_axes[lead:]
    voxels = float(math.prod(case.shape_cropped))
    for axis, target in zip(axes, configuration.spacing, strict=True):
        voxels *= case.spacing[axis] / target
    return int(voxels)


def _store_case(
    spec: DatasetSpec,
    plans: Plans,
    configuration: Configuration,
    folder: DatasetFolder,
    keys: Mapping[str, str],
    case_id: str,
) -> None:
    store = CaseStore(folder.store_path)
    if store.has(keys[case_id]):  # another run was faster
        return
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
    store.put(
        keys[case_id],
        image=prepared.image,
        segmentation=prepared.segmentation,
        outside=prepared.outside,
        record=prepared.record,
        chunk=(1,) * (3 - configuration.num_dimensions) + configuration.patch_size,
        ignore_label=LabelScheme.from_spec(spec).ignore_index,
    )


def _map(
    function: partial[None],
    needs: Mapping[str, int],
    title: str,
    workers: int | None,
    progress: bool,
) -> None:
    """Map over cases; all problems are raised as one error, the finished cases are kept."""
    problems: list[tuple[str, MedsegError]] = []
    with progress_bar(len(needs), title, shown=progress and len(needs) > 0) as bar:
        for outcome in map_cases(function, list(needs), workers=workers, needs=needs):
            if outcome.error is not None:
                problems.append((outcome.item, outcome.error))
            bar.update()
    if problems:
        lines = [f"  case {case!r}: {error}" for case, error in sorted(problems)[:_MAX_LISTED]]
        if len(problems) > _MAX_LISTED:
            lines.append(f"  ... and {len(problems) - _MAX_LISTED} more")
        count = f"{len(problems)} of {len(needs)} cases could not be preprocessed"
        raise DatasetError("\n".join([f"{title}: {count}; the others are kept", *lines]))
