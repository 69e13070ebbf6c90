"""What a value function says, in the same figures for every algorithm."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchrl.objectives import LossModule


def keep_targets(loss: LossModule) -> None:
    """Have a loss keep the targets of its last batch, which TorchRL's losses do not all return."""
    estimator = loss.value_estimator
    estimate = estimator.value_estimate

    def kept(*arguments: Any, **options: Any) -> Tensor:
        target: Tensor = estimate(*arguments, **options)
        estimator.targets = target.detach()
        return target

    estimator.value_estimate = kept


def value_figures(loss: LossModule, values: Tensor) -> dict[str, Tensor]:
    """Mean value and target of the last batch; where each value is one of several, their spread.

    Args:
        loss: One that keeps its targets.
        values: Of the batch's actions, ``[B, K]``: K quantiles of the return, or K critics'.

    Returns:
        ``value/q``, ``value/target`` and, if K > 1, ``value/spread``: the standard deviation over
        K. All in units of the return that is learnt from.
    """
    figures = {"value/q": values.mean(), "value/target": loss.value_estimator.targets.mean()}
    if values.shape[-1] > 1:
        figures["value/spread"] = values.std(-1, correction=0).mean()
    return figures
