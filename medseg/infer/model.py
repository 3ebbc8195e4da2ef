"""`load` a bundle, `Model.predict` a case: from an image to labels on the image's own grid."""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medseg.errors import (
    BundleError,
    ConfigError,
    DatasetError,
    MedsegError,
    case_context,
    near_names,
)
from medseg.geometry import Grid, SpatialRecord
from medseg.infer.bundle import Bundle, check_supported, find_bundle, read_bundle
from medseg.infer.export import probabilities_from_logits, segmentation_from_logits, volumes_ml
from medseg.infer.predictor import mirror_subsets, predict_logits
from medseg.infer.source import Case, Source, case_name, read_case
from medseg.infer.tiles import num_tiles
from medseg.io.image import Header
from medseg.io.write import write_segmentation
from medseg.labels import LabelScheme
from medseg.models.blocks import NormMethod
from medseg.models.build import build_network
from medseg.models.precision import autocast_dtype, pick_device
from medseg.models.unet import UNet
from medseg.models.weights import load_into, load_weights
from medseg.preprocess.pipeline import preprocess_case

logger = logging.getLogger(__name__)

Tta = Literal["auto", "none", "flips"]
CPU_FLIP_VOXELS = 2**26
"""On the CPU `tta="auto"` mirrors while folds x mirrorings x tiles x voxels stay below this."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Result:
    """The prediction of one case, on the grid of its image."""

    case: str
    """Name of the case."""
    segmentation: NDArray[np.integer[Any]]
    """(I, J, K) label map with the values of the dataset's files."""
    probabilities: NDArray[np.float32] | None
    """(L, I, J, K), on request."""
    affine: NDArray[np.float64]
    """(4, 4) voxel to RAS+ mm, that of the image."""
    labels: dict[str, int | tuple[int, ...]]
    """Label name -> value, or values of a region."""
    volumes_ml: dict[str, float]
    """Structure -> volume."""
    flags: tuple[str, ...]
    """What a person should look at, in words; empty if nothing."""
    record: SpatialRecord
    """How the network saw the image."""
    header: Header
    """Header of the image; a plain one if the case was an array."""

    def save(self, path: str | Path) -> None:
        """Write the segmentation with exactly the geometry of its image, atomically.

        Args:
            path: Target; its ending chooses the format.

        Raises:
            DatasetError: If the ending is unknown.
            GeometryError: If the format cannot hold the image's geometry.
        """
        write_segmentation(path, self.segmentation, self.header)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseError:
    """A case that could not be predicted."""

    case: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How predictions are made."""

    probabilities: bool = False
    tta: Tta = "auto"
    step: float = 0.5

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        known = ["auto", "none", "flips"]
        if self.tta not in known:
            raise ConfigError(
                f"tta is {self.tta!r}; expected one of: {', '.join(known)}."
                f"{near_names(str(self.tta), known)}"
            )
        if not 0 < self.step <= 1:
            raise ConfigError(f"step is {self.step}; expected a number in (0, 1], usually 0.5.")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Ready:
    """A case that only waits for the network."""

    name: str
    image: torch.Tensor
    grid: Grid
    header: Header
    record: SpatialRecord
    flags: tuple[str, ...]


def load(
    path: str | Path,
    *,
    device: str = "auto",
    mode: Literal["default", "exact"] = "default",
    folds: Sequence[str | int] | None = None,
    checkpoint: str = "final",
) -> Model:
    """Load a bundle, or the bundle of a training run, and keep its networks in memory.

    Args:
        path: Bundle folder or run folder.
        device: "auto", "cpu", "cuda:N" or "mps".
        mode: "exact" computes in float32 and one tile at a time.
        folds: Folds to average (0, "fold_0", "all" ...); None takes all the bundle has.
        checkpoint: "final" or "best".

    Raises:
        BundleError: If there is no bundle, it is damaged, or it lacks the weights asked for.
    """
    if mode not in ("default", "exact"):
        raise ConfigError(f"mode is {mode!r}; expected one of: default, exact.")
    bundle = read_bundle(find_bundle(Path(path)))
    check_supported(bundle)
    chosen = bundle.select_folds(folds)
    target = pick_device(device)
    labels = LabelScheme.from_spec(bundle.spec)
    paths = [bundle.weights(fold, checkpoint) for fold in chosen]
    norm: NormMethod = "instance" if mode == "exact" else "auto"
    networks = [_network(bundle, labels, path, norm).to(target) for path in paths]
    if mode != "exact":
        networks = [network.use_channels_last() for network in networks]
    return Model(bundle, networks, folds=chosen, device=target, is_exact=mode == "exact")


def _network(bundle: Bundle, labels: LabelScheme, path: Path, norm: NormMethod) -> UNet:
    network = build_network(
        bundle.configuration.architecture,
        num_inputs=len(bundle.spec.channels),
        num_logits=labels.num_logits,
        norm=norm,
        generator=torch.Generator(),  # leaves the caller's random state alone
    )
    load_into(network, load_weights(path), str(path))
    return network.requires_grad_(False).eval()


class Model:
    """Networks in memory with all that is needed to use them; safe to call from many threads."""

    def __init__(
        self,
        bundle: Bundle,
        networks: Sequence[nn.Module],
        *,
        folds: Sequence[str],
        device: torch.device,
        is_exact: bool = False,
    ) -> None:
        self.bundle = bundle
        self.labels = LabelScheme.from_spec(bundle.spec)
        self.folds = tuple(folds)
        self.device = device
        self._networks = tuple(networks)
        self._swaps = self._paired_channels()
        self._dtype = None if is_exact else autocast_dtype(device, "auto")
        self._tile_batch = 1 if is_exact else self._default_tile_batch()
        self._lock = threading.Lock()

    def predict(
        self, case: Case, *, probabilities: bool = False, tta: Tta = "auto", step: float = 0.5
    ) -> Result:
        """Segment one case.

        Args:
            case: Path, list of channel paths (one case), tuple (array (C,I,J,K) or (I,J,K),
                affine), SimpleITK image, nibabel image, or a list of such images.
            probabilities: Also return the probabilities of every channel.
            tta: "flips" averages over mirrored images, "none" does not; "auto" does on a GPU, and
                on the CPU where it takes no more than minutes.
            step: Largest shift between tiles, as a fraction of the tile.

        Raises:
            DatasetError: If the case cannot be read or has the wrong number of channels.
            ConfigError: If an option is out of range.
        """
        options = Options(probabilities=probabilities, tta=tta, step=step)
        name = case_name(case)
        with case_context(name):
            return self._finish(self._prepare(case, name), options)

    def predict_many(
        self,
        cases: Iterable[Case],
        *,
        probabilities: bool = False,
        tta: Tta = "auto",
        step: float = 0.5,
    ) -> Iterator[Result | CaseError]:
        """Segment cases one after another, in order; a bad case becomes a `CaseError`.

        While the network works on one case, a thread reads and prepares the next.

        Args:
            cases: Cases as `predict` takes them.
            probabilities: As in `predict`.
            tta: As in `predict`.
            step: As in `predict`.
        """
        options = Options(probabilities=probabilities, tta=tta, step=step)
        return self._predict_many(cases, options)

    def _predict_many(
        self, cases: Iterable[Case], options: Options
    ) -> Iterator[Result | CaseError]:
        waiting: deque[tuple[str, Future[_Ready]]] = deque()
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="medseg-prepare")
        try:
            for number, case in enumerate(cases):
                name = case_name(case, fallback=f"case {number}")
                waiting.append((name, pool.submit(self._prepare, case, name)))
                if len(waiting) > 1:
                    yield self._settle(*waiting.popleft(), options)
            while waiting:
                yield self._settle(*waiting.popleft(), options)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _settle(self, name: str, future: Future[_Ready], options: Options) -> Result | CaseError:
        """Return the result of a case, or what is wrong with it; never raises for one case."""
        try:
            return self._finish(future.result(), options)
        except MedsegError as error:
            return CaseError(case=name, message=str(error))
        except Exception as error:
            logger.debug("case %s failed", name, exc_info=True)
            return CaseError(case=name, message=f"{type(error).__name__}: {error}")

    def _prepare(self, case: Case, name: str) -> _Ready:
        """Read a case and bring it into the network frame; runs beside the network."""
        source = read_case(case, name)
        self._check_channels(source)
        prepared = preprocess_case(
            source.channels,
            source.grid.affine,
            plans=self.bundle.plans,
            configuration=self.bundle.configuration,
        )
        return _Ready(
            name=name,
            image=torch.from_numpy(np.ascontiguousarray(prepared.image)),
            grid=source.grid,
            header=source.header,
            record=prepared.record,
            flags=self._image_flags(source),
        )

    def _check_channels(self, source: Source) -> None:
        names = self.bundle.spec.channels
        if len(source.channels) != len(names):
            raise DatasetError(
                f"case {source.name!r}: got {len(source.channels)} channel"
                f"{'s' if len(source.channels) > 1 else ''}, expected {len(names)} "
                f"({', '.join(names)}). Give one image per channel, in this order."
            )

    def _image_flags(self, source: Source) -> tuple[str, ...]:
        return tuple(
            f"channel {name} has the same value everywhere"
            for name, channel in zip(self.bundle.spec.channels, source.channels, strict=True)
            if channel.min() == channel.max()
        )

    def _finish(self, ready: _Ready, options: Options) -> Result:
        """Run the networks on a prepared case and bring the result to the image's grid."""
        logits = self._logits(ready, options)
        segmentation = segmentation_from_logits(logits, ready.record, self.labels)
        probabilities = None
        if options.probabilities:
            probabilities = probabilities_from_logits(logits, ready.record, self.labels)
        volumes = volumes_ml(segmentation, ready.grid.affine, self.labels)
        is_empty = bool((segmentation == self.labels.background).all())
        nothing = ("no structure was found",) if is_empty else ()
        return Result(
            case=ready.name,
            segmentation=segmentation,
            probabilities=probabilities,
            affine=ready.grid.affine,
            labels=dict(self.bundle.spec.labels),
            volumes_ml=volumes,
            flags=ready.flags + nothing,
            record=ready.record,
            header=ready.header,
        )

    def _logits(self, ready: _Ready, options: Options) -> torch.Tensor:
        mirror_axes = self._mirror_axes(ready, options)
        with self._lock:
            return predict_logits(
                self._networks,
                ready.image,
                self.bundle.configuration.patch_size,
                num_logits=self.labels.num_logits,
                mirror_axes=mirror_axes,
                swap_axes=self.bundle.manifest.semantics.swap_axes,
                swaps=self._swaps,
                step=options.step,
                tile_batch=self._tile_batch,
                device=self.device,
                dtype=self._dtype,
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

    def _mirror_axes(self, ready: _Ready, options: Options) -> tuple[int, ...]:
        """Return the axes to mirror; `auto` decides by the work it takes and says so."""
        axes = self.bundle.manifest.semantics.mirror_axes
        if options.tta != "auto" or not axes:
            return () if options.tta == "none" else axes
        tile = self.bundle.configuration.patch_size
        tiles = num_tiles(ready.image.shape[1:], tile, options.step)
        passes = len(self._networks) * len(mirror_subsets(axes))
        affordable = passes * tiles * math.prod(tile) <= CPU_FLIP_VOXELS
        chosen = axes if self.device.type != "cpu" or affordable else ()
        logger.info(
            "case %s: tta auto chose %s (%d tiles x %d passes with flips, on %s)",
            ready.name, "flips" if chosen else "none", tiles, passes, self.device,
        )  # fmt: skip
        return chosen

    def _default_tile_batch(self) -> int:
        """Return tiles per pass: what training fits on a GPU; on a CPU only slices gain."""
        configuration = self.bundle.configuration
        if self.device.type == "cuda":
            return configuration.batch_size
        return 4 if configuration.num_dimensions == 2 else 1
