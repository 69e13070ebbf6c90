"""Everything that a run's next step depends on, as one state.

| what | where it is held |
|---|---|
| networks, target networks, ε and noise of the exploration | the algorithm's module |
| Adam's moments and step counts | its optimizers |
| transitions, priorities, scores, generations, the generator of the draws | the replay buffer |
| λ, β | the sampler |
| draws of demonstrations | `Batches` |
| games in the middle of their episodes, numbers of the next ones | the environment |
| what was observed last, trajectory ids | the collector |
| steps, updates that are due, evaluations | `Counters` |
| sums of the next row, episodes in progress, how long the metrics file is | `Telemetry` |
| clips that wait, open clips, counts, the judge's own random numbers | `AsyncScorer` |
| torch's, numpy's and Python's random numbers | the process |

Demonstrations are played anew, and all else follows from the configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torchrl.checkpoint import GlobalRNGState
from torchrl.collectors import Collector
from torchrl.data import PrioritizedSampler
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.batched_envs import BatchedEnvBase

from recipes.running.plain import plain, restored
from recipes.running.telemetry import Telemetry
from vlmrb_torchrl import AsyncScorer, VLMReplayBuffer
from vlmrb_torchrl.envs import ResumableEnv

State = dict[str, Any]
_TREES = ("_sum_tree", "_min_tree")


class Stateful(Protocol):
    """What PyTorch calls so: a part of a run that can be saved and loaded."""

    def state_dict(self) -> Any:
        """The state."""

    def load_state_dict(self, state: Any) -> Any:
        """Go on from it."""


@dataclass
class Counters:
    """How far a run is.

    Args:
        env_steps: Steps taken, over all ranks.
        updates_due: Updates earned by them and not made yet; below 1 between two collections.
        evaluations: Evaluations made.
    """

    env_steps: int = 0
    updates_due: float = 0.0
    evaluations: int = 0

    def state_dict(self) -> State:
        """The counts."""
        return asdict(self)

    def load_state_dict(self, state: State) -> None:
        """Go on counting."""
        self.__dict__.update(state)


class RunState:
    """The parts of a run, saved and loaded together.

    Saved and loaded in opposite orders. The judge may score on meanwhile: its clips are read before
    the buffer, so that none is missing in both, and are loaded after it. Random numbers come last,
    since building and loading may draw some.

    Args:
        parts: By name, in the order of loading.

    Example:
        >>> run = RunState({"algorithm": Learner(module), "counters": Counters()})
        >>> torch.save(run.state_dict(), "run.pt")  # doctest: +SKIP
    """

    def __init__(self, parts: Mapping[str, Stateful]) -> None:
        self._parts = {**parts, "random": GlobalRNGState()}

    def state_dict(self) -> State:
        """The state of each part, made of tensors, numbers and containers alone.

        Raises:
            ConfigError: A part's state holds something else.
        """
        return {name: plain(part.state_dict(), name) for name, part in self._reversed()}

    def load_state_dict(self, state: State) -> None:
        """Put every part back."""
        for name, part in self._parts.items():
            part.load_state_dict(restored(state[name]))

    def _reversed(self) -> Iterable[tuple[str, Stateful]]:
        return reversed(self._parts.items())


class Learner:
    """An algorithm: its module's weights and buffers, and what else it counts by.

    Args:
        module: The module. Its ``counts``, if there are any, name attributes that hold numbers,
            tensors or containers of these.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    def state_dict(self) -> State:
        """The weights, buffers and counts."""
        counts = {name: getattr(self._module, name) for name in self._names()}
        return {"weights": self._module.state_dict(), "counts": counts}

    def load_state_dict(self, state: State) -> None:
        """Load them."""
        self._module.load_state_dict(state["weights"])
        for name in self._names():
            setattr(self._module, name, state["counts"][name])

    def _names(self) -> Sequence[str]:
        return getattr(self._module, "counts", ())


class Optimizers:
    """The optimizers by name; their learning rates are the configuration's, which may change."""

    def __init__(self, optimizers: Mapping[str, Any]) -> None:
        self._optimizers = optimizers

    def state_dict(self) -> State:
        """Theirs, by name."""
        return {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()}

    def load_state_dict(self, state: State) -> None:
        """Load each of them, but for its learning rates."""
        for name, optimizer in self._optimizers.items():
            rates = [group["lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(state[name])
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate


class ReplayState:
    """A replay buffer: the slots written so far, what the sampler and the writer know of them.

    Args:
        buffer: Its storage has flat slots; it is empty when a state is loaded.
        generator: The one that its draws come from.
    """

    def __init__(self, buffer: VLMReplayBuffer, generator: torch.Generator) -> None:
        self._buffer, self._generator = buffer, generator

    def state_dict(self) -> State:
        """The state, without the slots that were never written."""
        whole, rows = self._buffer.state_dict(), len(self._buffer)
        sampler, stored = whole["_sampler"], None
        if isinstance(self._buffer.sampler, PrioritizedSampler) and "_min_tree" in sampler:
            every = torch.arange(self._buffer.storage.max_size)
            sampler |= {name: torch.as_tensor(sampler[name][every]) for name in _TREES}
        if rows:
            stored = self._buffer.storage[:rows]
            # torch.save would write all the memory that a view lies in.
            stored = stored.clone() if rows < self._buffer.storage.max_size else stored
        return {
            "stored": stored,
            "sampler": sampler,
            "writer": whole["_writer"],
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: State) -> None:
        """Fill the buffer."""
        buffer, sampler = self._buffer, dict(state["sampler"])
        if state["stored"] is not None:
            buffer.storage.set(torch.arange(len(state["stored"])), state["stored"])
        if isinstance(buffer.sampler, PrioritizedSampler) and "_min_tree" in sampler:
            every = torch.arange(buffer.storage.max_size)
            for name in _TREES:  # sums over leaves do not depend on the order that they came in
                tree = getattr(buffer.sampler, name)
                tree[every], sampler[name] = sampler[name], tree
        buffer.sampler.load_state_dict(sampler)
        buffer.writer.load_state_dict(state["writer"])
        self._generator.set_state(state["generator"])


class Episodes:
    """The environment and its collector, with the episodes that are in progress.

    An environment that cannot be put back (see `ResumableEnv`) begins new episodes instead, and
    what is open of the old ones is closed: to be loaded after the telemetry and the judge.

    Args:
        collector: The collector, with its environment.
        seed: Of the environment.
        telemetry: What measures episodes.
        scoring: What cuts them into clips.
    """

    def __init__(
        self,
        collector: Collector,
        seed: int,
        telemetry: Telemetry,
        scoring: AsyncScorer | None,
    ) -> None:
        self._collector, self._seed = collector, seed
        self._telemetry, self._scoring = telemetry, scoring

    def state_dict(self) -> State:
        """The games if they can be saved, what the policy sees next, trajectory ids."""
        collector, env = self._collector, self._collector.env
        games = _games(env)
        return {
            "games": games.games_state_dict() if isinstance(games, ResumableEnv) else None,
            "transforms": _of_transforms(env),
            "carrier": collector._carrier.to("cpu"),
            # Not the collector's own state: it holds the policy again, and no episodes.
            "frames": collector._frames,
            "trajectories": collector._traj_pool.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Put the games back, or begin new ones, which no earlier ones were."""
        collector, env = self._collector, self._collector.env
        games = _games(env)
        if state["transforms"] is None:
            self._telemetry.say("The environment's transforms cannot be saved: they start anew.")
        elif state["transforms"]:
            env.load_state_dict(state["transforms"])
        collector._frames = state["frames"]
        collector._traj_pool.load_state_dict(state["trajectories"])
        if isinstance(games, ResumableEnv) and state["games"] is not None:
            games.load_games_state_dict(state["games"])
            collector._carrier.update(state["carrier"])
            return
        env.set_seed(self._seed + state["frames"])
        collector.reset()
        self._telemetry.episodes_restarted()
        if self._scoring is not None:
            self._scoring.flush()
        self._telemetry.say(
            f"{type(games).__name__} cannot be put back into the middle of its episodes: they end "
            "here and new ones begin, so this run is not the one that was not interrupted."
        )


def _games(env: EnvBase) -> EnvBase:
    while isinstance(env, TransformedEnv):
        env = env.base_env
    return env


def _of_transforms(env: EnvBase) -> State | None:
    """What the environment's transforms have learnt, such as means; None: it cannot be had."""
    if not isinstance(env, TransformedEnv | BatchedEnvBase):
        return {}
    try:
        return dict(env.state_dict())
    except ValueError:  # torch's, of buffers that have no size before they are used
        return None
