"""icm: show it one reference image with a mask, and it pulls that thing out of every image of a folder.

``icm_cli.matte(...)`` is the command ``icm matte``, ``icm_cli.evaluate(...)`` is ``icm eval``,
``icm_cli.train(...)`` is ``icm train``;
``icm_cli.load(...)`` gives an object that mattes arrays.
Guo et al., "In-Context Matting", CVPR 2024.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from icm_cli.environment import __version__

if TYPE_CHECKING:
    from icm_cli.evaluation.evaluate import evaluate
    from icm_cli.matting.matte import matte
    from icm_cli.matting.predictor import load
    from icm_cli.training.train import train

__all__ = ["__version__", "evaluate", "load", "matte", "train"]


def __getattr__(name: str) -> Any:
    """Import the API when it is first asked for, so that ``icm --help`` need not wait for torch."""
    if name == "matte":
        from icm_cli.matting.matte import matte

        return matte
    if name == "evaluate":
        from icm_cli.evaluation.evaluate import evaluate

        return evaluate
    if name == "load":
        from icm_cli.matting.predictor import load

        return load
    if name == "train":
        from icm_cli.training.train import train

        return train
    raise AttributeError(f"module 'icm_cli' has no attribute {name!r}")
