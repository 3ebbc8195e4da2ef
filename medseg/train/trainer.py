"""The state of a training run, and what one step does to it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.func import functional_call

from medseg.augment.pipeline import Augmenter
from medseg.augment.streams import sample_seed
from medseg.data.loader import Batch
from medseg.errors import MedsegError
from medseg.labels import LabelScheme
from medseg.losses.compound import Loss
from medseg.models.unet import UNet
from medseg.schema.recipe import Recipe
from medseg.train.annotation import batch_annotated
from medseg.train.optim import Ema, build_optimizer, learning_rate
from medseg.train.schedule import Length

_BEST_SMOOTHING = 0.9
"""Weight of the past in the running mean of the patch Dice that chooses "best"."""
_MAX_SKIPPED_IN_A_ROW = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The parts a trainer is put together from."""

    network: UNet
    loss: Loss
    """(list of logits, target, valid) -> scalar; also told `annotated` where a batch is partial."""
    augmenter: Augmenter
    labels: LabelScheme
    device: torch.device
    dtype: torch.dtype | None
    """Autocast type of the network; None computes in float32."""
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Samples:
    """A batch on the device."""

    images: torch.Tensor
    """(B, C, *spatial)."""
    target: torch.Tensor
    """Labels (B, *spatial), or regions (B, R, *spatial)."""
    valid: torch.Tensor | None
    """(B, *spatial) voxels that count; None: all."""
    annotated: torch.Tensor | None
    """(B, L) structures that were annotated; None: all."""


class Trainer:
    """Network, optimiser, schedule position and running results of one run."""

    def __init__(self, recipe: Recipe, parts: Parts, length: Length) -> None:
        """Put a new run together; nothing is computed yet."""
        self.recipe, self.parts, self.length = recipe, parts, length
        self.network = parts.network.to(parts.device).use_channels_last()
        self.optimizer = build_optimizer(self.network.parameters(), recipe.optimizer)
        self.ema = Ema(self.network, recipe.ema) if recipe.ema else None
        self.scaler = torch.amp.GradScaler(
            parts.device.type, enabled=parts.dtype == torch.float16 and parts.device.type == "cuda"
        )
        self.iterations_per_epoch = recipe.iterations_per_epoch
        self.epoch = 0
        self.smoothed_dice: float | None = None
        self.best_dice: float | None = None
        self.is_best = False
        self.seconds_to_last_step = 0.0
        self._skipped = torch.zeros((), dtype=torch.int64, device=parts.device)
        self._skipped_in_a_row = 0
        self._skipped_before = 0

    @property
    def learning_rate(self) -> float:
        """Return the learning rate of the present step."""
        progress = self.length.progress
        if self.recipe.schedule.per == "epoch":
            progress = self._epoch_progress
        return learning_rate(self.recipe.schedule, self.recipe.optimizer.lr, progress)

    @property
    def _epoch_progress(self) -> float:
        done = self.epoch * self.iterations_per_epoch
        total = self.length.num_iterations
        return done / total if total else self.length.progress

    def new_loss_sum(self) -> torch.Tensor:
        """Return a zero on the device to sum losses in without synchronising."""
        return torch.zeros((), device=self.parts.device)

    def peek(self, losses: torch.Tensor, number: int) -> float | None:
        """Return the mean loss so far; on an accelerator only now and then, as it synchronises."""
        if self.parts.device.type != "cpu" and number % 50:
            return None
        return float(losses) / number

    def step(self, batch: Batch) -> torch.Tensor:
        """Do one optimiser step and return its loss, still on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.network.train()
        samples = self._prepare(batch, augment=True)
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            logits = _as_list(self.network(samples.images))
        loss = self._loss(logits, samples)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self._update(loss, batch)
        self.length.advance()
        return loss.detach().nan_to_num(0.0, 0.0, 0.0)

    def _loss(self, logits: list[torch.Tensor], samples: _Samples) -> torch.Tensor:
        if samples.annotated is None:
            return self.parts.loss(logits, samples.target, samples.valid)
        return self.parts.loss(logits, samples.target, samples.valid, annotated=samples.annotated)

    def _update(self, loss: torch.Tensor, batch: Batch) -> None:
        """Apply the gradients; a step that is not finite changes nothing and is counted.

        On an accelerator nothing is asked of the device: gradients that are not finite become 0.
        """
        self.scaler.unscale_(self.optimizer)
        limit = self.recipe.gradient_clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), limit)
        finite = torch.isfinite(norm + loss.detach())
        self._skipped += ~finite
        if self.parts.device.type == "cpu":
            self._skipped_in_a_row = 0 if bool(finite) else self._skipped_in_a_row + 1
            if self._skipped_in_a_row >= _MAX_SKIPPED_IN_A_ROW:
                cases = f"in a row, last with the cases {', '.join(batch.case_ids)},"
                raise _divergence(self._skipped_in_a_row, cases)
            if self._skipped_in_a_row:
                return
        elif not self.scaler.is_enabled():
            for gradient in [p.grad for p in self.network.parameters() if p.grad is not None]:
                gradient.copy_(torch.where(finite, gradient, 0))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.network)

    @property
    def num_skipped(self) -> int:
        """Return the number of skipped steps; waits for the device."""
        return int(self._skipped)

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> tuple[dict[str, float | None], float | None]:
        """Return the Dice of each structure pooled over validation patches, and the mean loss.

        The weights judged are those that are saved: the moving average where there is one. A
        structure is judged in the patches of the cases in which it was annotated.
        """
        self.network.eval()
        weights = self.weights()
        counts, loss, num_batches = None, self.new_loss_sum(), 0
        for batch in batches:
            samples = self._prepare(batch, augment=False)
            with self._autocast():
                logits = _as_list(functional_call(self.network, weights, (samples.images,)))
            loss += self._loss(logits, samples)
            found = self._counts(logits[0].float(), samples)
            counts = found if counts is None else counts + found
            num_batches += 1
        if counts is None:
            return dict.fromkeys(self.parts.labels.foreground), None
        dice = [
            2 * tp / (2 * tp + wrong) if tp + wrong > 0 else None for tp, wrong in counts.tolist()
        ]
        channels = self.parts.labels.channels
        by_channel = dict(zip(sorted(channels, key=channels.__getitem__), dice, strict=True))
        return {name: by_channel[name] for name in channels}, float(loss) / num_batches

    def _counts(self, logits: torch.Tensor, samples: _Samples) -> torch.Tensor:
        """Return (structures, 2): true positives, and false positives plus false negatives."""
        if self.parts.labels.has_regions:
            predicted, reference = logits > 0, samples.target.bool()
        else:
            classes = torch.arange(1, logits.shape[1], device=logits.device)
            shape = (1, -1, *(1,) * (logits.ndim - 2))
            predicted = logits.argmax(1, keepdim=True) == classes.view(shape)
            reference = samples.target.unsqueeze(1) == classes.view(shape)
        axes = tuple(range(2, logits.ndim))
        if samples.valid is not None:
            predicted = predicted & samples.valid.unsqueeze(1)
            reference = reference & samples.valid.unsqueeze(1)
        hits, wrong = (predicted & reference).sum(axes), (predicted ^ reference).sum(axes)
        if samples.annotated is not None:
            drawn = samples.annotated[:, -hits.shape[1] :]  # labels: without the background
            hits, wrong = hits * drawn, wrong * drawn
        return torch.stack([hits.sum(0), wrong.sum(0)], dim=1).double()

    def end_epoch(self, row: dict[str, Any]) -> None:
        """Count the epoch and decide whether its weights are the best so far.

        Raises:
            MedsegError: If no step of the epoch was finite.
        """
        self.epoch += 1
        if row["skipped_steps"] - self._skipped_before >= self.iterations_per_epoch:
            raise _divergence(self.iterations_per_epoch, "of the last epoch")
        self._skipped_before = row["skipped_steps"]
        mean = row["mean_patch_dice"]
        if mean is not None:
            before = mean if self.smoothed_dice is None else self.smoothed_dice
            self.smoothed_dice = _BEST_SMOOTHING * before + (1 - _BEST_SMOOTHING) * mean
        self.is_best = self.smoothed_dice is not None and (
            self.best_dice is None or self.smoothed_dice > self.best_dice
        )
        if self.is_best:
            self.best_dice = self.smoothed_dice
        self.seconds_to_last_step = row["elapsed_seconds"]
        row["smoothed_patch_dice"] = self.smoothed_dice

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the weights to predict with: the moving average where there is one."""
        return dict(self.ema.tensors if self.ema is not None else self.network.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return everything a later process needs to go on exactly here."""
        return {
            "network": dict(self.network.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None
            if self.ema is None
            else {"tensors": self.ema.tensors, "num_updates": self.ema.num_updates},
            "iteration": self.length.iteration,
            "progress": self.length.progress,
            "seconds_per_iteration": self.length.seconds_per_iteration,
            "elapsed_seconds": self.length.elapsed_seconds(),
            "epoch": self.epoch,
            "num_skipped": self.num_skipped,
            "smoothed_dice": self.smoothed_dice,
            "best_dice": self.best_dice,
            "seconds_to_last_step": self.seconds_to_last_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state written by `state_dict`."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        _match_layouts(self.optimizer)
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.num_updates = state["ema"]["num_updates"]
            for name, tensor in state["ema"]["tensors"].items():
                self.ema.tensors[name].copy_(tensor)
        self.length.iteration = state["iteration"]
        self.length.progress = state["progress"]
        self.length.seconds_per_iteration = state["seconds_per_iteration"]
        self.length.spent_before = state["elapsed_seconds"]
        self.epoch = state["epoch"]
        self._skipped.fill_(state["num_skipped"])
        self._skipped_before = state["num_skipped"]
        self.smoothed_dice = state["smoothed_dice"]
        self.best_dice = state["best_dice"]
        self.seconds_to_last_step = state["seconds_to_last_step"]

    def _prepare(self, batch: Batch, *, augment: bool) -> _Samples:
        """Move a batch to the device and turn labels into targets; augmented in training."""
        device, patches, labels = self.parts.device, batch.patches, self.parts.labels
        images = [_to_device(patch.image, device) for patch in patches]
        segmentations = [_to_device(_torch_labels(patch.segmentation), device) for patch in patches]
        masks = [_to_device(p.outside, device) for p in patches if p.outside is not None]
        if augment:
            seeds = [sample_seed(self.parts.seed, index) for index in batch.indices]
            annotated = batch_annotated(batch, labels, self.parts.augmenter, seeds)
            image, segmentation, _ = self.parts.augmenter(
                images, segmentations, masks or None, seeds=seeds
            )
        else:
            annotated = batch_annotated(batch, labels)
            image, segmentation = torch.stack(images), torch.stack(segmentations)
        target, valid = labels.target(segmentation)
        return _Samples(
            images=image,
            target=target,
            valid=valid,
            annotated=None if annotated is None else _to_device(annotated, device),
        )

    def _autocast(self) -> Any:
        if self.parts.dtype is None:
            return nullcontext()
        return torch.autocast(self.parts.device.type, dtype=self.parts.dtype)


def _match_layouts(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimiser's averages the memory layout of their parameters.

    Fused optimisers pair values by their place in memory, whatever the strides say.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _divergence(count: int, which: str) -> MedsegError:
    return MedsegError(
        f"training diverged: {count} steps {which} had a loss or gradient that is not finite. "
        "Lower optimizer.lr, or look at the images."
    )


def _as_list(logits: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
    return [logits] if isinstance(logits, torch.Tensor) else list(logits)


def _torch_labels(labels: Any) -> Any:
    """Return labels in an integer type that torch computes with (it lacks uint16)."""
    return labels.astype(np.int32) if labels.dtype == np.uint16 else labels


def _to_device(array: Any, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
