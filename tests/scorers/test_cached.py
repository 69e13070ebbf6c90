"""Scores kept on disk: who is asked, what makes two clips the same, what the folder holds.

A cache that fails stops no scoring; what someone else has written into it is no score.
"""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import os
import pickle
import sqlite3
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from tests.scorers.cached_doubles import (
    Both,
    Brightness,
    Failing,
    Forgetful,
    Heard,
    Opaque,
    OutOfRange,
    Reticent,
    Silent,
    Wavering,
    Weighty,
    brightness,
    made_here,
    scores,
    some_clips,
)
from vlmrb_torchrl.scorers import (
    CachedScorer,
    ClipScorer,
    EmbeddedJudge,
    NoisyScorer,
    PrivilegedScorer,
    PromptedScorer,
    RandomScorer,
    base,
    cached,
)
from vlmrb_torchrl.scorers.base import InvalidScoreError

# ---------------------------------------------------------------- who is asked


def test_scores_are_the_judges_to_the_last_bit_and_nobody_is_asked_twice(tmp_path: Path) -> None:
    """A white clip scores exactly 1 and a black one 0."""
    clips = some_clips(20)
    clips[0], clips[1] = 255, 0
    first, second = (CachedScorer(Brightness(), tmp_path) for _ in range(2))
    assert torch.equal(scores(first, clips), brightness(clips))
    assert torch.equal(scores(second, clips), brightness(clips))
    assert (second.scorer.asked, second.hits, second.misses) == (0, 20, 0)
    assert scores(second, clips[:0]).shape == (0,)


def test_each_new_clip_is_asked_about_once_and_the_order_is_kept(tmp_path: Path) -> None:
    clips = some_clips(6)
    judge = Brightness()
    scorer = CachedScorer(judge, tmp_path)
    scores(scorer, clips[[1, 4]])
    assert torch.equal(scores(scorer, clips), brightness(clips))
    assert (judge.asked, scorer.hits, scorer.misses) == (6, 2, 6)
    twice = some_clips(3, seed=1)[[0, 1, 0, 2, 1, 0]]
    assert torch.equal(scores(scorer, twice), brightness(twice))
    assert (judge.asked, scorer.hits, scorer.misses) == (9, 5, 9)


@pytest.mark.parametrize(
    "other", [{"prompt": "dark?"}, {"model": "median"}, {"weights": "2"}], ids=str
)
def test_another_prompt_model_or_revision_is_asked_anew(
    other: dict[str, str], tmp_path: Path
) -> None:
    clips, judge = some_clips(5), Brightness(**other)
    scores(CachedScorer(Brightness(), tmp_path), clips)
    scores(CachedScorer(judge, tmp_path), clips)
    assert judge.asked == 5


def test_another_shape_or_pixel_makes_another_clip(tmp_path: Path) -> None:
    judge = Brightness()
    judge.frame_size = None
    scorer = CachedScorer(judge, tmp_path)
    clips = some_clips(1, frames=4)
    for shape in ((4, 3, 2, 2), (2, 3, 4, 2), (2, 3, 2, 4)):  # the same bytes
        scores(scorer, clips.view(1, *shape))
    assert judge.asked == 3
    clips[0, -1, 0, 0, 0] ^= 1
    scores(scorer, clips)
    assert judge.asked == 4


def test_what_is_no_answer_is_not_kept(tmp_path: Path) -> None:
    judge = OutOfRange()
    scorer = CachedScorer(judge, tmp_path)
    for asked in (1, 2):
        with pytest.raises(InvalidScoreError):
            scores(scorer, some_clips(1))
        assert judge.asked == asked
    judge = Silent()
    scorer = CachedScorer(judge, tmp_path)
    for asked in (2, 4):
        said = scorer.score(TensorDict({"clip": some_clips(2)}, [2]))
        assert (bool(said.isnan().all()), judge.asked) == (True, asked)
    scorer = CachedScorer(Failing(), tmp_path)
    with pytest.raises(RuntimeError, match="no luck"):
        scores(scorer, some_clips(1))
    assert scorer._cache is not None


# ---------------------------------------------------------------- whose scores they are


@pytest.mark.parametrize("heard", [Heard, Forgetful])
def test_two_prompts_of_a_judge_whose_config_names_none_are_two_judges(
    heard: type[PromptedScorer], tmp_path: Path
) -> None:
    """Each prompt has its own answer, whichever way it was given and whoever asked before."""
    clips, judge = some_clips(1), heard("Is the door open?")
    for _ in range(2):
        for prompt, said in (("Is the door open?", 0.9), ("Is it night?", 0.1)):
            for asked in (heard(prompt), judge.asking(prompt)):
                assert scores(CachedScorer(asked, tmp_path), clips).item() == pytest.approx(said)


_SAID = """
import torch
from vlmrb_torchrl.scorers import ClipScorer

def said():
    return {helper}

class Judge(ClipScorer):
    def score(self, tensordict):
        return torch.full((len(tensordict),), {own})

class Other(ClipScorer):
    score = Judge.score
"""


@pytest.fixture
def module_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Writes a module and imports it, also as another one than before."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def module(name: str, helper: float = 0, own: Any = 0.5) -> ModuleType:
        (tmp_path / f"{name}.py").write_text(_SAID.format(helper=helper, own=own))
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        return importlib.import_module(name)

    return module


@pytest.mark.parametrize("edited", ["own", "helper", "base", "module"])
def test_a_judge_whose_code_is_another_is_another_judge(
    edited: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module_of: Any
) -> None:
    """0.2, then 0.8: of its class, of a function beside, of a base, or in another module."""
    (tmp_path / "heir.py").write_text("from today import Judge as Base\nclass Judge(Base): pass\n")
    for said in (0.2, 0.8):
        parts = {"own": said} if edited == "own" else {"helper": said, "own": "said()"}
        module = module_of(f"judge_{said * 10:.0f}" if edited == "module" else "today", **parts)
        if edited == "base":
            monkeypatch.delitem(sys.modules, "heir", raising=False)
            module = importlib.import_module("heir")
        for _ in range(2):
            got = scores(CachedScorer(module.Judge(), tmp_path / "scores"), some_clips(1))
            assert got.item() == pytest.approx(said)


def test_another_state_of_this_package_makes_other_judges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "__file__", str(tmp_path / "scorers" / "base.py"))
    known = set()
    for code in ("", "# thins clips otherwise"):
        (tmp_path / "frames.py").write_text(code)
        base._code.cache_clear()
        known.add(Brightness().fingerprint)
    base._code.cache_clear()
    assert len(known - {None}) == 2


def test_the_same_code_under_another_name_is_another_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module_of: Any
) -> None:
    """But a process that is spawned imports the script that its parent ran as ``__main__`` anew."""
    one, same = (module_of(name) for name in ("one_judge", "same_judge"))
    judges = [one.Judge(), one.Other(), same.Judge()]
    assert len({judge.fingerprint for judge in judges}) == 3
    assert one.Judge().fingerprint == judges[0].fingerprint
    known = set()
    for name in ("__main__", "__mp_main__"):
        spec = importlib.util.spec_from_file_location(name, tmp_path / "one_judge.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        known.add(module.Judge().fingerprint)
    assert len(known - {None}) == 1


def test_a_judge_of_judges_is_known_by_them(tmp_path: Path) -> None:
    bright = Brightness()
    pairs = [(bright, Brightness()), (bright, Brightness(weights="2")), (bright, Heard("door"))]
    known = [Both(*pair).fingerprint for pair in pairs]
    noisy = [NoisyScorer(other).fingerprint for _, other in pairs]
    assert len({*known, *noisy} - {None}) == 6
    twice = CachedScorer(CachedScorer(bright, tmp_path), tmp_path)
    assert twice.fingerprint == bright.fingerprint
    assert twice.prompts == ()
    assert NoisyScorer(CachedScorer(Heard("door"), tmp_path)).prompts == ("door",)
    assert NoisyScorer(made_here(0.5)).fingerprint is None


def test_it_passes_for_the_judge(tmp_path: Path) -> None:
    judge = Brightness()
    scorer = CachedScorer(judge, tmp_path)
    assert scorer.frame_size == (2, 2)
    assert (scorer.device, scorer.revision) == (judge.device, judge.revision)
    assert scorer.in_keys == ["clip"]
    assert not scorer.cheap
    assert repr(scorer) == f"CachedScorer(scorer={judge!r})"


@pytest.mark.parametrize(
    ("judge", "reason"),
    [
        (made_here(0.5), "another judge could pass"),
        (Reticent(), "another judge could pass"),
        (Opaque(), "another judge could pass"),
        (Both(Brightness(), made_here(0.5)), "another judge could pass"),
        (RandomScorer(), "use it as it is"),
        (PrivilegedScorer(("goal",)), "use it as it is"),
        (NoisyScorer(Brightness()), "use it as it is"),
    ],
    ids=lambda judge: type(judge).__name__,
)
def test_a_judge_whose_answers_cannot_be_told_or_kept_is_refused(
    judge: ClipScorer, reason: str, tmp_path: Path
) -> None:
    assert (judge.fingerprint is None) == ("could pass" in reason)
    with pytest.raises(ValueError, match=f"cannot be cached.*{reason}") as refusal:
        CachedScorer(judge, tmp_path)
    assert "\n" not in str(refusal.value)


def test_weights_that_no_revision_names_leave_the_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = CachedScorer(Weighty(), tmp_path)
    with caplog.at_level(logging.WARNING, logger="vlmrb_torchrl.scorers"):
        for _ in range(2):
            assert scores(scorer, some_clips(1)).item() == 0.5
    assert scorer.misses == 2
    (record,) = caplog.records
    assert "its weights in its revision" in record.getMessage()


def test_a_judge_that_changes_while_it_answers_leaves_no_score(tmp_path: Path) -> None:
    """Its answer is neither the old judge's nor surely the new one's; the next ones are kept."""
    judge = Wavering()
    scorer = CachedScorer(judge, tmp_path)
    for asked in (1, 2, 2):
        scores(scorer, some_clips(1))
        assert judge.asked == asked
    fresh = Wavering()
    scores(CachedScorer(fresh, tmp_path), some_clips(1))
    assert fresh.asked == 1


def test_the_embedded_judge_is_known_by_its_weights(tmp_path: Path) -> None:
    clips = torch.arange(2, dtype=torch.uint8).view(2, 1, 1, 1, 1).expand(2, 2, 3, 64, 64) * 99
    first, second = (CachedScorer(EmbeddedJudge(), tmp_path) for _ in range(2))
    assert torch.equal(scores(first, clips), scores(first.scorer, clips))
    assert torch.equal(scores(second, clips), scores(first.scorer, clips))
    assert (first.misses, second.misses) == (2, 0)
    assert first.fingerprint == first.scorer.fingerprint


# ---------------------------------------------------------------- bound and sharing


def test_the_bound_is_kept_and_what_is_asked_for_stays(tmp_path: Path) -> None:
    """At some 0.1 kB a score, 1,280 of them are more than twice what fits."""
    bound = 50_000
    judge = Brightness()
    scorer = CachedScorer(judge, tmp_path, size_megabytes=bound / 1e6)
    wanted = some_clips(8, seed=1000)
    scores(scorer, wanted)
    for seed in range(20):
        scores(scorer, some_clips(64, seed))
        scores(scorer, wanted)
        assert scorer._cache.size_bytes() <= bound
    assert judge.asked == 8 + 20 * 64
    (kept,) = scorer._cache.connection.execute("SELECT count(*) FROM scores").fetchone()
    assert 100 < kept < 1280
    scorer._cache.connection.close()  # takes what is in the log into the file
    assert bound / 2 < (tmp_path / "scores.sqlite").stat().st_size <= bound
    judge = Brightness()
    nothing_fits = CachedScorer(judge, tmp_path / "none", size_megabytes=1e-6)
    for asked in (4, 8):
        assert torch.equal(scores(nothing_fits, some_clips(4)), brightness(some_clips(4)))
        assert judge.asked == asked


@pytest.mark.parametrize("connections", [1, 4])
def test_threads_at_once_share_one_folder(tmp_path: Path, connections: int) -> None:
    """Four ask about the same 160 clips, each in an order of its own.

    Four connections open the file and write to it at once, as processes do.
    """
    scorers = [CachedScorer(Brightness(), tmp_path) for _ in range(connections)]
    start = threading.Barrier(4)

    def ask(first: int) -> bool:
        scorer = scorers[first % connections]
        start.wait(60)
        clips = [some_clips(16, (first + k) % 10) for k in range(10)]
        return all(torch.equal(scores(scorer, part), brightness(part)) for part in clips)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(4)))
    assert all(scorer._cache is not None for scorer in scorers), "the cache was given up"
    again = CachedScorer(Brightness(), tmp_path)
    for seed in range(10):
        scores(again, some_clips(16, seed))
    assert again.misses == 0


def score_beside(folder: Path, seeds: list[int], start: Barrier) -> bool:
    scorer = CachedScorer(Brightness(), folder)
    start.wait(60)
    batches = [some_clips(16, seed) for seed in seeds]
    return all(torch.equal(scores(scorer, clips), brightness(clips)) for clips in batches)


@pytest.mark.slow
def test_two_processes_at_once_share_one_folder(tmp_path: Path) -> None:
    """Both open it and write to it at the same time; half of their clips are the same."""
    with multiprocessing.Manager() as manager:
        start = manager.Barrier(2)
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            seeds = [list(range(20)), list(range(29, 9, -1))]
            assert all(pool.starmap(score_beside, [(tmp_path, each, start) for each in seeds]))
    scorer = CachedScorer(Brightness(), tmp_path)
    for seed in range(30):
        scores(scorer, some_clips(16, seed))
    assert scorer.scorer.asked == 0


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


# ---------------------------------------------------------------- what others may have put there


class Burglar:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("value", [7.0, -0.5, "yes", float("inf"), None, "a pickle"])
def test_what_is_no_score_is_a_miss_and_put_right(value: object, tmp_path: Path) -> None:
    """Nothing of it is executed; the last lines show that the pickle was a live one."""
    folder, mark, clips = tmp_path / "scores", tmp_path / "mark", some_clips(1)
    payload = pickle.dumps(Burglar(mark))
    scores(CachedScorer(Brightness(), folder), clips)
    connection = sqlite3.connect(folder / "scores.sqlite")
    with connection:
        planted = payload if value == "a pickle" else value
        connection.execute("UPDATE scores SET score = ?", (planted,))
    connection.close()
    for asked in (1, 0):
        judge = Brightness()
        assert torch.equal(scores(CachedScorer(judge, folder), clips), brightness(clips))
        assert judge.asked == asked
    assert not mark.exists()
    pickle.loads(payload)
    assert mark.exists()


# ---------------------------------------------------------------- what goes wrong


def folder_in_the_way(folder: Path, scorer: CachedScorer) -> None:
    folder.rmdir()
    folder.write_text("in the way")


def no_database(folder: Path, scorer: CachedScorer) -> None:
    (folder / "scores.sqlite").write_bytes(b"no database " * 1000)


def damaged_database(folder: Path, scorer: CachedScorer) -> None:
    """Its first page is whole, so that it opens; the scores are overwritten."""
    other = CachedScorer(Brightness(), folder)
    scores(other, some_clips(200))
    other._cache.connection.close()
    file = folder / "scores.sqlite"
    size = file.stat().st_size
    with file.open("r+b") as database:
        database.seek(4096)
        database.write(os.urandom(size - 4096))


def read_only(folder: Path, scorer: CachedScorer) -> None:
    """SQLite itself refuses to write: the test may run as root, whom no permission stops."""
    scorer.load()
    scorer._cache.connection.execute("PRAGMA query_only = 1")


def locked_for_ever(folder: Path, scorer: CachedScorer) -> None:
    scorer.load()
    scorer.other = sqlite3.connect(folder / "scores.sqlite", isolation_level=None)
    scorer.other.execute("BEGIN IMMEDIATE")


@pytest.mark.parametrize(
    "trouble", [folder_in_the_way, no_database, damaged_database, read_only, locked_for_ever]
)
def test_a_cache_that_fails_stops_no_scoring(
    trouble: Callable[[Path, CachedScorer], None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cached, "_LOCK_SECONDS", 0.01)
    folder, judge, clips = tmp_path / "scores", Brightness(), some_clips(4, seed=77)
    folder.mkdir()
    scorer = CachedScorer(judge, folder)
    trouble(folder, scorer)
    with caplog.at_level(logging.WARNING, logger="vlmrb_torchrl.scorers"):
        for times in (1, 2, 3):
            assert torch.equal(scores(scorer, clips), brightness(clips))
            assert judge.asked == 4 * times
    (record,) = caplog.records
    assert "the judge answers alone" in record.getMessage()
    assert str(scorer.folder) in record.getMessage()
    assert "\n" not in record.getMessage()


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
