"""Updates made faster: compiled, or captured as one CUDA graph. Their results are the same."""

from __future__ import annotations

import os
import shutil

from lightning.fabric import Fabric

from recipes.learning import Update
from recipes.settings import Training
from vlmrb_torchrl.checks import require

COMPILING_PAYS = 50_000
"""Updates that earn back the seconds of compiling on a CPU (`recipes.benchmarks.update`)."""


def way_of(training: Training, fabric: Fabric, *, judge_in_thread: bool) -> str:
    """Say how updates are run: ``training.accelerate``, or what ``auto`` stands for.

    Args:
        training: Settings of the run.
        fabric: Launched.
        judge_in_thread: Whether another thread of this process may use the GPU, which a capture
            does not survive.

    Raises:
        ConfigError: It is not possible here.
    """
    way, ranks = training.accelerate, fabric.world_size
    capturable = fabric.device.type == "cuda" and ranks == 1 and not judge_in_thread
    if way == "auto":
        steps = training.total_env_steps - training.warmup_env_steps
        long = steps * training.updates_per_env_step / ranks >= COMPILING_PAYS
        if fabric.device.type == "cuda":
            return "cudagraph" if capturable else "eager"
        return "compile" if long and compiler_is_here() else "eager"
    require(
        way != "cudagraph" or capturable,
        "training.accelerate",
        way,
        "it wants one rank, a GPU (training.accelerator) and a judge in a process of its own "
        "(scoring.mode): use compile or auto",
    )
    require(
        way != "compile" or fabric.device.type == "cuda" or compiler_is_here(),
        "training.accelerate",
        way,
        "install g++, or name another C++ compiler in CXX, or use eager",
    )
    return way


def compiler_is_here() -> bool:
    """Whether torch finds the C++ compiler that it compiles with."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def accelerated(update: Update, way: str) -> Update:
    """Wrap a function of a batch, which is called with batches of one shape.

    Args:
        update: Of an `Algorithm`.
        way: ``eager``, ``compile`` or ``cudagraph``.
    """
    if way == "compile":
        import torch._dynamo  # only here: it takes seconds

        # Losses and their gradients in one graph, where this version of torch can.
        if hasattr(torch._dynamo.config, "trace_autograd_ops"):
            torch._dynamo.config.trace_autograd_ops = True
        # Random numbers as they are drawn uncompiled, so that it is the same run.
        compiled: Update = torch.compile(update, options={"fallback_random": True})
        return compiled
    if way == "cudagraph":
        from tensordict.nn import CudaGraphModule

        captured: Update = CudaGraphModule(update)
        return captured
    return update
