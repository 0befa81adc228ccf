"""segment_anything's modelling classes, with or without a working torchvision.

The package's `__init__` imports torchvision for its predictor and its automatic mask generator;
the modelling modules need only torch. A torchvision that is absent or built for another torch
must not keep the model from being built, so in that case the package is entered past its
`__init__`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any, NoReturn

_PACKAGE = "segment_anything"
_NEED_TORCHVISION = ("SamPredictor", "SamAutomaticMaskGenerator")


def modelling() -> Any:
    """The module `segment_anything.modeling`: `ImageEncoderViT`, `PromptEncoder`, `MaskDecoder`...

    Raises:
        ImportError: if segment-anything itself is not installed.
    """
    try:
        # The package first: after somebody else's failed import (MONAI tries one), its
        # submodules are still in sys.modules without it.
        importlib.import_module(_PACKAGE)
        return importlib.import_module(f"{_PACKAGE}.modeling")
    except (ImportError, RuntimeError, OSError) as error:
        # RuntimeError and OSError: torchvision's compiled operators do not fit this torch.
        return _past_init(error)


def submodule(name: str) -> Any:
    """One of the modelling modules, such as `common` or `transformer`."""
    modelling()
    return importlib.import_module(f"{_PACKAGE}.modeling.{name}")


def _past_init(cause: Exception) -> ModuleType:
    """Imports the modelling modules under a package module whose `__init__` was never run."""
    spec = importlib.util.find_spec(_PACKAGE) if _PACKAGE not in sys.modules else None
    if spec is None:
        raise ImportError(
            f"{_PACKAGE} cannot be imported ({cause}); install it: pip install segment-anything"
        ) from cause
    _forget()
    package = importlib.util.module_from_spec(spec)
    package.__getattr__ = _explain(cause)  # type: ignore[method-assign]
    sys.modules[_PACKAGE] = package
    try:
        return importlib.import_module(f"{_PACKAGE}.modeling")
    except BaseException:
        _forget()
        raise


def _forget() -> None:
    """Takes every trace of a failed import out of `sys.modules`."""
    for name in [n for n in sys.modules if n.split(".")[0] == _PACKAGE]:
        del sys.modules[name]


def _explain(cause: Exception) -> Any:
    text = str(cause)  # the exception itself would keep its frames alive

    def missing(name: str) -> NoReturn:
        why = (
            f"; it needs a torchvision that fits torch, and its import failed: {text}"
            if name in _NEED_TORCHVISION
            else ""
        )
        raise AttributeError(f"module {_PACKAGE!r} has no attribute {name!r}{why}")

    return missing
