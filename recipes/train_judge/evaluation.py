"""What the embedded judge gets right: unseen seeds, DoorKey (held out), and where it must fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from minigrid.core.world_object import Goal
from minigrid.envs import DoorKeyEnv
from tensordict import TensorDict

from recipes.train_judge.data import EVENT_NAMES, VIEW, Clip, Episode, FrameTable, happened, visible
from recipes.train_judge.policies import play
from recipes.train_judge.rooms import ENDLESS, random_world
from vlmrb_torchrl.judge.statistics import area_under_curve, wilson
from vlmrb_torchrl.prompts import MINIGRID
from vlmrb_torchrl.renderers.minigrid import AbstractSprites, MiniGridRenderer, SwappedSprites
from vlmrb_torchrl.scorers.huggingface import HuggingFaceScorer

EVALUATION_SEED = 10_000_000
"""Resets from here on; training counts up from 0 and never comes near."""
DOORKEY_SIZES = (5, 6, 8, 12, 16)


@dataclass(frozen=True)
class Figures:
    """Answers of a judge against the simulator, at threshold 0.5."""

    clips: int
    positives: int
    true_positives: int
    false_positives: int
    seen: int
    seen_and_found: int
    auc: tuple[float, float, float]

    @property
    def precision(self) -> tuple[float, float, float]:
        """Share of Yes answers that are right, with its interval."""
        return wilson(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> tuple[float, float, float]:
        """Share of the clips in which it happened that got a Yes."""
        return wilson(self.true_positives, self.positives)

    @property
    def recall_visible(self) -> tuple[float, float, float]:
        """The same, of the clips whose frames show it."""
        return wilson(self.seen_and_found, self.seen)

    @property
    def false_positive_rate(self) -> tuple[float, float, float]:
        """Share of the clips in which it did not happen that got a Yes."""
        return wilson(self.false_positives, self.clips - self.positives)


def figures(score: np.ndarray, label: np.ndarray, shown: np.ndarray, seed: int = 0) -> Figures:
    """Compare scores with what happened (``label``) and what the frames show (``shown``)."""
    random = np.random.default_rng(seed)
    draws = random.integers(0, len(score), (200, len(score)))
    counts = np.stack([np.bincount(drawn, minlength=len(score)) for drawn in draws]).astype(float)
    low, high = np.nanquantile(area_under_curve(score, label, counts), [0.025, 0.975])
    yes, seen = score > 0.5, label & shown
    return Figures(
        clips=len(score),
        positives=int(label.sum()),
        true_positives=int((yes & label).sum()),
        false_positives=int((yes & ~label).sum()),
        seen=int(seen.sum()),
        seen_and_found=int((yes & seen).sum()),
        auc=(area_under_curve(score, label).item(), float(low), float(high)),
    )


class MovedGoal(DoorKeyEnv):
    """DoorKey with the goal at a random free cell beyond the door."""

    def _gen_grid(self, width: int, height: int) -> None:
        super()._gen_grid(width, height)
        door = next(i for i, t in enumerate(self.grid.grid) if t and t.type == "door") % width
        self.grid.set(width - 2, height - 2, None)
        cells = [(x, y) for x in range(door + 1, width - 1) for y in range(1, height - 1)]
        cells = [c for c in cells if c != (width - 2, height - 2)] or cells
        self.grid.set(*cells[int(self.np_random.integers(len(cells)))], Goal())


def training_family_episodes(count: int, seed: int) -> list[Episode]:
    """Scripted episodes of the training families under seeds never trained on."""
    random = np.random.default_rng(seed)
    worlds = (random_world(random) for _ in range(count))
    return [
        play(name, world, random, EVALUATION_SEED + seed + k)
        for k, (name, world) in enumerate(worlds)
    ]


def doorkey_episodes(size: int, count: int, seed: int, moved: bool = False) -> list[Episode]:
    """Scripted and random episodes of DoorKey, which training never saw."""
    random = np.random.default_rng(seed)
    world = (MovedGoal if moved else DoorKeyEnv)(size=size, max_steps=ENDLESS)
    return [play("DoorKey", world, random, EVALUATION_SEED + seed + k) for k in range(count)]


def cut(episodes: Sequence[Episode], transitions: int, frames: int) -> list[Clip]:
    """Clips as replay cuts them: one after another, the last of an episode short."""
    return [
        Clip(i, first, min(transitions, len(episode) - first), frames)
        for i, episode in enumerate(episodes)
        for first in range(0, len(episode), transitions)
    ]


class Examiner:
    """Asks one judge its three questions about clips.

    Args:
        scorer: The judge.
    """

    def __init__(self, scorer: HuggingFaceScorer) -> None:
        self.scorer = scorer
        scorer.load()

    def ask(
        self,
        question: str,
        episodes: Sequence[Episode],
        clips: Sequence[Clip],
        renderer: MiniGridRenderer = VIEW,
    ) -> np.ndarray:
        """Scores of the clips, float ``[len(clips)]``."""
        table = FrameTable(episodes)
        scorer = self.scorer.asking(MINIGRID[question])
        scores = []
        for start in range(0, len(clips), 128):
            rows = np.stack([table.rows(clip) for clip in clips[start : start + 128]])
            distinct, back = np.unique(rows, return_inverse=True)
            frames = table.render(distinct, renderer)[torch.from_numpy(back.reshape(rows.shape))]
            scores.append(scorer(TensorDict({"clip": frames}, [len(rows)]))["score"].numpy())
        return np.concatenate(scores)

    def examine(
        self,
        episodes: Sequence[Episode],
        clips: Sequence[Clip],
        *,
        questions: Sequence[str] = EVENT_NAMES,
        renderer: MiniGridRenderer = VIEW,
    ) -> dict[str, Figures]:
        """Figures of each question."""
        labels = np.stack([happened(episodes[c.episode], c) for c in clips])
        shown = np.stack([visible(episodes[c.episode], c) for c in clips])
        results = {}
        for name in questions:
            k = EVENT_NAMES.index(name)
            scores = self.ask(name, episodes, clips, renderer)
            results[name] = figures(scores, labels[:, k], shown[:, k])
        return results

    def confusion(
        self, episodes: Sequence[Episode], clips: Sequence[Clip]
    ) -> dict[tuple[str, str], tuple[float, float, float]]:
        """Share of Yes by (the only event that happened, what is asked)."""
        labels = np.stack([happened(episodes[c.episode], c) for c in clips])
        result = {}
        for asked in EVENT_NAMES:
            yes = self.ask(asked, episodes, clips) > 0.5
            for k, event in enumerate(EVENT_NAMES):
                alone = labels[:, k] & (labels.sum(1) == 1)
                result[event, asked] = wilson(int(yes[alone].sum()), int(alone.sum()))
        return result


def static_states(size: int, layouts: int) -> Iterator[np.ndarray]:
    """Every DoorKey state of some layouts: each free cell, direction and stage of key and door.

    Yields:
        Render states, uint8 ``[W, H, 4]``.
    """
    world = DoorKeyEnv(size=size)
    world.gen_obs = dict
    for k in range(layouts):
        world.reset(seed=EVALUATION_SEED + 777 + k)
        locked = world.grid.encode()
        taken = np.where(locked[..., :1] == 5, np.array([1, 0, 0], np.uint8), locked)
        opened = np.where(taken[..., :1] == 4, np.array([4, 4, 0], np.uint8), taken)
        for grid in (locked, taken, opened):
            standable = (np.isin(grid[..., 0], (1, 8))) | (
                (grid[..., 0] == 4) & (grid[..., 2] == 0)
            )
            for x, y in np.argwhere(standable):
                for direction in range(1, 5):
                    state = np.concatenate([grid, np.zeros((size, size, 1), np.uint8)], -1)
                    state[x, y, 3] = direction
                    yield state


def static_answers(
    examiner: Examiner, size: int, layouts: int, frames: int = 8
) -> dict[str, tuple[int, int]]:
    """Wrong answers and answers per question, on clips in which nothing moves."""
    states = list(static_states(size, layouts))
    episodes = [
        Episode("static", "none", np.stack([s, s]), np.zeros((1, len(EVENT_NAMES)), bool))
        for s in states
    ]
    clips = [Clip(i, 0, 1, frames) for i in range(len(states))]
    on_goal = np.array([(s[..., 0] == 8)[s[..., 3] > 0][0] for s in states])
    result = {}
    for name in EVENT_NAMES:
        yes = examiner.ask(name, episodes, clips) > 0.5
        truth = on_goal if name == "goal" else np.zeros_like(on_goal)
        result[f"{name}: Yes without cause"] = (int((yes & ~truth).sum()), int((~truth).sum()))
        if name == "goal":
            result["goal: missed"] = (int((~yes & truth).sum()), int(truth.sum()))
    return result


MODIFIED_GAMES: dict[str, Callable[[], MiniGridRenderer]] = {
    "misleading sprites": lambda: MiniGridRenderer(8, 8, SwappedSprites()),
    "abstract sprites, seed 0": lambda: MiniGridRenderer(8, 8, AbstractSprites(0)),
    "abstract sprites, seed 1": lambda: MiniGridRenderer(8, 8, AbstractSprites(1)),
}


def clips_per_second(
    scorer: HuggingFaceScorer, episodes: Sequence[Episode], clips: Sequence[Clip]
) -> tuple[float, float]:
    """Clips scored in a second of processor time, first seen and seen again.

    The frames are drawn beforehand; the second figure finds every frame's embedding kept.
    """
    table = FrameTable(episodes)
    batches = []
    for start in range(0, len(clips), 64):
        rows = [table.rows(clip) for clip in clips[start : start + 64]]
        frames = torch.stack([table.render(r) for r in rows])
        batches.append(TensorDict({"clip": frames}, [len(rows)]))
    scorer.load()
    rates = []
    for _ in range(2):
        begun = time.process_time()
        for batch in batches:
            scorer(batch)
        rates.append(len(clips) / (time.process_time() - begun))
    return rates[0], rates[1]
