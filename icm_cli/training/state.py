"""Files of a run: the model to matte with, and one file from which it can be resumed.

``last.safetensors`` and ``best.safetensors`` are checkpoints for ``icm matte`` (the mean of the weights, where there is
one). ``state.pt`` alone holds all that the next step depends on, so whatever is torn between the files, it goes on.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icm_cli.config import COMPONENT_KEYS, parse_model_config
from icm_cli.errors import ConfigError, UsageError
from icm_cli.files import atomic_write
from icm_cli.training.settings import differences

LAST_NAME = "last.safetensors"
BEST_NAME = "best.safetensors"
STATE_NAME = "state.pt"
FREE_SETTINGS = frozenset(
    {"train.log_every", "train.image_every", "train.save_every", "train.feature_cache_gb", "train.steps"}
)
"""Settings that a resumed run may change: none of them decides a step that is taken, but ``steps`` with a decay."""
OF_ONE_STAGE = {"match": "train.match.", "refine": "train.refine."}
"""Stage -> beginning of the settings that no other stage reads."""


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write whole or not at all. Raises OutputError."""
    content = io.BytesIO()  # torch hides what the file system says
    torch.save(dict(state), content)
    with atomic_write(path) as file:
        file.write(content.getbuffer())


def load_state(path: Path) -> dict[str, Any]:
    """Read what :func:`save_state` wrote. Raises ConfigError."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"training state {path} cannot be read: {error.strerror}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ConfigError(
            f"training state {path} is damaged or cut short, so the run cannot be resumed; train with another "
            f"--out, perhaps from --checkpoint {path.parent / LAST_NAME}"
        ) from error
    return state


def check_same_run(path: Path, saved: str, given: Mapping[str, Any], *, has_decay: bool) -> None:
    """Raises UsageError that shows every difference between a saved run's settings (JSON) and those given now."""
    free = FREE_SETTINGS - ({"train.steps"} if has_decay else set())
    unread = tuple(start for stage, start in OF_ONE_STAGE.items() if stage != given["train"]["stage"])
    lines = [line for line in differences(_completed(json.loads(saved)), given) if not line.startswith(unread)]
    changed = [line for line in lines if line.partition(":")[0].rstrip() not in free]
    if changed:
        raise UsageError(
            f"{path} is of a run with other settings, so it cannot be resumed: {'; '.join(changed)}. Give the "
            "same configuration, data and --set again, or another --out"
        )


def _completed(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Saved settings, with those of the model that came later: a run before them had their defaults."""
    with contextlib.suppress(ConfigError):  # of a model that this version does not know; the differences tell
        model = parse_model_config({part: saved[part] for part in COMPONENT_KEYS if part in saved}, "")
        return {**saved, **json.loads(json.dumps(model.as_dict()))}
    return dict(saved)


def to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that go on as they are whatever the model does."""
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
