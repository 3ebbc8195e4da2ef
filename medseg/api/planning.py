"""Plans of a dataset: made once, kept from then on, compared with what would be made now."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medseg.data.workspace import DatasetFolder
from medseg.errors import MedsegError, PlanError
from medseg.plan.merge import keep_own_configurations
from medseg.plan.planner import make_plans, target_spacing_problem
from medseg.plan.presets import PRESETS, get_preset
from medseg.plan.transfer import plan_from
from medseg.schema.dataset import DatasetSpec
from medseg.schema.fingerprint import Fingerprint, IntensityStatistics
from medseg.schema.plans import Plans

_MOVED = 0.1
"""Shift of a channel's mean, or change of its deviation, that matters, in deviations."""
_TOLERATED = {"spacing": 0.05, "patch_size": 0.2}
"""Relative change of an axis that does not matter where plans are kept."""
_FIXED = ("normalization", "use_mask_for_norm", "architecture")
"""What of a configuration matters whenever it changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks of the plans."""

    name: str = "nnunet"
    """Preset, or the name of plans that are there."""
    gpu_memory_gb: float | None = None
    target_spacing: tuple[float, ...] | None = None
    bundle: Path | None = None
    """Model whose plans are taken over, for fine-tuning; or plans of nnU-Net."""
    replan: bool = False
    """Make new plans where there are some already."""

    def check(self, folder: DatasetFolder) -> None:
        """Refuse what cannot be planned before any file is looked at.

        Raises:
            ConfigError: If the name is neither a preset nor the name of plans that are there, or
                plans to be replaced cannot be read.
            PlanError: If options contradict each other, or a model's plans would be replaced.
        """
        if self.bundle is not None and (self.gpu_memory_gb or self.target_spacing):
            raise PlanError(
                "--from takes the plans of a model as they are; leave out --gpu-memory and "
                "--target-spacing."
            )
        if self.target_spacing is not None and (
            problem := target_spacing_problem(self.target_spacing)
        ):
            raise PlanError(problem)
        is_there = folder.plans_path(self.name).is_file()
        if self.replan and is_there:
            self._check_model_is_given(folder.plans(self.name), folder.plans_path(self.name))
        if self.bundle is None and (self.replan or not is_there):
            get_preset(self.name)

    def _check_model_is_given(self, old: Plans, path: Path) -> None:
        if old.taken_from is not None and self.bundle is None:
            raise PlanError(
                f"{path}: these plans were taken over from a model ({old.taken_from}); --replan "
                "alone would replace them by the planner's, which its weights do not fit. Give "
                "--from BUNDLE again, or plan under another name (--plans)."
            )

    def with_wishes_of(self, old: Plans, path: Path) -> tuple[Request, tuple[str, ...]]:
        """Return the request with what the old plans were asked for, where nothing is asked now.

        Returns:
            The request, and what was taken over, in words.
        """
        if self.bundle is not None:
            return self, ()
        taken = {}
        if self.gpu_memory_gb is None and old.asked_gpu_memory_gb is not None:
            taken["gpu_memory_gb"] = f"--gpu-memory {old.asked_gpu_memory_gb:g}GB"
        if self.target_spacing is None and old.asked_target_spacing is not None:
            spacing = ",".join(f"{value:g}" for value in old.asked_target_spacing)
            taken["target_spacing"] = f"--target-spacing {spacing}"
        if not taken:
            return self, ()
        wishes = {field: getattr(old, f"asked_{field}") for field in taken}
        return replace(self, **wishes), (
            f"planned anew with what the plans were made with before: {', '.join(taken.values())}. "
            f"Give the option to change it, or delete {path} to plan without.",
        )


def settle_plans(
    folder: DatasetFolder, spec: DatasetSpec, fingerprint: Fingerprint, request: Request
) -> tuple[Plans, tuple[str, ...]]:
    """Return the plans that are there, or new ones where there are none or `replan` is asked for.

    Nothing is written.

    Returns:
        The plans, and what a person should be told.

    Raises:
        ConfigError: If there is no preset of that name.
        PlanError: If nothing fits, or plans that are there were made with other options.
    """
    path = folder.plans_path(request.name)
    if not path.is_file():
        return _make(folder, spec, fingerprint, request), ()
    old = folder.plans(request.name)
    if request.replan:
        request, told = request.with_wishes_of(old, path)
        return keep_own_configurations(old, _make(folder, spec, fingerprint, request)), told
    _check_kept(old, spec, request, path)
    return old, tuple(_moved(old, spec, fingerprint))


def _make(
    folder: DatasetFolder, spec: DatasetSpec, fingerprint: Fingerprint, request: Request
) -> Plans:
    if request.bundle is not None:
        from medseg.api.foreign_plans import read_source

        source = read_source(request.bundle, folder.path.parents[1])
        before = source.plans
        plans = plan_from(before, fingerprint, spec, bundle_channels=source.channels)
        return plans.model_copy(
            update={
                "name": request.name,
                "taken_from": f"plans {before.name!r} of {before.dataset!r}",
                "why": (*plans.why[:1], *source.remarks, *plans.why[1:]),
            }
        )
    return make_plans(
        fingerprint,
        spec,
        name=request.name,
        gpu_memory_gb=request.gpu_memory_gb,
        target_spacing=request.target_spacing,
    )


def _check_kept(plans: Plans, spec: DatasetSpec, request: Request, path: Path) -> None:
    problems = []
    asked = {
        "--gpu-memory": (request.gpu_memory_gb, plans.asked_gpu_memory_gb),
        "--target-spacing": (request.target_spacing, plans.asked_target_spacing),
    }
    problems += [
        f"  {option}: they were made with {_or_none(was)}, asked for now: {now}"
        for option, (now, was) in asked.items()
        if now is not None and now != was
    ]
    if request.bundle is not None:
        problems.append("  --from: they are there already and were not asked to be replaced")
    if len(plans.intensity) != len(spec.channels):
        problems.append(
            f"  they are for {len(plans.intensity)} channels, the dataset has {len(spec.channels)}"
        )
    if problems:
        raise PlanError(
            "\n".join(
                [
                    f"{path}: these plans are there and do not fit:",
                    *problems,
                    "Replace them with --replan, or leave the options out to keep them.",
                ]
            )
        )


def _or_none(value: object) -> str:
    return "none" if value is None else str(value)


def _moved(kept: Plans, spec: DatasetSpec, fingerprint: Fingerprint) -> Iterator[str]:
    """Yield a warning where plans made now would differ in what matters.

    A model's plans are not the planner's to judge: the weights need them as they are.
    """
    if kept.name not in PRESETS or kept.taken_from is not None:
        return
    try:
        fresh = make_plans(
            fingerprint,
            spec,
            name=kept.name,
            gpu_memory_gb=kept.asked_gpu_memory_gb,
            target_spacing=kept.asked_target_spacing,
        )
    except MedsegError as error:
        yield f"the dataset could not be planned anew as it is now ({error}); the plans are kept."
        return
    differences = [*_decisions(kept, fresh), *_intensities(kept, fresh, spec.channels)]
    if differences:
        yield (
            f"plans {kept.name!r} differ from what the planner would choose now, because the "
            "dataset has moved since they were made or their file was edited: "
            + "; ".join(differences[:4])
            + (f"; and {len(differences) - 4} more" if len(differences) > 4 else "")
            + ". The plans are kept as they are; --replan makes new ones, without edits of the "
            "planner's own configurations (and every case is preprocessed anew)."
        )


def _decisions(kept: Plans, fresh: Plans) -> Iterator[str]:
    planned = fresh.configurations
    if kept.network_axes != fresh.network_axes:
        yield f"network_axes {kept.network_axes} -> {fresh.network_axes}"
    if kept.left_right != fresh.left_right:
        yield "labels have other sides (left_right)"
    for name in planned.keys() - kept.configurations.keys():
        yield f"configuration {name} would be there"
    for name, configuration in planned.items():
        if name in kept.configurations:
            old = kept.configurations[name]
            for field, tolerated in _TOLERATED.items():
                before, after = getattr(old, field), getattr(configuration, field)
                if _are_apart(before, after, tolerated):
                    yield f"{name}: {field} {before} -> {after}"
            for field in _FIXED:
                if getattr(old, field) != getattr(configuration, field):
                    yield f"{name}: another {field}"


def _are_apart(before: Sequence[float], after: Sequence[float], tolerated: float) -> bool:
    """Return whether an axis changed by more than a share, or there are more or fewer axes."""
    if len(before) != len(after):
        return True
    return max(abs(b / a - 1) for a, b in zip(before, after, strict=True)) > tolerated


def _intensities(kept: Plans, fresh: Plans, channels: Sequence[str]) -> Iterator[str]:
    """Yield the channels whose fixed normalisation constants no longer describe them."""
    schemes = next(iter(kept.configurations.values())).normalization
    for name, scheme, old, new in zip(
        channels, schemes, kept.intensity, fresh.intensity, strict=True
    ):
        if scheme in ("ct", "quantitative") and _shift(old, new) > _MOVED:
            yield (
                f"channel {name!r}: mean {old.mean:.4g} -> {new.mean:.4g}, "
                f"standard deviation {old.std:.4g} -> {new.std:.4g}"
            )


def _shift(old: IntensityStatistics, new: IntensityStatistics) -> float:
    scale = max(old.std, 1e-8)
    return max(abs(new.mean - old.mean), abs(new.std - old.std)) / scale
