#!/usr/bin/env python3
"""Plan the data sets of a file and compare with the plans nnU-Net made for them.

    python scripts/bench/planner_parity.py FILE

FILE is a JSON list; each entry has "dataset" (nnU-Net's dataset.json), "fingerprint" (its
fingerprint, axes z, y, x) and "plans" (planner class -> its plans). Prints each difference, then
`equal N of M`: data sets whose plans are the same with all planners. Exit status 0 if all are.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medseg.errors import MedsegError
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
    "none": "NoNormalization",
    "rescale_0_1": "RescaleTo01Normalization",
    "rgb_0_1": "RGBTo01Normalization",
}
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
    zero = dict.fromkeys(IntensityStatistics.model_fields, 0.0)
    sizes = zip(fingerprint["spacings"], fingerprint["shapes_after_crop"], strict=True)
    return Fingerprint(
        cases={
            f"case_{index:04d}": CaseFingerprint(
                shape=(x, y, z), shape_cropped=(x, y, z), spacing=(dx, dy, dz)
            )
            for index, ((dz, dy, dx), (z, y, x)) in enumerate(sizes)
        },
        channels=(IntensityStatistics(**zero),) * num_channels,
        median_relative_size_after_cropping=fingerprint["median_relative_size_after_cropping"],
    )


def as_reference(plans: Plans) -> dict[str, Any]:
    """Return plans in nnU-Net's words."""
    return {
        "transpose_forward": [2 - axis for axis in plans.network_axes],
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


def differences(expected: Any, found: Any, where: str = "") -> Iterator[str]:
    """Yield "place: expected, found" for every difference; numbers agree to 1e-9."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted({*expected, *found}):
            place = f"{where}.{key}" if where else str(key)
            yield from differences(expected.get(key), found.get(key), place)
    elif isinstance(expected, list) and isinstance(found, (list, tuple)):
        if len(expected) != len(found):
            yield f"{where}: expected {expected}, found {list(found)}"
            return
        for index, pair in enumerate(zip(expected, found, strict=True)):
            yield from differences(*pair, f"{where}[{index}]")
    elif isinstance(expected, (int, float)) and isinstance(found, (int, float)):
        if not math.isclose(expected, found, rel_tol=1e-9):
            yield f"{where}: expected {expected}, found {found}"
    elif expected != found:
        yield f"{where}: expected {expected}, found {found}"


def compare(entry: dict[str, Any]) -> Iterator[str]:
    """Yield every difference between the plans of one entry and ours."""
    spec = read_spec(entry["dataset"])
    fingerprint = read_fingerprint(entry["fingerprint"], len(spec.channels))
    options = {k: entry[k] for k in ("gpu_memory_gb", "target_spacing") if k in entry}
    for planner, expected in entry["plans"].items():
        try:
            plans = make_plans(fingerprint, spec, name=PRESETS[planner], **options)
        except MedsegError as error:
            yield f"{planner}: {error}"
            continue
        for difference in differences(expected, as_reference(plans)):
            yield f"{planner}: {difference}"


def main(arguments: list[str]) -> int:
    """Compare every entry of the file."""
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    entries = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    num_equal, slowest = 0, 0.0
    for index, entry in enumerate(entries):
        start = time.perf_counter()
        found = list(compare(entry))
        slowest = max(slowest, (time.perf_counter() - start) / max(len(entry["plans"]), 1))
        num_equal += not found
        for difference in found:
            print(f"{entry.get('seed', index)} {entry.get('kind', '')}: {difference}")
    num_plans = sum(len(entry["plans"]) for entry in entries)
    print(f"{num_plans} plans; slowest {slowest:.2f} s")
    print(f"equal {num_equal} of {len(entries)}")
    return 0 if num_equal == len(entries) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
