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

from medseg.errors import BundleError, ConfigError, DatasetError, MedsegError, case_context
from medseg.geometry import Grid, SpatialRecord
from medseg.infer.bundle import Bundle, check_supported, find_bundle, read_bundle
from medseg.infer.export import (
    indices_for_next_stage,
    probabilities_from_logits,
    segmentation_from_logits,
    volumes_ml,
)
from medseg.infer.predictor import mirror_subsets, predict_logits
from medseg.infer.result import CaseError, Options, Result, Tta
from medseg.infer.source import Case, Source, case_name, read_case
from medseg.infer.tiles import num_tiles
from medseg.io.image import Header
from medseg.labels import LabelScheme
from medseg.models.build import build_network
from medseg.models.precision import autocast_dtype, pick_device
from medseg.models.weights import load_into, load_weights
from medseg.preprocess.pipeline import preprocess_case

logger = logging.getLogger(__name__)

CPU_FLIP_VOXELS = 2**26
"""On the CPU `tta="auto"` mirrors while folds x mirrorings x tiles x voxels stay below this."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Ready:
    """A case that only waits for the network."""

    name: str
    image: torch.Tensor
    grid: Grid
    header: Header
    record: SpatialRecord
    flags: tuple[str, ...]
    before: _Ready | None
    """The same for the stage before, in a cascade."""


def load(
    path: str | Path,
    *,
    device: str = "auto",
    mode: Literal["default", "exact"] = "default",
    folds: Sequence[str | int] | None = None,
    checkpoint: str = "final",
    trust_code: bool = False,
) -> Model:
    """Load a bundle, or the bundle of a training run, and keep its networks in memory.

    The first stage of a cascade is loaded with the same folds, and is always its "final" weights,
    on whose findings the second stage was trained.

    Args:
        path: Bundle folder or run folder.
        device: "auto", "cpu", "cuda:N" or "mps".
        mode: "exact" computes in float32 and one tile at a time.
        folds: Folds to average (0, "fold_0", "all" ...); None takes all the bundle has.
        checkpoint: "final" or "best".
        trust_code: Import a network given as "package.module:Name", which runs that code.

    Raises:
        BundleError: If there is no bundle, it is damaged, it lacks the weights asked for, or it
            needs code that is not trusted.
    """
    if mode not in ("default", "exact"):
        raise ConfigError(f"mode is {mode!r}; expected one of: default, exact.")
    bundle = read_bundle(find_bundle(Path(path)))
    check_supported(bundle)
    chosen = bundle.select_folds(folds)
    how = _Loading(folds=chosen, device=pick_device(device), mode=mode, trust_code=trust_code)
    return _loaded(bundle, how, checkpoint)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loading:
    """How the networks of a bundle, and of the stage before, are brought into memory."""

    folds: tuple[str, ...]
    device: torch.device
    mode: Literal["default", "exact"]
    trust_code: bool


def _loaded(bundle: Bundle, how: _Loading, checkpoint: str) -> Model:
    previous = None if bundle.previous is None else _loaded(bundle.previous, how, "final")
    networks = [_network(bundle, bundle.weights(fold, checkpoint), how) for fold in how.folds]
    return Model(
        bundle,
        networks,
        folds=how.folds,
        device=how.device,
        is_exact=how.mode == "exact",
        previous=previous,
    )


def _network(bundle: Bundle, path: Path, how: _Loading) -> nn.Module:
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
        previous: Model | None = None,
    ) -> None:
        self.bundle = bundle
        self.previous = previous
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
        return self._ready(source)

    def _ready(self, source: Source) -> _Ready:
        """Bring a case into the network frame of this stage and of those before it."""
        prepared = preprocess_case(
            source.channels,
            source.grid.affine,
            plans=self.bundle.plans,
            configuration=self.bundle.configuration,
        )
        return _Ready(
            name=source.name,
            image=torch.from_numpy(np.ascontiguousarray(prepared.image)),
            grid=source.grid,
            header=source.header,
            record=prepared.record,
            flags=self._image_flags(source),
            before=None if self.previous is None else self.previous._ready(source),
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
        """Return logits in the network frame, having asked the stage before what it finds."""
        found = None
        if self.previous is not None and ready.before is not None:
            logits = self.previous._logits(ready.before, options)
            found = indices_for_next_stage(
                logits, ready.before.record, ready.record, self.previous.labels
            )
        return self.network_logits(ready.image, options, name=ready.name, previous=found)

    def network_logits(
        self,
        image: torch.Tensor,
        options: Options,
        *,
        name: str = "case",
        previous: NDArray[np.unsignedinteger[Any]] | None = None,
    ) -> torch.Tensor:
        """Return the logits of a preprocessed image, in the network frame.

        Args:
            image: (C, n0, n1, n2) float32, preprocessed for the bundle's configuration.
            options: Mirroring and tiles.
            name: What the log calls the case.
            previous: (n0, n1, n2) label indices that the stage before found, in a cascade.

        Returns:
            (L, n0, n1, n2) float32, on the CPU.
        """
        mirror_axes = self._mirror_axes(image, options, name)
        with self._lock:
            return predict_logits(
                self._networks,
                image,
                self.bundle.configuration.patch_size,
                num_logits=self.labels.num_logits,
                previous=None if previous is None else _as_tensor(previous),
                num_previous=self.labels.num_previous(self.bundle.configuration),
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

    def _mirror_axes(self, image: torch.Tensor, options: Options, name: str) -> tuple[int, ...]:
        """Return the axes to mirror; `auto` decides by the work it takes and says so."""
        axes = self.bundle.manifest.semantics.mirror_axes
        if options.tta != "auto" or not axes:
            return () if options.tta == "none" else axes
        tile = self.bundle.configuration.patch_size
        tiles = num_tiles(image.shape[1:], tile, options.step)
        passes = len(self._networks) * len(mirror_subsets(axes))
        affordable = passes * tiles * math.prod(tile) <= CPU_FLIP_VOXELS
        chosen = axes if self.device.type != "cpu" or affordable else ()
        logger.info(
            "case %s: tta auto chose %s (%d tiles x %d passes with flips, on %s)",
            name, "flips" if chosen else "none", tiles, passes, self.device,
        )  # fmt: skip
        return chosen

    def _default_tile_batch(self) -> int:
        """Return tiles per pass: what training fits on a GPU; on a CPU only slices gain."""
        configuration = self.bundle.configuration
        if self.device.type == "cuda":
            return configuration.batch_size
        return 4 if configuration.num_dimensions == 2 else 1


def _as_tensor(indices: NDArray[np.unsignedinteger[Any]]) -> torch.Tensor:
    """Return label indices in a type that every device computes with."""
    is_small = indices.dtype == np.uint8
    return torch.from_numpy(np.ascontiguousarray(indices, None if is_small else np.int32))
