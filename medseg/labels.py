"""What the values of a label map mean: labels, regions, and the voxels that count for nothing.

Files hold values: any integers, as their makers chose them. Everything inside (store, patches,
losses, logits) holds consecutive indices instead: 0 the background, then the other values in
ascending order, the ignore label last.

Shape letters: B batch, L logit channels, R regions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import ConfigError, DatasetError, near_names
from medseg.schema.dataset import CaseFiles, DatasetSpec
from medseg.schema.plans import Configuration
from medseg.values import distinct_values, places_in, values_at

if TYPE_CHECKING:
    import torch

_MAX_INDEX = int(np.iinfo(np.uint16).max)
_MAX_UNSIGNED = int(np.iinfo(np.uint32).max)
_SIGNED = np.iinfo(np.int32)

Values = NDArray[np.integer[Any]]
Indices = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelScheme:
    """Labels or regions of a dataset, and how they become channels and come back.

    With labels channel c of the logits is index c. With regions (some name has several values)
    channel i is the i-th name other than the background, and channels may overlap.

    Examples:
        >>> scheme = LabelScheme(labels={"vessel": 255, "background": 0}, ignore_label=100)
        >>> scheme.values, scheme.foreground, scheme.structures
        ((0, 255, 100), {'vessel': (1,)}, {'vessel': (255,)})
        >>> scheme.to_indices(np.array([0, 255, 100]), "mask.png").tolist()
        [0, 1, 2]
    """

    labels: Mapping[str, int | tuple[int, ...]]
    """Name -> value in the files, or -> several values for a region; "background" has one."""
    regions_class_order: tuple[int, ...] | None = None
    """With regions: value painted for each of them, in order; later ones paint over earlier."""
    ignore_label: int | None = None
    """Value of voxels that count for nothing."""
    origin: str = "labels"
    """What an error message calls the place the scheme comes from."""

    def __post_init__(self) -> None:
        """Check that the values make sense together.

        Raises:
            ConfigError: With one line per problem.
        """
        self._refuse([*self._value_problems(), *self._order_problems()])

    @classmethod
    def from_spec(cls, spec: DatasetSpec) -> LabelScheme:
        """Return the scheme of a dataset, having checked what its cases say is annotated.

        A label "ignore", as nnU-Net spells it, is the ignore label.

        Raises:
            ConfigError: With one line per problem of its labels, or of its cases.
        """
        labels, ignored = dict(spec.labels), spec.ignore_label
        spelled = labels.get("ignore")
        if isinstance(spelled, int) and ignored in (None, spelled):
            ignored = spelled
            del labels["ignore"]
        scheme = cls(
            labels=labels,
            regions_class_order=spec.regions_class_order,
            ignore_label=ignored,
            origin=f"the labels of dataset {spec.name!r}",
        )
        scheme._refuse(scheme._annotation_problems(spec.cases))
        return scheme

    @property
    def has_regions(self) -> bool:
        """Return whether any name stands for several values."""
        return any(isinstance(entry, tuple) and len(entry) > 1 for entry in self.labels.values())

    @property
    def background(self) -> int:
        """Return the background's value in the files."""
        return _values(self.labels["background"])[0]

    @property
    def values(self) -> tuple[int, ...]:
        """Return the value in the files of each index, the ignore label last if there is one."""
        others = sorted(set(self._declared()) - {self.background})
        ignored = () if self.ignore_label is None else (self.ignore_label,)
        return (self.background, *others, *ignored)

    @property
    def ignore_index(self) -> int | None:
        """Return the index of the ignore label."""
        return None if self.ignore_label is None else len(self.values) - 1

    @property
    def structures(self) -> dict[str, tuple[int, ...]]:
        """Return the structures by their values in files: name -> values, background left out."""
        named = {name: _values(entry) for name, entry in self.labels.items()}
        return {name: values for name, values in named.items() if set(values) != {self.background}}

    @property
    def foreground(self) -> dict[str, tuple[int, ...]]:
        """Return the structures by their indices: name -> indices, background left out."""
        index = {value: number for number, value in enumerate(self.values)}
        return {
            name: tuple(index[value] for value in values)
            for name, values in self.structures.items()
        }

    @property
    def channels(self) -> dict[str, int]:
        """Return the logit channel of each structure."""
        if self.has_regions:
            return {name: number for number, name in enumerate(self.structures)}
        return {name: index for name, (index,) in self.foreground.items()}

    @property
    def num_foreground(self) -> int:
        """Return the number of indices that are neither background nor to be ignored: 1 ... N."""
        return len(self._declared()) - 1

    def num_previous(self, configuration: Configuration) -> int:
        """Return how many input channels a network takes for what the stage before it found.

        It is one for each foreground index in a cascade, also with regions; 0 without such a stage.

        Source:
            nnU-Net v2's cascade.
        """
        return 0 if configuration.previous_stage is None else self.num_foreground

    def channel_pairs(self, pairs: Iterable[tuple[str, str]]) -> tuple[tuple[int, int], ...]:
        """Return the indices of pairs of labels, which are their logit channels too.

        Args:
            pairs: Names, such as those of the plans' `left_right`.

        Raises:
            ConfigError: If a name is none of the labels or in several pairs, or labels are regions.
        """
        channels, names = self.channels, [name for pair in pairs for name in pair]
        problems = [
            f"  left_right.pairs has {name!r}; expected the name of a label, once."
            for name in sorted(set(names))
            if name not in channels or names.count(name) > 1
        ]
        if names and self.has_regions:
            problems.append("  left_right.policy is 'swap', but labels are regions; use 'forbid'.")
        self._refuse(problems)
        return tuple((channels[left], channels[right]) for left, right in pairs)

    @property
    def num_logits(self) -> int:
        """Return the number of output channels of the network."""
        return len(self.structures) if self.has_regions else len(self._declared())

    @property
    def regions_order_indices(self) -> tuple[int, ...]:
        """Return `regions_class_order` as indices; empty without regions."""
        if not self.has_regions:
            return ()
        return tuple(self.values.index(value) for value in self.regions_class_order or ())

    @property
    def valid_values(self) -> frozenset[int]:
        """Return every value a segmentation file may hold, the ignore label included."""
        return frozenset(self.values)

    @property
    def index_dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """Return the smallest type that holds every index."""
        return np.min_scalar_type(len(self.values) - 1)

    @property
    def value_dtype(self) -> np.dtype[np.integer[Any]]:
        """Return the type of label maps in files: the smallest that holds every value.

        It is uint8, uint16 or uint32, with a negative value int16 or int32.
        """
        low, high = min(self.values), max(self.values)
        if low >= 0:
            return np.min_scalar_type(high)
        small = np.iinfo(np.int16)
        return np.dtype(np.int16 if low >= small.min and high <= small.max else np.int32)

    def structure_mask(self, annotated_labels: Iterable[str] | None) -> tuple[bool, ...]:
        """Return of each logit channel whether it was annotated; the background always counts so.

        Args:
            annotated_labels: Names of what was drawn; None: everything.
        """
        if annotated_labels is None:
            return (True,) * self.num_logits
        names = set(annotated_labels)
        drawn = {channel for name, channel in self.channels.items() if name in names}
        if not self.has_regions:
            drawn.add(0)
        return tuple(channel in drawn for channel in range(self.num_logits))

    def sought(self, annotated_labels: Iterable[str] | None) -> tuple[tuple[int, ...], ...]:
        """Return the indices of each structure that was annotated.

        Args:
            annotated_labels: Names of what was drawn; None: everything.
        """
        names = set(self.labels if annotated_labels is None else annotated_labels)
        return tuple(indices for name, indices in self.foreground.items() if name in names)

    def check(
        self,
        found_values: Iterable[int],
        where: str,
        annotated_labels: Iterable[str] | None = None,
    ) -> None:
        """Check the values found in a segmentation file.

        Args:
            found_values: Distinct values.
            where: What the message names: a file or a case.
            annotated_labels: Names of what was drawn; None: everything.

        Raises:
            DatasetError: If a value is not one of the dataset's, or belongs to nothing that was
                drawn.
        """
        found = {int(value) for value in found_values}
        if found - self.valid_values:
            raise self._unknown(found, where)
        if annotated_labels is not None:
            self._check_drawn(found, where, tuple(annotated_labels))

    def _unknown(self, found: set[int], where: str) -> DatasetError:
        return DatasetError(
            f"{where}: the segmentation holds {_listed(sorted(found - self.valid_values))}; "
            f"expected only {_listed(sorted(self.valid_values))} ({self._described()}). Correct "
            "the segmentation, or add the values to the labels in dataset.json or the manifest."
        )

    def _check_drawn(self, found: set[int], where: str, names: tuple[str, ...]) -> None:
        drawn = {value for name in names for value in _values(self.labels[name])}
        others = sorted(found - drawn - {self.background, self.ignore_label})
        if others:
            holders = {
                name
                for name, values in self.structures.items()
                if name not in names and set(values) & set(others)
            }
            raise DatasetError(
                f"{where}: the segmentation holds {_listed(others)} "
                f"({', '.join(name for name in self.labels if name in holders)}), but the case is "
                f"said to be annotated only for {', '.join(names)}. Add the name to the case's "
                "annotated_labels, or take the label out of the segmentation."
            )

    def to_indices(self, array: Values, where: str) -> Indices:
        """Turn the values of a file into indices.

        Args:
            array: Label map of any shape, integers.
            where: What a message names: a file or a case.

        Returns:
            Array of the same shape and memory order, of type `index_dtype`; the given one where
            values and type are those asked for.

        Raises:
            DatasetError: If a value is not one of the dataset's.
        """
        values = self.values
        result: Indices | None
        if values == tuple(range(len(values))):
            fits = array.min(initial=0) >= 0 and array.max(initial=0) < len(values)
            result = array.astype(self.index_dtype, copy=False) if fits else None
        else:
            result = places_in(values, array, self.index_dtype)
        if result is None:
            raise self._unknown(set(distinct_values(array).tolist()), where)
        return result

    def to_values(self, indices: Indices) -> Values:
        """Turn indices into the values of files; the reverse of `to_indices`.

        Args:
            indices: Label map of any shape.

        Returns:
            Array of the same shape and memory order, of type `value_dtype`; the given one where
            values and type are those asked for.
        """
        values = self.values
        if values == tuple(range(len(values))):
            return indices.astype(self.value_dtype, copy=False)
        table = np.array(values, dtype=self.value_dtype)
        result: Values = values_at(table, indices)
        return result

    def target(self, segmentation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what the losses compare with.

        Args:
            segmentation: (B, *spatial) integer map of indices.

        Returns:
            With labels a (B, *spatial) int64 map whose ignored voxels are 0, with regions a
            (B, R, *spatial) bool map; and the (B, *spatial) bool map of voxels that count, None
            where the dataset has no ignore label.
        """
        import torch

        ignored = self.ignore_index
        valid = None if ignored is None else segmentation != ignored
        if self.has_regions:
            regions = [_is_any(segmentation, indices) for indices in self.foreground.values()]
            return torch.stack(regions, dim=1), valid
        target = segmentation.long()
        return (target if valid is None else target * valid), valid

    def segment(self, logits: torch.Tensor | NDArray[np.floating[Any]]) -> Indices:
        """Return the map of indices logits stand for.

        Labels: the largest logit wins, the smallest index among equals. Regions: every region
        whose logit is positive (probability above 0.5) is painted in `regions_class_order`.

        Args:
            logits: (L, *spatial).

        Returns:
            (*spatial) array of type `index_dtype`.

        Raises:
            ValueError: If the number of channels is another one.
        """
        if not isinstance(logits, np.ndarray):
            logits = logits.detach().float().cpu().numpy()
        if len(logits) != self.num_logits:
            raise ValueError(f"expected {self.num_logits} logit channels, got {len(logits)}")
        kind = self.index_dtype.type
        result: Indices = np.zeros(logits.shape[1:], dtype=kind)
        if self.has_regions:
            for index, region in zip(self.regions_order_indices, logits, strict=True):
                np.putmask(result, region > 0, index)
            return result
        best = logits[0].copy()
        for index in range(1, len(logits)):
            is_better = (logits[index] > best).view(np.uint8)
            np.maximum(result, is_better * kind(index), out=result)  # indices only grow
            np.maximum(best, logits[index], out=best)
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

    def _refuse(self, problems: list[str]) -> None:
        if problems:
            count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
            raise ConfigError("\n".join([f"{count} in {self.origin}:", *problems]))

    def _value_problems(self) -> list[str]:
        problems = self._background_problems()
        problems += [
            f"  labels.{name} has no value; expected an integer or a list of integers."
            for name, entry in self.labels.items()
            if not _values(entry) and name != "background"
        ]
        declared = self._declared()
        if len(declared) < 2:
            problems.append(
                f"  labels have the values {_listed(declared)}; expected the background's and at "
                "least one more."
            )
        holders = [n for n, entry in self.labels.items() if self.ignore_label in _values(entry)]
        if holders:
            problems.append(
                f"  the ignore label is {self.ignore_label}, which {', '.join(holders)} "
                "has too; expected a value of its own."
            )
        problems += self._size_problems(declared)
        if not self.has_regions:
            problems += self._shared_values()
        return problems

    def _background_problems(self) -> list[str]:
        if "background" not in self.labels:
            return [
                '  labels.background is missing; add the value of the background: "background": 0.'
            ]
        found = _values(self.labels["background"])
        if len(found) != 1:
            return [
                f"  labels.background is {_listed(found)}; expected one value. Give the others "
                "names of their own, or make one of them the ignore label."
            ]
        return []

    def _size_problems(self, declared: list[int]) -> list[str]:
        every = declared if self.ignore_label is None else [*declared, self.ignore_label]
        low, high = min(every, default=0), max(every, default=0)
        problems = []
        if low < _SIGNED.min or high > (_MAX_UNSIGNED if low >= 0 else _SIGNED.max):
            problems.append(
                f"  values reach from {low} to {high}; expected 0 to {_MAX_UNSIGNED}, or "
                f"{_SIGNED.min} to {_SIGNED.max} where some are negative. Renumber them, in the "
                "segmentations too."
            )
        if len(every) > _MAX_INDEX + 1:
            problems.append(
                f"  there are {len(every)} values; at most {_MAX_INDEX + 1} are supported."
            )
        return problems

    def _annotation_problems(self, cases: Mapping[str, CaseFiles]) -> list[str]:
        problems = []
        known = list(self.labels)
        for case, files in cases.items():
            names = files.annotated_labels
            if names is None:
                continue
            problems += [
                f"  case {case!r}: annotated_labels holds {name!r}; expected one of: "
                f"{_listed(known)}.{near_names(name, known)}"
                for name in names
                if name not in self.labels
            ]
            if not set(names) & set(self.structures) and not set(names) - set(known):
                problems.append(
                    f"  case {case!r}: annotated_labels names no structure; expected what "
                    "was drawn. Leave the key out if all was, or leave out the case if nothing was."
                )
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
        if not self.has_regions or self._background_problems():
            return []
        names = list(self.structures)
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


def _listed(values: Iterable[int | str], limit: int = 12) -> str:
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
