"""How the learner draws its batches: one class per method, chosen by name on the command line.

A method of one's own is a subclass in any importable module: ``--replay my_module.MyReplay``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import LazyTensorStorage, RandomSampler, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import Sampler

from recipes.arguments import (
    ClosedUnitInterval,
    FiniteFloat,
    FromOne,
    LeftOpenUnitInterval,
    NonNegativeFinite,
    PositiveFinite,
    PositiveInt,
    Slots,
    Width,
)
from recipes.learning import Signal
from recipes.settings import linear
from vlmrb_torchrl import ScoreBonus, VLMPrioritizedSampler, VLMReplayBuffer, keys
from vlmrb_torchrl.checks import require
from vlmrb_torchrl.samplers import (
    AttentiveSampler,
    GuidedPERSampler,
    OptimizedSampler,
    ReducibleLossSampler,
)

FirstTDError = Literal["greatest", "computed"]
"""|δ| of a new transition: the greatest there was, so that each is soon learnt from once (Schaul et
al. 2016), or its own, computed when it is stored (Ape-X, Horgan et al. 2018, arXiv 1803.00933)."""


class Replay(ABC):
    """What every replay method shares: a ring of transitions and a batch size.

    On the command line a method takes over the values of the one it replaces wherever their
    arguments share a name, so those mean the same, with the same default, in all methods.

    Args:
        capacity: Slots of the buffer, in transitions, on each rank.
        batch_size: Transitions per gradient step, on each rank.
        device: Where transitions and priorities lie: for a learner on a GPU,
            ``cuda`` draws there and waits for no copy.
    """

    uses_scores = False
    """Whether clips are scored for this method."""
    signal: Signal | None = None
    """What of an update is written back, as priorities of what it learnt from."""
    first_td_error: FirstTDError = "greatest"
    """What stands for the |δ| of a transition that was not learnt from yet."""
    buffer_class: type[TensorDictReplayBuffer] = VLMReplayBuffer
    """What holds the transitions; scores need a ``VLMReplayBuffer``."""

    def __init__(
        self,
        capacity: Slots = 200_000,
        batch_size: PositiveInt = 64,
        device: Literal["cpu", "cuda"] = "cpu",
    ) -> None:
        require(
            batch_size <= capacity,
            "replay.batch_size",
            batch_size,
            f"use 1 to replay.capacity ({capacity})",
        )
        self.capacity, self.batch_size, self.device = capacity, batch_size, device

    @abstractmethod
    def sampler(self) -> Sampler:
        """Build the sampler of the buffer."""

    def collected(self, sampler: Any, data: TensorDictBase) -> None:  # noqa: B027 - often nothing
        """Tell the sampler of steps that were just played, and are in the buffer by now.

        Args:
            sampler: The buffer's, built by ``sampler()``.
            data: Steps of the games, ``[num_envs, steps_per_collection]``, as they were played.
        """

    def anneal(self, sampler: Any, progress: float) -> None:  # noqa: B027 - often nothing
        """Set what changes while training, after each round of updates.

        Args:
            sampler: The buffer's, built by ``sampler()``.
            progress: Share of the steps after the warm-up that is done, 0 to 1.
        """

    def figures(self, buffer: VLMReplayBuffer, drawn: Tensor | None) -> dict[str, float]:
        """Say what is worth logging of the replay, whenever a row is written.

        Args:
            buffer: The buffer, with its sampler.
            drawn: Slots drawn since the last row; None: none were.
        """
        return {"transitions": float(len(buffer))}

    def buffer(self, other_rows: int = 0) -> VLMReplayBuffer:
        """Build the replay buffer, one row per transition.

        Args:
            other_rows: Transitions of a batch that come from elsewhere.
        """
        buffer: VLMReplayBuffer = self.buffer_class(
            storage=LazyTensorStorage(self.capacity, device=self.device),
            sampler=self.sampler(),
            batch_size=self.batch_size - other_rows,
            priority_key=self.signal or keys.TD_ERROR,
        )
        return buffer


class Uniform(Replay):
    """UER: every stored transition is equally likely."""

    def sampler(self) -> Sampler:
        """Build TorchRL's uniform sampler."""
        return RandomSampler()

    def figures(self, buffer: VLMReplayBuffer, drawn: Tensor | None) -> dict[str, float]:
        """Say that no transition is preferred."""
        return super().figures(buffer, drawn) | {"effective_sample_size": 1.0}


class Prioritized(Replay):
    """PER: P(i) ∝ (|δ_i| + ε)^α with weights (N P)^-β (Schaul et al. 2016, arXiv 1511.05952).

    The weights are not divided by the greatest of them: losses divide by their sum.

    Args:
        alpha: Exponent of the priority, 0 (uniform) to 1.
        beta_start: Exponent of the importance weight at the start, 0 to 1.
        beta_end: The same after ``beta_share``.
        beta_share: Share of the steps after the warm-up over which β rises linearly.
        td_error_offset: ε, added to |δ|, in units of return, so that no transition is lost.
        first_td_error: |δ| of a new transition: the greatest there was, so that each is soon learnt
            from once, or its own, computed when it is stored (Ape-X, arXiv 1803.00933).
    """

    signal: Signal | None = "td_error"

    def __init__(
        self,
        alpha: ClosedUnitInterval = 0.6,
        beta_start: ClosedUnitInterval = 0.4,
        beta_end: ClosedUnitInterval = 1.0,
        beta_share: ClosedUnitInterval = 1.0,
        td_error_offset: PositiveFinite = 1e-3,
        first_td_error: FirstTDError = "greatest",
        **ring: Any,
    ) -> None:
        super().__init__(**ring)
        self.alpha, self.td_error_offset = alpha, td_error_offset
        self.first_td_error = first_td_error
        self.beta_start, self.beta_end = beta_start, beta_end
        self.beta_share = beta_share

    def sampler(self) -> Sampler:
        """Build the mixture sampler as PER: every p is 1 and λ is 1."""
        return VLMPrioritizedSampler(
            self.capacity,
            lmbda=1.0,
            alpha=self.alpha,
            beta=self.beta_start,
            eps=self.td_error_offset,
            td_boost=True,
            unscored_priority=1.0,
        )

    def anneal(self, sampler: VLMPrioritizedSampler, progress: float) -> None:
        """Raise β to ``beta_end``."""
        sampler.beta = linear(self.beta_start, self.beta_end, self.beta_share, progress)

    def figures(self, buffer: VLMReplayBuffer, drawn: Tensor | None) -> dict[str, float]:
        """Add β and the effective sample size, 1 / (N Σ P²), as a share of the N transitions."""
        name = "effective_sample_size"
        figures = super().figures(buffer, drawn) | {"beta": float(buffer.sampler.beta)}
        return figures | {name: buffer.sampler.statistics(len(buffer))[name]}


class ReLo(Prioritized):
    """ReLo: as PER, by f(loss - the target network's loss) in the place of |δ| (arXiv 2208.10483).

    The offset ε is in units of the loss here.

    Args:
        mapping: f: ``relu``, or ``exponential``, x + 1 from 0 on and e^x below.
    """

    signal = "reducible_loss"

    def __init__(
        self, mapping: Literal["relu", "exponential"] = "relu", **prioritized: Any
    ) -> None:
        super().__init__(**prioritized)
        first = self.first_td_error
        require(first == "greatest", "replay.first_td_error", first, "use greatest with ReLo")
        self.mapping: Literal["relu", "exponential"] = mapping

    def sampler(self) -> Sampler:
        """Build the sampler that takes differences of losses."""
        return ReducibleLossSampler(
            self.capacity,
            mapping=self.mapping,
            alpha=self.alpha,
            beta=self.beta_start,
            eps=self.td_error_offset,
        )


class AER(Replay):
    """AER: of ⌈λ k⌉ uniform draws the k most similar to what is played (Sun et al., AAAI 2020).

    Each batch looks at one game, all in turn, in the state that it was last acted in. Vectors are
    compared by their cosine, grids by the share of entries that agree.

    Args:
        oversampling_start: λ at the start, at least 1; it falls linearly to 1, which is uniform.
            The value is ours: the paper's was not found, a reimplementation takes 2.
        oversampling_share: Share of the steps after the warm-up over which it falls.
    """

    def __init__(
        self,
        oversampling_start: FromOne = 2.0,
        oversampling_share: ClosedUnitInterval = 1.0,
        **ring: Any,
    ) -> None:
        super().__init__(**ring)
        self.oversampling_start, self.oversampling_share = oversampling_start, oversampling_share

    def sampler(self) -> Sampler:
        """Build the sampler that compares states."""
        return AttentiveSampler(self.oversampling_start)

    def collected(self, sampler: AttentiveSampler, data: TensorDictBase) -> None:
        """Show the sampler where the games are."""
        sampler.observe(data["observation"][:, -1])

    def anneal(self, sampler: AttentiveSampler, progress: float) -> None:
        """Lower λ to 1."""
        sampler.lmbda = linear(self.oversampling_start, 1.0, self.oversampling_share, progress)

    def figures(self, buffer: VLMReplayBuffer, drawn: Tensor | None) -> dict[str, float]:
        """Add λ."""
        return super().figures(buffer, drawn) | {"lambda": float(buffer.sampler.lmbda)}


class ERO(Replay):
    """ERO: a learnt policy chooses what may be replayed (Zha et al. 2019, arXiv 1906.08387).

    What the source was not found to fix is an argument, see ``OptimizedSampler``.

    Args:
        policy_features: Widths of the hidden layers of the replay policy.
        policy_learning_rate: Step size of Adam for it.
        policy_updates: Its steps after each collection in which episodes ended.
        policy_batch_size: Transitions of such a step.
        unvisited_score: Probability that a transition not replayed yet may be replayed.
    """

    signal = "td_error"

    def __init__(
        self,
        policy_features: tuple[Width, ...] = (64, 64),
        policy_learning_rate: PositiveFinite = 1e-4,
        policy_updates: PositiveInt = 1,
        policy_batch_size: PositiveInt = 64,
        unvisited_score: ClosedUnitInterval = 1.0,
        **ring: Any,
    ) -> None:
        super().__init__(**ring)
        self._policy: dict[str, Any] = {
            "hidden_features": policy_features,
            "learning_rate": policy_learning_rate,
            "policy_updates": policy_updates,
            "policy_batch_size": policy_batch_size,
            "unvisited_score": unvisited_score,
        }

    def sampler(self) -> Sampler:
        """Build the sampler and its policy."""
        return OptimizedSampler(self.capacity, **self._policy)

    def collected(self, sampler: OptimizedSampler, data: TensorDictBase) -> None:
        """Show the sampler what was earned."""
        outcome = data["next"]
        sampler.observe(outcome["reward"].squeeze(-1), outcome["done"].squeeze(-1))

    def figures(self, buffer: VLMReplayBuffer, drawn: Tensor | None) -> dict[str, float]:
        """Add the share that may be replayed, and the policy's mean score."""
        figures = super().figures(buffer, drawn)
        figures |= buffer.sampler.statistics(len(buffer))
        return figures


class Judged(Replay):
    """What methods that ask a judge share."""

    uses_scores = True

    def figures(self, buffer: VLMReplayBuffer, drawn: Tensor | None) -> dict[str, float]:
        """Add how much of the buffer and of the batches the judge has seen and praised."""
        sampler = buffer.sampler
        figures = super().figures(buffer, drawn)
        figures |= sampler.statistics(len(buffer))
        if drawn is not None:
            # As they are by now: a verdict that came after the draw counts as well.
            positive = sampler.positive
            share = positive[drawn.to(positive.device)].float().mean()
            figures["batch_share_positive"] = share.item()
        return figures


class VLMGuided(Judged):
    """VLM-RB: q(i) = λ q^P(i) + (1-λ)/N, where q^P follows the judge's scores (arXiv 2602.01915).

    Args:
        lmbda: Final share λ of draws by score, 0 (uniform) to 1.
        lmbda_share: Share of the steps after the warm-up over which λ rises linearly from 0.
        alpha: Exponent of the priority.
        beta: Exponent of the importance weight (N q)^-β; 0 as in the paper, 1 is unbiased.
        eps: Added to each priority; large values leak draws to transitions without a score.
        td_boost: Multiply the score by |δ|, the paper's choice for continuous control.
        threshold: A score from here on counts as Yes, below as No; null keeps raw scores.
        negative_priority: Priority of a transition that the judge said No for, where a Yes has 1:
            0 as in the paper; with `td_boost` 1 is PER, whatever the judge says.
        unscored_priority: Priority of a transition that no judge has seen yet.
    """

    def __init__(
        self,
        lmbda: ClosedUnitInterval = 0.5,
        lmbda_share: ClosedUnitInterval = 1 / 12,
        alpha: NonNegativeFinite = 0.6,
        beta: ClosedUnitInterval = 0.0,
        eps: PositiveFinite = 1e-12,
        td_boost: bool = False,
        threshold: LeftOpenUnitInterval | None = 0.5,
        negative_priority: ClosedUnitInterval = 0.0,
        unscored_priority: ClosedUnitInterval = 0.0,
        **ring: Any,
    ) -> None:
        super().__init__(**ring)
        self.lmbda, self.lmbda_share = lmbda, lmbda_share
        self.signal = "td_error" if td_boost else None
        self._priorities: dict[str, Any] = {
            "alpha": alpha,
            "beta": beta,
            "eps": eps,
            "td_boost": td_boost,
            "threshold": threshold,
            "negative_priority": negative_priority,
            "unscored_priority": unscored_priority,
        }

    def sampler(self) -> Sampler:
        """Build the mixture sampler, λ still at 0."""
        return VLMPrioritizedSampler(self.capacity, lmbda=0.0, **self._priorities)

    def anneal(self, sampler: VLMPrioritizedSampler, progress: float) -> None:
        """Raise λ from 0 to ``lmbda``."""
        sampler.lmbda = linear(0.0, self.lmbda, self.lmbda_share, progress)

    def figures(self, buffer: VLMReplayBuffer, drawn: Tensor | None) -> dict[str, float]:
        """Add λ and β."""
        sampler = buffer.sampler
        figures = {"lambda": float(sampler.lmbda), "beta": float(sampler.beta)}
        return super().figures(buffer, drawn) | figures


class GuidedPER(VLMGuided):
    """VLM-RB over PER: q(i) = λ q^P(i) + (1-λ) q^R(i), where q^R(i) ∝ (|δ_i| + ε)^α is PER.

    Where the judge has praised nothing yet it is PER.

    Args:
        rest_alpha: α of PER, 0 (uniform: VLM-RB) to 1.
        td_error_offset: ε of PER, in units of return.
        first_td_error: |δ| of a new transition: the greatest there was, or its own, computed when
            it is stored.
    """

    def __init__(
        self,
        rest_alpha: ClosedUnitInterval = 1.0,
        td_error_offset: PositiveFinite = 1e-3,
        first_td_error: FirstTDError = "greatest",
        **guided: Any,
    ) -> None:
        super().__init__(**guided)
        self.signal = "td_error"
        self.rest_alpha, self.td_error_offset = rest_alpha, td_error_offset
        self.first_td_error = first_td_error

    def sampler(self) -> Sampler:
        """Build the sampler of both, λ still at 0."""
        return GuidedPERSampler(
            self.capacity,
            lmbda=0.0,
            rest_alpha=self.rest_alpha,
            rest_eps=self.td_error_offset,
            **self._priorities,
        )


class RewardBonus(Judged):
    """The judge's score as a reward: draws are uniform, r + bonus · p is learnt from.

    All transitions of a praised clip are paid alike. Demonstrations that fill a share of each batch
    of their own are not judged and get nothing.

    Args:
        bonus: Of a Yes, in units of the reward that is learnt from.
        threshold: A score from here on counts as Yes (1), below as No (0); null keeps raw scores.
    """

    def __init__(
        self,
        bonus: FiniteFloat = 0.1,
        threshold: LeftOpenUnitInterval | None = 0.5,
        **ring: Any,
    ) -> None:
        super().__init__(**ring)
        self.bonus, self.threshold = bonus, threshold

    def sampler(self) -> Sampler:
        """Build a sampler that draws uniformly and keeps the scores."""
        return VLMPrioritizedSampler(self.capacity, lmbda=0.0, threshold=self.threshold)

    def buffer(self, other_rows: int = 0) -> VLMReplayBuffer:
        """Build the replay buffer, whose rewards have the bonus when they are drawn."""
        buffer = super().buffer(other_rows)
        buffer.append_transform(ScoreBonus(buffer.sampler, self.bonus, threshold=self.threshold))
        return buffer
