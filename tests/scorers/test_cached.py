"""Scores kept on disk: who is asked, what makes two clips the same, what the folder holds."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes import cli
from recipes.dqn import DQN
from tests.scorers.cached_doubles import Brightness, brightness, scores, some_clips
from vlmrb_torchrl.scorers import CachedScorer, EmbeddedJudge
from vlmrb_torchrl.scorers.embedded import FOLDER


def test_scores_are_the_judges_to_the_last_bit(tmp_path: Path) -> None:
    """A white clip scores exactly 1 and a black one 0."""
    clips = some_clips(20)
    clips[0], clips[1] = 255, 0
    first, second = (CachedScorer(Brightness(), tmp_path) for _ in range(2))
    assert torch.equal(scores(first, clips), brightness(clips))
    assert torch.equal(scores(second, clips), brightness(clips))
    assert second.misses == 0


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


def test_a_missing_score_is_not_kept(tmp_path: Path) -> None:
    class Broken(Brightness):
        def score(self, tensordict: Any) -> Tensor:
            super().score(tensordict)
            return torch.full((len(tensordict),), torch.nan)

    judge = Broken()
    scorer = CachedScorer(judge, tmp_path)
    for asked in (1, 2):
        assert scores(scorer, some_clips(1)).isnan().all()
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


def test_the_judges_fingerprint_is_taken_once(tmp_path: Path) -> None:
    """It may cost a digest of gigabytes of weights."""

    class Heavy(Brightness):
        digests = 0

        @property
        def revision(self) -> str:
            type(self).digests += 1
            return super().revision

    scorer = CachedScorer(Heavy(), tmp_path)
    for seed in range(5):
        scores(scorer, some_clips(2, seed))
    assert Heavy.digests == 1


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
    """At some 0.1 kB a score, 2,560 of them are more than twice what fits."""
    bound = 100_000
    judge = Brightness()
    scorer = CachedScorer(judge, tmp_path, size_megabytes=bound / 1e6)
    wanted = some_clips(8, seed=1000)
    scores(scorer, wanted)
    for seed in range(40):
        scores(scorer, some_clips(64, seed))
        scores(scorer, wanted)
        assert scorer._cache.size_bytes() <= bound
    assert judge.asked == 8 + 40 * 64
    (kept,) = scorer._cache.connection.execute("SELECT count(*) FROM scores").fetchone()
    assert 300 < kept < 2560
    scorer._cache.connection.close()  # takes what is in the log into the file
    assert bound / 2 < (tmp_path / "scores.sqlite").stat().st_size <= bound


def test_a_bound_that_nothing_fits_keeps_nothing(tmp_path: Path) -> None:
    judge = Brightness()
    scorer = CachedScorer(judge, tmp_path, size_megabytes=1e-6)
    for asked in (4, 8):
        assert torch.equal(scores(scorer, some_clips(4)), brightness(some_clips(4)))
        assert judge.asked == asked


def test_threads_at_once_share_one_scorer(tmp_path: Path) -> None:
    """Four threads ask about the same 160 clips, each in an order of its own."""
    scorer, start = CachedScorer(Brightness(), tmp_path), threading.Barrier(4)

    def ask(first: int) -> bool:
        start.wait(60)
        seeds = [(first + k) % 10 for k in range(10)]
        clips = [some_clips(16, seed) for seed in seeds]
        return all(torch.equal(scores(scorer, part), brightness(part)) for part in clips)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(4)))
    assert scorer._cache is not None, "the cache was given up"
    again = CachedScorer(Brightness(), tmp_path)
    for seed in range(10):
        scores(again, some_clips(16, seed))
    assert again.misses == 0


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


# From the command line


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
