"""Stopping a run whose loss or gradient is no number, before a weight is changed by it."""

from __future__ import annotations

import math
from typing import Any

from lightning.fabric import Fabric
from tensordict import TensorDictBase
from torch import Tensor
from torch.optim import Optimizer

from vlmrb_torchrl.checks import ConfigError

_WRITTEN_BY_THE_ENVIRONMENT = ("observation", ("next", "observation"), ("next", "reward"))
_FABRICS_WORDS = "non-finite"  # of the error of a gradient norm that is NaN or infinite


class DivergedError(ConfigError):
    """A loss or gradient is no number; the step that it was for was not taken.

    Of an update with several optimizers, those before it have stepped.
    """


def clip_gradients(
    fabric: Fabric,
    algorithm: Any,
    optimizer: Optimizer,
    name: str,
    loss: Tensor,
    batch: TensorDictBase,
) -> Tensor | None:
    """Clip the gradient of a loss; the last look at it before the step.

    Fabric reads the norm of every gradient, to refuse one that is no number, so that costs nothing
    more here; a Huber loss may be infinite while its gradient is not.

    Args:
        fabric: A launched Fabric.
        algorithm: Whose weights, and how large a norm they bear.
        optimizer: The one whose step is next.
        name: Of the optimizer.
        loss: What the gradient is of.
        batch: What the loss was computed from.

    Returns:
        The norm before it was clipped.

    Raises:
        DivergedError: The loss or the norm is NaN or infinite; the line says whether the batch is
            to blame.
    """
    if not math.isfinite(loss.item()):
        raise DivergedError(diagnosis(name, loss, batch))
    try:
        norm: Tensor | None = fabric.clip_gradients(
            algorithm, optimizer, max_norm=algorithm.gradient_clip_norm
        )
    except RuntimeError as error:
        if _FABRICS_WORDS not in str(error):
            raise
        raise DivergedError(diagnosis(name, loss, batch)) from error
    return norm


def diagnosis(name: str, loss: Tensor, batch: TensorDictBase) -> str:
    """One line: what is no number, where it comes from, what to do.

    Args:
        name: Of the optimizer.
        loss: Its loss.
        batch: The batch.
    """
    entries = {str(key): batch.get(key) for key in _WRITTEN_BY_THE_ENVIRONMENT}
    bad = [key for key, entry in entries.items() if not bool(entry.isfinite().all())]
    if bad:
        cause = f"the environment wrote what is no number into {', '.join(bad)}: mend it there"
    else:
        cause = "the batch holds numbers only: lower algorithm.learning_rate or gradient_clip_norm"
    what = f"loss/{name}" if not math.isfinite(loss.item()) else f"the gradient of loss/{name}"
    return f"{what} is no number ({loss.item():g} the loss); the step was not taken; {cause}"
