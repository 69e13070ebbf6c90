"""A judge that errs at chosen rates: how good must a VLM be for replay to profit?"""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from vlmrb_torchrl.checks import shown
from vlmrb_torchrl.keys import EVENTS, SCORE
from vlmrb_torchrl.scorers.base import ClipScorer, SeededScorer, check_unit

_YES = 0.5
"""A score from here on is a Yes, as in the sampler's default threshold."""


class NoisyScorer(SeededScorer):
    """Answers Yes (1) or No (0), wrongly at given rates, about another judge's verdicts.

    Args:
        scorer: The judge taken as the truth. Its score from 0.5 on is a Yes.
        true_positive_rate: Probability of a Yes where the truth is Yes, in [0, 1].
        false_positive_rate: Probability of a Yes where the truth is No, in [0, 1].
        seed: Where the sequence of errors starts; a recipe adds the seed of its run.

    Example:
        >>> wrong = NoisyScorer(ConstantScorer(1.0), true_positive_rate=0, false_positive_rate=1)
        >>> wrong(TensorDict({}, [2]))["score"]
        tensor([0., 0.])
    """

    def __init__(
        self,
        scorer: ClipScorer,
        true_positive_rate: float = 0.8,
        false_positive_rate: float = 0.05,
        seed: int = 0,
    ) -> None:
        if not isinstance(scorer, ClipScorer):
            raise TypeError(f"scorer={shown(scorer)}: pass a ClipScorer to err about.")
        super().__init__(scorer.in_keys, seed=seed)
        self.true_positive_rate = check_unit("true_positive_rate", true_positive_rate)
        self.false_positive_rate = check_unit("false_positive_rate", false_positive_rate)
        self.scorer = scorer
        self.cheap = scorer.cheap
        self.frame_size = scorer.frame_size

    @classmethod
    def example(cls) -> NoisyScorer:
        """Errs about a judge that gives every clip the same score."""
        return cls(_AlwaysYes())

    @property
    def config(self) -> tuple[tuple[str, object], ...]:
        """The arguments."""
        return (
            ("scorer", self.scorer),
            ("true_positive_rate", self.true_positive_rate),
            ("false_positive_rate", self.false_positive_rate),
            *super().config,
        )

    @property
    def prompts(self) -> tuple[str, ...]:
        """What the other judge is asked; nothing if it is not asked in words."""
        return getattr(self.scorer, "prompts", ())

    @property
    def revision(self) -> str:
        """The other judge's."""
        return self.scorer.revision

    @property
    def device(self) -> torch.device:
        """Where the other judge computes."""
        return self.scorer.device

    def load(self) -> None:
        """Load the other judge."""
        self.scorer.load()

    def score(self, tensordict: TensorDictBase) -> Tensor:
        """1.0 for Yes, 0.0 for No, NaN where the other judge has none, float32 ``[B]``."""
        truth = self.scorer(tensordict.copy())[SCORE].cpu()
        rate = torch.where(truth >= _YES, self.true_positive_rate, self.false_positive_rate)
        answer = (self.draw(tensordict.shape[0]) < rate).to(torch.float32)
        return answer.masked_fill(truth.isnan(), torch.nan)


class _AlwaysYes(ClipScorer):
    """Reads events and says Yes: something for the example to err about."""

    cheap = True

    def __init__(self) -> None:
        super().__init__(in_keys=(EVENTS,))

    def score(self, tensordict: TensorDictBase) -> Tensor:
        """Ones, float32 ``[B]``."""
        return torch.ones(tensordict.shape[0])
