"""Commands of nnU-Net typed after `medseg`: each is answered with what does its work here.

The same list, with more words, is the table of docs/how-to/coming-from-nnunet.md.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

_NO_CONVERSION = "nothing to convert: give the folder as it is"
_NO_TRIALS = "no postprocessing is tried out; what an imported model brings is applied"
_PICTURES = (
    "medseg dataset check DATASET",
    "it writes a page with pictures of every case, and looks for problems",
)
_COMPARE = (
    "medseg crossval DATASET CONFIG",
    "once for each configuration; nothing chooses among them for you",
)
_ENSEMBLE = (
    "medseg predict -i IMAGES -o OUT -m MODEL -m OTHER",
    "it averages the models while it predicts; stored probabilities are not read",
)
_FROM_URL = (
    "medseg import nnunet FILE.zip -o BUNDLE",
    "after you have downloaded FILE.zip yourself; public models by name: medseg models list",
)
HABITS: dict[str, tuple[str, str]] = {
    # version 2
    "nnUNetv2_plan_and_preprocess": ("medseg plan-and-preprocess DATASET", ""),
    "nnUNetv2_extract_fingerprint": ("medseg fingerprint DATASET", ""),
    "nnUNetv2_plan_experiment": ("medseg plan DATASET", ""),
    "nnUNetv2_preprocess": ("medseg preprocess DATASET", ""),
    "nnUNetv2_move_plans_between_datasets": (
        "medseg plan DATASET --from FILE --plans NAME",
        "FILE is the plans file, or a model",
    ),
    "nnUNetv2_convert_MSD_dataset": ("medseg plan-and-preprocess FOLDER", _NO_CONVERSION),
    "nnUNetv2_convert_old_nnUNet_dataset": ("medseg plan-and-preprocess FOLDER", _NO_CONVERSION),
    "nnUNetv2_plot_overlay_pngs": _PICTURES,
    "nnUNetv2_train": (
        "medseg train DATASET CONFIG FOLD",
        "the same command again goes on where it stopped",
    ),
    "nnUNetv2_accumulate_crossval_results": ("medseg crossval DATASET CONFIG", ""),
    "nnUNetv2_find_best_configuration": _COMPARE,
    "nnUNetv2_determine_postprocessing": ("", _NO_TRIALS),
    "nnUNetv2_apply_postprocessing": (
        "medseg predict -i IMAGES -o OUT -m MODEL",
        "it applies what the model holds, unless --no-postprocess",
    ),
    "nnUNetv2_predict": ("medseg predict -i IMAGES -o OUT -m MODEL", ""),
    "nnUNetv2_predict_from_modelfolder": (
        "medseg predict -i IMAGES -o OUT -m FOLDER",
        "FOLDER is the model's as nnU-Net left it; --exact computes as nnU-Net does",
    ),
    "nnUNetv2_ensemble": _ENSEMBLE,
    "nnUNetv2_evaluate_folder": (
        "medseg evaluate PRED REF -o FILE",
        "predictions come first here",
    ),
    "nnUNetv2_evaluate_simple": (
        "medseg evaluate PRED REF -o FILE",
        "predictions come first here; labels are found by themselves",
    ),
    "nnUNetv2_export_model_to_zip": (
        "medseg bundle pack MODEL -o FILE.zip",
        "for programs that read nnU-Net's folders: medseg export MODEL --format nnunet -o OUT",
    ),
    "nnUNetv2_install_pretrained_model_from_zip": (
        "medseg import nnunet FILE.zip -o BUNDLE",
        "",
    ),
    "nnUNetv2_download_pretrained_model_by_url": _FROM_URL,
    # version 1
    "nnUNet_plan_and_preprocess": ("medseg plan-and-preprocess DATASET", ""),
    "nnUNet_convert_decathlon_task": ("medseg plan-and-preprocess FOLDER", _NO_CONVERSION),
    "nnUNet_plot_task_pngs": _PICTURES,
    "nnUNet_train": (
        "medseg train DATASET CONFIG FOLD",
        "the dataset comes first here; the same command again goes on where it stopped",
    ),
    "nnUNet_train_DDP": ("medseg train DATASET CONFIG FOLD --gpus N", ""),
    "nnUNet_train_DP": ("medseg train DATASET CONFIG FOLD --gpus N", ""),
    "nnUNet_change_trainer_class": (
        "",
        "nothing depends on a trainer's class: a bundle holds the network and all steps around it",
    ),
    "nnUNet_find_best_configuration": _COMPARE,
    "nnUNet_determine_postprocessing": ("", _NO_TRIALS),
    "nnUNet_predict": (
        "medseg predict -i IMAGES -o OUT -m MODEL",
        "MODEL may be the trained model's folder as it is; --exact computes as nnU-Net does",
    ),
    "nnUNet_ensemble": _ENSEMBLE,
    "nnUNet_evaluate_folder": (
        "medseg evaluate PRED REF -o FILE",
        "labels are found by themselves",
    ),
    "nnUNet_export_model_to_zip": ("medseg bundle pack MODEL -o FILE.zip", ""),
    "nnUNet_install_pretrained_model_from_zip": ("medseg import nnunet FILE.zip -o BUNDLE", ""),
    "nnUNet_download_pretrained_model": (
        "medseg models fetch NAME",
        "it downloads, verifies and imports",
    ),
    "nnUNet_download_pretrained_model_by_url": _FROM_URL,
    "nnUNet_print_available_pretrained_models": ("medseg models list", ""),
    "nnUNet_print_pretrained_model_info": ("medseg models info NAME", ""),
}
"""Command of nnU-Net -> the command line that does its work, empty where there is none; and what
else to know, in words."""


class Commands(TyperGroup):
    """The top command, which knows what those who come from nnU-Net mean."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that is meant; a command of nnU-Net is answered with ours."""
        if args and (answer := answer_to(args[0])) is not None:
            ctx.fail(answer)
        return super().resolve_command(ctx, args)


def answer_to(name: str) -> str | None:
    """Return what to say to a command of nnU-Net; None where it is none.

    Examples:
        >>> answer_to("nnUNet_print_available_pretrained_models")
        'nnUNet_print_available_pretrained_models is a command of nnU-Net; here: medseg models list'
        >>> answer_to("predict")
    """
    if name not in HABITS:
        return None
    ours, more = HABITS[name]
    told = f"here: {ours}" if ours else f"there is none like it here: {more}"
    remark = f" ({more})" if ours and more else ""
    return f"{name} is a command of nnU-Net; {told}{remark}"
