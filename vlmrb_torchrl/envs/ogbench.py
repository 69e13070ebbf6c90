"""OGBench's manipulation tasks on one scene: a cube, a drawer, a window and the buttons that lock.

The dynamics and rewards are OGBench's own, step for step (arXiv 2410.20092). MuJoCo is imported
when an environment is built, not before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded

from vlmrb_torchrl import keys
from vlmrb_torchrl.checks import checked_device, is_whole, quoted, shown
from vlmrb_torchrl.envs.ogbench_simulator import build_games, simulator
from vlmrb_torchrl.envs.ogbench_workers import RemoteGames
from vlmrb_torchrl.envs.seeds import SeededEpisodes, check_games, check_seed
from vlmrb_torchrl.prompts import OGBENCH
from vlmrb_torchrl.renderers.mujoco import MuJoCoRenderer, Stage

if TYPE_CHECKING:
    from vlmrb_torchrl.envs.ogbench_demonstrator import OGBenchDemonstrator
    from vlmrb_torchrl.envs.ogbench_games import Outcome

SUBTASKS = {
    "scene": ("cube", "drawer_lock", "window_lock", "drawer", "window"),
    "cube-single": ("cube",),
}
"""Names of what has to be in its place, in OGBench's order."""
_ENV_ID = re.compile(rf"({'|'.join(SUBTASKS)})-singletask-task[1-5]-v0")


def ogbench_renderer(env_id: str, width: int, height: int, **options: Any) -> MuJoCoRenderer:
    """A renderer of a task's render states; see ``MuJoCoRenderer`` for the arguments."""
    return MuJoCoRenderer(partial(_stage, env_id), width, height, **options)


def _stage(env_id: str) -> Stage:
    scene: Stage = simulator().game(env_id)
    return scene


def event_names(env_id: str) -> tuple[str, ...]:
    """Names of the events of a task: success, then one for each subtask.

    Raises:
        ValueError: It is no task of the scene or of the single cube.
    """
    match = _ENV_ID.fullmatch(env_id) if isinstance(env_id, str) else None
    if match is None:
        raise ValueError(
            f"env_id={quoted(env_id)}: take scene-singletask-task1-v0 to task5, "
            "or cube-single-singletask-task1-v0 to task5."
        )
    return ("success", *SUBTASKS[match[1]])


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
        check_games(num_envs, held_out)
        if max_steps is not None and not is_whole(max_steps, 1):
            raise ValueError(
                f"max_steps={shown(max_steps)}: take 1 or more, or None for OGBench's own."
            )
        if not is_whole(workers, 1, num_envs):
            raise ValueError(f"workers={shown(workers)}: take 1 to num_envs ({num_envs}).")
        check_seed(seed)
        device = None if device is None else checked_device(device)
        super().__init__(device=device, batch_size=torch.Size([num_envs]))
        self.env_id, self.num_envs, self.workers = env_id, num_envs, workers
        self.held_out = held_out
        first = self._open()
        self.max_steps = self._time_limit() if max_steps is None else max_steps
        self._set_seed(seed)
        self._make_specs(first)

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
        self._steps = np.zeros(self.num_envs, np.int64)
        self._begun = [0] * self.num_envs  # seeds of the episodes in progress
        self._played: list[list[NDArray[np.float32]]] = [[] for _ in self._begun]  # their actions
        mine, *others = (partial(build_games, self.env_id, len(share)) for share in self._shares)
        try:
            for theirs in others:
                self._remote.append(RemoteGames(theirs))
            self._local = mine()
            return self._ask("begin", {})
        except BaseException:
            self._end_remote()
            raise

    def _time_limit(self) -> int:
        import gymnasium

        return int(gymnasium.spec(self.env_id).max_episode_steps or 0)

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

    def _make_specs(self, first: Outcome) -> None:
        N, device = self.num_envs, self.device
        flag = Categorical(2, shape=(N, 1), dtype=torch.bool, device=device)
        state, E = first.render_state.shape, len(self.event_names)
        self.observation_spec = Composite(
            {
                "observation": Unbounded(first.observation.shape, device, torch.float32),
                keys.RENDER_STATE: Bounded(0, 255, state, device, torch.uint8),
                keys.EVENTS: Binary(E, (N, E), device, torch.bool),
            },
            shape=(N,),
            device=device,
        )
        self.action_spec = Bounded(-1, 1, (N, 5), device, torch.float32)
        self.reward_spec = Unbounded((N, 1), device, torch.float32)
        self.done_spec = Composite(
            {name: flag.clone() for name in ("done", "terminated", "truncated")},
            shape=(N,),
            device=device,
        )

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        games = self._concerned(tensordict, "_reset")
        seeds = {i: self.episode_seed(i, self._episodes[i]) for i in games}
        for i in games:
            self._episodes[i] += 1
        self._ended[games], self._steps[games] = False, 0
        for i, seed in seeds.items():
            self._begun[i], self._played[i] = seed, []
        outcome = self._ask("begin", seeds)
        return self._pack(outcome, np.zeros_like(outcome.events))

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        games = self._concerned(tensordict, "_step")
        action = tensordict.get("action")
        if action.shape != (self.num_envs, 5) or not bool((action.abs() <= 1).all()):
            raise ValueError(
                f"action is {shown(action)} or outside [-1, 1]: pass float32 [{self.num_envs}, 5] "
                "within."
            )
        actions = action.detach().cpu().numpy()
        outcome = self._ask("play", {i: actions[i] for i in games})
        for i in games:
            self._played[i].append(actions[i].copy())
        self._steps[games] += 1
        self._ended[games, 0] = outcome.terminated[games]
        self._ended[games, 1] = self._steps[games] >= self.max_steps
        packed = self._pack(outcome, outcome.events)
        packed.set("reward", torch.from_numpy(outcome.reward[:, None]).to(self.device))
        return packed

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
        self._steps[:] = [len(actions) for actions in self._played]
        self._ended[:] = state["ended"].numpy()
        self._ask("begin", dict(enumerate(self._begun)))
        for step in range(self._steps.max()):
            self._ask("play", {i: a[step] for i, a in enumerate(self._played) if step < len(a)})

    def _concerned(self, tensordict: TensorDictBase | None, mask: str) -> list[int]:
        asked = None if tensordict is None else tensordict.get(mask, None)
        if asked is None:
            return list(range(self.num_envs))
        games: list[int] = asked.reshape(-1).nonzero().flatten().tolist()
        return games

    def _pack(self, outcome: Outcome, events: NDArray[np.bool_]) -> TensorDict:
        terminated, truncated = self._ended[:, :1].copy(), self._ended[:, 1:].copy()
        arrays = {
            "observation": outcome.observation,
            keys.RENDER_STATE: outcome.render_state,
            keys.EVENTS: events,
            "done": terminated | truncated,
            "terminated": terminated,
            "truncated": truncated,
        }
        return TensorDict(
            {name: torch.from_numpy(array) for name, array in arrays.items()},
            batch_size=self.batch_size,
            device=self.device,
        )
