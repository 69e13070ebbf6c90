"""Scores kept on disk: who is asked, what makes two clips the same, and what goes wrong."""

from __future__ import annotations

import builtins
import logging
import multiprocessing
import os
import pickle
import sqlite3
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import diskcache
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from recipes import cli
from recipes.dqn import DQN
from vlmrb_torchrl.scorers import (
    CachedScorer,
    ClipScorer,
    EmbeddedJudge,
    NoisyScorer,
    PrivilegedScorer,
    RandomScorer,
    cached,
)
from vlmrb_torchrl.scorers.base import InvalidScoreError
from vlmrb_torchrl.scorers.embedded import FOLDER


class Brightness(ClipScorer):
    """The mean of a clip's pixels, of 255; counts the clips that it is asked about."""

    frame_size = (2, 2)

    def __init__(self, prompt: str = "bright?", model: str = "mean", weights: str = "1") -> None:
        super().__init__()
        self.prompt, self.model, self.weights = prompt, model, weights
        self.asked = 0

    @property
    def config(self) -> tuple[tuple[str, object], ...]:
        return (("prompt", self.prompt), ("model", self.model))

    @property
    def revision(self) -> str:
        return self.weights

    def score(self, tensordict: Any) -> Tensor:
        self.asked += len(tensordict)
        return brightness(tensordict["clip"])


def brightness(clips: Tensor) -> Tensor:
    return clips.flatten(1).float().mean(1) / 255


def some_clips(count: int, seed: int = 0, frames: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, frames, 3, 2, 2), generator=generator).to(torch.uint8)


def scores(scorer: ClipScorer, clips: Tensor) -> Tensor:
    return scorer(TensorDict({"clip": clips}, [len(clips)]))["score"]


def test_scores_are_the_judges_to_the_last_bit(tmp_path: Path) -> None:
    clips = some_clips(20)
    for _ in range(2):
        assert torch.equal(scores(CachedScorer(Brightness(), tmp_path), clips), brightness(clips))


def test_a_judge_is_not_asked_what_another_was(tmp_path: Path) -> None:
    clips = some_clips(5)
    scores(CachedScorer(Brightness(), tmp_path), clips)
    judge = Brightness()
    again = CachedScorer(judge, tmp_path)
    scores(again, clips)
    assert (judge.asked, again.hits, again.misses) == (0, 5, 0)


def test_only_new_clips_are_asked_about_and_the_order_is_kept(tmp_path: Path) -> None:
    clips = some_clips(6)
    judge = Brightness()
    scorer = CachedScorer(judge, tmp_path)
    scores(scorer, clips[[1, 4]])
    assert torch.equal(scores(scorer, clips), brightness(clips))
    assert (judge.asked, scorer.hits, scorer.misses) == (6, 2, 6)


def test_a_clip_that_a_batch_holds_twice_is_asked_about_once(tmp_path: Path) -> None:
    clips = some_clips(3)[[0, 1, 0, 2, 1, 0]]
    judge = Brightness()
    scorer = CachedScorer(judge, tmp_path)
    assert torch.equal(scores(scorer, clips), brightness(clips))
    assert (judge.asked, scorer.hits, scorer.misses) == (3, 3, 3)


@pytest.mark.parametrize(
    "other", [{"prompt": "dark?"}, {"model": "median"}, {"weights": "2"}], ids=str
)
def test_another_prompt_model_or_revision_is_asked_anew(
    other: dict[str, str], tmp_path: Path
) -> None:
    clips = some_clips(5)
    scores(CachedScorer(Brightness(), tmp_path), clips)
    judge = Brightness(**other)
    scores(CachedScorer(judge, tmp_path), clips)
    assert judge.asked == 5


def test_the_same_bytes_in_another_shape_are_another_clip(tmp_path: Path) -> None:
    judge = Brightness()
    scorer = CachedScorer(judge, tmp_path)
    clips = some_clips(1, frames=4)
    for shape in ((4, 3, 2, 2), (2, 3, 4, 2), (2, 3, 2, 4)):
        scores(scorer, clips.view(1, *shape))
    assert judge.asked == 3


def test_one_pixel_makes_another_clip(tmp_path: Path) -> None:
    judge = Brightness()
    scorer = CachedScorer(judge, tmp_path)
    clips = some_clips(1).repeat(2, 1, 1, 1, 1)
    clips[1, -1, 0, 0, 0] ^= 1
    scores(scorer, clips)
    assert judge.asked == 2


def test_no_clips_no_scores(tmp_path: Path) -> None:
    assert scores(CachedScorer(Brightness(), tmp_path), some_clips(0)).shape == (0,)


def test_an_invalid_answer_is_not_kept(tmp_path: Path) -> None:
    class Broken(Brightness):
        def score(self, tensordict: Any) -> Tensor:
            super().score(tensordict)
            return torch.full((len(tensordict),), torch.nan)

    judge = Broken()
    scorer = CachedScorer(judge, tmp_path)
    for asked in (1, 2):
        with pytest.raises(InvalidScoreError):
            scores(scorer, some_clips(1))
        assert judge.asked == asked


def test_the_embedded_judge_is_known_by_its_weights(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    clips = torch.randint(0, 256, (2, 2, 3, 64, 64), generator=generator).to(torch.uint8)
    expected = scores(EmbeddedJudge(), clips)
    first, second = (CachedScorer(EmbeddedJudge(), tmp_path) for _ in range(2))
    assert torch.equal(scores(first, clips), expected)
    assert torch.equal(scores(second, clips), expected)
    assert (first.misses, second.misses) == (2, 0)
    assert first.fingerprint == first.scorer.fingerprint


def test_it_passes_for_the_judge(tmp_path: Path) -> None:
    judge = Brightness()
    scorer = CachedScorer(judge, tmp_path)
    assert scorer.frame_size == (2, 2)
    assert scorer.device == judge.device
    assert scorer.revision == judge.revision
    assert scorer.in_keys == ["clip"]
    assert not scorer.cheap
    assert scorer.config == (("scorer", "Brightness"), *judge.config)


# Bound and sharing


def test_the_bound_is_kept_and_what_is_asked_for_stays(tmp_path: Path) -> None:
    """At some 0.2 kB a score, 2,560 of them are twice what fits."""
    bound = 200_000
    judge = Brightness()
    scorer = CachedScorer(judge, tmp_path, size_megabytes=bound / 1e6)
    wanted = some_clips(8, seed=1000)
    scores(scorer, wanted)
    for seed in range(40):
        scores(scorer, some_clips(64, seed))
        scores(scorer, wanted)
        assert scorer._cache.volume() <= bound
    assert judge.asked == 8 + 40 * 64
    assert bound / 2 < (tmp_path / "cache.db").stat().st_size <= bound
    assert 300 < len(scorer._cache) < 2560


def score_beside(folder: Path, seeds: list[int], start: Barrier) -> tuple[int, bool]:
    scorer = CachedScorer(Brightness(), folder)
    start.wait(60)
    right = [
        torch.equal(scores(scorer, clips), brightness(clips))
        for clips in (some_clips(16, seed) for seed in seeds)
    ]
    return scorer.misses, all(right)


def test_two_processes_at_once_share_one_folder(tmp_path: Path) -> None:
    """Both open it and write to it at the same time; half of their clips are the same."""
    with multiprocessing.Manager() as manager:
        start = manager.Barrier(2)
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            seeds = [list(range(20)), list(range(29, 9, -1))]
            done = pool.starmap(score_beside, [(tmp_path, each, start) for each in seeds])
    assert all(right for _, right in done)
    assert all(0 <= misses <= 20 * 16 for misses, _ in done)
    judge = Brightness()
    scorer = CachedScorer(judge, tmp_path)
    for seed in range(30):
        scores(scorer, some_clips(16, seed))
    assert judge.asked == 0


def test_it_pickles_before_and_after_it_opened_its_folder(tmp_path: Path) -> None:
    scorer, clips = CachedScorer(Brightness(), tmp_path), some_clips(3)
    fresh = pickle.loads(pickle.dumps(scorer))
    scores(scorer, clips)
    again = pickle.loads(pickle.dumps(scorer))
    for copy in (fresh, again):
        assert copy._cache is None
        assert torch.equal(scores(copy, clips), brightness(clips))
        assert copy.scorer.asked == scorer.scorer.asked * (copy is again)


# What others may have put into the folder


class Burglar:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def plant(folder: Path, **columns: Any) -> str:
    """Change the only row of the cache in ``folder``; return its key."""
    connection = sqlite3.connect(folder / "cache.db")
    with connection:
        names = ", ".join(f"{name} = ?" for name in columns)
        connection.execute(f"UPDATE Cache SET {names}", tuple(columns.values()))
        ((key,),) = connection.execute("SELECT key FROM Cache").fetchall()
    connection.close()
    return str(key)


@pytest.mark.parametrize("in_a_file", [False, True])
def test_a_planted_pickle_is_never_executed(in_a_file: bool, tmp_path: Path) -> None:
    """diskcache itself would run it: the last lines show that the plant was a live one."""
    folder, mark, clips = tmp_path / "scores", tmp_path / "mark", some_clips(1)
    scores(CachedScorer(Brightness(), folder), clips)
    payload = pickle.dumps(Burglar(mark))
    (folder / "planted.val").write_bytes(payload)
    planted = {
        "mode": diskcache.core.MODE_PICKLE,
        "filename": "planted.val" if in_a_file else None,
        "value": None if in_a_file else payload,
    }
    plant(folder, **planted)
    judge = Brightness()
    assert torch.equal(scores(CachedScorer(judge, folder), clips), brightness(clips))
    assert judge.asked == 1
    assert not mark.exists()
    key = plant(folder, **planted)
    assert diskcache.Cache(folder, disk=diskcache.Disk).get(key) is None
    assert mark.exists()


def test_a_file_that_a_row_names_is_not_deleted(tmp_path: Path) -> None:
    folder, clips = tmp_path / "scores", some_clips(1)
    scores(CachedScorer(Brightness(), folder), clips)
    precious = tmp_path / "precious"
    precious.write_text("mine")
    plant(folder, mode=diskcache.core.MODE_TEXT, filename=str(precious), value=None)
    scorer = CachedScorer(Brightness(), folder)
    scores(scorer, clips)
    scorer._cache.clear()
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("value", [7.0, -0.5, "0.5", b"0.5", 1, None])
def test_what_is_no_score_is_a_miss_and_put_right(value: object, tmp_path: Path) -> None:
    clips = some_clips(1)
    scores(CachedScorer(Brightness(), tmp_path), clips)
    plant(tmp_path, value=value)
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
    (tmp_path / "cache.db").write_bytes(b"no database " * 1000)
    judge = Brightness()
    assert_scores_all_the_same(CachedScorer(judge, tmp_path), judge, caplog)


def test_a_damaged_database_stops_no_scoring(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its first page is whole, so that it opens; the scores are overwritten."""
    scorer = CachedScorer(Brightness(), tmp_path)
    scores(scorer, some_clips(200))
    scorer._cache.close()
    file = tmp_path / "cache.db"
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
    scorer._cache._sql("PRAGMA query_only = 1")
    assert_scores_all_the_same(scorer, judge, caplog)


def test_a_full_disk_stops_no_scoring(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SQLite may use no more pages than there are, so it is full after some batches."""
    judge = Brightness()
    scorer = CachedScorer(judge, tmp_path)
    scorer.load()
    scorer._cache._sql("PRAGMA max_page_count = 1")
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
    other = sqlite3.connect(tmp_path / "cache.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert_scores_all_the_same(scorer, judge, caplog)
    other.close()


def test_the_judges_own_errors_are_not_swallowed(tmp_path: Path) -> None:
    class Broken(Brightness):
        def score(self, tensordict: Any) -> Tensor:
            raise RuntimeError("no luck")

    scorer = CachedScorer(Broken(), tmp_path)
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


def test_missing_package_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_diskcache(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "diskcache":
            raise ImportError("No module named 'diskcache'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_diskcache)
    with pytest.raises(ImportError, match=r"diskcache.*pip install 'vlmrb-torchrl\[vlm\]'"):
        CachedScorer(Brightness(), tmp_path).load()


def test_the_folder_is_the_users_own_cache_unless_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    scorer = CachedScorer(Brightness())
    assert scorer.folder == tmp_path / "vlmrb_torchrl" / "scores"
    assert not scorer.folder.exists(), "constructing writes nothing"
    scorer.load()
    assert scorer.folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert CachedScorer(Brightness()).folder == tmp_path / ".cache" / "vlmrb_torchrl" / "scores"


def test_it_is_named_on_the_command_line_with_its_judge(tmp_path: Path) -> None:
    parser = cli.build_parser(DQN)
    chosen = [
        "--scoring.scorer=CachedScorer",
        "--scoring.scorer.scorer=EmbeddedJudge",
        "--scoring.scorer.scorer.questions=[goal,door]",
        f"--scoring.scorer.folder={tmp_path}",
    ]
    settings = parser.instantiate(parser.parse_args(chosen))
    scorer = settings.scoring.scorer
    assert isinstance(scorer, CachedScorer)
    assert isinstance(scorer.scorer, EmbeddedJudge)
    assert scorer.scorer.model_name == str(FOLDER)
    assert scorer.scorer.questions == ("goal", "door")
    assert scorer.folder == tmp_path
    cli.check(settings)
