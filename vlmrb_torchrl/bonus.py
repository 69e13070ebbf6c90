"""The judge's score as a reward instead of a priority: the control for guided replay."""

from __future__ import annotations

from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.envs import Transform

from vlmrb_torchrl.checks import is_key, is_real, require, shown
from vlmrb_torchrl.keys import INDEX
from vlmrb_torchrl.samplers import VLMPrioritizedSampler


class ScoreBonus(Transform):
    """Adds ``bonus`` · p to the rewards that are drawn, where p is what the judge says of the slot.

    The score is read when the transition is drawn, so that it counts as soon as it has come; a
    transition without one gets nothing. What is stored stays as it is. With ``lmbda=0`` the sampler
    draws uniformly and only keeps the scores.

    All transitions of a clip have its score, so this pays for having been near a success, on the
    way there as well as after it, and again on every visit. It is no potential-based shaping, which
    would leave the optimal policies as they are: a policy that gathers praised clips may be worth
    more than one that ends the episode. An n-step transition gets it once.

    A buffer transforms a batch after its locks are free: where another thread overwrites a slot in
    that moment, its transition gets what is known of the new one.

    B: batch.

    Args:
        sampler: Keeps the scores of the buffer that this is a transform of.
        bonus: Of a Yes, in units of the reward that is stored; may be negative.
        threshold: Score from which p = 1, else 0; None takes the score itself as p.
        reward_key: Where the reward is, ``[B, 1]`` or ``[B]``.

    Raises:
        ValueError: An argument is outside its range.
        TypeError: ``sampler`` keeps no scores.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage
        >>> from vlmrb_torchrl import VLMReplayBuffer
        >>> sampler = VLMPrioritizedSampler(4, lmbda=0.0)
        >>> buffer = VLMReplayBuffer(
        ...     storage=LazyTensorStorage(4),
        ...     sampler=sampler,
        ...     batch_size=64,
        ...     transform=ScoreBonus(sampler, 0.5),
        ... )
        >>> rows = TensorDict({"next": {"reward": torch.zeros(4, 1)}}, [4])
        >>> index = buffer.extend(rows)
        >>> sampler.update_score(index[:2], torch.tensor([0.9, 0.1]))
        >>> batch = buffer.sample()
        >>> torch.equal(batch["next", "reward"].squeeze(-1), 0.5 * (batch["index"] == 0))
        True
    """

    def __init__(
        self,
        sampler: VLMPrioritizedSampler,
        bonus: float,
        *,
        threshold: float | None = 0.5,
        reward_key: NestedKey = ("next", "reward"),
    ) -> None:
        if not isinstance(sampler, VLMPrioritizedSampler):
            raise TypeError(
                f"sampler={shown(sampler)}: pass the VLMPrioritizedSampler of the buffer"
            )
        require(is_real(bonus), "bonus", bonus, "use a finite number")
        fits = threshold is None or is_real(threshold, 0, 1)
        require(fits, "threshold", threshold, "use 0 to 1, or None")
        require(is_key(reward_key), "reward_key", reward_key, "name an entry of the batch")
        super().__init__(in_keys=[reward_key], out_keys=[reward_key])
        self.sampler, self.bonus, self.threshold = sampler, bonus, threshold

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Add the bonus to the rewards of a batch ``[B]`` that has its slots at ``"index"``."""
        (key,) = self.in_keys
        reward, slot = tensordict.get(key), tensordict.get(INDEX)
        shape = list(tensordict.batch_size)
        require(list(slot.shape) == shape, INDEX, slot, f"one slot for each of {shape} is needed")
        bonus = self._praise(slot).mul(self.bonus).to(reward)
        return tensordict.set(key, reward + bonus.view_as(reward))

    def _praise(self, slot: Tensor) -> Tensor:
        """The p of slots; 0 where there is no score, which is kept as one below 0."""
        scores = self.sampler._score
        score = scores[slot.to(scores.device)]
        return score.clamp_min(0) if self.threshold is None else (score >= self.threshold).float()

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        raise RuntimeError(
            "ScoreBonus is a transform of a replay buffer: an environment has no slots."
        )
