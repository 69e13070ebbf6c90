"""What an update costs, and what was taken off it: the same update in turn, mend by mend.

    python -m recipes.benchmarks.update
    python -m recipes.benchmarks.update --algorithm sac --configs recipes/configs/scene_task1

The two largest items of an update are the losses, most of it not arithmetic but the way in and out
of small networks, and the optimizers.  Sampling and priorities are left to
``recipes.benchmarks.sampler``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from jsonargparse import Namespace
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from recipes.arguments import program
from recipes.benchmarks.timing import against_first, rates, show
from recipes.networks import ActionValue, DeterministicPolicy, GaussianPolicy, GridQNetwork
from recipes.running import cli

GENERAL, OWN, RECIPE, COMPILED = (
    "networks in TensorDictModule, Adam as by default, a search for a GPU in each step",
    "networks that are modules of their own",
    "and Adam fused, without the search: the recipe",
    "and losses compiled (training.compile)",
)
_FORWARD: dict[type[Any], Callable[..., Any]] = {
    GridQNetwork: lambda own, observation: own.mlp(own.one_hot(observation)),
    ActionValue: lambda own, *pair: own.mlp(torch.cat(pair, dim=-1)),
    GaussianPolicy: lambda own, observation: own.split(own.mlp(observation)),
    DeterministicPolicy: lambda own, observation: own.mlp(observation).tanh(),
}
"""What the recipes' networks compute, for TorchRL's general module around it."""


class _Plain(nn.Module):
    """Tensors in and out."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, *inputs: Tensor) -> Any:
        return _FORWARD[type(self.own)](self.own, *inputs)


def general_module(kind: type[Any], *sizes: Any, **options: Any) -> TensorDictModule:
    """A network of a class within a ``TensorDictModule``."""
    own = kind(*sizes, **options)
    return TensorDictModule(_Plain(own), in_keys=own.in_keys, out_keys=own.out_keys)


def update(recipe: type[Any], settings: Namespace, way: str) -> Callable[[], int]:
    """Build an algorithm and return its update: each optimizer's step, then the targets'."""
    plain = way in (GENERAL, OWN)
    with ExitStack() as patched:
        names = vars(import_module(recipe.__module__))
        for kind in _FORWARD:
            if way == GENERAL and kind.__name__ in names:
                where = f"{recipe.__module__}.{kind.__name__}"
                patched.enter_context(patch(where, partial(general_module, kind)))
        module = cli.build_algorithm(recipe, settings)
    with closing(settings.env.make(1, seed=0)) as env:  # a batch of random actions' steps
        steps = env.rollout(settings.replay.batch_size, break_when_any_done=False)
    batch, optimizers = module.transitions(steps).reshape(-1), module.configure_optimizers()
    if way == COMPILED:
        module.compile_losses()
    for optimizer in optimizers.values() if plain else ():
        for group in optimizer.param_groups:
            group["fused"] = None  # torch's default

    def work() -> int:
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1" if plain else "0"  # 1: Lightning's
        drawn = batch.copy()
        for name, optimizer in optimizers.items():
            loss = module.training_step(drawn, name)
            if loss is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        module.after_update()
        return 1

    for _ in range(3):  # compiles, more than once where weights have got a gradient or a delay ends
        work()
    return work


def main(
    algorithm: Literal["dqn", "iqn", "sac", "td3"] = "dqn",
    configs: Path = cli.CONFIGS / "doorkey_6x6",
    rounds: int = 9,
    seconds: float = 1.0,
    compile: bool = True,
) -> None:
    """Time the update of a recipe, on one CPU core.

    Args:
        algorithm: Recipe.
        configs: Folder of a task's YAML files, as for ``recipes.compare``.
        rounds: Repetitions, in turn for all, in one run.
        seconds: Least duration of each measurement.
        compile: Whether compiled losses are timed, too: wants a C++ compiler and a minute.
    """
    torch.set_num_threads(1)
    recipe = getattr(import_module(f"recipes.{algorithm}"), algorithm.upper())
    settings = cli.rehearse(recipe, [f"--config={configs / algorithm}.yaml"])
    ways = [GENERAL, OWN, RECIPE, COMPILED]
    if algorithm == "iqn":  # whose network was never in a general module
        ways.remove(GENERAL)
    if not compile:
        ways.remove(COMPILED)
    measured = rates({way: update(recipe, settings, way) for way in ways}, rounds, seconds)
    times = {way: speed.durations(1e3) for way, speed in measured.items()}
    title = f"{algorithm.upper()}, batch {settings.replay.batch_size}"
    show(title, ("", "ms/update", "time ÷ the first's"), against_first(times))


if __name__ == "__main__":
    program(main)
