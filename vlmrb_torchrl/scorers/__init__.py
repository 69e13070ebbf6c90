"""Judges of clips: one TensorDictModule each, clips in, score in [0, 1] out."""

from vlmrb_torchrl.scorers.base import (
    ClipScorer,
    PromptedScorer,
    ScorerUnavailableError,
    SeededScorer,
)
from vlmrb_torchrl.scorers.cached import CachedScorer
from vlmrb_torchrl.scorers.contrastive import ContrastiveScorer
from vlmrb_torchrl.scorers.controls import (
    ConstantScorer,
    NoisyScorer,
    PrivilegedScorer,
    RandomScorer,
)
from vlmrb_torchrl.scorers.embedded import EmbeddedJudge
from vlmrb_torchrl.scorers.endpoint import EndpointScorer
from vlmrb_torchrl.scorers.huggingface import HuggingFaceScorer

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
