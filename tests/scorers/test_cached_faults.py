"""A cache that fails stops no scoring; what someone else has written into it is no score."""

from __future__ import annotations

import logging
import os
import pickle
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.scorers.cached_doubles import Brightness, Failing, brightness, scores, some_clips
from vlmrb_torchrl.scorers import (
    CachedScorer,
    ClipScorer,
    NoisyScorer,
    PrivilegedScorer,
    RandomScorer,
    cached,
)

# What others may have put into the folder


class Burglar:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def plant(folder: Path, score: object) -> None:
    """Put something else into the place of the only score in ``folder``."""
    connection = sqlite3.connect(folder / "scores.sqlite")
    with connection:
        connection.execute("UPDATE scores SET score = ?", (score,))
    connection.close()


def test_a_planted_pickle_is_never_executed(tmp_path: Path) -> None:
    """The last lines show that the plant was a live one."""
    folder, mark, clips = tmp_path / "scores", tmp_path / "mark", some_clips(1)
    scores(CachedScorer(Brightness(), folder), clips)
    payload = pickle.dumps(Burglar(mark))
    plant(folder, payload)
    judge = Brightness()
    assert torch.equal(scores(CachedScorer(judge, folder), clips), brightness(clips))
    assert judge.asked == 1
    assert not mark.exists()
    pickle.loads(payload)
    assert mark.exists()


@pytest.mark.parametrize("value", [7.0, -0.5, "yes", b"0.5", float("inf"), None])
def test_what_is_no_score_is_a_miss_and_put_right(value: object, tmp_path: Path) -> None:
    clips = some_clips(1)
    scores(CachedScorer(Brightness(), tmp_path), clips)
    plant(tmp_path, value)
    for asked in (1, 0):
        judge = Brightness()
        assert torch.equal(scores(CachedScorer(judge, tmp_path), clips), brightness(clips))
        assert judge.asked == asked


# What goes wrong


def assert_scores_all_the_same(
    scorer: CachedScorer, judge: Brightness, caplog: pytest.LogCaptureFixture
) -> None:
    clips = some_clips(4, seed=77)
    judge.asked = 0
    with caplog.at_level(logging.WARNING, logger="vlmrb_torchrl.scorers"):
        for times in (1, 2, 3):
            assert torch.equal(scores(scorer, clips), brightness(clips))
            assert judge.asked == 4 * times
    (record,) = caplog.records
    assert "the judge answers alone" in record.getMessage()
    assert str(scorer.folder) in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_folder_that_cannot_be_made_stops_no_scoring(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    judge = Brightness()
    assert_scores_all_the_same(CachedScorer(judge, tmp_path / "file" / "scores"), judge, caplog)


def test_a_file_that_is_no_database_stops_no_scoring(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "scores.sqlite").write_bytes(b"no database " * 1000)
    judge = Brightness()
    assert_scores_all_the_same(CachedScorer(judge, tmp_path), judge, caplog)


def test_a_damaged_database_stops_no_scoring(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its first page is whole, so that it opens; the scores are overwritten."""
    scorer = CachedScorer(Brightness(), tmp_path)
    scores(scorer, some_clips(200))
    scorer._cache.connection.close()
    file = tmp_path / "scores.sqlite"
    size = file.stat().st_size
    with file.open("r+b") as database:
        database.seek(4096)
        database.write(os.urandom(size - 4096))
    judge = Brightness()
    assert_scores_all_the_same(CachedScorer(judge, tmp_path), judge, caplog)


def test_a_folder_that_turns_read_only_stops_no_scoring(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SQLite itself refuses to write: the test may run as root, whom no permission stops."""
    judge = Brightness()
    scorer = CachedScorer(judge, tmp_path)
    scorer.load()
    scorer._cache.connection.execute("PRAGMA query_only = 1")
    assert_scores_all_the_same(scorer, judge, caplog)


def test_a_full_disk_stops_no_scoring(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SQLite may use no more pages than there are, so it is full after some batches."""
    judge = Brightness()
    scorer = CachedScorer(judge, tmp_path)
    scorer.load()
    scorer._cache.connection.execute("PRAGMA max_page_count = 1")
    for seed in range(30):
        clips = some_clips(64, seed)
        assert torch.equal(scores(scorer, clips), brightness(clips))
    assert judge.asked == 30 * 64
    (record,) = caplog.records
    assert "database or disk is full" in record.getMessage()


def test_a_lock_that_no_one_gives_back_stops_no_scoring(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached, "_LOCK_SECONDS", 0.01)
    judge = Brightness()
    scorer = CachedScorer(judge, tmp_path)
    scorer.load()
    other = sqlite3.connect(tmp_path / "scores.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert_scores_all_the_same(scorer, judge, caplog)
    other.close()


def test_the_judges_own_errors_are_not_swallowed(tmp_path: Path) -> None:
    scorer = CachedScorer(Failing(), tmp_path)
    with pytest.raises(RuntimeError, match="no luck"):
        scores(scorer, some_clips(1))
    assert scorer._cache is not None


@pytest.mark.parametrize(
    "judge",
    [
        RandomScorer(),
        PrivilegedScorer(("goal",)),
        NoisyScorer(Brightness()),
    ],
    ids=lambda judge: type(judge).__name__,
)
def test_a_judge_that_cannot_be_cached_is_refused(judge: ClipScorer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be cached.*use it as it is") as refusal:
        CachedScorer(judge, tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("size", [0, -1, float("nan")])
def test_a_size_must_be_positive(size: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size_megabytes="):
        CachedScorer(Brightness(), tmp_path, size)
