"""A judge that tosses coins: the lower control, which must give nothing."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from vlmrb_torchrl.scorers.base import SeededScorer, check_unit


class RandomScorer(SeededScorer):
    """Scores 1 with a given probability, whatever the clip. It reads nothing.

    Args:
        rate: Probability of a 1, in [0, 1].
        seed: Where the sequence of tosses starts; a recipe adds the seed of its run.

    Example:
        >>> RandomScorer(rate=1.0)(TensorDict({}, [3]))["score"]
        tensor([1., 1., 1.])
    """

    cheap = True

    def __init__(self, rate: float = 0.05, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.rate = check_unit("rate", rate)

    @property
    def config(self) -> tuple[tuple[str, object], ...]:
        """The arguments."""
        return (("rate", self.rate), *super().config)

    def score(self, tensordict: TensorDictBase) -> Tensor:
        """One toss a clip, float32 ``[B]``."""
        return (self.draw(tensordict.shape[0]) < self.rate).to(torch.float32)
