"""Judges of clips: one TensorDictModule each, clips in, score in [0, 1] out."""

from vlmrb_torchrl.scorers.base import (
    ClipScorer,
    PromptedScorer,
    ScorerUnavailableError,
    SeededScorer,
)
from vlmrb_torchrl.scorers.cached import CachedScorer
from vlmrb_torchrl.scorers.constant import ConstantScorer
from vlmrb_torchrl.scorers.contrastive import ContrastiveScorer
from vlmrb_torchrl.scorers.embedded import EmbeddedJudge
from vlmrb_torchrl.scorers.endpoint import EndpointScorer
from vlmrb_torchrl.scorers.huggingface import HuggingFaceScorer
from vlmrb_torchrl.scorers.noisy import NoisyScorer
from vlmrb_torchrl.scorers.privileged import PrivilegedScorer
from vlmrb_torchrl.scorers.random import RandomScorer

__all__ = [
    "CachedScorer",
    "ClipScorer",
    "ConstantScorer",
    "ContrastiveScorer",
    "EmbeddedJudge",
    "EndpointScorer",
    "HuggingFaceScorer",
    "NoisyScorer",
    "PrivilegedScorer",
    "PromptedScorer",
    "RandomScorer",
    "ScorerUnavailableError",
    "SeededScorer",
]
