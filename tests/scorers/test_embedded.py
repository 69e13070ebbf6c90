"""The judge that the package ships: right answers on DoorKey, which it was not trained on."""

from __future__ import annotations

import ast
import functools
import multiprocessing
import sys

import numpy as np
import pytest
import torch
from minigrid.envs import DoorKeyEnv
from tensordict import TensorDict

from recipes.train_judge.data import Clip, Episode, render
from recipes.train_judge.worlds import ENDLESS, Phase, play
from vlmrb_torchrl import scoring_worker
from vlmrb_torchrl.frames import _sums
from vlmrb_torchrl.prompts import MINIGRID
from vlmrb_torchrl.renderers import ClipRenderTransform, MiniGridRenderer, minigrid
from vlmrb_torchrl.scorers import EmbeddedJudge, local
from vlmrb_torchrl.scorers.embedded import FOLDER


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


@pytest.mark.parametrize("size", [5, 8, 16])
def test_goal_is_seen_in_the_last_frame_and_not_one_frame_earlier(
    judge: EmbeddedJudge, size: int
) -> None:
    """Whatever the number of frames."""
    episode = solved(size, 500)
    steps = len(episode)
    for first, frames in ((max(0, steps - 32), 32), (0, 4), (0, 64)):
        assert judge(clip_of(episode, first, steps - first, frames))["score"].item() > 0.9
        assert judge(clip_of(episode, first, steps - first - 1, frames))["score"].item() < 0.1


def test_shipped_weights_are_small_safetensors() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size < 5e6
    suffixes = {p.suffix for p in FOLDER.iterdir()}
    assert suffixes <= {".safetensors", ".json", ".jinja", ".md"}


def test_another_view_is_refused(judge: EmbeddedJudge) -> None:
    with pytest.raises(ValueError, match=r"is \(40, 40\): EmbeddedJudge knows \(64, 64\)"):
        judge(TensorDict({"clip": torch.zeros(1, 4, 3, 40, 40, dtype=torch.uint8)}, [1]))


def test_the_road_on_a_gpu_gives_the_scores_of_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps, run here: frames laid by torch, and told apart by sums where they lie."""
    episode = solved(8, 500)
    rows = np.stack([Clip(episode, 0, n, 32).rows for n in (len(episode), len(episode) - 1, 5)])
    clips = TensorDict({"render_state": torch.as_tensor(episode.states[rows])}, [3])
    transform = ClipRenderTransform(MiniGridRenderer(8, window=8))

    def scored() -> tuple[list[float], int]:
        scorer = EmbeddedJudge()
        scores = scoring_worker.judge(transform, scorer, clips.clone())
        return scores.tolist(), scorer._loaded.embeddings.encoded

    plain, encoded = scored()
    there = functools.partial(minigrid._mosaic_on, torch.device("cpu"))
    monkeypatch.setattr(minigrid, "_mosaic", there)
    monkeypatch.setattr(local, "frame_digests", lambda f: [s.tobytes() for s in _sums(f).numpy()])
    assert scored() == (pytest.approx(plain, abs=1e-6), encoded)
    assert plain[0] > 0.9 > 0.1 > plain[2]


def test_two_questions_score_their_maximum(judge: EmbeddedJudge) -> None:
    episode = solved(6, 700)
    clip = clip_of(episode, 0, min(32, len(episode) - 1))
    each = [judge.asking(q)(clip.clone())["score"] for q in ("goal", "door")]
    both = judge.asking(("goal", "door"))(clip.clone())["score"]
    torch.testing.assert_close(both, torch.maximum(*each), atol=1e-5, rtol=0)


def test_importing_scorers_imports_none_of_the_heavy_packages() -> None:
    """They are imported where they are used: a worker without a model starts seconds sooner."""
    heavy = {"transformers", "timm", "torchvision", "openai", "PIL", "torchrl"}
    for file in FOLDER.parent.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not heavy & {name.partition(".")[0] for name in names}, file


def judge_elsewhere(judge: EmbeddedJudge, clip: torch.Tensor) -> tuple[bool, float]:
    torch.set_num_threads(1)
    imported = "transformers" in sys.modules
    return imported, float(judge(TensorDict({"clip": clip}, [1]))["score"])


@pytest.mark.slow
def test_judge_travels_to_another_process_and_loads_only_at_the_first_clip(
    judge: EmbeddedJudge,
) -> None:
    clip = clip_of(solved(5, 800), 0, 8)
    here = judge(clip)["score"].item()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        imported, there = pool.apply(judge_elsewhere, (judge, clip["clip"]))
    assert not imported, "unpickling must not import transformers"
    assert there == pytest.approx(here, abs=1e-5)


def test_card_is_shipped_and_says_what_the_judge_is_not() -> None:
    card = (FOLDER / "README.md").read_text()
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
    assert EmbeddedJudge(device="cuda").dtype == "bfloat16"
    assert judge.asking("Is it night?").questions == ("Is it night?",)
