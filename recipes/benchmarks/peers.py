"""Whole training runs against Stable-Baselines3's own program: env steps/s, one core each.

    pip install stable-baselines3
    python -m recipes.benchmarks.peers
    python -m recipes.benchmarks.peers --algorithm sac --num_envs 4

Both have the same environments, networks, batches, updates per env step and schedules, and uniform
replay.  Stable-Baselines3's DQN is no double DQN: it makes one pass less an update.  Each run is a
process of its own; runs take turns, and the second half of each is timed, when what is compiled
has been.
"""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import track

from recipes.arguments import PositiveInt, program
from recipes.benchmarks.timing import Spread, show
from recipes.dqn import DQN
from recipes.networks import GridLinear
from recipes.running import cli
from recipes.running.metrics import last_row
from recipes.sac import SAC
from recipes.tasks import DoorKey
from vlmrb_torchrl.checks import require

PEER = "Stable-Baselines3"


def of_the_recipe(algorithm: str, way: str, num_envs: int, env_steps: int) -> float:
    """Train by the recipe; return env steps/s of the second half."""
    each = num_envs if algorithm == "sac" else 8 * num_envs  # env steps of a collection
    half = env_steps // 2 // each * each
    with TemporaryDirectory() as folder:
        settings = {
            "replay": "Uniform",
            "training.accelerate": way,
            "training.num_envs": num_envs,
            "training.total_env_steps": 2 * half,
            "training.log_every_env_steps": half,
            "training.eval_every_env_steps": 0,
            "training.checkpoint_every_env_steps": 0,
            "training.progress": "false",
            "training.log_dir": folder,
            "training.name": "run",
        }
        if algorithm == "sac":
            settings |= {
                "env": "tests.recipes.gymnasium_task.Gymnasium",
                "env.id": "Pendulum-v1",
                "replay.batch_size": 256,
                "training.steps_per_collection": 1,
                "training.updates_per_env_step": 1,
                "training.warmup_env_steps": 200,
            }
        given = [f"--{name}={value}" for name, value in settings.items()]
        cli.run(SAC if algorithm == "sac" else DQN, given)
        return float(last_row(Path(folder) / "run")["speed/env_steps_per_s"])


def of_the_peer(algorithm: str, num_envs: int, env_steps: int) -> float:
    """Train by Stable-Baselines3 with the recipe's settings; return the same."""
    import stable_baselines3 as sb3
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
    from stable_baselines3.common.vec_env import VecEnv

    torch.set_num_threads(1)

    class Watch(BaseCallback):
        """Notes when the second half begins."""

        def _on_step(self) -> bool:
            if not hasattr(self, "half") and self.num_timesteps >= env_steps // 2:
                self.half = self.num_timesteps, time.perf_counter()
            return True

    class FirstLayer(BaseFeaturesExtractor):
        """The recipe's."""

        def __init__(self, space: Any) -> None:
            super().__init__(space, 128)
            self.layer = GridLinear(space.shape[0] - 1, int(space.high.max()) + 1, 128)

        def forward(self, observation: torch.Tensor) -> torch.Tensor:
            features: torch.Tensor = self.layer(observation).relu()
            return features

    watch = Watch()
    if algorithm == "sac":
        envs = make_vec_env("Pendulum-v1", num_envs)
        model = sb3.SAC(
            "MlpPolicy",
            envs,
            learning_starts=200,
            gradient_steps=num_envs,
            policy_kwargs={"net_arch": [256, 256]},
            device="cpu",
        )
    else:
        model = sb3.DQN(
            "MlpPolicy",
            games_of(DoorKey(6), num_envs, VecEnv),
            learning_rate=1e-3,
            buffer_size=200_000,
            learning_starts=2_000,
            batch_size=64,
            tau=0.01,
            gamma=0.95,
            train_freq=8,
            gradient_steps=num_envs,
            target_update_interval=1,
            exploration_fraction=0.75,
            exploration_final_eps=0.1,
            policy_kwargs={
                "net_arch": [128],
                "features_extractor_class": FirstLayer,
                "normalize_images": False,
                "optimizer_kwargs": {"eps": 1e-5},
            },
            device="cpu",
        )
    model.learn(env_steps, callback=watch)
    steps, start = watch.half
    return float((model.num_timesteps - steps) / (time.perf_counter() - start))


def games_of(task: DoorKey, num_envs: int, base: type[Any]) -> Any:
    """The recipe's own games as a ``VecEnv``: what is compared is the learner, not MiniGrid."""
    import gymnasium

    class Games(base):  # type: ignore[misc]
        def __init__(self) -> None:
            self.games = task.make(num_envs, seed=0)
            cells = self.games.observation_spec["observation"].shape[1:]
            seen = gymnasium.spaces.Box(0, 6, tuple(cells), np.uint8)
            super().__init__(num_envs, seen, gymnasium.spaces.Discrete(7))

        def reset(self) -> Any:
            self.state = self.games.reset()
            return self.state["observation"].numpy()

        def step_async(self, actions: Any) -> None:
            self.state.set("action", torch.from_numpy(actions))

        def step_wait(self) -> Any:
            played, self.state = self.games.step_and_maybe_reset(self.state)
            after = played["next"]
            done = after["done"].squeeze(-1).numpy()
            infos: list[dict[str, Any]] = [{} for _ in done]
            for i in done.nonzero()[0]:
                cut = bool(after["truncated"][i] & ~after["terminated"][i])
                last = after["observation"][i].numpy()
                infos[i] = {"terminal_observation": last, "TimeLimit.truncated": cut}
            reward = after["reward"].squeeze(-1).numpy()
            return self.state["observation"].numpy(), reward, done, infos

        def close(self) -> None:
            self.games.close()

        def get_attr(self, name: str, indices: Any = None) -> Any:
            return [None] * num_envs

        def set_attr(self, *arguments: Any) -> None: ...

        def env_method(self, *arguments: Any, **options: Any) -> Any:
            return [None] * num_envs

        def env_is_wrapped(self, *arguments: Any) -> Any:
            return [False] * num_envs

    return Games()


def main(
    algorithm: Literal["dqn", "sac"] = "dqn",
    pairs: PositiveInt = 5,
    num_envs: PositiveInt | None = None,
    env_steps: PositiveInt | None = None,
    compile: bool = True,
) -> None:
    """Train by the recipe and by Stable-Baselines3 in turn.

    Args:
        algorithm: ``dqn`` on DoorKey-6x6, one update per 8 env steps; ``sac`` on Pendulum, one per
            env step.
        pairs: Repetitions.
        num_envs: Environments stepped together; null: 16 and 1.
        env_steps: Length of a run; null: 24000 and 2000.
        compile: Whether the recipe with compiled updates runs, too: wants a C++ compiler.
    """
    here = find_spec("stable_baselines3") is not None
    require(here, "Stable-Baselines3", "not installed", "pip install stable-baselines3")
    envs = num_envs or {"dqn": 16, "sac": 1}[algorithm]
    steps = env_steps or {"dqn": 24_000, "sac": 2_000}[algorithm]
    ways = ["eager", *(["compile"] if compile else [])]
    speeds: dict[str, list[float]] = {name: [] for name in (PEER, *ways)}
    for name in track([*speeds] * pairs, "runs", transient=True):
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            if name == PEER:
                run = alone.submit(of_the_peer, algorithm, envs, steps)
            else:
                run = alone.submit(of_the_recipe, algorithm, name, envs, steps)
            speeds[name].append(run.result())
    measured = {name: Spread(samples) for name, samples in speeds.items()}
    rows: list[tuple[object, ...]] = [(PEER, measured[PEER], "")]
    rows += [(f"recipe, {way}", measured[way], measured[way] / measured[PEER]) for way in ways]
    title = f"{algorithm.upper()}, {envs} environments, {pairs} runs of {steps} env steps"
    show(title, ("", "env steps/s", f"÷ {PEER}"), rows)


if __name__ == "__main__":
    program(main)
