"""Judges that are no VLM: the controls of an experiment, from coins to the simulator itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor

from vlmrb_torchrl.checks import is_real, require, shown
from vlmrb_torchrl.keys import EVENTS, SCORE
from vlmrb_torchrl.scorers.base import ClipScorer, ScorerWrapper, SeededScorer

_YES = 0.5
"""A score from here on is a Yes, as in the sampler's default threshold."""


def _probability(name: str, value: float) -> float:
    require(is_real(value, 0, 1), name, value, "it is a probability, choose it in [0, 1]")
    return float(value)


class ConstantScorer(ClipScorer):
    """Gives every clip the same score: replay must come out uniform. It reads nothing.

    Args:
        value: The score, in [0, 1].

    Example:
        >>> ConstantScorer(0.25)(TensorDict({}, [2]))["score"]
        tensor([0.2500, 0.2500])
    """

    cheap = True

    def __init__(self, value: float = 1.0) -> None:
        super().__init__(in_keys=())
        self.value = _probability("value", value)

    def score(self, tensordict: TensorDictBase) -> Tensor:
        """The constant, float32 ``[B]``."""
        return torch.full((tensordict.shape[0],), self.value)


class RandomScorer(SeededScorer):
    """Scores 1 with a given probability, whatever the clip: the lower control. It reads nothing.

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
        self.rate = _probability("rate", rate)

    def score(self, tensordict: TensorDictBase) -> Tensor:
        """One toss a clip, float32 ``[B]``."""
        return (self.draw(tensordict.shape[0]) < self.rate).to(torch.float32)


class PrivilegedScorer(ClipScorer):
    """Scores 1 where any of the wanted events happened in a clip, else 0: the upper control.

    It is a perfect judge and no VLM: it sees what the simulator reports over all the transitions
    that a clip covers, not only over the frames shown.

    Args:
        event_names: Names of the columns of ``"events"``, as in ``env.event_names``.
        events: The wanted ones.

    Raises:
        ValueError: If a wanted event has no column, or none is wanted.

    Example:
        >>> scorer = PrivilegedScorer(("goal", "door"), events=("door",))
        >>> clips = TensorDict({"events": torch.tensor([[True, False], [False, True]])}, [2])
        >>> scorer(clips)["score"]
        tensor([0., 1.])
    """

    cheap = True

    def __init__(self, event_names: Sequence[str], events: Sequence[str] = ("goal",)) -> None:
        super().__init__(in_keys=(EVENTS,))
        for name, names in (("event_names", event_names), ("events", events)):
            several = isinstance(names, Sequence) and not isinstance(names, str)
            good = several and all(isinstance(each, str) and each.strip() for each in names)
            require(good, name, names, "pass a list of names of events")
        self.event_names, self.events = tuple(event_names), tuple(events)
        good = bool(self.events) and set(self.events) <= set(self.event_names)
        remedy = f"choose one or more of {self.event_names}, the environment's event_names"
        require(good, "events", events, remedy)

    def score(self, tensordict: TensorDictBase) -> Tensor:
        """1.0 where a wanted event happened, float32 ``[B]``.

        Raises:
            ValueError: The clips hold another number of events than ``event_names`` lists.
        """
        events: Tensor = tensordict[EVENTS]
        held = events.shape[-1]
        remedy = f"the clips hold {held} events, pass env.event_names"
        require(held == len(self.event_names), "event_names", self.event_names, remedy)
        columns = [self.event_names.index(name) for name in self.events]
        return events[:, columns].any(-1).to(torch.float32)


class NoisyScorer(ScorerWrapper, SeededScorer):
    """Answers Yes (1) or No (0), wrongly at given rates, about another judge's verdicts.

    How good must a VLM be for replay to profit?

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
            raise TypeError(f"scorer is {shown(scorer)}: pass a ClipScorer to err about")
        super().__init__(scorer.in_keys, seed=seed)
        self.true_positive_rate = _probability("true_positive_rate", true_positive_rate)
        self.false_positive_rate = _probability("false_positive_rate", false_positive_rate)
        self.scorer = scorer
        self.cheap, self.frame_size = scorer.cheap, scorer.frame_size

    def load(self) -> None:
        """Load the other judge."""
        self.scorer.load()

    def score(self, tensordict: TensorDictBase) -> Tensor:
        """1.0 for Yes, 0.0 for No, NaN where the other judge has none, float32 ``[B]``."""
        truth = self.scorer(tensordict.copy())[SCORE].cpu()
        rate = torch.where(truth >= _YES, self.true_positive_rate, self.false_positive_rate)
        answer = (self.draw(tensordict.shape[0]) < rate).to(torch.float32)
        return answer.masked_fill(truth.isnan(), torch.nan)
