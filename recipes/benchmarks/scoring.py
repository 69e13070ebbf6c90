"""Clips per second of a judge, and what the learner keeps of its speed beside it.

    python -m recipes.benchmarks.scoring                             # the embedded judge, one core
    python -m recipes.benchmarks.scoring --model 1b --device cuda --compile true
    python -m recipes.benchmarks.scoring --model 1b --device cuda --views '[[224, 8]]' \
        --training_pairs 3 --learners '[cpu, cuda]'

The second builds a PerceptionLM of the 1B configuration with random weights: its speed is that of
the real one, its answers are noise.  Its figures are given as a share of what the GPU's peak
would allow, from the operations that the model needs.  The third then trains DQN with PER, with
that judge in a thread, and with it in a process, in turn: on the CPU, then on the judge's GPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from rich.progress import track
from tensordict import TensorDict
from torch import Tensor

from recipes.arguments import program
from recipes.benchmarks.perception_lm import SHAPES, Shape, build, teraflops
from recipes.benchmarks.timing import Spread, against_first, rates, show
from recipes.benchmarks.training import measure
from recipes.compare import METHODS, Study, plan
from vlmrb_torchrl.checks import checked_device, require
from vlmrb_torchrl.envs import DoorKeyEnv
from vlmrb_torchrl.judge.collection import collect
from vlmrb_torchrl.judge.settings import Settings
from vlmrb_torchrl.keys import CLIP
from vlmrb_torchrl.renderers import ClipRenderTransform
from vlmrb_torchrl.scorers import EmbeddedJudge, HuggingFaceScorer


def doorkey_clips(count: int, batch: int, tile_size: int, window: int | None) -> list[TensorDict]:
    """Clips of DoorKey-8x8 as replay cuts them, half demonstrated, half random, in batches."""
    env = DoorKeyEnv(size=8, num_envs=16)
    settings = Settings(env, [EmbeddedJudge()], policy="mixed", clips=count)
    states = collect(settings, lambda _: None).select("render_state")
    render = ClipRenderTransform(env.renderer(tile_size=tile_size, window=window))
    frames: Tensor = render(states)[CLIP]
    return [TensorDict({CLIP: part}, [len(part)]) for part in frames.split(batch)]


def loaded(judge: HuggingFaceScorer) -> HuggingFaceScorer:
    """The judge, with its weights."""
    judge.load()
    return judge


def stream(
    judge: HuggingFaceScorer,
    batches: Sequence[TensorDict],
    forget: Literal["nothing", "batch", "all"] = "nothing",
) -> int:
    """Score batches, frames forgotten before the first or before each; how many clips."""
    for i, part in enumerate(batches):
        if forget == "batch" or (forget == "all" and i == 0):
            judge._loaded.embeddings.clear()
        judge(part)
    return sum(map(len, batches))


def forward(judge: HuggingFaceScorer, inputs: dict[str, Any], clips: int) -> int:
    """The model's part in the scores of a batch; how many clips."""
    with torch.inference_mode():
        judge._odds(judge._run(**inputs, use_cache=False)).cpu()
    return clips


def embedded(clips: int, batch: int, rounds: int, device: str) -> None:
    """The embedded judge on one core."""
    torch.set_num_threads(1)
    batches = doorkey_clips(clips, batch, tile_size=8, window=8)
    plain = loaded(EmbeddedJudge(device=device, dedup=False))
    kept = loaded(EmbeddedJudge(device=device))
    contestants = {
        "every frame": partial(stream, plain, batches),
        "equal frames of a batch once": partial(stream, kept, batches, "batch"),
        "embeddings kept, from none on": partial(stream, kept, batches, "all"),
        "all embeddings kept": partial(stream, kept, batches),
    }
    speeds = rates(contestants, rounds, seconds=0.0)
    show(
        f"embedded judge, {clips} clips of DoorKey-8x8, 32 frames, batches of {batch}, {device}",
        ("encoded", "clips/s", "x every frame"),
        against_first(speeds),
    )


def race(
    folder: str,
    shape: Shape,
    device: str,
    views: Sequence[tuple[int, int]],
    clips: int,
    batch: int,
    rounds: int,
    peak_teraflops: float,
    compiled: bool,
) -> None:
    """The PerceptionLM in ``folder``, by pixels and frames."""
    rows = []
    batches = [part.to(device) for part in doorkey_clips(clips, batch, 16, None)]
    for pixels, count in track(views, "views", transient=True):
        contestants: dict[str, Callable[[], int]] = {}
        for how in ("eager", "compiled")[: 1 + compiled]:
            options: dict[str, Any] = {"resolution": pixels, "frames": count, "device": device}
            options |= {"batch_clips": batch, "compile": how == "compiled"}
            judge = partial(HuggingFaceScorer, folder, dtype="bfloat16", **options)
            plain, kept = loaded(judge(dedup=False)), loaded(judge())
            first = batches[0][CLIP][:, -count:]
            with torch.inference_mode():
                inputs = plain._inputs(plain._resized(first), plain.prompts[0])
            contestants |= {
                f"every frame, {how}": partial(stream, plain, batches),
                f"its forward pass, {how}": partial(forward, plain, inputs, len(first)),
                f"equal frames once, {how}": partial(stream, kept, batches, "all"),
            }
        speeds = rates(contestants, rounds, seconds=0.0)
        vision, language = teraflops(shape, pixels, count)
        different = kept._loaded.embeddings.encoded / (clips * count * (rounds + 1))
        for name, speed, ratio in against_first(speeds):
            needed = language + vision * (different if name.startswith("equal") else 1)
            share = f"{speed.median * needed / peak_teraflops:.0%}" if peak_teraflops else "-"
            rows.append((f"{pixels} x {count}", name, f"{needed:.2f}", speed, share, ratio))
    columns = ("pixels x frames", "encoded", "TFLOP a clip", "clips/s", "of peak", "x the first")
    show(f"PerceptionLM, random weights, batches of {batch}, {device}", columns, rows)


def beside_learner(
    judge: dict[str, Any], learner: str, settings: dict[str, Any], pairs: int, folder: Path
) -> list[tuple[object, ...]]:
    """DQN on ``learner`` with PER and, in turn, with the judge in a thread and in a process.

    Args:
        judge: The section ``scoring`` of a run's settings.
        learner: Where the networks are trained.
        settings: Other settings of each run.
        pairs: Repetitions.
        folder: Of the logs; it is made.
    """
    folder.mkdir()
    methods = ["per"]
    guided = yaml.safe_load((METHODS / "vlm_rb.yaml").read_text())
    for mode in ("thread", "process"):
        overlay = folder / f"{mode}.yaml"
        overlay.write_text(yaml.safe_dump(guided | {"scoring": judge | {"mode": mode}}))
        methods.append(str(overlay))
    settings = {**settings, "training.accelerator": learner}
    runs = plan(Study(methods=methods, seeds=pairs, settings=settings, out=folder))
    found: dict[str, list[dict[str, float]]] = {run.place["method"]: [] for run in runs}
    for run in track(runs, f"learner on {learner}", transient=True):
        found[run.place["method"]].append(measure(run))
    speeds = {
        method: Spread([row["env_steps"] / row["seconds"] for row in rows])
        for method, rows in found.items()
    }
    table: list[tuple[object, ...]] = []
    for method, speed, ratio in against_first(speeds):
        clips = [row.get("scoring/clips_scored", 0.0) / row["seconds"] for row in found[method]]
        lost = sum(
            row.get(f"scoring/clips_{fate}", 0.0)
            for row in found[method]
            for fate in ("dropped", "failed", "late")
        )
        what = "PER" if method == "per" else f"judge in a {method}"
        table.append((learner, what, speed, ratio, Spread(clips), f"{lost:.0f}"))
    return table


def main(
    model: Literal["embedded", "1b", "tiny"] = "embedded",
    device: str = "cpu",
    views: tuple[tuple[int, int], ...] = ((448, 32), (224, 32), (224, 8), (112, 8)),
    clips: int = 256,
    batch_clips: int = 16,
    rounds: int = 5,
    peak_teraflops: float = 0.0,
    compile: bool = False,
    training_pairs: int = 0,
    training_env_steps: int = 60_000,
    learners: tuple[Literal["cpu", "cuda"], ...] = ("cpu",),
    clip_transitions: int = 32,
    duty_cycle: float = 1.0,
) -> None:
    """Clips per second of a judge, with and without encoding equal frames once.

    Args:
        model: The embedded judge, or a PerceptionLM with random weights of that size.
        device: Where it computes.
        views: Of a random PerceptionLM: pixels along a frame's edge, a multiple of 28, and frames
            of a clip, up to 32.
        clips: Clips scored in each measurement.
        batch_clips: Clips of one forward pass.
        rounds: Repetitions, in turn for all, in one run.
        peak_teraflops: The device's peak in bfloat16 without sparsity (H200 and H100 SXM: 989,
            A100: 312), for the share of it that is reached; 0: not shown.
        compile: Time a random PerceptionLM translated by torch.compile, too, which takes minutes
            for each view. Beside a learner it is not: a run would end before.
        training_pairs: DQN runs with that judge, at the last of the views, in a thread, as many
            in a process, and as many with PER instead, for each of ``learners``; 0: none.
        training_env_steps: Length of such a run.
        learners: Where these runs train their networks.
        clip_transitions: Transitions of a clip in them; 32 keeps the judge busiest.
        duty_cycle: Share of the time that the judge may compute beside the learner.
    """
    checked_device(device, here=True)
    require(clips >= 1, "clips", clips, "use at least 1")
    require(training_pairs >= 0, "training_pairs", training_pairs, "use 0 or more")
    settings: dict[str, Any] = {
        "training.total_env_steps": training_env_steps,
        "training.log_every_env_steps": training_env_steps,
        "training.eval_every_env_steps": 0,
    }
    with tempfile.TemporaryDirectory() as folder:
        if model == "embedded":
            embedded(clips, batch_clips, rounds, device)
            scorer = {"class_path": "EmbeddedJudge", "init_args": {"device": device}}
        else:
            shape, (pixels, frames) = SHAPES[model], views[-1]
            for part in build(shape, max(pixels for pixels, _ in views)):
                part.save_pretrained(folder)
            sizes = clips, batch_clips, rounds, peak_teraflops, compile
            race(folder, shape, device, views, *sizes)
            view = {"resolution": pixels, "frames": frames}
            options = {"model": folder, "device": device, "dtype": "bfloat16", **view}
            scorer = {"class_path": "HuggingFaceScorer", "init_args": options}
            settings |= {"env.tile_size": 16, "env.window": None}
        if training_pairs:
            judge = {"scorer": scorer, "clip_transitions": clip_transitions}
            judge |= {"batch_clips": batch_clips, "duty_cycle": duty_cycle}
            rows = []
            for learner in learners:
                runs = Path(folder) / f"runs_{learner}"
                rows += beside_learner(judge, learner, settings, training_pairs, runs)
            columns = ("learner on", "replay", "env steps/s", "÷ PER", "clips/s", "clips lost")
            show(f"{training_env_steps} env steps, judge on {device}", columns, rows)


if __name__ == "__main__":
    program(main)
