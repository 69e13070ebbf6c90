"""What the page shows: the worst mistakes, a bounded number, and every frame bit by bit."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from PIL import Image

from tests.judge.worlds import Counter
from vlmrb_torchrl.judge.judging import Question, Verdict
from vlmrb_torchrl.judge.report import LARGEST, choose, sprite_sheet
from vlmrb_torchrl.judge.settings import Settings
from vlmrb_torchrl.judge.statistics import Answers
from vlmrb_torchrl.scorers import ConstantScorer


def played(sprites) -> torch.Tensor:
    """The frames as the page's script shows them, ``[F, 3, H, W]``."""
    png = base64.b64decode(sprites["sheet"].removeprefix("data:image/png;base64,"))
    sheet = np.asarray(Image.open(io.BytesIO(png)))
    width, height = sprites["size"]
    frames = []
    for k in sprites["order"]:
        y, x = k // sprites["columns"] * height, k % sprites["columns"] * width
        frames.append(sheet[y : y + height, x : x + width])
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def test_sheet_plays_the_very_frames_and_holds_equal_ones_once() -> None:
    generator = torch.Generator().manual_seed(0)
    distinct = torch.randint(0, 256, (5, 3, 6, 10), dtype=torch.uint8, generator=generator)
    frames = distinct[[0, 1, 1, 2, 0, 3, 4, 4]]
    sprites = sprite_sheet(frames)
    assert torch.equal(played(sprites), frames)
    assert sprites["order"] == [0, 1, 1, 2, 0, 3, 4, 4]


def test_large_frames_are_shrunk_to_a_bound_in_their_own_shape() -> None:
    frames = torch.full((2, 3, 224, 448), 7, dtype=torch.uint8)
    sprites = sprite_sheet(frames)
    assert sprites["size"] == (LARGEST, LARGEST // 2)
    assert (played(sprites) == 7).all()


def chosen(score, label, gallery):
    answers = Answers(score, label, label, np.arange(len(score)))
    settings = Settings(Counter(), [ConstantScorer()], policy="random", gallery=gallery)
    return choose(Verdict(Question("judge", "end", (), ("end",)), answers, {}, None), settings)


def test_outcomes_are_named_by_the_answer_given() -> None:
    score, label = np.array([0.9, 0.9, 0.1, 0.5]), np.array([True, False, True, True])
    outcomes = {entry["clip"]: entry["outcome"] for entry in chosen(score, label, gallery=4)}
    expected = ["true positive", "false positive", "false negative", "true positive"]
    assert [outcomes[k] for k in range(4)] == expected


def test_the_surest_mistakes_come_first_and_no_outcome_floods_the_page() -> None:
    random = np.random.default_rng(0)
    score, label = random.random(200), random.random(200) < 0.5
    entries = chosen(score, label, gallery=7)
    by_outcome = {e["outcome"]: [] for e in entries}
    for entry in entries:
        by_outcome[entry["outcome"]].append(entry["score"])
        assert entry["score"] == score[entry["clip"]]
        assert entry["label"] == label[entry["clip"]]
    assert [len(scores) for scores in by_outcome.values()] == [7] * 4
    assert by_outcome["false positive"] == sorted(score[~label], reverse=True)[:7]
    assert by_outcome["false negative"] == sorted(score[label])[:7]
    assert chosen(score, label, gallery=7) == entries
