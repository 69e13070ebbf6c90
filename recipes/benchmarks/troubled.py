"""A judge that misbehaves at random, for `recipes.benchmarks.soak`."""

from __future__ import annotations

import os
import random
import time

import torch
from tensordict import TensorDictBase
from torch import Tensor

from vlmrb_torchrl.checks import require
from vlmrb_torchrl.scorers import ClipScorer, EmbeddedJudge, ScorerUnavailableError

TROUBLES = ("raises", "out of memory", "unavailable", "NaN", "wrong shape", "exits", "hangs")


class TroubledScorer(ClipScorer):
    """The embedded judge, that at a share of its calls does anything but answer.

    Args:
        rate: Share of calls, in [0, 1].
    """

    def __init__(self, rate: float = 0.01) -> None:
        super().__init__()
        require(0 <= rate <= 1, "rate", rate, "use a share from 0 to 1")
        self.rate = rate
        self.judge = EmbeddedJudge()
        self.frame_size = self.judge.frame_size

    @property
    def config(self) -> tuple[tuple[str, object], ...]:
        """The rate."""
        return (("rate", self.rate),)

    def load(self) -> None:
        """Load the judge; each process errs in its own order."""
        self.judge.load()
        self._random = random.Random(os.getpid())

    def score(self, tensordict: TensorDictBase) -> Tensor:
        """Judge, or misbehave."""
        B = tensordict.shape[0]
        if self._random.random() < self.rate:
            return self._misbehave(self._random.choice(TROUBLES), B)
        return self.judge.score(tensordict)

    def _misbehave(self, how: str, B: int) -> Tensor:
        match how:
            case "raises":
                raise RuntimeError("trouble, as ordered")
            case "out of memory":
                raise torch.OutOfMemoryError("out of memory, as ordered")
            case "unavailable":
                raise ScorerUnavailableError("unavailable, as ordered")
            case "NaN":
                return torch.full((B,), torch.nan)
            case "wrong shape":
                return torch.zeros(B + 1)
            case "exits":
                os._exit(1)
            case _:
                time.sleep(3600)  # until whoever waits gives up
        raise AssertionError(how)
