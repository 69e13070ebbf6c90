"""The loop of the paper's Figure 1, once and explicit.

collect → extend → score → sample → update → re-prioritise → log.  Every recipe runs it; what
differs between algorithms is in their ``update``, what differs between replay methods is in the
sampler.  A judge is waited for before the first step; afterwards one line knows of it:
``scoring.extend``.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from jsonargparse import Namespace
from lightning.fabric import Fabric
from tensordict import TensorDictBase
from torchrl import timeit

from recipes.evaluation import evaluate
from recipes.learning import Algorithm
from recipes.running.acceleration import way_of
from recipes.running.checkpoint import Checkpoints
from recipes.running.divergence import check_learning
from recipes.running.metrics import Telemetry
from recipes.running.run_state import Games, Learner, Memory, RunState
from recipes.settings import Training, progress_of


@timeit("store")
def store(data: TensorDictBase, learner: Learner, memory: Memory) -> None:
    """Take steps into the buffer as transitions, and hand them to the judge."""
    kept = memory.transitions(data)
    if memory.scoring is None:
        index = memory.buffer.extend(kept.reshape(-1))
    else:  # the judge's render states wait beside the buffer, not in it: draws stay small
        rows = -1, data.shape[-1]  # an episode is a row of its own
        index = memory.scoring.extend(data.reshape(rows), kept.reshape(rows))
    if memory.replay.first_td_error == "computed":
        memory.buffer.update_priority(index, learner.td_error(kept.reshape(-1)))


def update(learner: Learner, memory: Memory, telemetry: Telemetry) -> None:
    """Learn from one batch: sample, update, re-prioritise."""
    with timeit("sample"):
        batch = memory.batches.sample()
    with timeit("update"):
        signal, figures = learner.update(batch)
    replayed = memory.batches.replayed(batch)
    telemetry.updated(figures, replayed, memory.buffer)
    if memory.replay.signal is not None:
        with timeit("priority"):
            if memory.replay.device == "cpu":  # to which they go: the learner is waited for
                check_learning(telemetry.learning)
            replayed.set(memory.buffer.priority_key, signal[: len(replayed)])
            memory.buffer.update_tensordict_priority(replayed)


def is_due(every: int, learner: Learner, training: Training, env_steps: int) -> bool:
    """Whether the last collection passed a multiple of ``every`` steps; never if that is 0."""
    new_env_steps = training.env_steps_per_collection * learner.fabric.world_size
    return bool(every) and env_steps // every > (env_steps - new_env_steps) // every


def evaluate_if_due(
    learner: Learner, settings: Namespace, telemetry: Telemetry, env_steps: int
) -> None:
    """Play held-out episodes, on rank 0, every so many steps."""
    fabric, training = learner.fabric, settings.training
    every = training.eval_every_env_steps
    if is_due(every, learner, training, env_steps):
        with telemetry.paused():
            if fabric.is_global_zero:
                number = env_steps // every - 1  # whatever came before it
                result = evaluate(learner.module.policy, settings.env, training, number)
                telemetry.evaluated(env_steps, result)
            fabric.barrier()


def save_policy(learner: Learner, telemetry: Telemetry, env_steps: int, name: str) -> None:
    """Write what is learnt by now, for `recipes.running.policies`."""
    policy = {"algorithm": learner.module.state_dict(), "env_steps": env_steps}
    learner.fabric.save(telemetry.folder / name, policy)


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
    seed = training.seed * fabric.world_size + fabric.global_rank
    module.signal = settings.replay.signal or module.signal
    learner = Learner(fabric, module)
    memory = Memory(settings, module.transitions, seed)
    games = Games(settings, module.behaviour, fabric, seed, telemetry, memory)
    with ExitStack() as cleanup:
        cleanup.callback(games.close)
        if fabric.device.type == "cuda":  # ahead of a judge on the same GPU, whose stream has 0
            cleanup.enter_context(torch.cuda.stream(torch.cuda.Stream(fabric.device, priority=-1)))
        with telemetry.paused():
            cleanup.enter_context(memory)
        threaded = memory.scoring is not None and memory.scoring.mode == "thread"
        learner.accelerate(way_of(training, fabric, judge_in_thread=threaded))
        telemetry.note(memory.batches.figures)
        run = RunState(
            {"algorithm": learner, "memory": memory, "telemetry": telemetry, "games": games}
        )
        if not checkpoints.restore(run):
            for episode in memory.batches.prefill:
                store(episode, learner, memory)
            if training.policies_every_env_steps:
                save_policy(learner, telemetry, 0, "policy_0.ckpt")

        cleanup.enter_context(checkpoints.interruption)
        while run.env_steps < training.total_env_steps:
            with timeit("collect"):
                data = games.play()
            new_env_steps = data.numel() * fabric.world_size
            run.env_steps += new_env_steps
            store(data, learner, memory)
            memory.replay.collected(memory.buffer.sampler, data)
            telemetry.collected(data)

            if run.env_steps > training.warmup_env_steps:
                run.updates_due += new_env_steps * training.updates_per_env_step
                while run.updates_due >= 1:
                    run.updates_due -= 1
                    update(learner, memory, telemetry)
                check_learning(telemetry.learning)  # before anything is played, shown or saved
                progress = progress_of(training, run.env_steps)
                telemetry.note(module.after_collection(progress))
                memory.replay.anneal(memory.buffer.sampler, progress)

            telemetry.log(run.env_steps, memory.replay, memory.buffer, memory.scoring)
            if run.env_steps > training.warmup_env_steps:  # before, nothing has been learnt
                evaluate_if_due(learner, settings, telemetry, run.env_steps)
            if is_due(training.policies_every_env_steps, learner, training, run.env_steps):
                save_policy(learner, telemetry, run.env_steps, f"policy_{run.env_steps}.ckpt")
            checkpoints.after_step(run, telemetry)
    save_policy(learner, telemetry, run.env_steps, "policy.ckpt")
