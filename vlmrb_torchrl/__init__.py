"""VLM-guided experience replay for TorchRL (VLM-RB, arXiv 2602.01915)."""

from vlmrb_torchrl.bonus import ScoreBonus
from vlmrb_torchrl.buffer import VLMReplayBuffer
from vlmrb_torchrl.renderers import ClipRenderTransform
from vlmrb_torchrl.samplers import VLMPrioritizedSampler
from vlmrb_torchrl.scoring import AsyncScorer

__all__ = [
    "AsyncScorer",
    "ClipRenderTransform",
    "ScoreBonus",
    "VLMPrioritizedSampler",
    "VLMReplayBuffer",
]
