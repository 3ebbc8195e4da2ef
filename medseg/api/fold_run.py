"""What the training of a fold is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from medseg.api.lengths import RequestedLength
from medseg.augment.settings import Mirroring, is_anisotropic, mirroring
from medseg.data.splits import Split
from medseg.data.workspace import DatasetFolder
from medseg.schema.plans import Configuration, Plans
from medseg.schema.recipe import Recipe
from medseg.train.distributed import Processes


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldRun:
    """One fold of a run, and everything its training is told."""

    folder: DatasetFolder
    plans: Plans
    """Plans with the one configuration, as the recipe changed it."""
    config: str
    recipe: Recipe
    recipe_name: str
    path: Path
    """The run's folder."""
    fold: str
    """fold_0 ... or all."""
    split: Split
    seed: int | None
    device: str
    length: RequestedLength
    extends: bool = False
    """Whether a finished fold is trained on."""
    validate_every: int | None = None
    """Epochs between two validations at full volume; None: at the end alone."""
    init_from: Path | None = None
    """Bundle whose weights the network starts from."""
    trackers: tuple[str, ...] = ()
    """Services that are told of every epoch: tensorboard, wandb, mlflow."""
    neighbours: int = 1
    """Trainings on this machine that share its memory, this one included."""
    started: float
    """`time.monotonic()` that the budget counts from."""
    progress: bool
    processes: Processes = Processes()  # noqa: RUF009 - a frozen value
    """The processes that train this fold."""

    @property
    def fold_path(self) -> Path:
        """Return the fold's folder."""
        return self.path / self.fold

    @property
    def weights_path(self) -> Path:
        """Return the folder of the fold's finished weights."""
        return self.fold_path / "weights"

    @property
    def checkpoints_path(self) -> Path:
        """Return the folder of the fold's checkpoints."""
        return self.fold_path / "checkpoints"

    @property
    def configuration(self) -> Configuration:
        """Return the configuration that is trained."""
        return self.plans.configurations[self.config]

    @property
    def mirroring(self) -> Mirroring:
        """Return what is mirrored, in training and prediction."""
        patch_size = self.configuration.patch_size
        return mirroring(
            self.recipe.augmentation,
            patch_size,
            dummy_2d=is_anisotropic(patch_size),
            left_right=self.plans.left_right,
        )

    @property
    def num_sharing(self) -> int:
        """Return the processes that share this machine's memory and processors."""
        return self.processes.count * self.neighbours

    @property
    def batch_size(self) -> int:
        """Return the patches of a step, over all processes."""
        return self.recipe.sampling.batch_size or self.configuration.batch_size


def trained_weights(run: FoldRun) -> dict[str, Path]:
    """Return checkpoint -> weight file of a fold, empty if it is not trained."""
    names = ("final", "best")
    paths = {name: run.weights_path / f"{name}.safetensors" for name in names}
    return {name: path for name, path in paths.items() if path.is_file()}


def fold_names(path: Path) -> Iterator[str]:
    """Yield the folds that a run's folder holds."""
    for entry in sorted(path.glob("*")):
        if entry.name == "all" or entry.name.startswith("fold_"):
            yield entry.name
