"""What the channels of a network mean: labels, regions, and the voxels that count for nothing.

Shape letters: B batch, L logit channels, R regions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import ConfigError, DatasetError
from medseg.schema.dataset import DatasetSpec

if TYPE_CHECKING:
    import torch

_MAX_VALUE = int(np.iinfo(np.uint16).max)


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelScheme:
    """Labels or regions of a dataset, and how they become channels and come back.

    With labels channel c of the logits is label c. With regions (some name has several values)
    channel i is the i-th name other than the background, and channels may overlap.
    """

    labels: Mapping[str, int | tuple[int, ...]]
    """Name -> value, or -> several values for a region; "background" is 0."""
    regions_class_order: tuple[int, ...] | None = None
    """With regions: value painted for each of them, in order; later ones paint over earlier."""
    ignore_label: int | None = None
    """Value of voxels that count for nothing: one above the highest label."""
    origin: str = "labels"
    """What an error message calls the place the scheme comes from."""

    def __post_init__(self) -> None:
        """Check that the values make sense together.

        Raises:
            ConfigError: With one line per problem.
        """
        problems = [*self._value_problems(), *self._order_problems()]
        if problems:
            count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
            raise ConfigError("\n".join([f"{count} in {self.origin}:", *problems]))

    @classmethod
    def from_spec(cls, spec: DatasetSpec) -> LabelScheme:
        """Return the scheme of a dataset.

        Raises:
            ConfigError: With one line per problem of its labels.
        """
        return cls(
            labels=spec.labels,
            regions_class_order=spec.regions_class_order,
            ignore_label=spec.ignore_label,
            origin=f"the labels of dataset {spec.name!r}",
        )

    @property
    def has_regions(self) -> bool:
        """Return whether any name stands for several values."""
        return any(isinstance(entry, tuple) and len(entry) > 1 for entry in self.labels.values())

    @property
    def foreground(self) -> dict[str, tuple[int, ...]]:
        """Return the evaluated structures: name -> label values, background left out."""
        named = {name: _values(entry) for name, entry in self.labels.items()}
        return {name: values for name, values in named.items() if set(values) != {0}}

    @property
    def num_logits(self) -> int:
        """Return the number of output channels of the network."""
        return len(self.foreground) if self.has_regions else len(self._declared())

    @property
    def valid_values(self) -> frozenset[int]:
        """Return every value a segmentation may hold, the ignore label included."""
        ignored = () if self.ignore_label is None else (self.ignore_label,)
        return frozenset((*self._declared(), *ignored))

    @property
    def dtype(self) -> type[np.uint8] | type[np.uint16]:
        """Return the smallest type that holds every valid value."""
        return np.uint8 if max(self.valid_values) <= np.iinfo(np.uint8).max else np.uint16

    def check(self, found_values: Iterable[int], where: str) -> None:
        """Check the values found in a segmentation.

        Args:
            found_values: Distinct values.
            where: What the message names: a file or a case.

        Raises:
            DatasetError: If a value is not one of the dataset's.
        """
        unknown = sorted({int(value) for value in found_values} - self.valid_values)
        if unknown:
            raise DatasetError(
                f"{where}: the segmentation holds {_listed(unknown)}; expected only "
                f"{_listed(sorted(self.valid_values))} ({self._described()}). Correct the "
                "segmentation, or add the values to labels in dataset.json."
            )

    def target(self, segmentation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what the losses compare with.

        Args:
            segmentation: (B, *spatial) integer label map.

        Returns:
            With labels a (B, *spatial) int64 map whose ignored voxels are 0, with regions a
            (B, R, *spatial) bool map; and the (B, *spatial) bool map of voxels that count, None
            where the dataset has no ignore label.
        """
        import torch

        valid = None if self.ignore_label is None else segmentation != self.ignore_label
        if self.has_regions:
            regions = [_is_any(segmentation, values) for values in self.foreground.values()]
            return torch.stack(regions, dim=1), valid
        target = segmentation.long()
        return (target if valid is None else target * valid), valid

    def segment(
        self, logits: torch.Tensor | NDArray[np.floating[Any]]
    ) -> NDArray[np.unsignedinteger[Any]]:
        """Return the label map logits stand for.

        Labels: the largest logit wins, the smallest label among equals. Regions: every region
        whose logit is positive (probability above 0.5) is painted in `regions_class_order`.

        Args:
            logits: (L, *spatial).

        Returns:
            (*spatial) array of type `dtype`.

        Raises:
            ValueError: If the number of channels is another one.
        """
        if not isinstance(logits, np.ndarray):
            logits = logits.detach().float().cpu().numpy()
        if len(logits) != self.num_logits:
            raise ValueError(f"expected {self.num_logits} logit channels, got {len(logits)}")
        result: NDArray[np.unsignedinteger[Any]] = np.zeros(logits.shape[1:], dtype=self.dtype)
        if self.has_regions:
            for value, region in zip(self.regions_class_order or (), logits, strict=True):
                np.putmask(result, region > 0, value)
            return result
        best = logits[0].copy()
        for label in range(1, len(logits)):
            is_better = (logits[label] > best).view(np.uint8)
            np.maximum(result, is_better * self.dtype(label), out=result)  # labels only grow
            np.maximum(best, logits[label], out=best)
        return result

    def activate(self, logits: torch.Tensor) -> torch.Tensor:
        """Return float32 probabilities: softmax over labels, a sigmoid for each region.

        Args:
            logits: (L, *spatial).
        """
        logits = logits.float()
        return logits.sigmoid() if self.has_regions else logits.softmax(dim=0)

    def _declared(self) -> list[int]:
        """Return the distinct values of all names, ascending; the ignore label is not one."""
        return sorted({value for entry in self.labels.values() for value in _values(entry)})

    def _described(self) -> str:
        named = [f"{_listed(_values(entry))} {name}" for name, entry in self.labels.items()]
        ignored = [] if self.ignore_label is None else [f"{self.ignore_label} ignore"]
        return "; ".join([*named, *ignored])

    def _value_problems(self) -> list[str]:
        problems = []
        if _values(self.labels.get("background", ())) != (0,):
            found = self.labels.get("background", "missing")
            problems.append(f'  labels.background is {found}; expected 0. Add "background": 0.')
        problems += [
            f"  labels.{name} has no value; expected an integer or a list of integers."
            for name, entry in self.labels.items()
            if not _values(entry)
        ]
        declared = self._declared()
        if declared != list(range(len(declared))) or len(declared) < 2:
            problems.append(
                f"  labels have the values {_listed(declared)}; expected 0, 1, 2 ... without "
                "gaps, at least one above 0. Renumber them, in the segmentations too."
            )
        highest = max(declared, default=0)
        if self.ignore_label is not None and self.ignore_label != highest + 1:
            problems.append(
                f"  the ignore label is {self.ignore_label}; expected {highest + 1}, one above the "
                "highest label. Renumber it, in the segmentations too."
            )
        if highest + (self.ignore_label is not None) > _MAX_VALUE:
            problems.append(f"  the highest value is {highest}; at most {_MAX_VALUE} is supported.")
        if not self.has_regions:
            problems += self._shared_values()
        return problems

    def _shared_values(self) -> list[str]:
        holders: dict[tuple[int, ...], list[str]] = {}
        for name, entry in self.labels.items():
            holders.setdefault(_values(entry), []).append(name)
        return [
            f"  labels {', '.join(names)} share the value {_listed(values)}; expected one name "
            "for each value. Remove or renumber one."
            for values, names in holders.items()
            if len(names) > 1 and values
        ]

    def _order_problems(self) -> list[str]:
        """Check `regions_class_order`; without regions it has no meaning and is not looked at."""
        if not self.has_regions:
            return []
        names = list(self.foreground)
        expected = f"expected {len(names)} values, one for each of: {', '.join(names)}."
        if self.regions_class_order is None:
            return [f"  regions_class_order is missing; {expected}"]
        problems = []
        if len(self.regions_class_order) != len(names):
            problems.append(
                f"  regions_class_order has {len(self.regions_class_order)} values; {expected}"
            )
        unknown = sorted(set(self.regions_class_order) - set(self._declared()))
        if unknown:
            problems.append(
                f"  regions_class_order holds {_listed(unknown)}; expected values of labels: "
                f"{_listed(self._declared())}."
            )
        return problems


def _values(entry: int | tuple[int, ...]) -> tuple[int, ...]:
    return entry if isinstance(entry, tuple) else (entry,)


def _listed(values: Iterable[int], limit: int = 12) -> str:
    """Return values for a message, the middle of a long list left out."""
    texts = [str(value) for value in values]
    shown = texts if len(texts) <= limit else [*texts[: limit - 1], "...", texts[-1]]
    return ", ".join(shown) or "nothing"


def _is_any(segmentation: torch.Tensor, values: tuple[int, ...]) -> torch.Tensor:
    """Return where a label map holds one of the values."""
    found = segmentation == values[0]
    for value in values[1:]:
        found |= segmentation == value
    return found
