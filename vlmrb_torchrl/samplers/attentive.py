"""Replay of what is like the present: of many uniform draws those most similar to the state of now.

Source: Sun, Zhou, Li 2020, Attentive Experience Replay, AAAI 34(04).

B: items of a batch, G: games that are played at a time, S: shape of a state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tensordict import NestedKey
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torchrl.data import RandomSampler

from vlmrb_torchrl.checks import is_key, is_real, require
from vlmrb_torchrl.samplers.arguments import entry_of
from vlmrb_torchrl.samplers.saving import SavedInFolder


def similarity(states: Tensor, state: Tensor) -> Tensor:
    """Cosine of states ``[B, *S]`` to one ``[*S]``, in [-1, 1].

    Whole numbers are codes, whose size means nothing, as those of a grid's cells: of them it is the
    share that is the same, which is the cosine of their one-hot vectors.

    Example:
        >>> similarity(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([6.0, 8.0]))
        tensor([1.0000, 0.8000])
        >>> similarity(torch.tensor([[7, 1, 2, 3], [7, 0, 0, 0]]), torch.tensor([7, 1, 0, 3]))
        tensor([0.7500, 0.5000])
    """
    states, state = states.flatten(1), state.reshape(1, -1)
    if states.is_floating_point():
        return cosine_similarity(states, state, dim=-1)
    return (states == state).float().mean(-1)


class AttentiveSampler(SavedInFolder, RandomSampler):
    """AER: of ⌈λ B⌉ slots drawn uniformly the B whose states are most similar to the current one.

    At λ = 1, and before anything was observed, it is TorchRL's ``RandomSampler``, number for
    number. The paper lets λ fall linearly to 1; torchrl's ``LinearScheduler`` can do so.

    Tell it what is being played by :meth:`observe`. The paper plays one game; of several each has
    its turn, one a batch.

    Args:
        lmbda: λ >= 1, an attribute that may be set later.
        state_key: Where a stored transition has its state, ``[*S]``.
        similarity: Of states ``[B, *S]`` to one ``[*S]``, ``[B]``; any function that grows with it,
            such as one of a network's features.

    Raises:
        ValueError: An argument is outside its range.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> sampler = AttentiveSampler(lmbda=100.0)
        >>> buffer = TensorDictReplayBuffer(
        ...     storage=LazyTensorStorage(3), sampler=sampler, batch_size=2
        ... )
        >>> index = buffer.extend(TensorDict({"observation": torch.eye(3)}, [3]))
        >>> sampler.observe(torch.tensor([[0.0, 0.9, 0.1]]))
        >>> buffer.sample()["index"]
        tensor([1, 1])
    """

    def __init__(
        self,
        lmbda: float = 2.0,
        *,
        state_key: NestedKey = "observation",
        similarity: Callable[[Tensor, Tensor], Tensor] = similarity,
    ) -> None:
        require(is_key(state_key), "state_key", state_key, "name an entry of the transitions")
        require(callable(similarity), "similarity", similarity, "pass a function of two tensors")
        self.lmbda = lmbda
        self._state_key, self._similarity = state_key, similarity
        self._observed: Tensor | None = None
        self._turn = 0

    @property
    def lmbda(self) -> float:
        """λ, how many draws there are for each that is kept."""
        value: float = self._lmbda
        return value

    @lmbda.setter
    def lmbda(self, value: Any) -> None:
        value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        require(is_real(value, 1), "lmbda", value, "use a finite number >= 1")
        self._lmbda = value

    def observe(self, states: Tensor) -> None:
        """Hear of the state that each game is in now, ``[G, *S]``.

        Raises:
            ValueError: It is no state of at least one game.
        """
        fits = isinstance(states, Tensor) and states.ndim > 0 and len(states) > 0
        require(fits, "states", states, "pass a tensor of a state a game")
        self._observed = states.detach().clone()

    def sample(self, storage: Any, batch_size: int) -> tuple[Any, dict[str, Any]]:
        """Draw slots ``[B]``.

        Raises:
            ValueError: Observed and stored states differ in shape.
            RuntimeError: The storage is empty.
        """
        # Not a draw more for what rounding has left of λ B.
        candidates = math.ceil(self._lmbda * batch_size - 1e-9)
        if self._observed is None or candidates == batch_size:
            return super().sample(storage, batch_size)  # type: ignore[no-any-return]
        index, info = super().sample(storage, candidates)
        stored = entry_of(storage, self._state_key, index)
        self._observed = self._observed.to(stored.device)
        state = self._observed[self._turn % len(self._observed)]
        shape = list(stored.shape[1:])
        require(list(state.shape) == shape, "observed state", state, f"{shape} are stored")
        self._turn += 1
        kept = self._similarity(stored, state).topk(batch_size, sorted=False).indices
        if isinstance(index, tuple):  # coordinates in a storage of several dimensions
            return tuple(axis[kept] for axis in index), info
        return index[kept], info

    def state_dict(self) -> dict[str, Any]:
        """What the next draw follows from, but for the buffer's generator."""
        return {"lmbda": self._lmbda, "observed": self._observed, "turn": self._turn}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.lmbda = state_dict["lmbda"]
        self._observed, self._turn = state_dict["observed"], state_dict["turn"]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(lmbda={self._lmbda}, state_key={self._state_key!r})"
