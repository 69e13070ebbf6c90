"""What a run is made of, and everything that its next step depends on, as one state.

| what | where it is held |
|---|---|
| networks, target networks, ε and noise of the exploration, Adam's moments | `Learner` |
| transitions, priorities, scores, λ, β, the generators of the draws | `Memory` |
| clips that wait, open clips, counts, the judge's own random numbers | its `AsyncScorer` |
| games in the middle of their episodes, numbers of the next ones, what was seen last | `Games` |
| sums of the next row, episodes in progress, how long the metrics file is | `Telemetry` |
| steps, updates that are due, torch's, numpy's and Python's random numbers | `RunState` |

Demonstrations are played anew, and all else follows from the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Self

import numpy as np
import torch
from jsonargparse import Namespace
from lightning.fabric import Fabric
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.checkpoint import GlobalRNGState
from torchrl.collectors import Collector
from torchrl.envs import TransformedEnv
from torchrl.envs.batched_envs import BatchedEnvBase

from recipes.demonstrations import Batches
from recipes.learning import Algorithm, Learnt, Update
from recipes.running.acceleration import accelerated
from recipes.running.divergence import check_steps
from recipes.running.metrics import Telemetry
from recipes.settings import Scoring
from recipes.tasks import Task
from recipes.transitions import Transitions
from vlmrb_torchrl import AsyncScorer, ClipRenderTransform, VLMReplayBuffer
from vlmrb_torchrl.checks import ConfigError, require
from vlmrb_torchrl.envs import ResumableEnv
from vlmrb_torchrl.scorers import SeededScorer

State = dict[str, Any]


class RunState:
    """How far a run is, and its parts, in the order of loading."""

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.env_steps = 0  # over all ranks
        self.updates_due = 0.0  # earned by them and not made yet; below 1 between two collections
        self._parts = {**parts, "random": GlobalRNGState()}  # last, as loading others may draw some

    def state_dict(self) -> State:
        """The state of each part, made of tensors, numbers and containers alone.

        Raises:
            ConfigError: A part's state holds something else.
        """
        parts = {name: plain(part.state_dict(), name) for name, part in self._parts.items()}
        return {"env_steps": self.env_steps, "updates_due": self.updates_due, **parts}

    def load_state_dict(self, state: State) -> None:
        """Put every part back."""
        self.env_steps, self.updates_due = state["env_steps"], state["updates_due"]
        for name, part in self._parts.items():
            part.load_state_dict(restored(state[name]))


class Learner:
    """An algorithm and its optimizers, on the device that it learns on.

    Its ``counts``, if there are any, name attributes to be saved besides weights and buffers:
    numbers, tensors or containers of these.

    Raises:
        ConfigError: Fabric was launched with a precision that wants more than casts.
    """

    def __init__(self, fabric: Fabric, module: Algorithm) -> None:
        precision = fabric.strategy.precision.precision
        known = precision in ("32-true", "bf16-mixed")
        require(known, "--precision", precision, "use 32-true or bf16-mixed")
        self.fabric, self.module = fabric, module
        self._counts: tuple[str, ...] = getattr(module, "counts", ())
        self._optimizers = module.prepare(fabric)
        self.accelerate("eager")

    def accelerate(self, way: str) -> None:
        """Have updates run in a way that `accelerated` knows."""
        self._way, self._updates = way, dict[str, Update]()

    def update(self, batch: TensorDictBase) -> Learnt:
        """Learn from a batch ``[B]``; see `Algorithm.update`."""
        name = self.module.next_update()
        if name not in self._updates:
            self._updates[name] = accelerated(getattr(self.module, name), self._way)
        with self.fabric.autocast():  # of `fabric run --precision`
            return self._updates[name](self.fabric.to_device(batch))

    def td_error(self, transitions: TensorDictBase) -> Tensor:
        """|δ| of transitions ``[B]``."""
        with self.fabric.autocast():
            return self.module.td_error(self.fabric.to_device(transitions))

    def state_dict(self) -> State:
        """Weights, buffers and counts; the optimizers' states."""
        return {
            "weights": self.module.state_dict(),
            "counts": {name: getattr(self.module, name) for name in self._counts},
            "optimizers": {name: each.state_dict() for name, each in self._optimizers.items()},
        }

    def load_state_dict(self, state: State) -> None:
        """Load them, but for the learning rates: they are the configuration's, and may change."""
        self.module.load_state_dict(state["weights"])
        for name in self._counts:
            setattr(self.module, name, state["counts"][name])
        for name, optimizer in self._optimizers.items():
            rates = [group["lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(state["optimizers"][name])
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate


class Memory:
    """What was played: stored, judged and drawn from.

    Once it is entered the judge has loaded and the demonstrations have been played.
    """

    scoring: AsyncScorer | None = None  # for methods that use scores
    batches: Batches  # what is learnt from

    def __init__(self, settings: Namespace, transitions: Transitions, seed: int) -> None:
        self._settings, self._seed = settings, seed
        self.transitions, self.replay = transitions, settings.replay
        self._other_rows = settings.demonstrations.rows(self.replay.batch_size)
        self.buffer: VLMReplayBuffer = self.replay.buffer(self._other_rows)
        self._draws = torch.Generator(self.replay.device).manual_seed(seed)
        self.buffer.set_rng(self._draws)

    def __enter__(self) -> Self:
        settings = self._settings
        with ExitStack() as opened:
            if self.replay.uses_scores:
                scoring = build_scoring(self.buffer, settings.env, settings.scoring, self._seed)
                self.scoring = opened.enter_context(scoring)
                # Loading takes seconds: a fast environment would be half-way by then. Later a
                # judge's faults stop nothing, but a run without one is uniform replay.
                if not scoring.wait_until_ready():
                    raise ConfigError(
                        f"scoring.scorer is {settings.scoring.scorer!r}: it does not load, the "
                        "warning above says why"
                    )
            episodes = settings.demonstrations.play(settings.env, self._seed)
            self.batches = Batches(
                self.buffer, episodes, self._other_rows, self.transitions, self._seed
            )
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def state_dict(self) -> State:
        """What is stored, and what waits for the judge."""
        # The judge may score on meanwhile: its clips are read before the buffer, so that none is
        # missing in both; loading goes the other way.
        scoring = None if self.scoring is None else self.scoring.state_dict()
        return {
            "scoring": scoring,
            "buffer": state_of_buffer(self.buffer),
            "draws": self._draws.get_state(),
            "demonstrations": self.batches.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Fill the buffer, and hand the judge what waits for it."""
        self.batches.load_state_dict(state["demonstrations"])
        self._draws.set_state(state["draws"])
        load_buffer(self.buffer, state["buffer"])
        if self.scoring is not None:
            self.scoring.load_state_dict(state["scoring"])


def build_scoring(buffer: VLMReplayBuffer, task: Task, settings: Scoring, seed: int) -> AsyncScorer:
    """Put the judge beside the buffer; one that tosses coins tosses others in each run."""
    if isinstance(settings.scorer, SeededScorer):
        settings.scorer.manual_seed((settings.scorer.seed + seed) % 2**63)  # torch takes no more
    renderer = task.renderer()
    render = None if renderer is None else ClipRenderTransform(renderer)
    # On a machine with fewer cores than work, scores that come late are worth little.
    return AsyncScorer(buffer, render, **vars(settings), niceness=0, seed=seed)


def state_of_buffer(buffer: VLMReplayBuffer) -> State:
    """The slots written so far, and what the sampler and the writer know of them."""
    whole, rows = buffer.state_dict(), len(buffer)
    stored: Any = buffer.storage[:rows] if rows else None
    if 0 < rows < buffer.storage.max_size:  # torch.save would write all memory that a view lies in
        stored = stored.clone()
    return {"stored": stored, "sampler": whole["_sampler"], "writer": whole["_writer"]}


def load_buffer(buffer: VLMReplayBuffer, state: State) -> None:
    """Fill an empty buffer."""
    if state["stored"] is not None:
        buffer.storage.set(torch.arange(len(state["stored"])), state["stored"])
    buffer.sampler.load_state_dict(state["sampler"])
    buffer.writer.load_state_dict(state["writer"])


class Games:
    """The environments, and what plays them: random actions before the first update.

    Environments that cannot be put back (see `ResumableEnv`) begin new episodes instead, and what
    is open of the old ones is closed: to be loaded after the telemetry and the memory.
    """

    def __init__(
        self,
        settings: Namespace,
        behaviour: Any,
        fabric: Fabric,
        seed: int,
        telemetry: Telemetry,
        memory: Memory,
    ) -> None:
        self._seed, self._telemetry, self._memory = seed, telemetry, memory
        training, collected = settings.training, settings.training.env_steps_per_collection
        # That after which the steps of all ranks first exceed the warm-up is the last random one.
        random_collections = training.warmup_env_steps // (collected * fabric.world_size) + 1
        self._collector = Collector(
            settings.env.make(training.num_envs, seed=seed),
            behaviour,
            frames_per_batch=collected,
            init_random_frames=random_collections * collected,
            total_frames=-1,
            env_device="cpu",
            policy_device=fabric.device,
            storing_device="cpu",
            trust_policy=True,
            auto_register_policy_transforms=False,
        )
        self._collected = iter(self._collector)
        self._env = self._games = self._collector.env
        while isinstance(self._games, TransformedEnv):
            self._games = self._games.base_env

    def play(self) -> TensorDictBase:
        """Collect the next steps, ``[num_envs, steps_per_collection]``.

        Raises:
            DivergedError: The environment wrote what is no number.
        """
        data: TensorDictBase = next(self._collected)
        check_steps(data)
        return data

    def close(self) -> None:
        """End the environments."""
        self._collector.shutdown()

    def state_dict(self) -> State:
        """The games if they can be saved, what the policy sees next, trajectory ids."""
        transforms: State | None = {}  # what they have learnt, such as means
        if isinstance(self._env, TransformedEnv | BatchedEnvBase):
            try:
                transforms = dict(self._env.state_dict())
            except ValueError:  # torch's, of buffers that have no size before they are used
                transforms = None
        resumable = isinstance(self._games, ResumableEnv)
        return {
            "games": self._games.games_state_dict() if resumable else None,
            "transforms": transforms,
            "carrier": self._collector._carrier.to("cpu"),
            # Not the collector's own state: it holds the policy again, and no episodes.
            "frames": self._collector._frames,
            "trajectories": self._collector._traj_pool.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Put the games back, or begin new ones, which no earlier ones were."""
        if state["transforms"] is None:
            self._telemetry.say("The environment's transforms cannot be saved: they start anew.")
        elif state["transforms"]:
            self._env.load_state_dict(state["transforms"])
        self._collector._frames = state["frames"]
        self._collector._traj_pool.load_state_dict(state["trajectories"])
        if state["games"] is not None:
            self._games.load_games_state_dict(state["games"])
            self._collector._carrier.update(state["carrier"])
            return
        self._env.set_seed(self._seed + state["frames"])
        self._collector.reset()
        self._telemetry.episodes_restarted()
        if self._memory.scoring is not None:
            self._memory.scoring.flush()
        self._telemetry.say(
            f"{type(self._games).__name__} cannot be put back into the middle of its episodes: "
            "they end here and new ones begin, so this run is not the one that was not interrupted."
        )


_TENSORDICT = "__tensordict__"
_LEAVES = (Tensor, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def plain(value: Any, path: str) -> Any:
    """A state as tensors, numbers and containers, which ``torch.load`` reads without pickled code.

    Raises:
        ConfigError: There is something else in it, at ``path``.
    """
    if isinstance(value, TensorDictBase):
        return {_TENSORDICT: plain(dict(value.items()), path), "batch_size": list(value.batch_size)}
    if isinstance(value, Mapping):
        return {key: plain(entry, f"{path}.{key}") for key, entry in value.items()}
    if isinstance(value, _LEAVES):
        return value
    if isinstance(value, list | tuple):
        return type(value)(plain(entry, f"{path}.{i}") for i, entry in enumerate(value))
    if isinstance(value, np.generic):
        return value.item()
    raise ConfigError(
        f"training.checkpoint_every_env_steps: {path} is a {type(value).__name__}, which a "
        "checkpoint cannot hold: save it as tensors and numbers, or use 0 for no checkpoints"
    )


def restored(value: Any) -> Any:
    """The inverse of `plain`."""
    if isinstance(value, dict) and _TENSORDICT in value:
        return TensorDict(restored(value[_TENSORDICT]), value["batch_size"])
    if isinstance(value, dict):
        return {key: restored(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(map(restored, value))
    return value
