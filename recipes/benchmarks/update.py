"""What an update costs, and what was taken off it: the same update in turn, mend by mend.

    python -m recipes.benchmarks.update
    python -m recipes.benchmarks.update --algorithm sac --configs recipes/configs/scene_task1

The two largest items of an update are the losses, most of it not arithmetic but the way in and out
of small networks, and the optimizers.  Sampling and priorities are left to
``recipes.benchmarks.sampler``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from importlib import import_module
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from jsonargparse import Namespace, auto_cli
from rich.console import Console
from rich.table import Table
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from recipes.benchmarks.timing import Spread, rates
from recipes.continuous_networks import ActionValue, DeterministicPolicy, GaussianPolicy
from recipes.networks import GridQNetwork
from recipes.running import cli
from vlmrb_torchrl.checks import ConfigError, require

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


def in_general_module(kind: type[Any]) -> Callable[..., TensorDictModule]:
    """Build networks of a class within a ``TensorDictModule``."""

    def build(*sizes: Any, **options: Any) -> TensorDictModule:
        own = kind(*sizes, **options)
        return TensorDictModule(_Plain(own), in_keys=own.in_keys, out_keys=own.out_keys)

    return build


def drawn_batch(settings: Namespace, module: Any) -> TensorDictBase:
    """A batch of the recipe's size, of random actions' steps."""
    with closing(settings.env.make(1, seed=0)) as env:
        steps = env.rollout(settings.replay.batch_size, break_when_any_done=False)
    batch: TensorDictBase = module.transitions(steps).reshape(-1)
    return batch


def update(
    recipe: type[Any],
    settings: Namespace,
    *,
    general: bool = False,
    plain: bool = False,
    compiled: bool = False,
) -> Callable[[], int]:
    """Build an algorithm and return its update: each optimizer's step, then the targets'.

    Args:
        recipe: LightningModule class.
        settings: Of a run.
        general: Put its networks into ``TensorDictModule``.
        plain: Step by torch's default Adam, with Lightning's search for a GPU.
        compiled: Compile its losses.
    """
    with ExitStack() as patched:
        names = vars(import_module(recipe.__module__))
        for kind in _FORWARD:
            if general and kind.__name__ in names:
                where = f"{recipe.__module__}.{kind.__name__}"
                patched.enter_context(patch(where, in_general_module(kind)))
        module = cli.build_algorithm(recipe, settings)
    batch, optimizers = drawn_batch(settings, module), module.configure_optimizers()
    if compiled:
        module.compile_losses()
    if plain:
        for optimizer in optimizers.values():
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
    require(rounds >= 1, "rounds", rounds, "use at least 1")
    settings = cli.rehearse(recipe, [f"--config={configs / algorithm}.yaml"])
    ways = {
        GENERAL: {"general": True, "plain": True},
        OWN: {"plain": True},
        RECIPE: {},
        COMPILED: {"compiled": True},
    }
    if algorithm == "iqn":  # its network was never in a general module
        del ways[GENERAL]
    if not compile:
        del ways[COMPILED]
    contestants = {name: update(recipe, settings, **way) for name, way in ways.items()}
    measured = rates(contestants, rounds, seconds)
    first = next(iter(measured.values()))
    title = f"{algorithm.upper()}, batch {settings.replay.batch_size}: median (lowest to highest)"
    table = Table("", "ms/update", "time ÷ the first's", title=title)
    for name, speed in measured.items():
        millis = Spread([1e3 / sample for sample in speed.samples])
        table.add_row(name, str(millis), str(first / speed))
    Console().print(table)


if __name__ == "__main__":
    try:
        auto_cli(main)
    except ConfigError as error:
        sys.exit(f"update: {error}")
