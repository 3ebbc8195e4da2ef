"""One bundle in memory: its networks, and the way of an image to their logits."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medseg.bundles.bundle import Bundle
from medseg.crop import crop
from medseg.errors import BundleError, ConfigError
from medseg.geometry import SpatialRecord, orient
from medseg.infer.exact import exact_values, on_image_grid
from medseg.infer.export import indices_for_next_stage, reduce_parts
from medseg.infer.memory import Request, features_of
from medseg.infer.parts import Held, Part
from medseg.infer.parts import Source as Logits
from medseg.infer.result import Options
from medseg.infer.rows import Layout, LogitRows, Progress, Volume, tile_boxes
from medseg.infer.runner import Runner, evaluating, make_runner, mirror_subsets
from medseg.infer.source import Source
from medseg.infer.tiles import num_tiles, padding
from medseg.labels import LabelScheme
from medseg.models.precision import autocast_dtype
from medseg.postprocess import apply as apply_postprocessing
from medseg.preprocess.pipeline import network_spacing, preprocess_case, resize_label_map
from medseg.resample import new_shape, separate_axis
from medseg.schema.bundle import Semantics

logger = logging.getLogger(__name__)

CPU_FLIP_VOXELS = 2**26
"""On the CPU `tta="auto"` mirrors while folds x mirrorings x tiles x voxels stay below this, and in
exact mode always, as the originals do."""

MOST_CHANGED = 0.0005
"""Share of labels that arithmetic with 16 bits may change where it is checked."""
LEAST_DICE = 0.9995
"""Least Dice, mean over what is there, of the labels with and without it."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Ready:
    """An image that only waits for the networks of one member."""

    image: torch.Tensor
    """(C, n0, n1, n2) float32."""
    record: SpatialRecord
    before: Ready | None = None
    """The same for the stage before, in a cascade."""
    told: NDArray[np.unsignedinteger[Any]] | None = None
    """(n0, n1, n2) label indices of the stage before, once they are known."""
    source: Source | None = None
    """The image as read, where it is preprocessed by what the stage before finds."""


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
        self.is_exact = is_exact
        self.dtype = None if is_exact else autocast_dtype(device, "auto")
        self.batch = 1 if is_exact else self._default_batch()
        """Images the networks are given at once."""
        self._swaps = self._paired_channels()
        self._is_settled = self.semantics.low_precision == "trusted" or device.type != "cpu"
        self._said: set[tuple[int, ...]] = set()

    @property
    def semantics(self) -> Semantics:
        """Return how the bundle's predictions are put together."""
        return self.bundle.manifest.semantics

    @property
    def _previous(self) -> str:
        """Return how what the stage before found is handed over; "logits" without such a stage."""
        has_stage = self.bundle.configuration.previous_stage is not None
        return self.semantics.previous if has_stage else "logits"

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
            ConfigError: If there is one, and no stage before; or there is none, and no bundle of
                the stage before.
        """
        self._check_told(told)
        indices = None
        if told is not None:
            indices = self.labels.to_indices(told, f"previous stage of {source.name!r}")
        is_merged = self._previous == "labels"
        prepared = preprocess_case(
            source.channels,
            source.grid.affine,
            plans=self.bundle.plans,
            configuration=self.bundle.configuration,
            segmentation=indices if is_merged else None,
            semantics=self.semantics,
            orientation=self.bundle.manifest.orientation,
            spacing=self._spacing(source),
            is_exact=self.is_exact,
        )
        ready = Ready(
            image=torch.from_numpy(np.ascontiguousarray(prepared.image)), record=prepared.record
        )
        if indices is not None:
            found = prepared.segmentation if is_merged else None
            found = self._on_network_grid(indices, ready.record) if found is None else found
            return replace(ready, told=found)
        if self.previous is None:
            return ready
        source_kept = None if self._previous == "logits" else source
        return replace(ready, before=self.previous.ready(source), source=source_kept)

    @property
    def _is_stored(self) -> bool:
        return self.bundle.manifest.orientation == "stored_sitk"

    def _spacing(self, source: Source) -> tuple[float, float, float]:
        """Return the voxel size (I, J, K): by the header where images are taken as stored."""
        return source.header.spacing if self._is_stored else source.grid.spacing

    def _check_told(self, told: NDArray[np.integer[Any]] | None) -> None:
        """Raise ConfigError if what the stage before found is missing, or nobody asked for it."""
        name, wanted = self.bundle.configuration_name, self.bundle.configuration.previous_stage
        if told is not None:
            self.require_stage_before()
        if told is None and wanted is not None and self.previous is None:
            raise ConfigError(
                f"{name!r} needs what {wanted!r} finds, and {self.bundle.folder} does not hold "
                "that model. Give its label map with previous_stage (--previous-stage)."
            )

    def require_stage_before(self) -> None:
        """Raise ConfigError unless this is the second stage of a cascade, its first here or not."""
        if self.bundle.configuration.previous_stage is None:
            raise ConfigError(
                f"previous_stage is given, but {self.bundle.configuration_name!r} has no stage "
                "before it; leave it out."
            )

    def _on_network_grid(
        self, indices: NDArray[np.unsignedinteger[Any]], record: SpatialRecord
    ) -> NDArray[np.unsignedinteger[Any]]:
        """Return label indices (I, J, K) as label indices (n0, n1, n2) in the network frame."""
        whole = record.to_network_axes(indices)
        if self._previous == "labels_uncropped":
            own = np.ascontiguousarray(whole)
            return resize_label_map(own, record, self.semantics, is_exact=True)
        separate = separate_axis(
            record.spacing_cropped,
            record.spacing_network,
            when=self.semantics.resample_labels.separate,
        )
        cropped = np.ascontiguousarray(crop(whole, record.box))
        return resize_label_map(
            cropped, record, self.semantics, is_exact=self.is_exact, separate=separate
        )

    def preprocess_bytes(self, source: Source) -> int:
        """Return what bringing a case into the network frame takes beside the case itself."""
        grid = source.grid
        axes, _ = orient(grid.affine, self.bundle.plans.network_axes, is_stored=self._is_stored)
        own = [grid.spacing[axis] for axis in axes]
        target = network_spacing(own, self.bundle.configuration, self.semantics)
        shape = new_shape([grid.shape[axis] for axis in axes], own, target)
        before, after = math.prod(grid.shape), math.prod(shape)
        per_channel = 4 * len(source.channels)
        return per_channel * (before + after) + 8 * max(before, after) + 2 * before

    def volume(self, ready: Ready) -> Volume:
        """Return what the tiles of an image are cut from.

        Args:
            ready: The image, with what the stage before found if there is one.
        """
        previous = None if ready.told is None else _as_tensor(ready.told)
        num_previous = self.labels.num_previous(self.bundle.configuration)
        if (previous is None) != (num_previous == 0):
            told = "nothing" if previous is None else "a label map"
            raise ValueError(f"num_previous is {num_previous}, the stage before gave {told}")
        return Volume.of(ready.image, self.tile, previous)

    def rows(self, ready: Ready, task: Task) -> LogitRows:
        """Return the logits of an image, to be made as they are asked for.

        Args:
            ready: The image, with what the stage before found if there is one.
            task: How.
        """
        return LogitRows(
            self.runner(ready, task),
            self.volume(ready),
            task.layout,
            step=task.options.step,
            progress=task.progress,
            should_stop=task.should_stop,
        )

    def part(self, ready: Ready, task: Task, weight: float = 1.0) -> Part:
        """Return what the networks say of an image, in the network frame.

        Outside exact mode nothing is computed before it is asked for.

        Args:
            ready: The image, with what the stage before found if there is one.
            task: How.
            weight: Share in the mean of several members.
        """
        if not self._is_settled and task.dtype is not None:
            self._settle_precision(ready, task)
        task = task if self.dtype is not None else replace(task, dtype=None)
        source: Logits = self._exact(ready, task) if self.is_exact else self.rows(ready, task)
        return Part(source=source, record=ready.record, weight=weight, semantics=self.semantics)

    def _settle_precision(self, ready: Ready, task: Task) -> None:
        """Compute in float32 from now on, if 16 bits change labels in the middle of an image.

        One network looks at a tile as it is and, where tiles are mirrored, along all axes at once.
        """
        self._is_settled = True
        volume = self.volume(ready)
        boxes = tile_boxes(volume, task.options.step)
        plain = replace(task, options=replace(task.options, disagreement=False))
        decisions = []
        with torch.inference_mode(), evaluating(self.networks):
            for dtype in (None, task.dtype):
                runner = self.runner(ready, replace(plain, dtype=dtype), self.networks[:1]).ends()
                tile = volume.cut([boxes[len(boxes) // 2]], self.device, runner.num_previous)
                decisions.append(runner.decision(runner.run(tile, 1), 1))
        changed = float((decisions[0] != decisions[1]).float().mean())
        if changed > MOST_CHANGED or _dice(*decisions) < LEAST_DICE:
            logger.info(
                "%s: %s would change %.2f %% of the labels; computing in float32",
                self.bundle.folder.name, task.dtype, 100 * changed,
            )  # fmt: skip
            self.dtype = None

    def _exact(self, ready: Ready, task: Task) -> Logits:
        found = exact_values(
            [self.runner(ready, task, [network]) for network in self.networks],
            self.volume(ready),
            semantics=self.semantics,
            step=task.options.step,
            measures_disagreement=task.options.disagreement and len(self.networks) > 1,
            progress=task.progress,
            should_stop=task.should_stop,
        )
        return Held(found, task.layout.axis)

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

    def informed(
        self,
        ready: Ready,
        task: Task,
        arranged: Callable[[Member, Ready, SpatialRecord], Layout],
    ) -> Ready:
        """Return the image with what the stage before finds, on this stage's grid.

        Args:
            ready: The image; it is returned itself where there is nothing to find out.
            task: How this stage predicts it.
            arranged: Gives the layout of a member's logits, which are resampled to what a record
                says of the network's frame.
        """
        if self.previous is None or ready.before is None:
            return ready
        own = Task(
            name=task.name,
            options=replace(task.options, disagreement=False),
            layout=arranged(self.previous, ready.before, ready.record),
            dtype=task.dtype,
            should_stop=task.should_stop,
        )
        part = self.previous.part(self.previous.informed(ready.before, own, arranged), own)
        if ready.source is not None:
            return self.ready(ready.source, self.previous.label_map(part, ready.source))
        found = indices_for_next_stage(part, ready.record, self.previous.labels)
        return replace(ready, told=found)

    def label_map(self, part: Part, source: Source) -> NDArray[np.integer[Any]]:
        """Return what this member finds in an image, postprocessed, (I, J, K) as in files.

        Args:
            part: What its networks say.
            source: The image.
        """
        part = on_image_grid(part) if self.is_exact else part
        found, stored = reduce_parts([part], self.labels).segmentation, self.bundle.postprocessing
        if stored is None:
            return found
        return apply_postprocessing(
            found, stored, self.labels.structures, self.labels.background, source.grid.voxel_mm3
        )

    def mirror_axes(self, image: torch.Tensor, options: Options, name: str = "") -> tuple[int, ...]:
        """Return the axes to mirror; `auto` decides by the work it takes.

        With a name it says so, once for each choice.

        Args:
            image: (C, n0, n1, n2), preprocessed.
            options: What was asked for.
            name: What the log calls the case.
        """
        axes = self.semantics.mirror_axes
        if options.tta != "auto" or not axes:
            return () if options.tta == "none" else axes
        tiles = num_tiles(image.shape[1:], self.tile, options.step)
        passes = len(self.networks) * len(mirror_subsets(axes))
        affordable = passes * tiles * math.prod(self.tile) <= CPU_FLIP_VOXELS or self.is_exact
        chosen = axes if self.device.type != "cpu" or affordable else ()
        if name and chosen not in self._said:
            self._said.add(chosen)
            logger.info(
                "case %s: tta auto chose %s (%d %s x %d passes with flips, on %s)",
                name, "flips" if chosen else "none", tiles, "tiles" if tiles > 1 else "tile",
                passes, self.device,
            )  # fmt: skip
        return chosen

    def runner(
        self, ready: Ready, task: Task, networks: Sequence[nn.Module] | None = None
    ) -> Runner:
        """Return how tiles become logits.

        Args:
            ready: The image.
            task: How it is predicted.
            networks: Those that take part; None: all.
        """
        return make_runner(
            self.networks if networks is None else networks,
            num_channels=len(ready.image),
            num_logits=self.labels.num_logits,
            num_previous=self.labels.num_previous(self.bundle.configuration),
            mirror_axes=self.mirror_axes(ready.image, task.options, task.name),
            swap_axes=self.semantics.swap_axes,
            swaps=self._swaps,
            device=self.device,
            dtype=task.dtype,
            has_regions=self.labels.has_regions,
            averages_probabilities=self.semantics.average == "probabilities",
            measures_disagreement=task.options.disagreement,
        )

    def _paired_channels(self) -> tuple[tuple[int, int], ...]:
        """Return the logit channels that change places where left and right were exchanged.

        Raises:
            BundleError: If the bundle mirrors so but its plans do not name the pairs.
        """
        if not self.semantics.swap_axes:
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


def _dice(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the mean Dice of two decisions over what either finds; 1 where that is nothing.

    Args:
        one: (B, *tile) labels, or (B, R, *tile) yes or no for each region.
        other: The same.
    """
    if one.dtype == torch.bool:
        pairs = list(zip(one.unbind(1), other.unbind(1), strict=True))
    else:
        found = [int(label) for label in torch.unique(torch.cat([one, other])) if label]
        pairs = [(one == label, other == label) for label in found]
    sizes = [int(a.sum()) + int(b.sum()) for a, b in pairs]
    shares = [2 * int((a & b).sum()) / n for (a, b), n in zip(pairs, sizes, strict=True) if n]
    return sum(shares) / len(shares) if shares else 1.0


def _as_tensor(indices: NDArray[np.unsignedinteger[Any]]) -> torch.Tensor:
    """Return label indices in a type that every device computes with."""
    is_small = indices.dtype == np.uint8
    return torch.from_numpy(np.ascontiguousarray(indices, None if is_small else np.int32))
