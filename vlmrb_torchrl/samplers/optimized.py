"""Replay by a learnt policy, which says of each transition whether it may be replayed.

Source: Zha, Lai, Zhou, Hu 2019, Experience Replay Optimization, arXiv 1906.08387.

C: slots, N: slots written, B: items of one call, G: games that are played at a time, T: steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from tensordict import NestedKey
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrl.data.replay_buffers.samplers import PrioritizedSampler
from torchrl.modules import MLP

from vlmrb_torchrl.checks import is_key, is_positive, is_real, is_whole, require
from vlmrb_torchrl.samplers.arguments import as_index, as_numbers, entry_of, raveled, unraveled
from vlmrb_torchrl.samplers.saving import SavedInFolder

_ARRAYS = ("_features", "_score", "_mask", "_written", "_stale", "_scored")


class OptimizedSampler(SavedInFolder, PrioritizedSampler):
    r"""ERO: slots have I_i ~ Bernoulli(φ(reward, |δ|, age)), and those with I = 1 are drawn alike.

    Whenever episodes end, φ is rewarded by r = R − R', the change of their mean return, for the
    mask I that was learnt from since: by REINFORCE, r ∇ Σ_j log P(I_j), over transitions j drawn
    uniformly. Then a new mask is drawn. Tell it what is played by :meth:`observe`, and |δ| by
    ``update_priority``, as of any prioritized sampler.

    φ of a transition is computed anew when it was replayed since the last mask. ``age`` is the
    number of transitions written since, as a share of the capacity. While the mask is empty all
    slots are drawn alike.

    What the source, as far as it was to be had, leaves open is an argument, but for two things:
    episodes that end together, of several games, count as one by their mean, and the age stands for
    its "timestep". Arrays and φ are on the CPU, and a draw waits for a GPU that the rows lie on.

    Args:
        max_capacity: Slots of the storage, C.
        hidden_features: Widths of φ's hidden layers; its last layer starts at 0, so at φ = 0.5.
        learning_rate: Step size of Adam for φ.
        policy_updates: Steps of φ whenever episodes end.
        policy_batch_size: Transitions of such a step.
        unvisited_score: Probability, in [0, 1], of a transition that was not replayed yet.
        reward_key: Where a stored transition has its reward, ``[1]`` or ``[]``.

    Raises:
        ValueError: An argument is outside its range.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> sampler = OptimizedSampler(4)
        >>> buffer = TensorDictReplayBuffer(
        ...     storage=LazyTensorStorage(4), sampler=sampler, batch_size=8, priority_key="td_error"
        ... )
        >>> index = buffer.extend(TensorDict({"next": {"reward": torch.ones(4, 1)}}, [4]))
        >>> batch = buffer.sample()
        >>> buffer.update_tensordict_priority(batch.set("td_error", torch.rand(8)))
        >>> sampler.observe(reward=torch.ones(1, 4), done=torch.arange(4)[None] == 3)
    """

    reduction = "max"  # of a priority per step of a stored trajectory, by the buffer
    uses_td_error = True

    def __init__(
        self,
        max_capacity: int,
        *,
        hidden_features: Sequence[int] = (64, 64),
        learning_rate: float = 1e-4,
        policy_updates: int = 1,
        policy_batch_size: int = 64,
        unvisited_score: float = 1.0,
        reward_key: NestedKey = ("next", "reward"),
    ) -> None:
        # Not super().__init__, which builds trees that nothing here reads.
        widths = isinstance(hidden_features, (list, tuple)) and all(
            is_whole(width, 1) for width in hidden_features
        )
        for fits, name, value, remedy in (
            (is_whole(max_capacity, 1), "max_capacity", max_capacity, "use a whole number >= 1"),
            (widths, "hidden_features", hidden_features, "use whole numbers >= 1"),
            (is_positive(learning_rate), "learning_rate", learning_rate, "use a number above 0"),
            (is_whole(policy_updates, 1), "policy_updates", policy_updates, "use 1 or more"),
            (is_whole(policy_batch_size, 1), "policy_batch_size", policy_batch_size, "use >= 1"),
            (is_real(unvisited_score, 0, 1), "unvisited_score", unvisited_score, "use 0 to 1"),
            (is_key(reward_key), "reward_key", reward_key, "name an entry of the transitions"),
        ):
            require(fits, name, value, remedy)
        self._max_capacity, self._unvisited_score = max_capacity, unvisited_score
        self._policy_updates, self._policy_batch_size = policy_updates, policy_batch_size
        self._reward_key = reward_key
        self.policy = MLP(
            in_features=3,
            out_features=1,
            num_cells=list(hidden_features),
            activation_class=nn.ReLU,
        )
        for weight in self.policy[-1].parameters():
            nn.init.zeros_(weight)
        self._optimizer = torch.optim.Adam(self.policy.parameters(), lr=learning_rate)
        self._playing = torch.zeros(0)  # return so far of each game's episode, [G]
        self._return: float | None = None  # of the last episodes that ended
        self._init()

    def _init(self) -> None:
        """Knows of no row. Also how a buffer empties its sampler."""
        C = self._max_capacity
        self._features = torch.zeros(C, 3)  # reward, |δ|, age, when it was last replayed
        self._score = torch.zeros(C)  # φ, or what stands in for it; 0 of a slot without a row
        self._mask, self._stale, self._scored = (torch.zeros(C, dtype=torch.bool) for _ in range(3))
        self._written = torch.full((C,), -1)  # number of the write; -1: none
        self._writes = self._rows = 0
        self._subset: Tensor | None = None  # slots of the mask; None: not looked for yet
        self._just_marked: Any = None

    def _random(self, *shape: int) -> Tensor:
        device = None if self._rng is None else self._rng.device
        return torch.rand(shape, device=device, generator=self._rng).cpu()

    def _among(self, number: int, items: int) -> Tensor:
        """``items`` numbers below ``number``, uniformly."""
        return self._random(items).double().mul(number).long().clamp_max(number - 1)

    @property
    def default_priority(self) -> float:
        """TorchRL's, of a slot without one; nothing is written for such a slot."""
        return 1.0

    @property
    def mask(self) -> Tensor:
        """Which slots are drawn from, bool ``[C]``."""
        return self._mask.clone()

    # ---------------------------------------------------------------- drawing and writing

    def sample(self, storage: Any, batch_size: int) -> tuple[Any, dict[str, Any]]:
        """Draw slots ``[B]`` with replacement.

        Raises:
            RuntimeError: The storage is empty.
        """
        require(is_whole(batch_size, 0), "batch_size", batch_size, "use a whole number >= 0")
        rows = len(storage)
        if rows == 0:
            raise RuntimeError("Cannot sample from an empty storage.")
        if self._subset is None or self._rows != rows:
            self.match_storage(storage)
            self._subset, self._rows = self._mask[:rows].nonzero().squeeze(-1), rows
        if len(self._subset):
            slot = self._subset[self._among(len(self._subset), batch_size)]
        else:
            slot = self._among(rows, batch_size)
        home = getattr(storage, "device", None)
        slot = slot if home in (None, "auto") else slot.to(home)
        return (unraveled(slot, storage.shape) if storage.ndim > 1 else slot), {}

    def match_storage(self, storage: Any) -> None:
        """Take rows that were never announced, as they came with the storage, for new ones."""
        self.mark_update((self._written[: len(storage)] < 0).nonzero().squeeze(-1))

    def mark_update(self, index: Any, *, storage: Any = None) -> None:
        """Hear of slots that were (over)written: they are not visited."""
        slot = self._slots(index, storage)
        self._features[slot] = 0
        self._score[slot] = self._unvisited_score
        self._mask[slot] = self._random(len(slot)) < self._unvisited_score
        self._stale[slot] = self._scored[slot] = False
        self._written[slot] = torch.arange(self._writes, self._writes + len(slot))
        self._writes += len(slot)
        self._subset, self._just_marked = None, index

    def extend(self, index: Any) -> None:
        """Same as :meth:`mark_update`, which a buffer calls before with the same tensor."""
        if index is not self._just_marked:
            self.mark_update(index)
        self._just_marked = None

    add = extend

    def update_priority(self, index: Any, priority: Any, *, storage: Any = None) -> None:
        """Hear the |δ| of slots that a learner visited.

        Args:
            index: int64 ``[B]``, or ``[B, storage.ndim]``.
            priority: |δ|, ``[B]``, ``[B, 1]`` or one number, in units of return.
            storage: Where the rewards are; a buffer passes its own.

        Raises:
            ValueError: There is no storage, or a value is no |δ|; nothing was written.
            IndexError: An index is out of range; nothing was written.
        """
        require(storage is not None, "storage", storage, "pass that of the buffer")
        slot = self._slots(index, storage)
        value = as_numbers(priority, "priority").detach().to("cpu", torch.float32).reshape(-1)
        fits = value.numel() in (1, len(slot)) and bool((value.isfinite() & (value >= 0)).all())
        require(fits, "priority", priority, "pass |δ| of 0 or more for each slot, all finite")
        place = slot if storage.ndim == 1 else unraveled(slot, storage.shape)
        reward = entry_of(storage, self._reward_key, place).to("cpu", torch.float32).reshape(-1)
        age = (self._writes - 1 - self._written[slot]) / self._max_capacity
        self._features[slot] = torch.stack([reward, value.expand_as(reward), age], -1)
        self._stale[slot] = True

    def _slots(self, index: Any, storage: Any) -> Tensor:
        slot = as_index(index, "index").cpu()
        slot = raveled(slot, storage) if slot.ndim > 1 else slot.reshape(-1)
        outside = (slot < 0) | (slot >= self._max_capacity)
        if outside.any():
            raise IndexError(
                f"index {int(slot[outside][0])} is no slot of a sampler of capacity "
                f"{self._max_capacity}: pass the indices that extend or sample returned."
            )
        return slot

    # ---------------------------------------------------------------- learning what to replay

    def observe(self, reward: Tensor, done: Tensor) -> None:
        """Hear of steps that were just played, and learn if an episode ended in them.

        Args:
            reward: In order, ``[G, T]``, G the same in each call.
            done: Whether the episode ended in a step, bool ``[G, T]``.

        Raises:
            ValueError: They are no steps of the same games as before.
        """
        games = len(self._playing) or len(reward)
        for name, steps in (("reward", reward), ("done", done)):
            fits = steps.ndim == 2 and len(steps) == games and steps.shape == reward.shape
            require(fits, name, steps, f"pass [{games} games, steps]")
        if not len(self._playing):
            self._playing = torch.zeros(games)
        ended = []
        for now, over in zip(reward.detach().cpu().unbind(1), done.cpu().unbind(1), strict=True):
            self._playing = self._playing + now
            ended.append(self._playing[over])
            self._playing = self._playing.masked_fill(over, 0)
        returns = torch.cat(ended)
        if len(returns):
            self._learn(float(returns.mean()))
            self._draw_mask()

    def _learn(self, mean_return: float) -> None:
        """Reward φ for the mask that the return came of."""
        before, self._return = self._return, mean_return
        slots = self._scored.nonzero().squeeze(-1)
        if before is None or not len(slots):
            return
        for _ in range(self._policy_updates):
            slot = slots[self._among(len(slots), self._policy_batch_size)]
            with torch.enable_grad():
                logit = self.policy(self._features[slot]).squeeze(-1)
                chosen = self._mask[slot].to(logit.dtype)
                surprise = binary_cross_entropy_with_logits(logit, chosen, reduction="sum")
                self._optimizer.zero_grad()
                ((mean_return - before) * surprise).backward()
            self._optimizer.step()

    @torch.no_grad()
    def _draw_mask(self) -> None:
        stale = self._stale.nonzero().squeeze(-1)
        self._score[stale] = self.policy(self._features[stale]).squeeze(-1).sigmoid()
        self._scored[stale], self._stale[stale] = True, False
        self._mask = self._random(self._max_capacity) < self._score
        self._subset = None

    def statistics(self, length: int) -> dict[str, float]:
        """Figures for a logger.

        Args:
            length: Slots written, N = ``len(buffer)``.

        Returns:
            ``effective_sample_size``: share of the N slots that are drawn from; ``mean_score``:
            mean probability to be among them.
        """
        if length == 0:
            return {"effective_sample_size": 0.0, "mean_score": 0.0}
        share = float(self._mask[:length].float().mean())
        return {
            "effective_sample_size": share or 1.0,  # of an empty mask
            "mean_score": float(self._score[:length].mean()),
        }

    # ---------------------------------------------------------------- saving

    def state_dict(self) -> dict[str, Any]:
        """A copy of what the next draw follows from, but for the buffer's generator."""
        return {
            **{name: getattr(self, name).clone() for name in (*_ARRAYS, "_playing")},
            "_writes": self._writes,
            "_return": self._return,
            "policy": {name: each.clone() for name, each in self.policy.state_dict().items()},
            "optimizer": deepcopy(self._optimizer.state_dict()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: It is of another capacity, or no state at all; nothing changed.
        """
        of, remedy = "sampler state", f"pass one of {self._max_capacity} slots"
        fits = isinstance(state_dict, Mapping) and all(
            isinstance(state_dict.get(name), Tensor) and len(state_dict[name]) == self._max_capacity
            for name in _ARRAYS
        )
        require(fits, of, state_dict, remedy)
        self.policy.load_state_dict(state_dict["policy"])
        self._optimizer.load_state_dict(state_dict["optimizer"])
        for name in (*_ARRAYS, "_playing"):
            setattr(self, name, state_dict[name].clone())
        self._writes, self._return = state_dict["_writes"], state_dict["_return"]
        self._subset, self._just_marked = None, None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._max_capacity}, policy={self.policy})"
