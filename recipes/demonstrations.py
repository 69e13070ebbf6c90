"""Episodes that the environment's own demonstrator plays before training, for all methods alike.

They go into the replay buffer once, before the first step, or fill a fixed share of every batch
from a memory of their own. Which they are follows from the task, the seed and these settings, not
from the replay method, and drawing them leaves no other random numbers changed.

T: transitions, B: transitions of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Categorical
from torchrl.envs import EnvBase

from recipes.arguments import NonNegativeFinite, NonNegativeInt, RightOpenUnitInterval
from recipes.running.divergence import check_steps
from recipes.tasks import Task
from vlmrb_torchrl import VLMReplayBuffer, keys
from vlmrb_torchrl.checks import require
from vlmrb_torchrl.envs import DemonstratedEnv

# Beyond the seed of any run: demonstrations start where training does not, and what is random about
# them is drawn from other numbers than the buffer's draws, which have the seed of the run.
_SEED_OFFSET, _NOISE_OFFSET, _DRAWS_OFFSET = 1 << 30, 2 << 30, 3 << 30
_LONGEST = 1 << 20  # steps; the environment's own time limit ends episodes long before


@dataclass
class Demonstrations:
    """Scripted episodes that every replay method is given; their steps count in no budget.

    Args:
        episodes: Episodes played before training; those without success are left out.
        batch_share: Share of each batch that is drawn from them, uniformly; 0: they are put into
            the replay buffer before the first step, and judged and drawn like what follows.
        action_noise: Standard deviation of the noise on the demonstrator's actions; share of
            random actions if they are discrete.
    """

    episodes: NonNegativeInt = 0
    batch_share: RightOpenUnitInterval = 0.0
    action_noise: NonNegativeFinite = 0.1

    def __post_init__(self) -> None:
        require(
            self.batch_share == 0 or self.episodes > 0,
            "demonstrations.episodes",
            self.episodes,
            f"with a batch_share of {self.batch_share} play at least 1",
        )

    def play(self, task: Task, seed: int) -> list[TensorDictBase]:
        """Play the episodes on ``task`` in the run of ``seed``.

        Returns:
            Successful ones, each ``[T]`` and done in its last transition.

        Raises:
            ConfigError: The environment has no demonstrator, or no episode succeeded.
        """
        if not self.episodes:
            return []
        with closing(task.make(self.episodes, seed=_SEED_OFFSET + seed)) as env:
            require(
                isinstance(env, DemonstratedEnv),
                "demonstrations.episodes",
                self.episodes,
                f"{type(task).__name__} has no demonstrator, use 0",
            )
            rollout = self._rollout(env, seed)
        check_steps(rollout)

        def succeeds(episode: TensorDictBase) -> bool:
            success = task.success(episode["next"])
            return success is not None and bool(success.any())

        ends = rollout["next", "done"].squeeze(-1).int().argmax(-1).tolist()
        whole = [rollout[game, : end + 1] for game, end in enumerate(ends)]
        played = [episode for episode in whole if succeeds(episode)]
        require(bool(played), "demonstrations.episodes", self.episodes, "none of them succeeded")
        return played

    def rows(self, batch_size: int) -> int:
        """How many of a batch's transitions are demonstrations that are not in the buffer.

        Raises:
            ConfigError: None, though there is a share for them; or all.
        """
        rows = round(batch_size * self.batch_share)
        require(
            (rows > 0) == (self.batch_share > 0) and rows < batch_size,
            "demonstrations.batch_share",
            self.batch_share,
            f"of replay.batch_size ({batch_size}) it leaves nothing for one of the two",
        )
        return rows

    def _rollout(self, env: EnvBase, seed: int) -> TensorDictBase:
        demonstrator, spec = env.demonstrator(), env.action_spec
        random = torch.Generator().manual_seed(_NOISE_OFFSET + seed)

        def act(tensordict: TensorDictBase) -> TensorDictBase:
            action: Tensor = demonstrator(tensordict).get("action")
            if isinstance(spec, Categorical):
                wild = torch.rand(action.shape, generator=random) < self.action_noise
                anything = torch.randint(spec.space.n, action.shape, generator=random)
                return tensordict.set("action", torch.where(wild, anything, action))
            noise = torch.randn(action.shape, generator=random)
            return tensordict.set("action", spec.project(action + self.action_noise * noise))

        with torch.no_grad():
            return env.rollout(_LONGEST, act, break_when_any_done=False, break_when_all_done=True)


class Batches:
    """Batches of an update: drawn from the replay buffer, then, as many each time, demonstrations.

    A demonstration has no slot (its index is -1) and no priority. Its importance weight is the mean
    of the replayed ones: demonstrations have their share of the loss, whatever the method.

    Args:
        buffer: The replay buffer; its batch size is that of the replayed part.
        episodes: Demonstrations; may be none.
        rows: Transitions of a batch that they are; 0: they lie in ``prefill``, for the buffer to
            hold before the first step.
        transitions: What is kept of their steps.
        seed: Of the draws.
    """

    def __init__(
        self,
        buffer: VLMReplayBuffer,
        episodes: Sequence[TensorDictBase] = (),
        rows: int = 0,
        transitions: Callable[[TensorDictBase], TensorDictBase] = lambda steps: steps,
        seed: int = 0,
    ) -> None:
        self.buffer, self._rows = buffer, rows
        self.prefill = () if rows else tuple(episodes)
        self.figures: dict[str, float] = {}  # for the log
        if episodes:
            self.figures = {
                "demonstration_episodes": len(episodes),
                "demonstration_transitions": sum(len(episode) for episode in episodes),
                "demonstration_rows": rows,
            }
        self._random = torch.Generator().manual_seed(_DRAWS_OFFSET + seed)
        if rows:
            self._memory = TensorDict.cat([transitions(episode) for episode in episodes])

    def sample(self) -> TensorDictBase:
        """Draw ``[B]`` transitions, the replayed ones first."""
        drawn = self.buffer.sample()
        if not self._rows:
            return drawn
        chosen = torch.randint(len(self._memory), (self._rows,), generator=self._random)
        shown: TensorDictBase = self._memory[chosen].to(drawn.device)
        for key in drawn.keys(include_nested=True, leaves_only=True):
            if key not in shown.keys(include_nested=True):
                like = drawn[key][:1].expand(self._rows, *drawn[key].shape[1:])
                # Losses divide by the sum of the weights: so they count as their rows do.
                value = drawn[key].mean() if key == keys.WEIGHT else -torch.ones_like(like)
                shown.set(key, value.expand_as(like).to(like.dtype))
        return torch.cat([drawn, shown])

    def state_dict(self) -> dict[str, Tensor]:
        """Where the draws are; the episodes themselves follow from the seed."""
        return {"random": self._random.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on drawing."""
        self._random.set_state(state["random"])

    def replayed(self, batch: TensorDictBase) -> TensorDictBase:
        """The part of a batch that came from the buffer."""
        return batch[: -self._rows] if self._rows else batch
