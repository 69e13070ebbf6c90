"""Losses that TorchRL lacks, in its manner."""

from vlmrb_torchrl.objectives.iqn import IQNLoss, quantile_huber
from vlmrb_torchrl.objectives.quantile_network import QuantileNetwork, cvar

__all__ = ["IQNLoss", "QuantileNetwork", "cvar", "quantile_huber"]
