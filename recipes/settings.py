"""Settings that every recipe shares; defaults live here, YAML files hold departures only."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from typing import Literal

from vlmrb_torchrl.checks import MOST_SECONDS, is_positive, is_real, is_whole, require
from vlmrb_torchrl.scorers import ClipScorer

MOST_SEED = 1 << 30  # beyond, the seeds of demonstrations begin; numpy's generators take 32 bits


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
        log_dir: Folder for TensorBoard logs and metrics.
        name: Name of the run's folder below ``log_dir``, where no run may lie yet; null: algorithm,
            task, replay method and seed.
        accelerator: Where the networks are trained; the CPU is faster for small ones. The option
            of ``fabric run`` counts instead. The judge has a ``device`` of its own.
        torch_threads: Threads of a tensor operation; 1 is fastest for small networks.
        compile: Compile the losses by ``torch.compile``: up to a minute before the first
            update, each update a little faster. Wants a C++ compiler.
        progress: Show a progress bar.
    """

    total_env_steps: int = 240_000
    num_envs: int = 16
    steps_per_collection: int = 8
    warmup_env_steps: int = 2_000
    updates_per_env_step: float = 0.125
    seed: int = 0
    eval_every_env_steps: int = 15_000
    eval_episodes: int = 40
    eval_epsilon: float = 0.05
    log_every_env_steps: int = 4_000
    strip_every_env_steps: int = 60_000
    checkpoint_every_env_steps: int = 40_000
    log_dir: str = "runs"
    name: str | None = None
    accelerator: Literal["cpu", "cuda", "auto"] = "cpu"
    torch_threads: int = 1
    compile: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        positive = (
            "total_env_steps",
            "num_envs",
            "steps_per_collection",
            "eval_episodes",
            "log_every_env_steps",
            "torch_threads",
        )
        for name in positive:
            value = getattr(self, name)
            require(is_whole(value, 1), f"training.{name}", value, "use at least 1")
        distances = ("eval", "strip", "checkpoint")
        for name in ("warmup_env_steps", "seed", *(f"{d}_every_env_steps" for d in distances)):
            value = getattr(self, name)
            require(is_whole(value, 0), f"training.{name}", value, "use 0 or more")
        require(self.seed < MOST_SEED, "training.seed", self.seed, f"use less than {MOST_SEED}")
        compiler = os.environ.get("CXX", "g++")
        require(
            not self.compile or shutil.which(compiler) is not None,
            "training.compile",
            self.compile,
            f"install {compiler}, or name another C++ compiler in CXX",
        )
        ratio = self.updates_per_env_step
        require(is_positive(ratio, 64), "training.updates_per_env_step", ratio, "use (0, 64]")
        epsilon = self.eval_epsilon
        require(is_real(epsilon, 0, 1), "training.eval_epsilon", epsilon, "use 0 to 1")

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
        batch_clips: Clips that the judge sees at once.
        timeout_s: Seconds for a batch until the judge counts as hanging.
        duty_cycle: Share of the time that the judge may compute, for one on the learner's own GPU.
        mode: Where the judge runs: a process (CPU), a thread with its own CUDA stream, in the
            loop itself (``sync``: reruns are bit-exact), or what suits the judge (``auto``).
    """

    scorer: ClipScorer
    clip_transitions: int = 32
    frames_per_clip: int = 32
    stride: int | None = None
    queue_clips: int = 2048
    batch_clips: int = 16
    timeout_s: float = 60.0
    duty_cycle: float = 1.0
    mode: Literal["auto", "process", "thread", "sync"] = "auto"

    def __post_init__(self) -> None:
        for name in ("clip_transitions", "frames_per_clip", "queue_clips", "batch_clips"):
            value = getattr(self, name)
            require(is_whole(value, 1), f"scoring.{name}", value, "use at least 1")
        require(
            is_positive(self.timeout_s, MOST_SECONDS),
            "scoring.timeout_s",
            self.timeout_s,
            f"use a number above 0, up to {MOST_SECONDS:g}",
        )
        require(
            is_positive(self.duty_cycle, 1),
            "scoring.duty_cycle",
            self.duty_cycle,
            "use a share above 0, up to 1",
        )
        require(
            self.stride is None or is_whole(self.stride, 1, self.clip_transitions),
            "scoring.stride",
            self.stride,
            f"use 1 to scoring.clip_transitions ({self.clip_transitions}), or null for no overlap",
        )
