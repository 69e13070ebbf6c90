"""Settings that every recipe shares, and what they say about a run's schedules.

Defaults live here, YAML files hold departures only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recipes.arguments import (
    ClosedUnitInterval,
    LeftOpenUnitInterval,
    NonNegativeInt,
    PositiveInt,
    Seconds,
    Seed,
    UpdateRatio,
)
from vlmrb_torchrl.checks import require
from vlmrb_torchrl.scorers import ClipScorer


@dataclass
class Training:
    """The run: how long, how many environments, how often it learns, looks and writes.

    Env steps and updates are counted over all ranks together.

    Args:
        total_env_steps: Length of the run, in environment steps. A run that is resumed with another
            length has its schedules stretched to it.
        num_envs: Environments stepped together, on each rank.
        steps_per_collection: Steps of each environment between two rounds of updates.
        warmup_env_steps: Environment steps of random actions before the first update.
        updates_per_env_step: Gradient steps per environment step (0.125: one every 8 steps).
        seed: Seed of the networks, the environments and the draws.
        eval_every_env_steps: Distance of two evaluations, in environment steps; 0 for none. There
            are none in the warm-up.
        eval_episodes: Episodes of an evaluation, on seeds that training never sees.
        eval_epsilon: Share of random actions in an evaluation, if actions are discrete; it breaks
            endless loops.
        log_every_env_steps: Distance of two rows of training figures; the end has one, too.
        strip_every_env_steps: Distance of two pictures of scored clips; 0 for none.
        checkpoint_every_env_steps: Distance of two checkpoints, from which ``--resume`` goes on;
            0 for none, not even when the run is stopped. The last two are kept.
        policies_every_env_steps: Distance of two copies of the weights, ``policy_<steps>.ckpt``,
            the first of them before any update; 0: ``policy.ckpt`` at the end is the only one.
        log_dir: Folder for TensorBoard logs and metrics.
        name: Name of the run's folder below ``log_dir``, where no run may lie yet; null: algorithm,
            task, replay method and seed.
        accelerator: Where the networks are trained; the CPU is faster for small ones. The option
            of ``fabric run`` counts instead. The judge has a ``device`` of its own.
        torch_threads: Threads of a tensor operation; 1 is fastest for small networks.
        accelerate: How updates run: one operation after another (``eager``), compiled by
            ``torch.compile`` (``compile``: up to a minute before the first one; wants a C++
            compiler), or captured as one CUDA graph (``cudagraph``: one GPU, the judge not in a
            thread). ``auto``: captured on a GPU where that is possible; on the CPU compiled if the
            run is long enough to earn it back. The results are the same but for rounding.
        progress: Show a progress bar.
    """

    total_env_steps: PositiveInt = 240_000
    num_envs: PositiveInt = 16
    steps_per_collection: PositiveInt = 8
    warmup_env_steps: NonNegativeInt = 2_000
    updates_per_env_step: UpdateRatio = 0.125
    seed: Seed = 0
    eval_every_env_steps: NonNegativeInt = 15_000
    eval_episodes: PositiveInt = 40
    eval_epsilon: ClosedUnitInterval = 0.05
    log_every_env_steps: PositiveInt = 4_000
    strip_every_env_steps: NonNegativeInt = 60_000
    checkpoint_every_env_steps: NonNegativeInt = 40_000
    policies_every_env_steps: NonNegativeInt = 0
    log_dir: str = "runs"
    name: str | None = None
    accelerator: Literal["cpu", "cuda", "auto"] = "cpu"
    torch_threads: PositiveInt = 1
    accelerate: Literal["auto", "eager", "compile", "cudagraph"] = "auto"
    progress: bool = True

    @property
    def env_steps_per_collection(self) -> int:
        """Environment steps of one collected batch, on one rank."""
        return self.num_envs * self.steps_per_collection


@dataclass
class Scoring:
    """How clips are cut and judged; read by replay methods that use scores.

    Args:
        scorer: The judge. A VLM of your own: any ``ClipScorer`` class by its import path.
        clip_transitions: Consecutive transitions that a clip covers and its score is written to.
        frames_per_clip: Frames of them that the judge sees, the last outcome among them.
        stride: Transitions between the starts of two clips; null: no overlap.
        queue_clips: Clips that may wait, about 5 kB each on DoorKey; beyond, the oldest is
            dropped and counted.
        delay_env_steps: Control: environment steps from a clip's end until the judge is given it,
            on each rank.
        dropped_share: Control: share of the clips that the judge is never given.
        batch_clips: Clips that the judge sees at once.
        timeout_s: Seconds for a batch until the judge counts as hanging.
        duty_cycle: Share of the time that the judge may compute, for one on the learner's own GPU.
        mode: Where the judge runs: a process, a thread (on CUDA with a stream of its own), in the
            loop itself (``sync``: reruns are bit-exact), or what suits the judge (``auto``).
    """

    scorer: ClipScorer
    clip_transitions: PositiveInt = 32
    frames_per_clip: PositiveInt = 32
    stride: PositiveInt | None = None
    queue_clips: PositiveInt = 2048
    delay_env_steps: NonNegativeInt = 0
    dropped_share: ClosedUnitInterval = 0.0
    batch_clips: PositiveInt = 16
    timeout_s: Seconds = 60.0
    duty_cycle: LeftOpenUnitInterval = 1.0
    mode: Literal["auto", "process", "thread", "sync"] = "auto"

    def __post_init__(self) -> None:
        require(
            self.stride is None or self.stride <= self.clip_transitions,
            "scoring.stride",
            self.stride,
            f"use 1 to scoring.clip_transitions ({self.clip_transitions}), or null for no overlap",
        )


def progress_of(training: Training, env_steps: int) -> float:
    """Share of the steps after the warm-up that is done after ``env_steps``, 0 to 1.

    Example:
        >>> progress_of(Training(total_env_steps=50_000, warmup_env_steps=2_000), 26_000)
        0.5
    """
    learning = training.total_env_steps - training.warmup_env_steps
    return min(1.0, (env_steps - training.warmup_env_steps) / learning)


def linear(start: float, end: float, share: float, progress: float) -> float:
    """A line from ``start`` to ``end``, which is kept from then on.

    Args:
        start: Value at the end of the warm-up.
        end: Value once ``share`` of the steps after the warm-up is done, exactly.
        share: Of the steps after the warm-up, 0 (at once) to 1 (at the end of the run).
        progress: Share of those steps that is done, 0 to 1.

    Example:
        >>> [linear(1.0, 0.1, 0.5, progress) for progress in (0.0, 0.25, 0.5, 1.0)]
        [1.0, 0.55, 0.1, 0.1]
    """
    done = 1.0 if progress >= share else progress / share
    return start * (1 - done) + end * done
