"""Losses that TorchRL lacks, in its manner."""

from vlmrb_torchrl.objectives.iqn import (
    IQNLoss,
    QuantileNetwork,
    cvar,
    quantile_distance,
    quantile_huber,
    quantiles_of,
)

__all__ = [
    "IQNLoss",
    "QuantileNetwork",
    "cvar",
    "quantile_distance",
    "quantile_huber",
    "quantiles_of",
]
