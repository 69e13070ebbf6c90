"""A judge that always answers the same: replay that must come out uniform."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from vlmrb_torchrl.scorers.base import ClipScorer, check_unit


class ConstantScorer(ClipScorer):
    """Gives every clip the same score. It reads nothing, hence costs no rendering.

    Args:
        value: The score, in [0, 1].

    Example:
        >>> ConstantScorer(0.25)(TensorDict({}, [2]))["score"]
        tensor([0.2500, 0.2500])
    """

    cheap = True

    def __init__(self, value: float = 1.0) -> None:
        super().__init__(in_keys=())
        self.value = check_unit("value", value)

    @property
    def config(self) -> tuple[tuple[str, object], ...]:
        """The arguments."""
        return (("value", self.value),)

    def score(self, tensordict: TensorDictBase) -> Tensor:
        """The constant, float32 ``[B]``."""
        return torch.full((tensordict.shape[0],), self.value)
