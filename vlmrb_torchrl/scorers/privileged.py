"""A judge that reads the simulator's own events: the upper control of every experiment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor

from vlmrb_torchrl.checks import shown
from vlmrb_torchrl.keys import EVENTS
from vlmrb_torchrl.scorers.base import ClipScorer


class PrivilegedScorer(ClipScorer):
    """Scores 1 where any of the wanted events happened in a clip, else 0.

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
            if not several or not all(isinstance(each, str) and each.strip() for each in names):
                raise ValueError(f"{name}={shown(names)}: pass a list of names of events.")
        self.event_names = tuple(event_names)
        self.events = tuple(events)
        unknown = [name for name in self.events if name not in self.event_names]
        if unknown or not self.events:
            raise ValueError(
                f"events={shown(events)}: choose one or more of {self.event_names}, "
                "the environment's event_names."
            )
        self._columns = [self.event_names.index(name) for name in self.events]

    @classmethod
    def example(cls) -> PrivilegedScorer:
        """Asks for the goal among the three events of the contract tests."""
        return cls(("goal", "door", "key"))

    @property
    def config(self) -> tuple[tuple[str, object], ...]:
        """The arguments."""
        return (("event_names", self.event_names), ("events", self.events))

    def score(self, tensordict: TensorDictBase) -> Tensor:
        """1.0 where a wanted event happened, float32 ``[B]``."""
        events: Tensor = tensordict.get(EVENTS)
        if events.shape[-1] != len(self.event_names):
            raise ValueError(
                f"The clips hold {events.shape[-1]} events, but event_names lists "
                f"{len(self.event_names)}: {self.event_names}; pass env.event_names."
            )
        return events[:, self._columns].any(-1).to(torch.float32)
