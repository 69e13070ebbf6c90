"""What the report says; what its page shows: the worst mistakes, and every frame bit by bit."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from tests.judge.worlds import Counter, Grey, counted, examined
from vlmrb_torchrl.judge.judging import Question, Verdict
from vlmrb_torchrl.judge.report import LARGEST, choose, every_number, notes, sprite_sheet, write
from vlmrb_torchrl.judge.settings import Settings
from vlmrb_torchrl.judge.statistics import Answers
from vlmrb_torchrl.scorers import ConstantScorer, NoisyScorer, PrivilegedScorer


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


def test_page_is_whole_in_itself_and_says_what_its_clips_cannot_answer(tmp_path) -> None:
    """No clip is a positive here; and text is only text, whatever it holds."""
    nasty = 'Is it </script><b onclick="x">over</b> & {{ 7 * 7 }} | `?'
    world = Counter(length=1000)
    settings = counted(env=world, scorers=[Grey()], prompts=[nasty], out=tmp_path, gallery=2)
    write(examined(settings), {"note": nasty}, f"judge {nasty}")
    html = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", html)
    assert html.count("</script>") == html.count("<script") == 2
    assert "<b onclick" not in html
    assert "{{ 7 * 7 }}" in html
    text = (tmp_path / "report.md").read_text()
    assert "\\|" in text
    assert "No clip shows 'end'" in text
    assert "--policy scripted" in text
    assert "nan" not in text.lower()
    numbers = json.loads((tmp_path / "figures.json").read_text())
    assert numbers["verdicts"][0]["measures"]["recall"]["value"] is None
    assert numbers["verdicts"][0]["measures"]["recall"]["reason"] == "no positive clip"


def test_clips_that_all_are_positives_are_told_of() -> None:
    result = examined(counted(clip_transitions=10, scorers=[Grey()]))
    assert str(result.verdicts[0].estimates["auc"]) == "– (no negative clip)"
    said = notes(result.verdicts, result.clips, result.settings)
    assert said[0].startswith("Every clip shows 'end'")


def test_every_number_holds_the_confusion_that_the_measures_follow_from() -> None:
    noisy = NoisyScorer(PrivilegedScorer(("end", "third"), ("end",)), 0.6, 0.3)
    result = examined(counted(scorers=[noisy], clips=90))
    numbers = json.loads(every_number(result, {"seed": 0}))
    (found,), (cost,) = numbers["verdicts"], numbers["costs"]
    yes = found["true_positives"] + found["false_positives"]
    happened = found["true_positives"] + found["false_negatives"]
    assert yes + found["false_negatives"] + found["true_negatives"] == 90
    assert found["measures"]["precision"]["value"] == pytest.approx(found["true_positives"] / yes)
    assert found["measures"]["recall"]["value"] == pytest.approx(found["true_positives"] / happened)
    assert sum(found["scores"]["positives"]) == happened
    assert cost["env_steps_per_s"]["32"] == pytest.approx(32 * cost["clips_per_s"])
    hours = 1e6 / 32 * cost["busy_s_per_clip"] / 3600  # a clip every 32 steps
    assert cost["hours_per_million_env_steps"]["32"] == pytest.approx(hours)
