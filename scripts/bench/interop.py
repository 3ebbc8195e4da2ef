#!/usr/bin/env python3
"""Import models of nnU-Net, predict with them, and compare with what the originals predicted.

    python scripts/bench/interop.py --fixtures DIR [DIR ...] [--output FILE]
    python scripts/bench/interop.py --dataset HIPPOCAMPUS --peer-python PY [--work DIR]
        [--pretrained BUNDLE] [--rounds 3] [--cases 60] [--steps 60] [--threads 2] [--output FILE]

Fixtures: each sub-folder of DIR holds a model (of version 1 or 2, anywhere in it), in/ with the
channels of one case, out/ with what the original predicted on a CPU (case.nii.gz; resampled.npy,
probabilities of the cropped box; or case.npz), and prev/case.nii.gz where a cascade wants it.
scripts/bench/interop_v1_fixtures.py writes such folders. Judged: in exact mode the largest
difference of a probability and the labels, by default the share of labels that differ.

Against nnU-Net: a model that its own trainer trained for --steps steps (nnunet_predict.py) is
imported; so few find something only if they go on from a trained model, --pretrained, which medseg
exports for nnU-Net; both sides segment the same images by their own commands, in turn, with
mirroring and without, from the start of the process to its end. Judged: Dice of the two label maps
of each case (mean over labels), by default and with --exact, how many times faster medseg is, and
that the model finds something in every case.

Each limit is judged on a line that begins with "met" or "short"; exit status 0 if all are met, 1 if
not.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from costs import Spent, bind, keep, measured
from numpy.typing import NDArray
from peer import MEDSEG, judge, run
from predict import MIN_SPEED, WORDS, _ours, _peer_model, _theirs, link_images
from predict_alone import case_dice, emptied, mean_dice

import medseg
from medseg.api.importing import import_nnunet, list_nnunet

MAX_DIFFERENCE = 1e-5
"""Of a probability, in exact mode."""
MAX_CHANGED = 0.001
"""Share of labels, by default."""
MIN_DICE = 0.999
"""Of the worst case."""
Figures = dict[str, Any]


def main() -> int:
    """Measure, print and judge."""
    options = _options()
    bind(options.threads)
    root = options.work or Path(tempfile.mkdtemp(prefix="medseg-bench-"))
    root.mkdir(parents=True, exist_ok=True)
    figures: Figures = {"threads": options.threads}
    verdicts: dict[str, bool] = {}
    for folder in options.fixtures:
        for fixture in sorted(path.parent for path in folder.glob("*/out")):
            figures[fixture.name], found = _fixture(fixture, root / "bundles" / fixture.name)
            verdicts |= found
    if options.dataset is not None:
        figures["trained"], found = _trained(options, root)
        verdicts |= found
    return keep(options.output, figures, verdicts)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fixtures", type=Path, nargs="+", default=[])
    parser.add_argument("--dataset", type=Path, help="Hippocampus, as the Decathlon has it.")
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--peer-model", type=Path, help="nnU-Net's model folder, fold 0.")
    parser.add_argument(
        "--pretrained", type=Path, help="Bundle whose weights training goes on from."
    )
    parser.add_argument("--peer-workers", type=int, default=3, help="Its -npp and -nps.")
    parser.add_argument("--work", type=Path, help="Kept; what is in it is not made again.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--steps", type=int, default=60, help="Training steps.")
    parser.add_argument("--threads", type=int, default=2, help="Cores of each side.")
    parser.add_argument("--output", type=Path, help="Where the figures are written, as JSON.")
    options = parser.parse_args()
    if options.dataset is None and not options.fixtures:
        parser.error("nothing to do: give --fixtures, or --dataset and --peer-python")
    if options.dataset is not None and options.peer_python is None:
        parser.error("--dataset needs --peer-python")
    return options


def _fixture(folder: Path, output: Path) -> tuple[Figures, dict[str, bool]]:
    """Compare one imported model with what the original predicted."""
    models = [model for model in list_nnunet(folder) if model.configuration != "3d_lowres"]
    bundle = import_nnunet(models[0].folder, output)
    images = sorted((folder / "in").glob("*.nii.gz"))
    before = folder / "prev/case.nii.gz"
    wanted = np.asarray(nib.load(folder / "out/case.nii.gz").dataobj)
    figures: Figures = {}
    for mode in ("exact", "default"):
        model = medseg.load(bundle.folder, mode=mode, device="cpu")
        found = model.predict(
            images,
            previous_stage=before if before.is_file() else None,
            probabilities=True,
            tta="flips",
        )
        figures[mode] = {
            "largest": _largest_difference(
                folder / "out", found, is_turned=bundle.manifest.orientation == "canonical"
            ),
            "labels": int(np.count_nonzero(found.segmentation != wanted)),
            "voxels": int(wanted.size),
            "precision": model.precision,
        }
    exact, usual = figures["exact"], figures["default"]
    share = usual["labels"] / usual["voxels"]
    return figures, {
        f"{folder.name} exact": judge(
            f"{folder.name}, exact: largest difference of a probability {exact['largest']:.1e}, at "
            f"most {MAX_DIFFERENCE:g} wanted; {exact['labels']} of {exact['voxels']} labels differ",
            is_met=exact["largest"] <= MAX_DIFFERENCE and exact["labels"] == 0,
        ),
        f"{folder.name} default": judge(
            f"{folder.name}, default ({usual['precision']}): {share:.3%} of the labels differ, at "
            f"most {MAX_CHANGED:.1%} wanted; largest difference of a probability "
            f"{usual['largest']:.1e}",
            is_met=share <= MAX_CHANGED,
        ),
    }


def _largest_difference(folder: Path, found: medseg.Result, *, is_turned: bool) -> float:
    """Return the largest difference of a probability, in the box that the original kept.

    A reader that turns images leaves the original's probabilities in its own frame.
    """
    own = found.probabilities
    if own is None:
        raise ValueError("there are no probabilities")
    if is_turned:
        turns = nib.orientations.io_orientation(nib.load(folder / "case.nii.gz").affine)
        own = np.stack([nib.orientations.apply_orientation(part, turns) for part in own])
    if (folder / "resampled.npy").is_file():
        theirs = np.load(folder / "resampled.npy")
        order = [found.record.axes.index(axis) for axis in range(3)]
        box = tuple(slice(*found.record.box[d]) for d in order)
        own = own[(slice(None), *box)]
    else:
        theirs = np.load(folder / "case.npz")["probabilities"]
    return float(np.abs(own.astype(np.float64) - theirs.transpose(0, 3, 2, 1)).max())


def _trained(options: argparse.Namespace, root: Path) -> tuple[Figures, dict[str, bool]]:
    """Compare an imported model with the original, both at work on the same images."""
    theirs = options.peer_model or _made(options, root)
    bundle = emptied(root / "imported")
    shutil.rmtree(bundle)
    run([*MEDSEG, "import", "nnunet", theirs, "-o", bundle, "--folds", "0"])
    images = link_images(options.dataset, root / "images", options.cases)
    figures: Figures = {"cases": len(images)}
    verdicts: dict[str, bool] = {}
    for tta, words in WORDS.items():
        spent: dict[str, list[Spent]] = {"medseg": [], "nnU-Net": []}
        for number in range(options.rounds):
            spent["medseg"].append(_ours(root, bundle, tta))
            spent["nnU-Net"].append(_theirs(options, root, theirs, tta))
            last = ", ".join(f"{side} {runs[-1]}" for side, runs in spent.items())
            print(f"round {number + 1}, {words}: {last}", flush=True)
        fast, slow = (statistics.median(s.seconds for s in spent[side]) for side in spent)
        figures[tta] = {"medseg": fast, "nnU-Net": slow, "dice": _agreement(root, images)}
        verdicts[f"speed {tta}"] = judge(
            f"{words}: medseg {fast:.2f} s, nnU-Net {slow:.2f} s, {slow / fast:.2f} times faster, "
            f"at least {MIN_SPEED[tta]:g} wanted",
            is_met=slow / fast >= MIN_SPEED[tta],
        )
        figures[tta]["truth"] = mean_dice(images, root / "predicted_nnU-Net")
        empty = [case for case in images if not _labels(_theirs_of(root, case)).any()]
        verdicts[f"finds {tta}"] = judge(
            f"{words}: nnU-Net finds something in {len(images) - len(empty)} of {len(images)} "
            f"cases, mean Dice to the reference {figures[tta]['truth']:.4f}",
            is_met=not empty,
        )
        verdicts[f"dice {tta}"] = _judged(f"{words}, default", figures[tta]["dice"])
        output = emptied(root / "predicted_medseg")
        command = [*MEDSEG, "predict", "-i", root / "images", "-o", output, "-m", bundle]
        run([*command, "--tta", tta, "--exact", "--device", "cpu"])
        figures[tta]["dice exact"] = _agreement(root, images)
        verdicts[f"dice exact {tta}"] = _judged(f"{words}, exact", figures[tta]["dice exact"])
    return figures, verdicts


def _made(options: argparse.Namespace, root: Path) -> Path:
    """Return a model folder of nnU-Net's trainer; what is there is used again."""
    if options.pretrained is None:
        return _peer_model(options, root)
    told = root / f"peer_model_from_{options.steps}.txt"
    if not told.is_file():
        export = root / "pretrained"
        run([*MEDSEG, "export", options.pretrained, "--format", "nnunet", "-o", export])
        script = Path(__file__).with_name("nnunet_predict.py")
        checkpoint = next(export.glob("fold_*/checkpoint_final.pth"))
        command = [options.peer_python, script, "train", options.dataset, "--work", root / "peer"]
        command += ["--steps", str(options.steps), "--pretrained", checkpoint, "--output", told]
        measured(command, log=root / "nnunet_train.log")
    return Path(told.read_text())


def _agreement(root: Path, images: dict[str, Path]) -> dict[str, float]:
    """Return the Dice of both sides' label maps of each case."""
    return {
        case: case_dice(
            _labels(root / f"predicted_medseg/{case}.nii.gz"), _labels(_theirs_of(root, case))
        )
        for case in images
    }


def _theirs_of(root: Path, case: str) -> Path:
    return root / f"predicted_nnU-Net/{case}.nii.gz"


def _labels(path: Path) -> NDArray[Any]:
    return np.asarray(nib.load(path).dataobj)


def _judged(words: str, dice: dict[str, float]) -> bool:
    worst = min(dice, key=dice.__getitem__)
    return judge(
        f"{words}: Dice of both label maps {dice[worst]:.5f} in the worst case ({worst}), mean "
        f"{statistics.fmean(dice.values()):.5f}; at least {MIN_DICE:g} wanted in every case",
        is_met=dice[worst] >= MIN_DICE,
    )


if __name__ == "__main__":
    sys.exit(main())
