"""Plans and descriptions of datasets as nnU-Net v2 writes them, for small models.

For interop_v2_fixtures.py.
"""

from __future__ import annotations

from typing import Any

DATASET, PLANS = "Dataset900_Small", "nnUNetPlans"
Content = dict[str, Any]


def spline(**more: Any) -> Content:
    """Return what a configuration says of resampling by default."""
    result: Content = {}
    for what, order in (("data", 3), ("seg", 1), ("probabilities", 1)):
        result[f"resampling_fn_{what}"] = "resample_data_or_seg_to_shape"
        result[f"resampling_fn_{what}_kwargs"] = {
            "is_seg": what == "seg", "order": order, "order_z": 0, "force_separate_z": None, **more,
        }  # fmt: skip
    return result


def by_torch(**arguments: Any) -> Content:
    """Return what a configuration says of resampling with torch."""
    result: Content = {}
    for what in ("data", "seg", "probabilities"):
        result[f"resampling_fn_{what}"] = "resample_torch_fornnunet"
        result[f"resampling_fn_{what}_kwargs"] = {
            "is_seg": what == "seg", "memefficient_seg_resampling": False, **arguments,
        }  # fmt: skip
    return result


def not_at_all() -> Content:
    """Return what a configuration says that leaves every grid alone."""
    kinds = ("data", "seg", "probabilities")
    names = {f"resampling_fn_{what}": "no_resampling_hack" for what in kinds}
    return {**names, **{f"resampling_fn_{what}_kwargs": {} for what in kinds}}


def configuration_of(
    patch: tuple[int, ...],
    spacing: tuple[float, ...],
    strides: list[list[int]],
    kernels: list[list[int]] | None = None,
    *,
    schemes: tuple[str, ...] = ("CTNormalization", "ZScoreNormalization"),
    masks: tuple[bool, ...] = (False, True),
    residual: bool = False,
    resampling: Content | None = None,
    **more: Any,
) -> Content:
    """Return a configuration as the original's planners write it; axes in network order."""
    dim, stages = len(patch), len(strides)
    network, blocks = "PlainConvUNet", "n_conv_per_stage"
    if residual:
        network, blocks = "ResidualEncoderUNet", "n_blocks_per_stage"
    return {
        "data_identifier": f"{PLANS}_data", "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2, "patch_size": list(patch),
        "median_image_size_in_voxels": [40.0, 36.0, 44.0][:dim], "spacing": list(spacing),
        "normalization_schemes": list(schemes), "use_mask_for_norm": list(masks),
        **(spline() if resampling is None else resampling),
        "batch_dice": dim == 2,
        "architecture": {
            "network_class_name": f"dynamic_network_architectures.architectures.unet.{network}",
            "arch_kwargs": {
                "n_stages": stages,
                "features_per_stage": [min(8 * 2**stage, 20) for stage in range(stages)],
                "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
                "kernel_sizes": kernels or [[3] * dim for _ in strides],
                "strides": strides,
                blocks: [1, 3, 2][:stages] if residual else [2] * stages,
                "n_conv_per_stage_decoder": [1 if residual else 2] * (stages - 1),
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None, "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": None if residual else {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        **more,
    }  # fmt: skip


def plans_of(
    configurations: dict[str, Content],
    *,
    transpose: tuple[int, int, int] = (0, 1, 2),
    reader: str = "SimpleITKIO",
) -> Content:
    """Return plans as the original's planners write them."""
    properties = {
        "max": 300.0, "mean": 80.0, "median": 79.0, "min": 0.0,
        "percentile_00_5": 30.0, "percentile_99_5": 140.0, "std": 40.0,
    }  # fmt: skip
    return {
        "dataset_name": DATASET, "plans_name": PLANS,
        "original_median_spacing_after_transp": [1.3, 1.1, 0.9],
        "original_median_shape_after_transp": [40, 36, 44],
        "image_reader_writer": reader,
        "transpose_forward": list(transpose),
        "transpose_backward": [transpose.index(axis) for axis in range(3)],
        "configurations": configurations,
        "experiment_planner_used": "ExperimentPlanner", "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            str(channel): properties for channel in range(2)
        },
    }  # fmt: skip


def dataset_of(num_labels: int = 3, **more: Any) -> Content:
    """Return the content of a dataset.json."""
    return {
        "channel_names": {"0": "CT", "1": "T2"},
        "labels": {"background": 0, **{f"part_{n}": n for n in range(1, num_labels)}},
        "numTraining": 5,
        "file_ending": ".nii.gz",
        **more,
    }


def regions(num_regions: int) -> Content:
    """Return a dataset.json with regions, each within the one before, and an ignore label."""
    values = list(range(1, num_regions + 1))
    labels: Content = {f"region_{value}": values[value - 1 :] for value in values[:-1]}
    labels = {"background": 0, **labels, "last": values[-1], "ignore": values[-1] + 1}
    return dataset_of(labels=labels, regions_class_order=values)
