"""The judge that the package ships: right answers on DoorKey, which it was not trained on."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from minigrid.envs import DoorKeyEnv
from tensordict import TensorDict

from recipes.train_judge.data import Clip, Episode, render
from recipes.train_judge.worlds import ENDLESS, Phase, play
from vlmrb_torchrl.prompts import MINIGRID
from vlmrb_torchrl.scorers import EmbeddedJudge
from vlmrb_torchrl.scorers.embedded import FOLDER

SIZES = (5, 8, 16)


def solved(size: int, seed: int) -> Episode:
    """DoorKey solved by the shortest way: its last transition reaches the goal."""
    random = np.random.default_rng(seed)
    while True:
        world = DoorKeyEnv(size=size, max_steps=ENDLESS)
        episode = play(world, random, seed, [Phase("goal", 400)])
        if episode.events[-1, 0]:
            return episode


def clip_of(episode: Episode, first: int, transitions: int, frames: int = 32) -> TensorDict:
    states = episode.states[Clip(episode, first, transitions, frames).rows]
    return TensorDict({"clip": render(states)[None]}, [1])


@pytest.fixture(scope="module")
def judge() -> EmbeddedJudge:
    return EmbeddedJudge()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(2))
def test_goal_is_seen_in_the_last_frame_and_not_one_frame_earlier(
    judge: EmbeddedJudge, size: int, seed: int
) -> None:
    episode = solved(size, 500 + seed)
    steps = len(episode)
    first = max(0, steps - 32)
    assert judge(clip_of(episode, first, steps - first))["score"].item() > 0.9
    assert judge(clip_of(episode, first, steps - first - 1))["score"].item() < 0.1


@pytest.mark.parametrize("frames", [4, 16, 64])
def test_goal_is_seen_whatever_the_number_of_frames(judge: EmbeddedJudge, frames: int) -> None:
    episode = solved(8, 600)
    steps = len(episode)
    assert judge(clip_of(episode, 0, steps, frames))["score"].item() > 0.9
    assert judge(clip_of(episode, 0, steps - 1, frames))["score"].item() < 0.1


def test_shipped_weights_are_small_safetensors() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size < 5e6
    suffixes = {p.suffix for p in FOLDER.iterdir()}
    assert suffixes <= {".safetensors", ".json", ".jinja", ".md"}


def test_questions_are_checked() -> None:
    with pytest.raises(ValueError, match="ask one or more of goal, door, key"):
        EmbeddedJudge(("goal", "lava"))
    with pytest.raises(ValueError, match="ask one or more"):
        EmbeddedJudge(())


def test_another_view_is_refused(judge: EmbeddedJudge) -> None:
    with pytest.raises(ValueError, match=r"40 x 40 pixels.*tile_size=8, window=8"):
        judge(TensorDict({"clip": torch.zeros(1, 4, 3, 40, 40, dtype=torch.uint8)}, [1]))


def test_two_questions_score_their_maximum() -> None:
    episode = solved(6, 700)
    clip = clip_of(episode, 0, min(32, len(episode) - 1))
    each = [EmbeddedJudge((q,))(clip.clone())["score"] for q in ("goal", "door")]
    both = EmbeddedJudge(("goal", "door"))(clip.clone())["score"]
    torch.testing.assert_close(both, torch.maximum(*each), atol=1e-5, rtol=0)


def judge_elsewhere(judge: EmbeddedJudge, clip: torch.Tensor) -> tuple[bool, float]:
    torch.set_num_threads(1)
    imported = "transformers" in sys.modules
    return imported, float(judge(TensorDict({"clip": clip}, [1]))["score"])


def test_judge_travels_to_another_process_and_loads_only_at_the_first_clip(
    judge: EmbeddedJudge,
) -> None:
    clip = clip_of(solved(5, 800), 0, 8)
    here = judge(clip)["score"].item()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        imported, there = pool.apply(judge_elsewhere, (judge, clip["clip"]))
    assert not imported, "importing the package must not import transformers"
    assert there == pytest.approx(here, abs=1e-5)


def test_card_is_shipped_and_says_what_the_judge_is_not() -> None:
    card = (Path(FOLDER) / "README.md").read_text()
    assert "What it is not" in card
    assert "DoorKey is held out" in card


def test_asked_something_else_it_is_another_judge() -> None:
    """By an event's name or in its words: the same question, so the same judge."""
    judge, built = EmbeddedJudge(), EmbeddedJudge("door")
    for asked in ("door", MINIGRID["door"]):
        door = judge.asking(asked)
        assert (judge.questions, door.questions) == (("goal",), ("door",))
        assert door.prompts == built.prompts
        assert door.fingerprint == built.fingerprint != judge.fingerprint
    on_gpu = EmbeddedJudge(device="cuda")
    assert (on_gpu.dtype, on_gpu.fingerprint == judge.fingerprint) == ("bfloat16", False)
    assert judge.asking("Is it night?").questions == ("Is it night?",)
