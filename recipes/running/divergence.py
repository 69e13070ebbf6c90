"""Stopping a run whose numbers are none, before it plays, shows or saves what came of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tensordict import TensorDictBase
from torch import Tensor

from vlmrb_torchrl.checks import ConfigError

_WRITTEN_BY_THE_ENVIRONMENT = ("observation", ("next", "observation"), ("next", "reward"))


class DivergedError(ConfigError):
    """A run cannot go on: what was played or learnt is no number."""


def check_steps(data: TensorDictBase) -> None:
    """Refuse steps of any shape with a NaN or an infinity in an observation or a reward."""
    entries = {str(key): data.get(key) for key in _WRITTEN_BY_THE_ENVIRONMENT}
    bad = [
        key
        for key, entry in entries.items()
        if entry.is_floating_point() and not bool(entry.isfinite().all())
    ]
    if bad:
        raise DivergedError(
            f"the environment wrote what is no number into {', '.join(bad)}: mend it there; "
            "nothing was learnt from it"
        )


def check_learning(sums: Mapping[str, Tensor]) -> None:
    """Refuse to go on after losses or gradients that are no numbers; waits for the device.

    Args:
        sums: Of losses and of gradients' norms, by name: one NaN makes a sum NaN.
    """
    bad = [name for name, total in sums.items() if not math.isfinite(total.item())]
    if bad:
        raise DivergedError(
            f"{', '.join(bad)} is no number, though the data are: lower algorithm.learning_rate or "
            "gradient_clip_norm; no action and no checkpoint came of it"
        )
