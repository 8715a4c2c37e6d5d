"""Training. ``icm_cli.train``, the body of ``icm train``, is :func:`icm_cli.training.train.train`."""

import importlib.util

from icm_cli.errors import ConfigError

REQUIRED_PACKAGES = ("accelerate", "tensorboard")
"""Packages of the extra ``[train]``."""

for _name in REQUIRED_PACKAGES:
    if importlib.util.find_spec(_name) is None:
        raise ConfigError(f"icm train needs {_name}, which is not installed; run: pip install 'icm-cli[train]'")
