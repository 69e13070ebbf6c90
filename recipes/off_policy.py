"""The loop of the paper's Figure 1, once and explicit.

collect → extend → score → sample → update → re-prioritise → log.  Every recipe runs it; what
differs between algorithms is in their LightningModule, what differs between replay methods is
in the sampler.  A judge is built and waited for before the first step; afterwards one line knows of
it: ``scoring.extend``.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Protocol

import torch
from lightning.fabric import Fabric
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torch.optim import Optimizer
from torchrl import timeit
from torchrl.collectors import Collector

from recipes.demonstrations import Batches, Demonstrations
from recipes.evaluation import evaluate
from recipes.replay import Replay
from recipes.running.checkpoint import Checkpoints
from recipes.running.divergence import check_learning, check_steps
from recipes.running.interruption import Interruption
from recipes.running.run_state import (
    Counters,
    Episodes,
    Learner,
    Optimizers,
    ReplayState,
    RunState,
)
from recipes.running.telemetry import Telemetry
from recipes.schedules import progress_of
from recipes.settings import Scoring, Training
from recipes.tasks import Task
from recipes.transitions import Transitions
from vlmrb_torchrl import AsyncScorer, ClipRenderTransform, VLMReplayBuffer
from vlmrb_torchrl.checks import ConfigError
from vlmrb_torchrl.scorers import SeededScorer


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


def build_scoring(buffer: VLMReplayBuffer, task: Task, settings: Scoring, seed: int) -> AsyncScorer:
    """Put the judge beside the buffer; one that tosses coins tosses others in each run."""
    if isinstance(settings.scorer, SeededScorer):
        settings.scorer.manual_seed((settings.scorer.seed + seed) % 2**63)  # torch takes no more
    renderer = task.renderer()
    return AsyncScorer(
        buffer,
        None if renderer is None else ClipRenderTransform(renderer),
        settings.scorer,
        clip_transitions=settings.clip_transitions,
        frames_per_clip=settings.frames_per_clip,
        stride=settings.stride,
        queue_clips=settings.queue_clips,
        batch_clips=settings.batch_clips,
        timeout_s=settings.timeout_s,
        duty_cycle=settings.duty_cycle,
        mode=settings.mode,
        # On a machine with fewer cores than work, scores that come late are worth little.
        niceness=0,
    )


def wait_for_judge(scoring: AsyncScorer, settings: Scoring) -> None:
    """Let the judge load, which takes seconds: a fast environment would be half-way by then.

    Raises:
        ConfigError: If it does not load. Later its faults stop nothing, but a run without a judge
            from the start is uniform replay under another name.
    """
    if not scoring.wait_until_ready():
        raise ConfigError(
            f"scoring.scorer is {settings.scorer!r}: it does not load, the warning above says why"
        )


@timeit("store")
def store(
    data: TensorDictBase,
    transitions: Transitions,
    buffer: VLMReplayBuffer,
    scoring: AsyncScorer | None,
) -> None:
    """Take transitions into the buffer, and hand them to the judge."""
    kept = transitions(data)
    if scoring is None:
        buffer.extend(kept.reshape(-1))
    else:  # the judge's render states wait beside the buffer, not in it: draws stay small
        rows = -1, data.shape[-1]  # an episode is a row of its own
        scoring.extend(data.reshape(rows), kept.reshape(rows))


def update(
    fabric: Fabric,
    algorithm: Any,
    optimizers: dict[str, Optimizer],
    batches: Batches,
    replay: Replay,
    telemetry: Telemetry,
) -> None:
    """Learn from one batch: sample, a gradient step of each optimizer, re-prioritise."""
    with timeit("sample"):
        batch = batches.sample().to(fabric.device)
    for name, optimizer in optimizers.items():
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
    replayed = batches.replayed(batch)
    telemetry.updated(batch, replayed, batches.buffer)
    if replay.uses_td_error:
        with timeit("priority"):  # which goes to the buffer's device: the learner's is waited for
            check_learning(telemetry.learning)
            batches.buffer.update_tensordict_priority(replayed)


def learn(
    fabric: Fabric,
    algorithm: Any,
    optimizers: dict[str, Optimizer],
    batches: Batches,
    replay: Replay,
    telemetry: Telemetry,
    count: Counters,
) -> None:
    """Make the updates that are due; whether they diverged is seen before anything is played."""
    while count.updates_due >= 1:
        count.updates_due -= 1
        update(fabric, algorithm, optimizers, batches, replay, telemetry)
    check_learning(telemetry.learning)


def evaluate_if_due(
    fabric: Fabric,
    module: Algorithm,
    task: Task,
    training: Training,
    telemetry: Telemetry,
    count: Counters,
) -> None:
    """Play held-out episodes, on rank 0, every so many steps after the warm-up."""
    every = training.eval_every_env_steps
    if not every or count.env_steps < (count.evaluations + 1) * every:
        return
    if count.env_steps > training.warmup_env_steps:  # before, nothing has been learnt
        with telemetry.paused():
            if fabric.is_global_zero:
                result = evaluate(module.policy, task, training, count.evaluations)
                telemetry.evaluated(count.env_steps, result)
            fabric.barrier()
    count.evaluations += 1


def train(
    fabric: Fabric,
    module: Algorithm,
    task: Task,
    replay: Replay,
    scoring_settings: Scoring,
    demonstrations: Demonstrations,
    training: Training,
    telemetry: Telemetry,
    checkpoints: Checkpoints,
) -> None:
    """Train ``module`` on ``task``; every figure goes to ``telemetry``.

    Args:
        fabric: A launched Fabric.
        module: The algorithm, freshly built.
        task: The environment's factory.
        replay: The replay method.
        scoring_settings: How clips are cut and judged, for methods that use scores.
        demonstrations: Scripted episodes to begin with, whatever the method.
        training: Lengths, ratios and seeds.
        telemetry: Where figures go.
        checkpoints: Where the run is kept, and what it may go on from.

    Raises:
        StoppedError: By Ctrl-C or SIGTERM, after the step and a checkpoint.
    """
    if training.compile:
        module.compile_losses()
    optimizers = module.configure_optimizers()
    algorithm, *prepared = fabric.setup(module, *optimizers.values())
    optimizers = dict(zip(optimizers, prepared, strict=True))
    algorithm.mark_forward_method("training_step")
    seed = training.seed * fabric.world_size + fabric.global_rank
    buffer = replay.buffer(demonstrations.rows(replay.batch_size))
    draws = torch.Generator().manual_seed(seed)
    buffer.set_rng(draws)
    collector = Collector(
        task.make(training.num_envs, seed=seed),
        module.behaviour,
        frames_per_batch=training.env_steps_per_collection,
        total_frames=-1,
        env_device="cpu",
        policy_device=fabric.device,
        storing_device="cpu",
        trust_policy=True,
        auto_register_policy_transforms=False,
    )
    new_env_steps = training.env_steps_per_collection * fabric.world_size
    count = Counters()
    with ExitStack() as cleanup:
        cleanup.callback(collector.shutdown)
        if fabric.device.type == "cuda":  # ahead of a judge on the same GPU, whose stream has 0
            cleanup.enter_context(torch.cuda.stream(torch.cuda.Stream(fabric.device, priority=-1)))
        scoring = None
        if replay.uses_scores:
            scoring = cleanup.enter_context(build_scoring(buffer, task, scoring_settings, seed))
            with telemetry.paused():
                wait_for_judge(scoring, scoring_settings)

        with telemetry.paused():
            batches = demonstrations.batches(buffer, replay, task, module.transitions, seed)
        telemetry.note(batches.figures)
        run = RunState(
            {
                "algorithm": Learner(module),
                "optimizers": Optimizers(optimizers),
                "replay": ReplayState(buffer, draws),
                "demonstrations": batches,
                "counters": count,
                "telemetry": telemetry,
                **({} if scoring is None else {"scoring": scoring}),
                "episodes": Episodes(collector, seed, telemetry, scoring),
            }
        )
        if not checkpoints.restore(run):
            for episode in batches.prefill:
                store(episode, module.transitions, buffer, scoring)

        interruption = cleanup.enter_context(Interruption(fabric))
        collected = iter(collector)
        while count.env_steps < training.total_env_steps:
            with timeit("collect"):
                data = next(collected)
            check_steps(data)
            count.env_steps += new_env_steps
            store(data, module.transitions, buffer, scoring)
            telemetry.collected(data)

            if count.env_steps > training.warmup_env_steps:
                count.updates_due += new_env_steps * training.updates_per_env_step
                learn(fabric, algorithm, optimizers, batches, replay, telemetry, count)
                progress = progress_of(training, count.env_steps)
                module.after_collection(progress)
                replay.anneal(buffer.sampler, progress)

            telemetry.log(count.env_steps, module, replay, buffer, scoring)
            evaluate_if_due(fabric, module, task, training, telemetry, count)
            checkpoints.after_step(run, count.env_steps, telemetry, interruption.requested())
    policy = {"algorithm": algorithm, "env_steps": count.env_steps}
    fabric.save(telemetry.folder / "policy.ckpt", policy)
