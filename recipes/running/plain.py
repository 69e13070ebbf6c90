"""States as a checkpoint holds them: tensors, numbers and containers, and so no pickled code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from vlmrb_torchrl.checks import ConfigError

_TENSORDICT = "__tensordict__"
_LEAVES = (Tensor, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def plain(value: Any, path: str) -> Any:
    """A state as tensors, numbers and containers, which ``torch.load`` reads without pickled code.

    Raises:
        ConfigError: There is something else in it, at ``path``.
    """
    if isinstance(value, TensorDictBase):
        entries = {str(k): plain(v, f"{path}.{k}") for k, v in value.items()}
        return {_TENSORDICT: entries, "batch_size": list(value.batch_size)}
    if isinstance(value, Mapping):
        return {key: plain(entry, f"{path}.{key}") for key, entry in value.items()}
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(plain(entry, f"{path}.{i}") for i, entry in enumerate(value))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, _LEAVES):
        return value
    raise ConfigError(
        f"training.checkpoint_every_env_steps: {path} is a {type(value).__name__}, which a "
        "checkpoint cannot hold: save it as tensors and numbers, or use 0 for no checkpoints"
    )


def restored(value: Any) -> Any:
    """The inverse of `plain`."""
    if isinstance(value, dict):
        if _TENSORDICT in value:
            entries = {name: restored(entry) for name, entry in value[_TENSORDICT].items()}
            return TensorDict(entries, value["batch_size"])
        return {key: restored(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(map(restored, value))
    return value
