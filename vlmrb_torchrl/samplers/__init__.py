"""Ways to draw from a replay buffer: one file each, beside the parts that they share."""

from __future__ import annotations

from vlmrb_torchrl.samplers.attentive import AttentiveSampler
from vlmrb_torchrl.samplers.guided_per import GuidedPERSampler
from vlmrb_torchrl.samplers.optimized import OptimizedSampler
from vlmrb_torchrl.samplers.reducible import ReducibleLossSampler
from vlmrb_torchrl.samplers.vlm import VLMPrioritizedSampler

__all__ = [
    "AttentiveSampler",
    "GuidedPERSampler",
    "OptimizedSampler",
    "ReducibleLossSampler",
    "VLMPrioritizedSampler",
]
