"""What an update costs: a recipe's against the same in a plain PyTorch loop, written out here.

    python -m recipes.benchmarks.update
    python -m recipes.benchmarks.update --algorithm sac --configs tests/recipes/configs/pendulum
    python -m recipes.benchmarks.update --device cuda

Both have the same networks, batch, data and optimizer.  They are timed on one batch, and with the
draw of each batch: from a buffer by TorchRL's uniform sampler, and from tensors by random indices.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from lightning.fabric import Fabric
from tensordict import TensorDictBase
from tensordict.nn import CudaGraphModule
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from recipes.arguments import PositiveInt, program
from recipes.benchmarks.timing import rates, show
from recipes.replay import Uniform
from recipes.running import cli
from recipes.running.run_state import Learner
from vlmrb_torchrl import VLMReplayBuffer
from vlmrb_torchrl.checks import checked_device

PLAIN_LOOP, PLAIN_GRAPH = "plain loop", "plain loop, cudagraph"
DRAWN = ", with the draw"
TRANSITIONS = 2048
"""Stored, to be drawn from."""

Rows = tuple[Tensor, ...]
"""Observations, actions, rewards, whether the episode goes on, and next observations."""
Step = Callable[..., Any]
"""An update by such rows, which returns |δ|; where there are several, they take turns."""


# -------------------------------------------------------------- as one writes it without a library


def descend(loss: Tensor, optimizer: Optimizer, max_norm: float) -> None:
    """One gradient step."""
    optimizer.zero_grad()
    loss.backward()
    if max_norm < math.inf:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_norm)
    optimizer.step()


@torch.no_grad()
def follow(target: nn.Module, online: nn.Module, rate: float) -> None:
    """Move a target network."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


def dqn(m: Any) -> list[Step]:
    """Double DQN with the networks and settings of a recipe."""
    gamma, value_adam = m.transitions.gamma, m.configure_optimizers()["value"]

    def step(now: Tensor, action: Tensor, reward: Tensor, going: Tensor, after: Tensor) -> Any:
        value = m.network.values(now).gather(1, action[:, None])[:, 0]
        with torch.no_grad():
            best = m.network.values(after).argmax(1, keepdim=True)
            goal = reward + gamma * going * m.target.values(after).gather(1, best)[:, 0]
        loss = functional.smooth_l1_loss(value, goal)
        descend(loss, value_adam, m.gradient_clip_norm)
        follow(m.target, m.network, m.target_update_rate)
        return (goal - value.detach()).abs()

    return [step]


def iqn(m: Any) -> list[Step]:
    """IQN."""
    gamma, value_adam = m.transitions.gamma, m.configure_optimizers()["value"]

    def step(now: Tensor, action: Tensor, reward: Tensor, going: Tensor, after: Tensor) -> Any:
        rows = torch.arange(len(now), device=now.device)
        tau = torch.rand(len(now), m.online_quantiles, device=now.device)
        value = m.network.quantiles(now, tau)[rows, :, action]
        with torch.no_grad():
            best = m.network.values(after).argmax(1)
            tau_after = torch.rand(len(now), m.target_quantiles, device=now.device)
            quantiles = m.target.quantiles(after, tau_after)[rows, :, best]
            goal = reward[:, None] + gamma * going[:, None] * quantiles
        difference = goal[:, None] - value[:, :, None]
        huber = functional.huber_loss(value[:, :, None], goal[:, None], "none", delta=m.kappa)
        weight = (tau[:, :, None] - (difference < 0).float()).abs()
        loss = (weight * huber / m.kappa).mean(2).sum(1).mean()
        descend(loss, value_adam, m.gradient_clip_norm)
        follow(m.target, m.network, m.target_update_rate)
        return (goal.mean(1) - value.detach().mean(1)).abs()

    return [step]


def sac(m: Any) -> list[Step]:
    """SAC with twin critics."""
    gamma, (critic_adam, actor_adam, alpha_adam) = (
        m.transitions.gamma,
        m.configure_optimizers().values(),
    )

    def step(now: Tensor, action: Tensor, reward: Tensor, going: Tensor, after: Tensor) -> Any:
        alpha = m.log_alpha.exp().detach()
        with torch.no_grad():
            next_action, log_prob = m.actor.draw(after)
            next_value = m.target(after, next_action).min(1).values - alpha * log_prob
            goal = reward + gamma * going * next_value
        values = m.critics(now, action)
        loss = 2 * functional.mse_loss(values, goal[:, None].expand_as(values))
        descend(loss, critic_adam, m.gradient_clip_norm)
        chosen, log_prob = m.actor.draw(now)
        loss = (alpha * log_prob - m.critics(now, chosen).min(1).values).mean()
        descend(loss, actor_adam, m.gradient_clip_norm)
        loss = -(m.log_alpha * (log_prob.detach() + m.target_entropy)).mean()
        descend(loss, alpha_adam, m.gradient_clip_norm)
        follow(m.target, m.critics, m.target_update_rate)
        return (goal[:, None] - values.detach()).abs().amax(1)

    return [step]


def td3(m: Any) -> list[Step]:
    """TD3, whose actor learns once in ``policy_delay`` updates."""
    gamma, (critic_adam, actor_adam) = m.transitions.gamma, m.configure_optimizers().values()

    def critics(now: Tensor, action: Tensor, reward: Tensor, going: Tensor, after: Tensor) -> Any:
        with torch.no_grad():
            limit = m.target_noise_clip
            noise = (m.target_noise * torch.randn_like(action)).clamp(-limit, limit)
            next_action = (m.target_policy.act(after) + noise).clamp(-1, 1)
            goal = reward + gamma * going * m.target(after, next_action).min(1).values
        values = m.critics(now, action)
        loss = 2 * functional.mse_loss(values, goal[:, None].expand_as(values))
        descend(loss, critic_adam, m.gradient_clip_norm)
        return (goal[:, None] - values.detach()).abs().amax(1)

    def both(now: Tensor, *rest: Tensor) -> Any:
        td_error = critics(now, *rest)
        loss = -m.critics[0](torch.cat([now, m.policy.act(now)], 1)).mean()
        descend(loss, actor_adam, m.gradient_clip_norm)
        follow(m.target, m.critics, m.target_update_rate)
        follow(m.target_policy, m.policy, m.target_update_rate)
        return td_error

    return [both, *[critics] * (m.policy_delay - 1)]


PLAIN = {"dqn": dqn, "iqn": iqn, "sac": sac, "td3": td3}


# -------------------------------------------------------------- the contestants


def rows_of(steps: TensorDictBase) -> Rows:
    """Transitions as tensors."""
    following = steps["next"]
    going = ~following["terminated"].squeeze(-1)
    reward = following["reward"].squeeze(-1)
    return steps["observation"], steps["action"], reward, going, following["observation"]


def in_turn(steps: Sequence[Step], rows: Callable[[], Rows]) -> Callable[[], Any]:
    """Make each update by the next of the steps."""
    turns = itertools.cycle(steps)

    def work() -> Any:
        return next(turns)(*rows())

    return work


def drawing(learner: Learner, buffer: VLMReplayBuffer) -> Any:
    """Draw a batch and learn from it."""
    return learner.update(buffer.sample())


def contestants(
    algorithm: str, settings: Namespace, kind: type[Any], device: torch.device, ways: Sequence[str]
) -> dict[str, Callable[[], Any]]:
    """Build the loops: each makes one update when called."""
    with closing(settings.env.make(8, seed=0)) as env:  # random actions
        steps = env.rollout(TRANSITIONS // 8, break_when_any_done=False)
    size = settings.replay.batch_size
    place: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    made: dict[str, Callable[[], Any]] = {}
    modules = [cli.build_algorithm(kind, settings).to(device) for _ in (PLAIN_LOOP, *ways)]
    stored = modules[0].transitions(steps).reshape(-1).to(device)
    buffer = Uniform(capacity=len(stored), batch_size=size, device=place).buffer()
    buffer.extend(stored)
    rows, batch = rows_of(stored), buffer.sample()

    def drawn_rows() -> Rows:
        chosen = torch.randint(len(stored), (size,), device=device)
        return tuple(column[chosen] for column in rows)

    some = drawn_rows()
    loops = {PLAIN_LOOP: PLAIN[algorithm](modules[0])}
    if device.type == "cuda":
        own = PLAIN[algorithm](copy.deepcopy(modules[0]))
        captured = {step: CudaGraphModule(step) for step in own}
        loops[PLAIN_GRAPH] = [captured[step] for step in own]
    for name, loop in loops.items():
        made[name] = in_turn(loop, lambda: some)
        made[name + DRAWN] = in_turn(loop, drawn_rows)
    for way, module in zip(ways, modules[1:], strict=True):
        learner = Learner(Fabric(accelerator=device.type, devices=1), module)
        learner.accelerate(way)
        made[f"recipe, {way}"] = partial(learner.update, batch)
        made[f"recipe, {way}{DRAWN}"] = partial(drawing, learner, buffer)
    return made


def timed(work: Callable[[], Any], device: torch.device) -> Callable[[], int]:
    """Make ten updates, and wait for the GPU at their end."""

    def ten() -> int:
        for _ in range(10):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 10

    return ten


def main(
    algorithm: Literal["dqn", "iqn", "sac", "td3"] = "dqn",
    configs: Path | None = None,
    rounds: PositiveInt = 9,
    seconds: float = 1.0,
    device: Literal["cpu", "cuda"] = "cpu",
    compile: bool = True,
) -> None:
    """Time the update of a recipe against the plain loop; on the CPU on one core.

    Args:
        algorithm: Recipe.
        configs: Folder of a task's YAML files, as for ``recipes.compare``; null: DoorKey-6x6 or,
            of continuous actions, OGBench's cube.
        rounds: Repetitions, in turn for all, in one run.
        seconds: Least duration of each measurement.
        device: Where it learns; on ``cuda`` both are captured as a CUDA graph, too.
        compile: Whether compiled updates are timed: wants a C++ compiler and a minute.
    """
    where = checked_device(device, here=True)
    torch.set_num_threads(1)
    kind = getattr(import_module(f"recipes.{algorithm}"), algorithm.upper())
    task = "doorkey_6x6" if algorithm in ("dqn", "iqn") else "cube_task1"
    folder = cli.CONFIGS / task if configs is None else configs
    settings = cli.rehearse(kind, [f"--config={folder / algorithm}.yaml"])
    ways = ["eager", *(["compile"] if compile else []), *(["cudagraph"] * (device == "cuda"))]
    works = contestants(algorithm, settings, kind, where, ways)
    for work in works.values():  # compiles, and captures
        timed(work, where)()
    measured = rates({name: timed(work, where) for name, work in works.items()}, rounds, seconds)
    rows = []
    for name in [name for name in measured if not name.endswith(DRAWN)]:
        cells: list[object] = [name]
        for end in ("", DRAWN):
            time, first = (measured[each + end].durations(1e3) for each in (name, PLAIN_LOOP))
            cells += [time, time / first]
        rows.append(cells)
    title = f"{algorithm.upper()}, batch {settings.replay.batch_size}, {device}"
    show(title, ("", "ms/update", "÷ plain", "ms with the draw", "÷ plain"), rows)


if __name__ == "__main__":
    program(main)
