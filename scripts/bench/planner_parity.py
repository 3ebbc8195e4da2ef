#!/usr/bin/env python3
"""Plan the data sets of a file and compare with the plans nnU-Net made for them.

    python scripts/bench/planner_parity.py FILE
    python scripts/bench/planner_parity.py --random 40 --seed 1 --peer-python PYTHON [--save FILE]

FILE is a JSON list; each entry has "dataset" (nnU-Net's dataset.json), "fingerprint" (its
fingerprint, axes z, y, x) and "plans" (planner class -> its plans), and may have "gpu_memory_gb"
and "target_spacing" (mm, x, y, z). With --random, that many data sets are made up
(`random_entry`) and planned by the nnU-Net of the environment whose interpreter is given.

Plans are compared with channel names read as nnU-Net reads them, for which CT alone has a scale.
medseg's own rule, which every command uses, normalises parameter maps with the statistics of the
data set: that rule plans too, and may differ in the normalisation of those channels and in nothing
else.

Prints each difference, what the own rule changes, then `equal N of M`: data sets whose plans are
the same with all planners. Exit status 0 if all are and the own rule changes nothing else; 1 if
not; 2 if there is nothing to compare.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medseg.errors import MedsegError
from medseg.plan.channels import NORMALIZATION_BY_NAME, physical_scale
from medseg.plan.planner import make_plans
from medseg.schema.dataset import DatasetSpec
from medseg.schema.fingerprint import CaseFingerprint, Fingerprint, IntensityStatistics
from medseg.schema.plans import Configuration, Plans

PRESETS = {
    "ExperimentPlanner": "nnunet",
    "nnUNetPlannerResEncM": "resenc_m",
    "nnUNetPlannerResEncL": "resenc_l",
    "nnUNetPlannerResEncXL": "resenc_xl",
}
NORMALIZATION = {
    "zscore": "ZScoreNormalization",
    "ct": "CTNormalization",
    "quantitative": "normalisation of parameter maps, which nnU-Net has not",
    "none": "NoNormalization",
    "rescale_0_1": "RescaleTo01Normalization",
    "rgb_0_1": "RGBTo01Normalization",
}
STATISTICS = {"mean": 100, "std": 20, "median": 98, "min": 3, "max": 220}
STATISTICS |= {"percentile_00_5": 40, "percentile_99_5": 170}
"""Intensities of every channel: nnU-Net's planner does not look at them, medseg's for a scale."""
NORMALIZES = re.compile(r"\.(?:normalization_schemes|use_mask_for_norm)\[(\d+)\]: ")
"""A difference in how a channel is normalised; the group is its number."""
MAY_LACK = "original_median_spacing"
"""What the reference plans of a file need not hold."""
NETWORKS = {"plain_unet": "PlainConvUNet", "residual_unet": "ResidualEncoderUNet"}


def read_spec(dataset: dict[str, Any], name: str = "dataset") -> DatasetSpec:
    """Return nnU-Net's dataset.json as a data set."""
    labels = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in dataset["labels"].items()
    }
    channels = dataset.get("channel_names") or dataset["modality"]
    return DatasetSpec(
        name=name,
        channels=tuple(channels.values()),
        labels=labels,
        ignore_label=labels.get("ignore"),
        regions_class_order=dataset.get("regions_class_order"),
    )


def read_fingerprint(fingerprint: dict[str, Any], num_channels: int) -> Fingerprint:
    """Return nnU-Net's fingerprint, its axes z, y, x turned to I, J, K."""
    sizes = zip(fingerprint["spacings"], fingerprint["shapes_after_crop"], strict=True)
    return Fingerprint(
        cases={
            f"case_{index:04d}": CaseFingerprint(
                shape=(x, y, z), shape_cropped=(x, y, z), spacing=(dx, dy, dz)
            )
            for index, ((dz, dy, dx), (z, y, x)) in enumerate(sizes)
        },
        channels=(IntensityStatistics(**STATISTICS),) * num_channels,
        median_relative_size_after_cropping=fingerprint["median_relative_size_after_cropping"],
    )


def as_reference(plans: Plans) -> dict[str, Any]:
    """Return plans in nnU-Net's words."""
    return {
        "transpose_forward": [2 - axis for axis in plans.network_axes],
        "original_median_spacing": plans.original_median_spacing,
        "configurations": {
            name: {"inherits_from": "3d_fullres", "previous_stage": configuration.previous_stage}
            if configuration.previous_stage
            else _configuration_as_reference(configuration)
            for name, configuration in plans.configurations.items()
        },
    }


def _configuration_as_reference(configuration: Configuration) -> dict[str, Any]:
    network = configuration.architecture
    return {
        "batch_size": configuration.batch_size,
        "patch_size": configuration.patch_size,
        "median_image_size_in_voxels": configuration.median_shape,
        "spacing": configuration.spacing,
        "normalization_schemes": [NORMALIZATION[scheme] for scheme in configuration.normalization],
        "use_mask_for_norm": configuration.use_mask_for_norm,
        "batch_dice": configuration.batch_dice,
        "architecture": {
            "network": NETWORKS[network.kind],
            "n_stages": len(network.features),
            "features_per_stage": network.features,
            "kernel_sizes": network.kernel_sizes,
            "strides": network.strides,
            "blocks": network.blocks_encoder,
            "decoder": network.blocks_decoder,
        },
    }


def differences(
    expected: Any, found: Any, where: str = "", *, tolerance: float = 1e-9
) -> Iterator[str]:
    """Yield "place: expected, found" for every difference; numbers agree relatively."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted({*expected, *found}):
            place = f"{where}.{key}" if where else str(key)
            yield from differences(expected.get(key), found.get(key), place, tolerance=tolerance)
    elif isinstance(expected, list) and isinstance(found, (list, tuple)):
        if len(expected) != len(found):
            yield f"{where}: expected {expected}, found {list(found)}"
            return
        for index, pair in enumerate(zip(expected, found, strict=True)):
            yield from differences(*pair, f"{where}[{index}]", tolerance=tolerance)
    elif isinstance(expected, (int, float)) and isinstance(found, (int, float)):
        if not math.isclose(expected, found, rel_tol=tolerance):
            yield f"{where}: expected {expected}, found {found}"
    elif expected != found:
        yield f"{where}: expected {expected}, found {found}"


def compare(entry: dict[str, Any], *, quantitative: bool = False) -> Iterator[str]:
    """Yield every difference between the plans of one entry and ours.

    Args:
        entry: Data set, fingerprint and plans.
        quantitative: Plan with medseg's own rule for parameter maps, as every command does.
    """
    spec = read_spec(entry["dataset"])
    fingerprint = read_fingerprint(entry["fingerprint"], len(spec.channels))
    options = {k: entry[k] for k in ("gpu_memory_gb", "target_spacing") if k in entry}
    if not entry["plans"]:
        yield "no plans to compare with"
    for planner, expected in entry["plans"].items():
        if "error" in expected:
            yield f"{planner}: nnU-Net itself failed: {expected['error']}"
            continue
        try:
            preset = PRESETS[planner]
            plans = make_plans(fingerprint, spec, name=preset, quantitative=quantitative, **options)
        except MedsegError as error:
            yield f"{planner}: {error}"
            continue
        wanted = {key: v for key, v in expected.items() if key != "intensity"}
        found = as_reference(plans)
        if MAY_LACK not in expected:
            del found[MAY_LACK]
        for difference in differences(wanted, found):
            yield f"{planner}: {difference}"


def by_own_rule(found: Iterable[str], channels: Sequence[str]) -> tuple[set[str], list[str]]:
    """Sort differences of plans made with medseg's own rule for parameter maps.

    Returns:
        The channels that are normalised otherwise because their names stand for a physical scale
        that nnU-Net does not know; and all differences besides.
    """
    maps, others = set(), []
    for difference in found:
        match = NORMALIZES.search(difference)
        name = channels[int(match[1])] if match else ""
        if physical_scale(name) and name.casefold() not in NORMALIZATION_BY_NAME:
            maps.add(name)
        else:
            others.append(difference)
    return maps, others


def own_rule_in_words(changed: Sequence[set[str]]) -> str:
    """Return what the own rule changes, from the channels it changes in each data set."""
    names = ", ".join(sorted(set().union(*changed)))
    where = f", in the normalisation of {names} alone" if names else ""
    differing = sum(map(bool, changed))
    return f"with the shipped rule for parameter maps: {differing} of {len(changed)} differ{where}"


# Made-up data sets

KINDS: dict[str, tuple[tuple[float, ...], tuple[float, ...], float]] = {
    "ct": ((280, 512, 512), (1.5, 0.8, 0.8), 0.2),
    "ct_thin": ((700, 512, 512), (0.6, 0.7, 0.7), 0.2),
    "mr_iso": ((180, 240, 200), (1.0, 1.0, 1.0), 0.1),
    "mr_equal": ((160, 160, 160), (1.0, 1.0, 1.0), 0.0),
    "mr_axial": ((28, 384, 320), (5.0, 0.6, 0.7), 0.15),
    "mr_sagittal": ((448, 512, 17), (0.5, 0.5, 4.0), 0.1),
    "mr_coronal": ((256, 24, 320), (0.9, 3.6, 0.8), 0.15),
    "cardiac": ((10, 230, 210), (9.0, 1.4, 1.4), 0.3),
    "mixed": ((60, 200, 180), (3.0, 1.0, 1.0), 0.6),
    "spine": ((1400, 90, 90), (0.4, 0.8, 0.8), 0.2),
    "tiny": ((9, 13, 11), (1.2, 1.0, 0.9), 0.2),
    "small": ((36, 50, 35), (1.0, 1.0, 1.0), 0.05),
    "few_slices": ((3, 300, 260), (8.0, 0.7, 0.7), 0.2),
    "whole_body": ((1100, 512, 512), (1.0, 1.3, 1.3), 0.1),
    "microscopy": ((2000, 2000, 2000), (0.001, 0.001, 0.001), 0.05),
    "nanometres": ((120, 1500, 1500), (50.0, 4.0, 4.0), 0.1),
    "2d": ((1, 700, 600), (999.0, 1.0, 1.0), 0.3),
    "2d_small": ((1, 40, 64), (999.0, 1.0, 1.0), 0.1),
    "2d_large": ((1, 6000, 4000), (999.0, 1.0, 1.0), 0.1),
    "2d_wide": ((1, 96, 1500), (10.0, 0.1, 0.4), 0.1),
}
"""Kind -> shape and spacing of a middle case (z, y, x), and how much cases differ.

Single slices always have the largest voxels across the slice: elsewhere nnU-Net plans them as
volumes, and medseg does not, on purpose.
"""
CHANNELS = ("CT", "ct", "T1w", "FLAIR", "ADC", "noNorm", "zscore", "rescale_to_0_1")
MEMORY_GB = (4, 8, 11, 16, 24, 40, 80)


def random_entry(rng: np.random.Generator, kind: str) -> dict[str, Any]:
    """Return a made-up data set of a kind: dataset.json, fingerprint, planners, options."""
    shape, spacing, spread = (np.array(v) for v in KINDS[kind])
    num_cases = int(rng.choice([1, 2, 3, 8, 20, 60, 200, 900]))
    shared = np.exp(rng.normal(0, spread / 2, 3))
    fixed = spread == 0 or kind.startswith("2d")
    factors = np.exp(rng.normal(0, spread / 2, (num_cases, 3)))
    spacings = np.where(fixed, spacing, np.round(spacing * shared * np.sqrt(factors), 5))
    shapes = np.round(shape * np.where(shape == 1, 1, shared / factors)).astype(int)
    entry = {
        "kind": kind,
        "dataset": _random_dataset(rng, num_cases),
        "fingerprint": {
            "spacings": spacings.tolist(),
            "shapes_after_crop": np.maximum(shapes, np.where(shape == 1, 1, 2)).tolist(),
            "median_relative_size_after_cropping": float(rng.choice([0.3, 0.74, 0.75, 1.0])),
        },
        "planners": [str(v) for v in rng.permutation(list(PRESETS))[: int(rng.integers(1, 4))]],
    }
    if rng.random() < 0.5:
        entry["gpu_memory_gb"] = float(rng.choice(MEMORY_GB))
    if rng.random() < 0.15 and shape.min() > 1:
        entry["target_spacing"] = np.round(spacing[::-1] * rng.uniform(0.7, 2.5, 3), 3).tolist()
    return entry


def _random_dataset(rng: np.random.Generator, num_cases: int) -> dict[str, Any]:
    num_labels = int(rng.choice([1, 2, 5, 20, 117]))
    labels: dict[str, Any] = {"background": 0}
    has_regions = rng.random() < 0.3
    for value in range(1, num_labels + 1):
        labels[f"l{value}"] = list(range(value, num_labels + 1)) if has_regions else value
    if rng.random() < 0.3:
        labels["ignore"] = num_labels + 1
    names = ["R", "G", "B"] if rng.random() < 0.1 else rng.choice(CHANNELS, rng.integers(1, 5))
    dataset: dict[str, Any] = {
        "channel_names": {str(index): str(name) for index, name in enumerate(names)},
        "labels": labels,
        "numTraining": num_cases,
        "file_ending": ".nii.gz",
    }
    if has_regions:
        dataset["regions_class_order"] = list(range(1, num_labels + 1))
    return dataset


def random_entries(number: int, seed: int, python: str) -> list[dict[str, Any]]:
    """Return made-up data sets of all kinds in turn, planned by nnU-Net."""
    rng = np.random.default_rng(seed)
    kinds = [str(kind) for _ in range(0, number, len(KINDS)) for kind in rng.permutation([*KINDS])]
    entries = [random_entry(rng, kind) for kind in kinds[:number]]
    for index, (entry, result) in enumerate(
        zip(entries, planned_by_peer(map(_job, entries), python), strict=True)
    ):
        entry.update(seed=f"{seed}/{index}", plans=result["plans"])
    return entries


def planned_by_peer(jobs: Iterable[dict[str, Any]], python: str) -> list[dict[str, Any]]:
    """Return fingerprint and plans of each job, made by the nnU-Net of another environment."""
    script = Path(__file__).with_name("nnunet_planner.py")
    with tempfile.TemporaryDirectory() as folder:
        listed, results = Path(folder) / "jobs.json", Path(folder) / "results.json"
        listed.write_text(json.dumps(list(jobs)))
        command = [python, str(script), str(listed), str(results)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return list(json.loads(results.read_text()))


def _job(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry as nnU-Net takes it: no image is read, spacing is z, y, x."""
    bare = {"case": {"images": ["none_0000.nii.gz"], "label": "none.nii.gz"}}
    plain = {"overwrite_image_reader_writer": "SimpleITKIO", "dataset": bare}
    statistics = dict.fromkeys(("mean", "std", "median", "min", "max"), 0.0)
    properties = dict.fromkeys(entry["dataset"]["channel_names"], statistics)
    return {
        **entry,
        "dataset": {**plain, **entry["dataset"]},
        "fingerprint": {
            **entry.get("fingerprint", {}),
            "foreground_intensity_properties_per_channel": properties,
        },
        **({"target_spacing": entry["target_spacing"][::-1]} if "target_spacing" in entry else {}),
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE")
    parser.add_argument("--random", type=int, metavar="N", help="number of made-up data sets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer-python", metavar="PYTHON", help="interpreter that has nnunetv2")
    parser.add_argument("--save", type=Path, metavar="FILE", help="where to keep what was made")
    options = parser.parse_args(arguments)
    if (options.file is None) == (options.random is None):
        parser.error("expected either FILE or --random N")
    if options.random is not None and options.peer_python is None:
        parser.error("--random needs --peer-python")
    return options


def main(arguments: list[str]) -> int:
    """Compare every entry."""
    options = parse(arguments)
    if options.file is not None:
        entries = json.loads(options.file.read_text(encoding="utf-8"))
    else:
        entries = random_entries(options.random, options.seed, options.peer_python)
    if options.save is not None:
        options.save.write_text(json.dumps(entries))
    if not entries:
        print("no data sets: there is nothing to compare", file=sys.stderr)
        return 2
    return judge(entries)


def judge(entries: Sequence[dict[str, Any]]) -> int:
    """Print how the plans of every entry compare and return the exit status."""
    num_equal, num_others, slowest = 0, 0, 0.0
    changed = []
    for index, entry in enumerate(entries):
        start = time.perf_counter()
        found = list(compare(entry))
        slowest = max(slowest, (time.perf_counter() - start) / max(len(entry["plans"]), 1))
        num_equal += not found
        own = compare(entry, quantitative=True)
        maps, others = by_own_rule(own, read_spec(entry["dataset"]).channels)
        others = [line for line in others if line not in found]
        changed.append(maps)
        num_others += len(others)
        for line in (*found, *(f"with the shipped rule: {line}" for line in others)):
            print(f"{entry.get('seed', index)} {entry.get('kind', '')}: {line}")
    num_plans = sum(len(entry["plans"]) for entry in entries)
    print(f"{num_plans} plans; slowest {slowest:.2f} s")
    if num_others:
        print(
            f"the shipped rule changes more than the normalisation of maps, in {num_others} places"
        )
    else:
        print(own_rule_in_words(changed))
    print(f"equal {num_equal} of {len(entries)}")
    return 0 if num_equal == len(entries) and not num_others else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
