"""Training: ``icm_cli.train``, the body of ``icm train``, is :func:`icm_cli.training.train.train`."""

import importlib.util

from icm_cli.errors import ConfigError

NEEDED = ("accelerate", "tensorboard")
"""Packages of the extra ``[train]`` that every training needs."""

for _name in NEEDED:
    if importlib.util.find_spec(_name) is None:
        raise ConfigError(f"icm train needs {_name}, which is not installed; run: pip install 'icm-cli[train]'")
