"""icm: give one reference image with a mask, and it extracts that object from every image of a folder.

``icm_cli.matte(...)`` is the command ``icm matte``, ``icm_cli.evaluate(...)`` is ``icm eval`` and
``icm_cli.train(...)`` is ``icm train``. ``icm_cli.load(...)`` returns an object that mattes arrays, and
``icm_cli.Hints`` say where the object is in an image. Guo et al., "In-Context Matting", CVPR 2024.

Type checkers and editors read ``__init__.pyi``, which is generated from :mod:`icm_cli.options`.
"""

from __future__ import annotations

import importlib
from typing import Any

from icm_cli.environment import __version__

__all__ = ["Hints", "__version__", "evaluate", "load", "matte", "train"]

_MODULES = {
    "Hints": "icm_cli.guidance.hints",
    "evaluate": "icm_cli.evaluation.evaluate",
    "load": "icm_cli.matting.model_choice",
    "matte": "icm_cli.matting.matte",
    "train": "icm_cli.training.train",
}


def __getattr__(name: str) -> Any:
    """Import a name of the API when it is first used, so that ``icm --help`` does not wait for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module 'icm_cli' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
