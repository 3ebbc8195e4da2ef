"""One bundle in memory: its networks, and the way of an image to their logits."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medseg.crop import crop
from medseg.errors import BundleError, ConfigError
from medseg.geometry import SpatialRecord, orient
from medseg.infer.bundle import Bundle
from medseg.infer.export import Source as Logits
from medseg.infer.export import indices_for_next_stage
from medseg.infer.memory import Request, features_of
from medseg.infer.result import Options
from medseg.infer.rows import Layout, LogitRows, Progress, Volume
from medseg.infer.runner import Runner, make_runner, mirror_subsets
from medseg.infer.source import Source
from medseg.infer.tiles import num_tiles, padding
from medseg.labels import LabelScheme
from medseg.models.build import build_network
from medseg.models.precision import autocast_dtype
from medseg.models.weights import load_into, load_weights
from medseg.preprocess.pipeline import preprocess_case
from medseg.resample import new_shape, resize_labels, separate_axis

logger = logging.getLogger(__name__)

CPU_FLIP_VOXELS = 2**26
"""On the CPU `tta="auto"` mirrors while folds x mirrorings x tiles x voxels stay below this."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Ready:
    """An image that only waits for the networks of one member."""

    image: torch.Tensor
    """(C, n0, n1, n2) float32."""
    record: SpatialRecord
    before: Ready | None = None
    """The same for the stage before, in a cascade."""
    told: NDArray[np.unsignedinteger[Any]] | None = None
    """(n0, n1, n2) label indices of the stage before, where somebody gave them."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Task:
    """How the logits of one image are to be made."""

    name: str
    options: Options
    layout: Layout
    dtype: torch.dtype | None
    """Autocast type."""
    progress: Progress | None = None
    should_stop: Callable[[], bool] = lambda: False


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """How the networks of a bundle, and of the stage before, are brought into memory."""

    folds: tuple[str, ...]
    device: torch.device
    mode: Literal["default", "exact"]
    trust_code: bool


class Member:
    """The networks of one bundle, one per fold, and of the stage before."""

    def __init__(
        self,
        bundle: Bundle,
        networks: Sequence[nn.Module],
        *,
        folds: Sequence[str],
        device: torch.device,
        is_exact: bool = False,
        previous: Member | None = None,
    ) -> None:
        """Take over networks that are on `device`."""
        self.bundle = bundle
        self.previous = previous
        self.labels = LabelScheme.from_spec(bundle.spec)
        self.folds = tuple(folds)
        self.device = device
        self.networks = tuple(networks)
        self.dtype = None if is_exact else autocast_dtype(device, "auto")
        self.batch = 1 if is_exact else self._default_batch()
        """Images the networks are given at once."""
        self._swaps = self._paired_channels()
        self._said: set[tuple[int, ...]] = set()

    @property
    def tile(self) -> tuple[int, ...]:
        """Return the size of a tile, that of the patches the networks were trained on."""
        return tuple(self.bundle.configuration.patch_size)

    def ready(self, source: Source, told: NDArray[np.integer[Any]] | None = None) -> Ready:
        """Bring a case into the network frame of this stage and, if need be, of the one before.

        Args:
            source: The case.
            told: (I, J, K) label map of the stage before, with the values of files, if somebody
                has it.

        Raises:
            DatasetError: If the label map holds other values.
            ConfigError: If there is one, and no stage before.
        """
        prepared = preprocess_case(
            source.channels,
            source.grid.affine,
            plans=self.bundle.plans,
            configuration=self.bundle.configuration,
        )
        image = torch.from_numpy(np.ascontiguousarray(prepared.image))
        if self.previous is None:
            if told is not None:
                raise ConfigError(
                    f"previous_stage is given, but {self.bundle.configuration_name!r} has no stage "
                    "before it; leave it out."
                )
            return Ready(image=image, record=prepared.record)
        if told is None:
            return Ready(image=image, record=prepared.record, before=self.previous.ready(source))
        return Ready(image=image, record=prepared.record, told=self._on_network_grid(
            told, prepared.record, source.name))  # fmt: skip

    def _on_network_grid(
        self, told: NDArray[np.integer[Any]], record: SpatialRecord, name: str
    ) -> NDArray[np.unsignedinteger[Any]]:
        """Return a label map (I, J, K) as label indices (n0, n1, n2) in the network frame."""
        indices = self.labels.to_indices(told, f"previous stage of {name!r}")
        cropped = np.ascontiguousarray(crop(record.to_network_axes(indices), record.box))
        separate = separate_axis(record.spacing_cropped, record.spacing_network)
        return resize_labels(cropped, record.shape_network, separate=separate)

    def preprocess_bytes(self, source: Source) -> int:
        """Return what bringing a case into the network frame takes beside the case itself."""
        grid, spacing = source.grid, self.bundle.configuration.spacing
        axes, _ = orient(grid.affine, self.bundle.plans.network_axes)
        own = [grid.spacing[axis] for axis in axes]
        target = (*own[: 3 - len(spacing)], *spacing)
        shape = new_shape([grid.shape[axis] for axis in axes], own, target)
        before, after = math.prod(grid.shape), math.prod(shape)
        per_channel = 4 * len(source.channels)
        return per_channel * (before + after) + 8 * max(before, after) + 2 * before

    def rows(
        self, ready: Ready, task: Task, found: NDArray[np.unsignedinteger[Any]] | None = None
    ) -> LogitRows:
        """Return the logits of an image, to be made as they are asked for.

        Args:
            ready: The image.
            task: How.
            found: (n0, n1, n2) label indices of the stage before, in a cascade.
        """
        previous = None if found is None else _as_tensor(found)
        configuration = self.bundle.configuration
        num_previous = self.labels.num_previous(configuration)
        if (previous is None) != (num_previous == 0):
            told = "nothing" if previous is None else "a label map"
            raise ValueError(f"num_previous is {num_previous}, the stage before gave {told}")
        return LogitRows(
            self._runner(ready, task),
            Volume.of(ready.image, self.tile, previous),
            task.layout,
            step=task.options.step,
            progress=task.progress,
            should_stop=task.should_stop,
        )

    def request(self, ready: Ready, options: Options) -> Request:
        """Return what predicting an image takes, as far as memory goes."""
        lacks = padding(ready.image.shape[1:], self.tile)
        n0, n1, n2 = ready.image.shape[1:]
        a, b, c = (n + sum(lack) for n, lack in zip(ready.image.shape[1:], lacks, strict=True))
        t0, t1, t2 = (1, *self.tile)[-3:]
        configuration = self.bundle.configuration
        num_flips = len(mirror_subsets(self.mirror_axes(ready.image, options)))
        measures = options.disagreement and len(self.networks) > 1
        return Request(
            shape=(a, b, c),
            shape_network=(n0, n1, n2),
            axes=ready.record.axes,
            shape_cropped=ready.record.shape_cropped,
            tile=(t0, t1, t2),
            is_2d=len(self.tile) == 2,
            num_inputs=len(ready.image) + self.labels.num_previous(configuration),
            num_channels=self.labels.num_logits + measures,
            features=features_of(configuration.architecture),
            num_passes=len(self.networks) * num_flips,
            batch=self.batch,
            value_bytes=4 if self.dtype is None else 2,
        )

    def found_before(
        self,
        ready: Ready,
        task: Task,
        arranged: Callable[[Member, Ready, SpatialRecord], Layout],
    ) -> NDArray[np.unsignedinteger[Any]] | None:
        """Return what the stage before finds, on this stage's grid; None where there is none.

        Args:
            ready: The image.
            task: How this stage predicts it.
            arranged: Gives the layout of a member's logits, which are resampled to what a record
                says of the network's frame.
        """
        if self.previous is None or ready.before is None:
            return ready.told
        own = Task(
            name=task.name,
            options=replace(task.options, disagreement=False),
            layout=arranged(self.previous, ready.before, ready.record),
            dtype=task.dtype,
            should_stop=task.should_stop,
        )
        before = self.previous.found_before(ready.before, own, arranged)
        rows: Logits = self.previous.rows(ready.before, own, before)
        return indices_for_next_stage(rows, ready.before.record, ready.record, self.previous.labels)

    def mirror_axes(self, image: torch.Tensor, options: Options, name: str = "") -> tuple[int, ...]:
        """Return the axes to mirror; `auto` decides by the work it takes.

        With a name it says so, once for each choice.

        Args:
            image: (C, n0, n1, n2), preprocessed.
            options: What was asked for.
            name: What the log calls the case.
        """
        axes = self.bundle.manifest.semantics.mirror_axes
        if options.tta != "auto" or not axes:
            return () if options.tta == "none" else axes
        tiles = num_tiles(image.shape[1:], self.tile, options.step)
        passes = len(self.networks) * len(mirror_subsets(axes))
        affordable = passes * tiles * math.prod(self.tile) <= CPU_FLIP_VOXELS
        chosen = axes if self.device.type != "cpu" or affordable else ()
        if name and chosen not in self._said:
            self._said.add(chosen)
            logger.info(
                "case %s: tta auto chose %s (%d %s x %d passes with flips, on %s)",
                name, "flips" if chosen else "none", tiles, "tiles" if tiles > 1 else "tile",
                passes, self.device,
            )  # fmt: skip
        return chosen

    def _runner(self, ready: Ready, task: Task) -> Runner:
        return make_runner(
            self.networks,
            num_channels=len(ready.image),
            num_logits=self.labels.num_logits,
            num_previous=self.labels.num_previous(self.bundle.configuration),
            mirror_axes=self.mirror_axes(ready.image, task.options, task.name),
            swap_axes=self.bundle.manifest.semantics.swap_axes,
            swaps=self._swaps,
            device=self.device,
            dtype=task.dtype,
            has_regions=self.labels.has_regions,
            measures_disagreement=task.options.disagreement,
        )

    def _paired_channels(self) -> tuple[tuple[int, int], ...]:
        """Return the logit channels that change places where left and right were exchanged.

        Raises:
            BundleError: If the bundle mirrors so but its plans do not name the pairs.
        """
        if not self.bundle.manifest.semantics.swap_axes:
            return ()
        sides = self.bundle.plans.left_right
        if sides is None or not sides.pairs:
            raise BundleError(
                f"{self.bundle.folder}: labels change places when mirrored (semantics.swap_axes), "
                "but plans.json has no left_right.pairs. Write the bundle again."
            )
        return self.labels.channel_pairs(sides.pairs)

    def _default_batch(self) -> int:
        """Return images per pass: without gradients a GPU holds more than in training.

        On a CPU a 3D tile keeps all cores busy; several at once take longer each
        (`scripts/bench/forward.py`).
        """
        configuration = self.bundle.configuration
        if self.device.type == "cuda":
            return 2 * configuration.batch_size
        return 4 if configuration.num_dimensions == 2 else 1


def load_member(bundle: Bundle, how: Loading, checkpoint: str) -> Member:
    """Bring a bundle into memory, with the stage before.

    Args:
        bundle: Verified.
        how: Folds and device.
        checkpoint: "final" or "best"; the stage before is always its "final" weights.

    Raises:
        BundleError: If weights are missing or do not fit, or need code that is not trusted.
    """
    previous = None if bundle.previous is None else load_member(bundle.previous, how, "final")
    networks = [_network(bundle, fold, checkpoint, how) for fold in how.folds]
    return Member(
        bundle,
        networks,
        folds=how.folds,
        device=how.device,
        is_exact=how.mode == "exact",
        previous=previous,
    )


def _network(bundle: Bundle, fold: str, checkpoint: str, how: Loading) -> nn.Module:
    path = bundle.weights(fold, checkpoint)
    configuration, labels = bundle.configuration, LabelScheme.from_spec(bundle.spec)
    try:
        network = build_network(
            configuration.architecture,
            num_inputs=len(bundle.spec.channels) + labels.num_previous(configuration),
            num_logits=labels.num_logits,
            patch_size=configuration.patch_size,
            norm="instance" if how.mode == "exact" else "auto",
            generator=torch.Generator(),  # leaves the caller's random state alone
            trust_code=how.trust_code,
        )
    except BundleError as error:
        raise BundleError(f"{bundle.folder}: {error}") from None
    load_into(network, load_weights(path), str(path))
    network = network.requires_grad_(False).eval().to(how.device)
    return network if how.mode == "exact" else network.use_channels_last()


def _as_tensor(indices: NDArray[np.unsignedinteger[Any]]) -> torch.Tensor:
    """Return label indices in a type that every device computes with."""
    is_small = indices.dtype == np.uint8
    return torch.from_numpy(np.ascontiguousarray(indices, None if is_small else np.int32))


def same_kind(members: Sequence[Member]) -> None:
    """Check that members take the same images and give the same labels.

    Raises:
        BundleError: With everything that differs.
    """
    lead, problems = members[0], []
    for other in members[1:]:
        pairs = {
            "channels": (lead.bundle.spec.channels, other.bundle.spec.channels),
            "labels": (lead.bundle.spec.labels, other.bundle.spec.labels),
            "regions_class_order": (
                lead.bundle.spec.regions_class_order,
                other.bundle.spec.regions_class_order,
            ),
        }
        problems += [
            f"  {other.bundle.folder}: {what} is {found}, expected {expected}"
            for what, (expected, found) in pairs.items()
            if expected != found
        ]
    if problems:
        raise BundleError(
            "\n".join(
                [f"models that are averaged must agree with the first, {lead.bundle.folder}:",
                 *problems, "Leave these out, or predict with each on its own."]
            )
        )  # fmt: skip
