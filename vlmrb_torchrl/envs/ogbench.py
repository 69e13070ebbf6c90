"""OGBench's manipulation tasks on one scene: a cube, a drawer, a window and the buttons that lock.

The dynamics and rewards are OGBench's own, step for step (arXiv 2410.20092). It is imported when an
environment is built, not before.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDictBase
from torchrl.data import Bounded, Unbounded

from vlmrb_torchrl.checks import is_whole, require
from vlmrb_torchrl.envs.base import SeededEpisodes
from vlmrb_torchrl.prompts import OGBENCH
from vlmrb_torchrl.renderers.mujoco import MuJoCoRenderer

if TYPE_CHECKING:
    from vlmrb_torchrl.envs.ogbench_demonstrator import OGBenchDemonstrator
    from vlmrb_torchrl.envs.ogbench_games import Outcome

SUBTASKS = {
    "scene": ("cube", "drawer_lock", "window_lock", "drawer", "window"),
    "cube-single": ("cube",),
}
"""Names of what has to be in its place, in OGBench's order."""
_ENV_ID = re.compile(rf"({'|'.join(SUBTASKS)})-singletask-task[1-5]-v0")


def event_names(env_id: str) -> tuple[str, ...]:
    """Names of the events of a task: success, then one for each subtask.

    Raises:
        ValueError: It is no task of the scene or of the single cube.
    """
    match = _ENV_ID.fullmatch(env_id) if isinstance(env_id, str) else None
    known = "take scene-singletask-task1-v0 to task5, or cube-single-singletask-task1-v0 to task5"
    require(match is not None, "env_id", env_id, known)
    assert match is not None
    return ("success", *SUBTASKS[match[1]])


def ogbench_renderer(env_id: str, width: int, height: int, **options: Any) -> MuJoCoRenderer:
    """A renderer of a task's render states; see ``MuJoCoRenderer`` for the arguments."""
    return MuJoCoRenderer(partial(_simulated, "game", env_id), width, height, **options)


def _simulated(name: str, *arguments: Any) -> Any:
    """What the simulator's ``name`` makes, in whatever process this is called."""
    return getattr(simulator(), name)(*arguments)


def simulator() -> Any:
    """The module of OGBench's games, whose import takes a second."""
    # OGBench imports dm_control, which looks for a graphics library once and for all, and fails
    # where MUJOCO_GL names one that is not here; the games draw nothing, so it is told not to.
    asked = os.environ.get("MUJOCO_GL")
    try:
        import_module("mujoco")  # its own choice of a graphics library is the user's
        os.environ["MUJOCO_GL"] = "disabled"
        return import_module("vlmrb_torchrl.envs.ogbench_games")
    except ModuleNotFoundError as error:
        install = "pip install 'vlmrb-torchrl[ogbench]', on Python 3.11 or 3.12"
        raise ImportError(f"OGBench's tasks need OGBench ({error}): {install}") from error
    finally:
        os.environ.pop("MUJOCO_GL", None)
        if asked is not None:
            os.environ["MUJOCO_GL"] = asked


class OGBenchEnv(SeededEpisodes):
    """N games of one OGBench task: a robot arm brings a cube, drawer, window and locks into place.

    N: games, D: 40 for the scene, 28 for the cube, S: 298 and 248, E: 6 and 2.

    | entry | dtype, shape | |
    |---|---|---|
    | ``observation`` | float32 ``[N, D]`` | OGBench's: joints, effector, gripper, then each object |
    | ``render_state`` | uint8 ``[N, S]`` | bytes of qpos (float64), qvel (float32), button states (uint8) |
    | ``events`` | bool ``[N, E]`` | success; then each subtask, once an episode: not done before, done after |
    | ``action`` | float32 ``[N, 5]`` in [-1, 1] | effector's x, y, z and yaw, gripper: all relative |
    | ``reward`` | float32 ``[N, 1]`` | OGBench's: minus the number of subtasks not done |

    A subtask that is done from the start has an event only in the tasks whose way to success undoes it:
    the locks of tasks 2 and 5, the drawer of tasks 4 and 5.

    Success terminates an episode; ``max_steps`` truncates it. Both can hold at once. As in OGBench
    the reward, and success, are those of the state that the action is taken in: success comes one
    step after the last subtask's event, and not at all where that was the step of truncation.

    Seeds: episode k of game i is OGBench's ``reset(seed=env.episode_seed(i, k))``, a function of
    ``seed``, i, k and ``held_out`` alone. A pickled environment leaves its games behind: the copy
    goes on with the next episodes.

    Args:
        env_id: A task as OGBench registers it: ``scene-singletask-task1-v0`` to ``task5``, or
            ``cube-single-singletask-task1-v0`` to ``task5``.
        num_envs: Games that are stepped together, N.
        max_steps: Steps until truncation; None is OGBench's own, 750 (scene) or 200 (cube).
        seed: Of the whole stream of episodes; ``set_seed`` restarts the stream with another.
        held_out: Play the episodes that training never draws, for evaluation.
        workers: Processes that the games are spread over, this one among them.
        device: Where the tensors go. The games themselves are played on the CPU.

    Raises:
        ImportError: OGBench is not installed.
        ValueError: An unknown task, a number that is not positive, more workers than games.

    Example:
        >>> env = OGBenchEnv("scene-singletask-task4-v0", num_envs=2)
        >>> env.rollout(3)["observation"].shape
        torch.Size([2, 3, 40])
    """  # noqa: E501

    success_event = "success"
    prompts = OGBENCH

    def __init__(
        self,
        env_id: str = "scene-singletask-task1-v0",
        num_envs: int = 4,
        *,
        max_steps: int | None = None,
        seed: int = 0,
        held_out: bool = False,
        workers: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        self.event_names = event_names(env_id)
        limited = max_steps is None or is_whole(max_steps, 1)
        require(limited, "max_steps", max_steps, "take 1 or more, or None for OGBench's own")
        super().__init__(num_envs, seed=seed, held_out=held_out, device=device)
        most = f"take 1 to num_envs ({num_envs})"
        require(is_whole(workers, 1, num_envs), "workers", workers, most)
        self.env_id, self.workers = env_id, workers
        first = self._open()
        if max_steps is None:
            import gymnasium

            max_steps = gymnasium.spec(env_id).max_episode_steps
        assert max_steps is not None
        self.max_steps = max_steps
        observation = Unbounded(first.observation.shape, dtype=torch.float32)
        self._observe(observation, Bounded(0, 255, first.render_state.shape, dtype=torch.uint8))
        self.action_spec = Bounded(-1, 1, (num_envs, 5), dtype=torch.float32)

    def renderer(
        self,
        width: int = 200,
        height: int = 200,
        camera: str = "front",
        shadows: bool = False,
        samples: int = 0,
    ) -> MuJoCoRenderer:
        """A renderer of ``render_state``; see ``MuJoCoRenderer`` for the arguments."""
        options = {"camera": camera, "shadows": shadows, "samples": samples}
        return ogbench_renderer(self.env_id, width, height, **options)

    def demonstrator(self) -> OGBenchDemonstrator:
        """A policy that does one subtask after the other, by OGBench's own oracles."""
        from vlmrb_torchrl.envs.ogbench_demonstrator import OGBenchDemonstrator

        return OGBenchDemonstrator(self.env_id)

    def close(self, *, raise_if_closed: bool = True) -> None:
        """End the processes of games."""
        super().close(raise_if_closed=raise_if_closed)
        self._end_remote()

    def _end_remote(self) -> None:
        while self._remote:
            self._remote.pop().close()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_local", "_remote")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> Outcome:
        """Build the games, spread over the processes."""
        self._remote: list[RemoteGames] = []
        simulator()  # refuses here, not in a process
        self._shares = np.array_split(np.arange(self.num_envs), self.workers)
        self._ended = np.zeros((self.num_envs, 2), bool)  # terminated, truncated
        self._begun = [0] * self.num_envs  # seeds of the episodes in progress
        self._played: list[list[NDArray[np.float32]]] = [[] for _ in self._begun]  # their actions
        mine, *others = (
            partial(_simulated, "Games", self.env_id, len(share)) for share in self._shares
        )
        try:
            for theirs in others:
                self._remote.append(RemoteGames(theirs))
            self._local = mine()
            return self._ask("begin", {})
        except BaseException:
            self._end_remote()
            raise

    def _ask(self, method: str, arguments: Mapping[int, Any]) -> Outcome:
        """Call a method of all games, with an argument for each game that it concerns."""
        if len(self._remote) < self.workers - 1:
            raise RuntimeError("This OGBenchEnv is closed; make a new one.")
        mine, *others = (
            {i - share[0]: arguments[i] for i in share if i in arguments} for share in self._shares
        )
        for remote, theirs in zip(self._remote, others, strict=True):
            remote.send(method, theirs)
        local: Outcome = getattr(self._local, method)(mine)
        answers = [local, *(remote.receive() for remote in self._remote)]
        return type(local)(*(np.concatenate(parts) for parts in zip(*answers, strict=True)))

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        games = self._asked(tensordict, "_reset")
        for i in games:
            self._begun[i], self._played[i] = self.episode_seed(i, self._episodes[i]), []
            self._episodes[i] += 1
        self._ended[games] = False
        seen = self._ask("begin", {i: self._begun[i] for i in games})
        nothing = np.zeros_like(seen.events)
        return self._outcome(seen.observation, seen.render_state, nothing, self._ended, None)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict.get("action")
        within = action.shape == (self.num_envs, 5) and bool((action.abs() <= 1).all())
        got = f"pass float32 [{self.num_envs}, 5] within [-1, 1]"
        require(within, "action", action, got)
        actions = action.detach().cpu().numpy()
        games = self._asked(tensordict, "_step")
        seen = self._ask("play", {i: actions[i] for i in games})
        for i in games:
            self._played[i].append(actions[i].copy())
            self._ended[i] = seen.terminated[i], len(self._played[i]) >= self.max_steps
        reward = seen.reward[:, None]
        return self._outcome(seen.observation, seen.render_state, seen.events, self._ended, reward)

    def games_state_dict(self) -> dict[str, Any]:
        """The games as they stand: the seed of each episode, and what was done in it.

        The simulator's own state would be less: what OGBench reads of it after a step is older
        than its positions, and the solver remembers its last answer.
        """
        played = [torch.from_numpy(np.array(a, np.float32).reshape(-1, 5)) for a in self._played]
        return {
            "stream": self.get_extra_state(),
            "begun": list(self._begun),
            "played": played,
            "ended": torch.from_numpy(self._ended.copy()),
        }

    def load_games_state_dict(self, state: dict[str, Any]) -> None:
        """Play the episodes again up to where they were."""
        self.set_extra_state(state["stream"])
        self._begun = list(state["begun"])
        self._played = [list(actions.numpy()) for actions in state["played"]]
        self._ended[:] = state["ended"].numpy()
        self._ask("begin", dict(enumerate(self._begun)))
        for step in range(max(map(len, self._played))):
            self._ask("play", {i: a[step] for i, a in enumerate(self._played) if step < len(a)})


_GOODBYE_SECONDS = 5.0
_GRACE_SECONDS = 10
"""How long a process asked to end by SIGTERM still answers: where a whole job is asked, whoever
plays finishes a step and saves."""


class RemoteGames:
    """`Games` in a process of its own: `send` returns at once, `receive` waits for the answer."""

    def __init__(self, build: Callable[[], Any]) -> None:
        # Never by a fork: this process has threads, and a picture's context, maybe.
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, build), name="games", daemon=True
        )
        self._process.start()
        theirs.close()
        self._calls = 0

    def send(self, method: str, argument: Any) -> None:
        """Call a method of the games."""
        self._calls += 1
        with self._alive():
            self._connection.send((self._calls, method, argument))

    def receive(self) -> Any:
        """What the method called last returned; answers nobody waited for are passed over."""
        call, answer = 0, None
        with self._alive():
            while call != self._calls:
                call, answer = self._connection.recv()
        return answer

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):
            self._process.join(_GOODBYE_SECONDS)
            code = self._process.exitcode
            raise RuntimeError(
                f"A process of games has died (exit code {code}): its last words are above; "
                "with workers=1 the games run in this process."
            ) from None

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(_GOODBYE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(_GOODBYE_SECONDS)


def _serve(connection: Connection, build: Callable[[], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks ends it, by closing
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))
    games = build()
    while True:
        try:
            call, method, argument = connection.recv()
        except (EOFError, OSError):  # closed, maybe before the last answer was read
            return
        answer = getattr(games, method)(argument)
        with suppress(OSError):
            connection.send((call, answer))
