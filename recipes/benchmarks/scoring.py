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

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import track
from tensordict import TensorDict
from torch import Tensor

from recipes.arguments import program
from recipes.benchmarks.perception_lm import SHAPES, Shape, build, teraflops
from recipes.benchmarks.timing import against_first, rates, show
from recipes.benchmarks.training import training
from vlmrb_torchrl.checks import require
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
    render = ClipRenderTransform(env.renderer(tile_size=tile_size, window=window))
    frames: Tensor = render(states)[CLIP]
    return frames


def ways(
    build: Callable[..., HuggingFaceScorer], clips: Tensor, batch: int
) -> dict[str, Callable[[], int]]:
    """The same clips, scored in a stream of batches: with less and less computed anew."""
    batches = [TensorDict({CLIP: part}, [len(part)]) for part in clips.split(batch)]
    scorer, plain = build(), build(dedup=False)
    scorer.load()
    plain.load()
    embeddings: Any = scorer._loaded.embeddings  # type: ignore[union-attr]

    def stream(judge: HuggingFaceScorer, forget: Literal["nothing", "batch", "all"]) -> int:
        for i, part in enumerate(batches):
            if forget == "batch" or (forget == "all" and i == 0):
                embeddings.clear()
            judge(part)
        return len(clips)

    return {
        "every frame": lambda: stream(plain, "nothing"),
        "equal frames of a batch once": lambda: stream(scorer, "batch"),
        "embeddings kept, from none on": lambda: stream(scorer, "all"),
        "all embeddings kept": lambda: stream(scorer, "nothing"),
    }


def embedded(clips: int, batch: int, rounds: int, device: str) -> None:
    """The embedded judge on one core."""
    torch.set_num_threads(1)
    frames = doorkey_clips(clips, tile_size=8, window=8)
    distinct = len(frames.flatten(0, 1).flatten(1).unique(dim=0)) / frames.shape[:2].numel()
    contestants = ways(partial(EmbeddedJudge, device=device), frames, batch)
    speeds = rates(contestants, rounds, seconds=0.0)
    show(
        f"embedded judge, {clips} clips of DoorKey-8x8, 32 frames, {distinct:.0%} of them "
        f"different, batches of {batch}, {device}",
        ("encoded", "clips/s", "x every frame"),
        against_first(speeds),
    )


def race(
    folder: str,
    shape: Shape,
    device: str,
    settings: Sequence[tuple[int, int]],
    clips: int,
    batch: int,
    rounds: int,
    peak_teraflops: float,
) -> None:
    """The PerceptionLM in ``folder``, by pixels and frames."""
    columns = ("pixels", "frames", "TFLOP a clip", "clips/s", "share of peak", "deduplicated", "x")
    rows = []
    shown = doorkey_clips(clips, tile_size=16, window=None).to(device)
    for pixels, count in track(settings, "settings", transient=True):
        build = partial(
            HuggingFaceScorer,
            folder,
            device=device,
            dtype="bfloat16",
            resolution=pixels,
            frames=count,
            batch_clips=batch,
        )
        contestants = ways(build, shown, batch)
        del contestants["equal frames of a batch once"], contestants["all embeddings kept"]
        plain, kept = rates(contestants, rounds, seconds=0.0).values()
        needed = sum(teraflops(shape, pixels, count))
        share = f"{plain.median * needed / peak_teraflops:.0%}" if peak_teraflops else "-"
        rows.append((pixels, count, f"{needed:.2f}", plain, share, kept, kept / plain))
    show(f"PerceptionLM, random weights, batches of {batch}, {device}", columns, rows)


def beside_learner(
    folder: str, device: str, view: tuple[int, int], pairs: int, env_steps: int, duty_cycle: float
) -> None:
    """DQN on ``device`` with the judge in ``folder`` and, in turn, with PER instead."""
    judge = {"model": folder, "device": device, "dtype": "bfloat16"}
    judge |= dict(zip(("resolution", "frames"), map(str, view), strict=True))
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
    if model == "embedded":
        embedded(clips, batch_clips, rounds, device)
        return
    settings = [(pixels, count) for pixels in resolutions for count in frames]
    shape = SHAPES[model]
    with tempfile.TemporaryDirectory() as folder:
        for part in build(shape, max(resolutions)):
            part.save_pretrained(folder)
        race(folder, shape, device, settings, clips, batch_clips, rounds, peak_teraflops)
        if training_pairs:
            view = min(resolutions), min(frames)
            beside_learner(folder, device, view, training_pairs, training_env_steps, duty_cycle)


if __name__ == "__main__":
    program(main)
