"""Scores kept on disk: who is asked, what makes two clips the same, what the folder holds."""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from recipes.dqn import DQN
from recipes.running import cli
from tests.scorers.cached_doubles import (
    Both,
    Brightness,
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
    PromptedScorer,
    base,
)
from vlmrb_torchrl.scorers.base import InvalidScoreError
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


def test_an_invalid_answer_is_not_kept(tmp_path: Path) -> None:
    judge = OutOfRange()
    scorer = CachedScorer(judge, tmp_path)
    for asked in (1, 2):
        with pytest.raises(InvalidScoreError):
            scores(scorer, some_clips(1))
        assert judge.asked == asked


def test_a_clip_that_got_no_score_is_asked_about_again(tmp_path: Path) -> None:
    judge = Silent()
    scorer = CachedScorer(judge, tmp_path)
    for asked in (2, 4):
        said = scorer.score(TensorDict({"clip": some_clips(2)}, [2]))
        assert (bool(said.isnan().all()), judge.asked) == (True, asked)


# Whose scores they are


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
from {place} import {base}

def said():
    return {helper}

class Judge({base}):
    def score(self, tensordict):
        return torch.full((len(tensordict),), {own})
"""


@pytest.mark.parametrize("edited", ["own", "helper", "base", "module"])
def test_a_judge_whose_code_is_another_is_another_judge(
    edited: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.2, then 0.8: of its class, of a function beside, of a base, or in another module."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for said in (0.2, 0.8):
        ours = "vlmrb_torchrl.scorers"
        parts = {"place": ours, "base": "ClipScorer", "helper": said, "own": "said()"}
        if edited == "own":
            parts.update(helper=0, own=said)
        name = f"judge_{said * 10:.0f}" if edited == "module" else "judge_of_today"
        (tmp_path / f"{name}.py").write_text(_SAID.format(**parts))
        if edited == "base":
            heir = "from judge_of_today import Judge as Base\nclass Judge(Base): pass\n"
            (tmp_path / "heir.py").write_text(heir)
        for module in (name, "heir"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        importlib.invalidate_caches()
        judge = importlib.import_module("heir" if edited == "base" else name).Judge()
        for _ in range(2):
            got = scores(CachedScorer(judge, tmp_path / "scores"), some_clips(1))
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    whole = _SAID.format(place="vlmrb_torchrl.scorers", base="ClipScorer", helper=0, own=0.5)
    for name in ("one_judge", "same_judge"):
        other = "class Other(ClipScorer): score = Judge.score"
        (tmp_path / f"{name}.py").write_text(f"{whole}\n{other}\n")
    one, same = (importlib.import_module(name) for name in ("one_judge", "same_judge"))
    judges = [one.Judge(), one.Other(), same.Judge()]
    assert len({judge.fingerprint for judge in judges}) == 3
    assert one.Judge().fingerprint == judges[0].fingerprint


def test_a_judge_in_a_script_is_the_same_in_the_processes_of_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is spawned imports the script that its parent ran as ``__main__`` anew."""
    script = tmp_path / "script.py"
    script.write_text(
        _SAID.format(place="vlmrb_torchrl.scorers", base="ClipScorer", helper=0, own=0.5)
    )
    known = set()
    for name in ("__main__", "__mp_main__"):
        spec = importlib.util.spec_from_file_location(name, script)
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


@pytest.mark.parametrize(
    "judge",
    [made_here(0.5), Reticent(), Opaque(), Both(Brightness(), made_here(0.5))],
    ids=lambda judge: type(judge).__name__,
)
def test_a_judge_that_another_could_pass_for_is_refused(judge: ClipScorer, tmp_path: Path) -> None:
    assert judge.fingerprint is None
    with pytest.raises(ValueError, match="cannot be cached: another judge could pass") as refusal:
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
    assert repr(scorer) == f"CachedScorer(scorer={judge!r})"


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
