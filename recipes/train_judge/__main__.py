"""Train the embedded judge from nothing, examine it, and write its card.

    python -m recipes.train_judge  # about ten minutes of one core; into runs/train_judge
    python -m recipes.train_judge --train false  # the card again

The judge that the package ships was written by
``python -m recipes.train_judge --output vlmrb_torchrl/scorers/judge``.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipes.arguments import PositiveInt, program
from recipes.train_judge.card import write_card
from recipes.train_judge.data import ClipSampler, Episode
from recipes.train_judge.model import build_model, build_processor
from recipes.train_judge.training import Log, Training
from recipes.train_judge.worlds import play, random_world


def main(
    output: Path = Path("runs/train_judge"),
    *,
    seed: int = 0,
    episodes: PositiveInt = 3000,
    frame_steps: PositiveInt = 600,
    event_steps: PositiveInt = 1200,
    answer_steps: PositiveInt = 900,
    train: bool = True,
    examine: bool = True,
    examined_episodes: PositiveInt = 120,
) -> None:
    """Train a judge and write its card. Ctrl-C leaves the output folder as it was.

    Args:
        output: Folder for the weights, the processor and the card.
        seed: Seed of the weights, the worlds and the order of everything.
        episodes: Scripted episodes that clips are cut from.
        frame_steps: Steps of the first stage: what single frames show.
        event_steps: Steps of the second: at which frame something happened.
        answer_steps: Steps of the third: questions and answers.
        train: False: examine the judge that lies in ``output``.
        examine: Examine the judge and write its card, ``README.md``.
        examined_episodes: Episodes a table row is made of.
    """
    torch.set_num_threads(1)  # the figures are those of one core
    if train:
        _train(output, seed, episodes, (frame_steps, event_steps, answer_steps))
    elif not (output / "model.safetensors").is_file():
        sys.exit(f"{output} holds no judge: train one first (--train true).")
    if examine:
        write_card(output, examined_episodes)
        print(f"Card: {output / 'README.md'}")


def _train(output: Path, seed: int, count: int, steps: tuple[int, int, int]) -> None:
    begun, begun_cpu = time.perf_counter(), time.process_time()
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    log = progress_lines()
    episodes = collect(count, random, log)
    processor = build_processor()
    training = Training(build_model(processor), processor, ClipSampler(episodes, random), log)
    training.frames(steps[0])
    training.embed()
    training.events(steps[1])
    training.answers(steps[2])
    facts = {
        "seed": seed,
        "episodes": count,
        "transitions": sum(len(e) for e in episodes),
        "distinct_frames": len(training.states),
        "steps": dict(zip(("frames", "events", "answers"), steps, strict=True)),
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "minutes": round((time.perf_counter() - begun) / 60, 1),
        "cpu_minutes": round((time.process_time() - begun_cpu) / 60, 1),
    }
    save(training.model.eval(), processor, facts, output)
    print(f"Judge: {output} ({facts['parameters']:,} parameters, {facts['minutes']} minutes)")


def collect(count: int, random: np.random.Generator, log: Log) -> list[Episode]:
    """Scripted episodes of random worlds, resets seeded from 0 up."""
    episodes = []
    for k in range(count):
        episodes.append(play(random_world(random), random, seed=k))
        log("episodes", k, count, {})
    return episodes


def save(model: Any, processor: Any, facts: dict[str, Any], output: Path) -> None:
    """Write everything beside ``output``, then move it in file by file."""
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        (partial / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
        output.mkdir(parents=True, exist_ok=True)
        for file in partial.iterdir():
            os.replace(file, output / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def progress_lines() -> Log:
    """A log that prints twenty lines a stage, each with the means since the last."""
    values: dict[str, list[float]] = {}

    def log(stage: str, step: int, steps: int, means: dict[str, float]) -> None:
        for name, value in means.items():
            values.setdefault(name, []).append(value)
        if (step + 1) % max(1, steps // 20) == 0 or step + 1 == steps:
            line = "  ".join(f"{name} {np.nanmean(each):.3f}" for name, each in values.items())
            print(f"{stage} {step + 1}/{steps}  {line}", flush=True)
            values.clear()

    return log


if __name__ == "__main__":
    try:
        program(main)
    except KeyboardInterrupt:
        sys.exit("Stopped. No file was left half-written.")
