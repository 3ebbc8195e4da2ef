"""medseg: from a folder of labelled medical images to a validated segmentation model.

Importing this package is quick: everything heavy is imported when it is first used.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medseg.api.judging import crossval, evaluate
    from medseg.api.models import load
    from medseg.api.prepare import plan_and_preprocess
    from medseg.api.training import Run, train
    from medseg.errors import (
        BundleError,
        ConfigError,
        DatasetError,
        GeometryError,
        MedsegError,
        PlanError,
    )
    from medseg.infer.model import Model
    from medseg.infer.result import CaseError, Result

__version__ = "0.1.0"

__all__ = [
    "BundleError",
    "CaseError",
    "ConfigError",
    "DatasetError",
    "GeometryError",
    "MedsegError",
    "Model",
    "PlanError",
    "Result",
    "Run",
    "crossval",
    "evaluate",
    "load",
    "plan_and_preprocess",
    "train",
]

_OWNERS = {
    **dict.fromkeys([name for name in __all__ if name.endswith("Error")], "medseg.errors"),
    "load": "medseg.api.models",
    "Model": "medseg.infer.model",
    **dict.fromkeys(["CaseError", "Result"], "medseg.infer.result"),
    **dict.fromkeys(["Run", "train"], "medseg.api.training"),
    **dict.fromkeys(["crossval", "evaluate"], "medseg.api.judging"),
    "plan_and_preprocess": "medseg.api.prepare",
}


class _Package(ModuleType):
    """This package: public functions keep their names beside sub-packages of the same name.

    Importing `medseg.train` binds that sub-package to the attribute `train`; here the attribute
    stays the function, and the sub-package is reached by import statements alone.
    """

    def __getattr__(self, name: str) -> Any:
        """Import a public name from its owner at first use."""
        if name not in _OWNERS:
            raise AttributeError(f"module 'medseg' has no attribute {name!r}")
        import importlib

        value = getattr(importlib.import_module(_OWNERS[name]), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """Bind everything but a sub-package to a public name."""
        if not (name in _OWNERS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        """Return the public names."""
        return sorted([*__all__, "__version__"])


sys.modules[__name__].__class__ = _Package
