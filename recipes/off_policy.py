"""The loop of the paper's Figure 1, once and explicit.

collect → extend → score → sample → update → re-prioritise → log.  Every recipe runs it; what
differs between algorithms is in their LightningModule, what differs between replay methods is
in the sampler.  A judge is waited for before the first step; afterwards one line knows of it:
``scoring.extend``.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Protocol

import torch
from jsonargparse import Namespace
from lightning.fabric import Fabric
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torch.optim import Optimizer
from torchrl import timeit

from recipes.evaluation import evaluate
from recipes.running.checkpoint import Checkpoints
from recipes.running.divergence import check_learning
from recipes.running.metrics import Telemetry
from recipes.running.run_state import Games, Learner, Memory, RunState
from recipes.settings import progress_of
from recipes.transitions import Transitions


class Algorithm(Protocol):
    """What the loop asks of a LightningModule."""

    gradient_clip_norm: float
    transitions: Transitions
    policy: TensorDictModuleBase
    behaviour: TensorDictModuleBase

    def configure_optimizers(self) -> dict[str, Optimizer]:
        """Build the optimizers, in the order of their steps: the critic, whence |δ|, is first."""

    def compile_losses(self, **options: Any) -> None:
        """Compile what ``training_step`` spends its time in, with options of ``torch.compile``."""

    def training_step(self, batch: TensorDictBase, optimizer: str) -> Tensor | None:
        """Return the loss that ``optimizer`` descends, or None where it has nothing to do.

        The critic's step writes |δ| into the batch.
        """

    def after_update(self) -> None:
        """Run after each update (target networks)."""

    def after_collection(self, progress: float) -> None:
        """Run after each round of updates (exploration).

        Args:
            progress: Share of the steps after the warm-up that is done, 0 to 1.
        """

    def figures(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """Say what is worth logging, whenever a row is due, of the last batch, just learnt from.

        No random number may be drawn: runs would differ by how often they are logged.
        """


@timeit("store")
def store(data: TensorDictBase, memory: Memory) -> None:
    """Take steps into the buffer as transitions, and hand them to the judge."""
    kept = memory.transitions(data)
    if memory.scoring is None:
        memory.buffer.extend(kept.reshape(-1))
    else:  # the judge's render states wait beside the buffer, not in it: draws stay small
        rows = -1, data.shape[-1]  # an episode is a row of its own
        memory.scoring.extend(data.reshape(rows), kept.reshape(rows))


def update(learner: Learner, memory: Memory, telemetry: Telemetry) -> None:
    """Learn from one batch: sample, a gradient step of each optimizer, re-prioritise."""
    fabric, algorithm = learner.fabric, learner.wrapped
    with timeit("sample"):
        batch = memory.batches.sample().to(fabric.device)
    for name, optimizer in learner.optimizers.items():
        with timeit("loss"):
            loss = algorithm.training_step(batch, name)
        if loss is None:
            continue
        with timeit("backward"):
            optimizer.zero_grad()
            fabric.backward(loss)
        with timeit("optimizer"):
            norm = fabric.clip_gradients(
                algorithm,
                optimizer,
                max_norm=algorithm.gradient_clip_norm,
                error_if_nonfinite=False,  # that would wait for the device, in each step
            )
            optimizer.step()
        telemetry.stepped(name, loss, norm)
    with timeit("target"):
        algorithm.after_update()
    replayed = memory.batches.replayed(batch)
    telemetry.updated(batch, replayed, memory.buffer)
    if memory.replay.uses_td_error:
        with timeit("priority"):  # which goes to the buffer's device: the learner's is waited for
            check_learning(telemetry.learning)
            memory.buffer.update_tensordict_priority(replayed)


def evaluate_if_due(
    learner: Learner, settings: Namespace, telemetry: Telemetry, env_steps: int
) -> None:
    """Play held-out episodes, on rank 0, every so many steps."""
    fabric, training = learner.fabric, settings.training
    every = training.eval_every_env_steps
    new_env_steps = training.env_steps_per_collection * fabric.world_size
    if every and env_steps // every > (env_steps - new_env_steps) // every:
        with telemetry.paused():
            if fabric.is_global_zero:
                number = env_steps // every - 1  # whatever came before it
                result = evaluate(learner.module.policy, settings.env, training, number)
                telemetry.evaluated(env_steps, result)
            fabric.barrier()


def train(
    fabric: Fabric,
    module: Algorithm,
    settings: Namespace,
    telemetry: Telemetry,
    checkpoints: Checkpoints,
) -> None:
    """Train ``module``; every figure goes to ``telemetry``.

    Args:
        fabric: Launched.
        module: Freshly built.
        settings: The task ``env``, the ``replay`` method, ``scoring``, ``demonstrations`` and
            ``training``, as the command line names them.
        telemetry: Where figures go.
        checkpoints: Where the run is kept, and what it may go on from.

    Raises:
        StoppedError: By Ctrl-C or SIGTERM, after the step and a checkpoint.
    """
    training = settings.training
    if training.compile:
        module.compile_losses()
    seed = training.seed * fabric.world_size + fabric.global_rank
    learner = Learner(fabric, module)
    memory = Memory(settings, module.transitions, seed)
    games = Games(settings, module.behaviour, fabric.device, seed, telemetry, memory)
    with ExitStack() as cleanup:
        cleanup.callback(games.close)
        if fabric.device.type == "cuda":  # ahead of a judge on the same GPU, whose stream has 0
            cleanup.enter_context(torch.cuda.stream(torch.cuda.Stream(fabric.device, priority=-1)))
        with telemetry.paused():
            cleanup.enter_context(memory)
        telemetry.note(memory.batches.figures)
        run = RunState(
            {"algorithm": learner, "memory": memory, "telemetry": telemetry, "games": games}
        )
        if not checkpoints.restore(run):
            for episode in memory.batches.prefill:
                store(episode, memory)

        cleanup.enter_context(checkpoints.interruption)
        while run.env_steps < training.total_env_steps:
            with timeit("collect"):
                data = games.play()
            new_env_steps = data.numel() * fabric.world_size
            run.env_steps += new_env_steps
            store(data, memory)
            telemetry.collected(data)

            if run.env_steps > training.warmup_env_steps:
                run.updates_due += new_env_steps * training.updates_per_env_step
                while run.updates_due >= 1:
                    run.updates_due -= 1
                    update(learner, memory, telemetry)
                check_learning(telemetry.learning)  # before anything is played, shown or saved
                progress = progress_of(training, run.env_steps)
                module.after_collection(progress)
                memory.replay.anneal(memory.buffer.sampler, progress)

            telemetry.log(run.env_steps, module, memory.replay, memory.buffer, memory.scoring)
            if run.env_steps > training.warmup_env_steps:  # before, nothing has been learnt
                evaluate_if_due(learner, settings, telemetry, run.env_steps)
            checkpoints.after_step(run, telemetry)
    policy = {"algorithm": learner.wrapped, "env_steps": run.env_steps}
    fabric.save(telemetry.folder / "policy.ckpt", policy)
