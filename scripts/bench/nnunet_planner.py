#!/usr/bin/env python3
"""Plan data sets with nnU-Net; run by the interpreter of an environment that has nnunetv2.

    PYTHON scripts/bench/nnunet_planner.py JOBS RESULTS

JOBS is a JSON list of {"dataset", "fingerprint" or "files", "planners", "gpu_memory_gb",
"target_spacing"}: nnU-Net's dataset.json; its fingerprint, or true to have it taken from the files
the dataset.json lists; the planner classes; options (spacing z, y, x). RESULTS becomes a list of
{"fingerprint", "plans": planner -> plans or {"error"}}.

Networks are built on torch's meta device, so that the estimate of their memory takes no memory.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def reduced(plans: dict[str, Any]) -> dict[str, Any]:
    """Return what decides training; the rest of the plans names functions and classes."""
    return {
        "transpose_forward": plans["transpose_forward"],
        "original_median_spacing": plans["original_median_spacing_after_transp"],
        "intensity": list(plans["foreground_intensity_properties_per_channel"].values()),
        "configurations": {
            name: entry if "inherits_from" in entry else _reduced_configuration(entry)
            for name, entry in plans["configurations"].items()
        },
    }


def _reduced_configuration(entry: dict[str, Any]) -> dict[str, Any]:
    network = entry["architecture"]["arch_kwargs"]
    kept = ("batch_size", "patch_size", "median_image_size_in_voxels", "spacing")
    kept += ("normalization_schemes", "use_mask_for_norm", "batch_dice")
    return {key: entry[key] for key in kept} | {
        "architecture": {
            "network": entry["architecture"]["network_class_name"].rsplit(".", 1)[1],
            "n_stages": network["n_stages"],
            "features_per_stage": network["features_per_stage"],
            "kernel_sizes": network["kernel_sizes"],
            "strides": network["strides"],
            "blocks": network.get("n_conv_per_stage") or network["n_blocks_per_stage"],
            "decoder": network["n_conv_per_stage_decoder"],
        }
    }


def plan(job: dict[str, Any], name: str, root: Path) -> dict[str, Any]:
    """Plan one data set with each of its planners."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import (
        DatasetFingerprintExtractor,
    )

    for folder in FOLDERS[:2]:
        (root / folder / name).mkdir(parents=True)
    (root / FOLDERS[0] / name / "dataset.json").write_text(json.dumps(job["dataset"]))
    file = root / FOLDERS[1] / name / "dataset_fingerprint.json"
    if job.get("files"):
        extractor = DatasetFingerprintExtractor(name, num_processes=1)
        extractor.show_progress_bar = False
        extractor.run()
    else:
        file.write_text(json.dumps(job["fingerprint"]))
    plans = {planner: _plan_with(planner, job, name) for planner in job["planners"]}
    return {"fingerprint": json.loads(file.read_text()), "plans": plans}


def _plan_with(planner: str, job: dict[str, Any], name: str) -> dict[str, Any]:
    import nnunetv2
    import torch
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = os.path.join(nnunetv2.__path__[0], "experiment_planning")
    found = recursive_find_python_class(folder, planner, "nnunetv2.experiment_planning")
    options = {"plans_name": planner}
    if "gpu_memory_gb" in job:
        options["gpu_memory_target_in_gb"] = job["gpu_memory_gb"]
    if "target_spacing" in job:
        options["overwrite_target_spacing"] = job["target_spacing"]
    try:
        with torch.device("meta"):
            return reduced(found(name, **options).plan_experiment())
    except Exception:
        return {"error": traceback.format_exc(limit=-2)}


def main(jobs: Path, results: Path) -> None:
    """Plan every job; what the planners print is dropped."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as root:
        variables = {folder: os.path.join(root, folder) for folder in FOLDERS}
        os.environ.update(variables | {"nnUNet_n_proc_DA": "1"})
        output = []
        real, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115
        for index, job in enumerate(json.loads(jobs.read_text())):
            output.append(plan(job, f"Dataset{index + 1:03d}_Job", Path(root)))
        sys.stdout = real
        results.write_text(json.dumps(output, default=float))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
