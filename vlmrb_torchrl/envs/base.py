"""What an environment of this package offers beside being a TorchRL ``EnvBase``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.data import Binary, Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

from vlmrb_torchrl import keys
from vlmrb_torchrl.checks import checked_device, is_whole, require
from vlmrb_torchrl.renderers.base import Renderer

_MOST_GAMES = 1 << 16


@runtime_checkable
class JudgedEnv(Protocol):
    """An environment whose clips a judge can be shown, and asked about.

    Beside what it observes, such an environment writes two entries (``vlmrb_torchrl.keys``):
    ``render_state``, from which its renderer redraws the state, and ``events``, bool
    ``[*B, E]``: what the simulator saw happen in the transition that led to this state, all
    False after a reset. The agent reads neither.

    Attributes:
        event_names: Names of the E events, in their order in ``events``.
        success_event: The event that is success, one of ``event_names``.
        prompts: What to ask a judge about each event, word for word; ``success_event`` at least.
    """

    event_names: tuple[str, ...]
    success_event: str
    prompts: Mapping[str, str]

    def renderer(self) -> Renderer:
        """A renderer of this environment's ``render_state``."""
        ...


@runtime_checkable
class DemonstratedEnv(JudgedEnv, Protocol):
    """A `JudgedEnv` that knows a way to success: chance alone would seldom show a judge one."""

    def demonstrator(self) -> TensorDictModuleBase:
        """A policy for this environment that succeeds; it has no memory."""
        ...


@runtime_checkable
class ResumableEnv(Protocol):
    """An environment that can be put back into the middle of its episodes.

    Its two methods are to hold everything that the next steps and resets depend on, but for the
    process's own random generators; what was observed last is kept by the collector.
    """

    def games_state_dict(self) -> dict[str, Any]:
        """The games as they stand, as tensors, numbers and containers of these."""
        ...

    def load_games_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``games_state_dict`` of an environment built alike: step by step the same."""
        ...


class SeededEpisodes(EnvBase):  # type: ignore[misc]
    """N games played together, whose episodes are numbered, each with a seed of its own.

    When episode k of game i begins, a subclass takes ``episode_seed(i, k)``, with k from
    ``_episodes[i]``, and counts on. Its arguments are explained in the subclasses.
    """

    event_names: tuple[str, ...]

    def __init__(
        self,
        num_envs: int,
        *,
        seed: int,
        held_out: bool,
        device: torch.device | str | None = None,
    ) -> None:
        most = _MOST_GAMES
        require(is_whole(num_envs, 1, most), "num_envs", num_envs, f"play 1 to {most} games")
        require(isinstance(held_out, bool), "held_out", held_out, "say True or False")
        device = None if device is None else checked_device(device)
        super().__init__(device=device, batch_size=torch.Size([num_envs]))
        self.num_envs, self.held_out = num_envs, held_out
        self._restart(seed)
        flag = Categorical(2, shape=(num_envs, 1), dtype=torch.bool)
        flags = {name: flag.clone() for name in ("done", "terminated", "truncated")}
        self.done_spec = Composite(flags, shape=(num_envs,))
        self.reward_spec = Unbounded((num_envs, 1))

    def episode_seed(self, game: int, episode: int) -> int:
        """Seed that the simulator's reset gets: a function of ``seed`` and these two alone.

        Training episodes get seeds in [0, 2³¹), held-out ones in [2³¹, 2³²).
        """
        drawn = np.random.SeedSequence((self._seed, game, episode)).generate_state(1)[0]
        return int(drawn) >> 1 | self.held_out << 31

    def get_extra_state(self) -> dict[str, Any]:
        """For checkpoints: a restored environment goes on with the next episodes."""
        return {"seed": self._seed, "episodes": list(self._episodes)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Continue from ``get_extra_state``; takes effect when the games are next reset."""
        episodes = list(state["episodes"])
        fits = len(episodes) == self.num_envs and all(is_whole(each, 0) for each in episodes)
        require(fits, "episodes", episodes, f"the state is not one of {self.num_envs} games")
        self._restart(state["seed"])
        self._episodes = episodes

    def _set_seed(self, seed: int | None) -> None:
        self._restart(int(torch.randint(2**31, ())) if seed is None else seed)

    def _restart(self, seed: int) -> None:
        require(is_whole(seed, 0, 2**63 - 1), "seed", seed, "take a whole number in [0, 2⁶³)")
        self._seed = seed
        self._episodes = [0] * self.num_envs  # begun so far, per game

    def _observe(self, observation: TensorSpec, render_state: TensorSpec) -> None:
        """Declare what `_outcome` returns."""
        N, E = self.num_envs, len(self.event_names)
        events = Binary(E, (N, E), dtype=torch.bool)
        observed = {
            "observation": observation,
            keys.RENDER_STATE: render_state,
            keys.EVENTS: events,
        }
        self.observation_spec = Composite(observed, shape=(N,))

    def _asked(self, tensordict: TensorDictBase | None, mask: str) -> list[int]:
        """The games that ``"_reset"`` or ``"_step"`` names; the others wait."""
        asked = None if tensordict is None else tensordict.get(mask, None)
        if asked is None:
            return list(range(self.num_envs))
        games: list[int] = asked.reshape(-1).nonzero().flatten().tolist()
        return games

    def _outcome(
        self,
        observation: NDArray[Any],
        render_state: NDArray[np.uint8],
        events: NDArray[np.bool_],
        ended: NDArray[np.bool_],
        reward: NDArray[np.float32] | None,
    ) -> TensorDict:
        """What a step or, without ``reward`` ``[N, 1]``, a reset returns, on arrays given away.

        ``ended``, ``[N, 2]``: terminated and truncated.
        """
        arrays = {
            "observation": observation,
            keys.RENDER_STATE: render_state,
            keys.EVENTS: events,
            "done": ended.any(1, keepdims=True),
            "terminated": ended[:, :1].copy(),
            "truncated": ended[:, 1:].copy(),
        }
        if reward is not None:
            arrays["reward"] = reward
        return TensorDict(
            {name: torch.from_numpy(array) for name, array in arrays.items()},
            batch_size=self.batch_size,
            device=self.device,
        )
