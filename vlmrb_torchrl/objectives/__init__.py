"""Losses that TorchRL lacks, in its manner."""

from vlmrb_torchrl.objectives.iqn import IQNLoss, QuantileNetwork, cvar, quantile_huber

__all__ = ["IQNLoss", "QuantileNetwork", "cvar", "quantile_huber"]
