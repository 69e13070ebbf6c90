"""Clips per second of a judge, and what the learner keeps of its speed beside it.

    python -m recipes.benchmarks.scoring                             # the embedded judge, one core
    python -m recipes.benchmarks.scoring --model 1b --device cuda    # Perception-LM-1B's shape
    python -m recipes.benchmarks.scoring --model 1b --device cuda --training_pairs 3

The second builds a PerceptionLM of the 1B configuration with random weights: its speed is that of
the real one, its answers are noise.  Its figures are given as a share of what the GPU's peak
would allow, from the operations that the model needs.  The third then trains DQN on the same
device, with that judge and without, in turn.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tensordict import TensorDict
from torch import Tensor

from recipes.benchmarks.perception_lm import SHAPES, Shape, build, teraflops
from recipes.benchmarks.timing import rates
from recipes.benchmarks.training import training
from vlmrb_torchrl.checks import ConfigError, require
from vlmrb_torchrl.envs import DoorKeyEnv
from vlmrb_torchrl.judge.collection import collect
from vlmrb_torchrl.judge.settings import Settings
from vlmrb_torchrl.keys import CLIP
from vlmrb_torchrl.renderers import ClipRenderTransform
from vlmrb_torchrl.scorers import EmbeddedJudge, HuggingFaceScorer


def doorkey_clips(count: int, tile_size: int, window: int | None) -> Tensor:
    """Clips of DoorKey-8x8 as replay cuts them, half demonstrated, half random, ``[N, F, ...]``."""
    env = DoorKeyEnv(size=8, num_envs=16)
    settings = Settings(env, [EmbeddedJudge()], policy="mixed", clips=count)
    states = collect(settings, lambda _: None).select("render_state")
    frames: Tensor = ClipRenderTransform(env.renderer(tile_size=tile_size, window=window))(states)[
        CLIP
    ]
    return frames


def ways(scorer: HuggingFaceScorer, plain: HuggingFaceScorer, clips: Tensor, batch: int) -> Any:
    """The same clips, scored in a stream of batches: with less and less computed anew."""
    batches = [TensorDict({CLIP: part}, [len(part)]) for part in clips.split(batch)]
    scorer.load()
    plain.load()
    model = scorer._loaded
    assert model is not None
    assert model.embeddings is not None
    embeddings = model.embeddings

    def stream(judge: HuggingFaceScorer, forget: Literal["nothing", "batch", "all"]) -> int:
        if forget == "all":
            embeddings.clear()
        for part in batches:
            if forget == "batch":
                embeddings.clear()
            judge(part)
        return len(clips)

    contestants: dict[str, Callable[[], int]] = {
        "every frame": lambda: stream(plain, "nothing"),
        "equal frames of a batch once": lambda: stream(scorer, "batch"),
        "embeddings kept, from none on": lambda: stream(scorer, "all"),
        "all embeddings kept": lambda: stream(scorer, "nothing"),
    }
    return contestants


def embedded(clips: int, batch: int, rounds: int, device: str, console: Console) -> None:
    """The embedded judge on one core."""
    torch.set_num_threads(1)
    frames = doorkey_clips(clips, tile_size=8, window=8)
    distinct = len(frames.flatten(0, 1).flatten(1).unique(dim=0)) / frames.shape[:2].numel()
    contestants = ways(
        EmbeddedJudge(device=device), EmbeddedJudge(device=device, dedup=False), frames, batch
    )
    speeds = rates(contestants, rounds, seconds=0.0)
    table = Table(
        title=f"embedded judge, {clips} clips of DoorKey-8x8, 32 frames, {distinct:.0%} of them "
        f"different, batches of {batch}, {device}; median (lowest to highest) of {rounds}"
    )
    for column in ("encoded", "clips/s", "x every frame"):
        table.add_column(column)
    for name, speed in speeds.items():
        table.add_row(name, str(speed), str(speed / speeds["every frame"]))
    console.print(table)


def race(
    folder: str,
    shape: Shape,
    device: str,
    settings: Sequence[tuple[int, int]],
    clips: int,
    batch: int,
    rounds: int,
    peak_teraflops: float,
    console: Console,
) -> None:
    """The PerceptionLM in ``folder``, by pixels and frames."""
    table = Table(title=f"PerceptionLM, random weights, batches of {batch}, {device}")
    columns = ("pixels", "frames", "TFLOP a clip", "clips/s", "share of peak", "deduplicated", "x")
    for column in columns:
        table.add_column(column, justify="right")
    shown = doorkey_clips(clips, tile_size=16, window=None).to(device)
    for pixels, count in track(settings, "settings", console=console, transient=True):
        options: dict[str, Any] = {
            "device": device,
            "dtype": "bfloat16",
            "resolution": pixels,
            "frames": count,
            "batch_clips": batch,
        }
        contestants = ways(
            HuggingFaceScorer(folder, **options),
            HuggingFaceScorer(folder, dedup=False, **options),
            shown,
            batch,
        )
        del contestants["equal frames of a batch once"], contestants["all embeddings kept"]
        speeds = rates(contestants, rounds, seconds=0.0)
        plain, kept = speeds["every frame"], speeds["embeddings kept, from none on"]
        needed = sum(teraflops(shape, pixels, count))
        share = f"{plain.median * needed / peak_teraflops:.0%}" if peak_teraflops else "-"
        figures = (f"{needed:.2f}", str(plain), share, str(kept), str(kept / plain))
        table.add_row(str(pixels), str(count), *figures)
    console.print(table)


def beside_learner(
    folder: str, device: str, view: tuple[int, int], pairs: int, env_steps: int, duty_cycle: float
) -> None:
    """DQN on ``device`` with the judge in ``folder`` and, in turn, with PER instead."""
    judge = {
        "model": folder,
        "device": device,
        "dtype": "bfloat16",
        "resolution": view[0],
        "frames": view[1],
    }
    training(
        pairs=pairs,
        env_steps=env_steps,
        extra=[
            f"--training.accelerator={torch.device(device).type}",
            "--env.tile_size=16",
            "--env.window=null",
            f"--scoring.duty_cycle={duty_cycle}",
            "--scoring.scorer=HuggingFaceScorer",
            *(f"--scoring.scorer.{name}={value}" for name, value in judge.items()),
        ],
        out=Path(folder) / "runs",
    )


def main(
    model: Literal["embedded", "1b", "tiny"] = "embedded",
    device: str = "cpu",
    resolutions: tuple[int, ...] = (448, 224, 112),
    frames: tuple[int, ...] = (32, 16, 8),
    clips: int = 256,
    batch_clips: int = 16,
    rounds: int = 5,
    peak_teraflops: float = 0.0,
    training_pairs: int = 0,
    training_env_steps: int = 60_000,
    duty_cycle: float = 1.0,
) -> None:
    """Clips per second of a judge, with and without encoding equal frames once.

    Args:
        model: The embedded judge, or a PerceptionLM with random weights of that size.
        device: Where it computes.
        resolutions: Of a random PerceptionLM: pixels along a frame's edge, multiples of 28.
        frames: Of a random PerceptionLM: frames of a clip.
        clips: Clips scored in each measurement.
        batch_clips: Clips of one forward pass.
        rounds: Repetitions, in turn for all, in one run.
        peak_teraflops: The device's peak in bfloat16 without sparsity (H200 and H100 SXM: 989,
            A100: 312), for the share of it that is reached; 0: not shown.
        training_pairs: DQN runs with that judge, at the least resolution and frames, and as many
            with PER instead, on the same device; 0: none. Not for the embedded judge, which
            ``recipes.benchmarks.training`` has.
        training_env_steps: Length of such a run.
        duty_cycle: Share of the time that the judge may compute beside the learner.
    """
    require(clips >= 1, "clips", clips, "use at least 1")
    require(rounds >= 1, "rounds", rounds, "use at least 1")
    console = Console()
    if model == "embedded":
        embedded(clips, batch_clips, rounds, device, console)
        return
    settings = [(pixels, count) for pixels in resolutions for count in frames]
    shape = SHAPES[model]
    with tempfile.TemporaryDirectory() as folder:
        for part in build(shape, max(resolutions)):
            part.save_pretrained(folder)
        race(folder, shape, device, settings, clips, batch_clips, rounds, peak_teraflops, console)
        if training_pairs:
            view = min(resolutions), min(frames)
            beside_learner(folder, device, view, training_pairs, training_env_steps, duty_cycle)


if __name__ == "__main__":
    try:
        auto_cli(main)
    except ConfigError as error:
        sys.exit(f"scoring: {error}")
