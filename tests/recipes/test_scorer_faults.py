"""A judge that fails while DQN trains: learning goes on, nothing is lost, counters tell it."""

from __future__ import annotations

import logging
import os
import signal
import threading

import pytest
import torch

from recipes import off_policy
from recipes.dqn import DQN
from recipes.running import cli, run_state
from recipes.running.metrics import read_rows
from tests.scoring_doubles import Faulty, Yes
from vlmrb_torchrl import AsyncScorer, ClipRenderTransform
from vlmrb_torchrl.scorers import EmbeddedJudge, ScorerUnavailableError

SHORT = [
    "--env.size=5",
    "--env.max_steps=40",
    "--training.total_env_steps=512",
    "--training.warmup_env_steps=100",
    "--training.eval_every_env_steps=0",
    "--training.log_every_env_steps=256",
    "--training.strip_every_env_steps=0",
    "--training.checkpoint_every_env_steps=0",
    "--training.num_envs=4",
    "--training.progress=false",
    "--replay.capacity=2000",
    "--algorithm.hidden_features=[8]",
    "--scoring.mode=thread",
]
UPDATES = 52  # one in 8 of the 416 steps after the first collection beyond the warm-up
PATIENT = 60.0  # seconds; only a failing test waits as long


class Failing(Yes):
    """It fails as told: ``fail(call, clips)`` may raise, or answer instead."""

    def __init__(self, fail):
        super().__init__()
        self.fail, self.calls = fail, 0

    def score(self, tensordict):
        self.calls += 1
        answer = self.fail(self.calls, len(tensordict))
        return super().score(tensordict) if answer is None else answer


class Cramped(EmbeddedJudge):
    """The embedded judge, with memory for 3 clips."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def log_odds(self, clips, prompts):
        self.sizes.append(len(clips))
        if len(clips) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().log_odds(clips, prompts)


class Drained(AsyncScorer):
    """Scores what is pending before it closes, and keeps the books."""

    def __exit__(self, *error):
        assert self.drain(PATIENT, flush=True)
        self.books = self.statistics()
        super().__exit__(*error)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Train a short run with a judge; return the scorer's books."""

    def run(judge, on_submit=lambda env_steps, scoring: None, **options):
        made, updates, update = [], [], off_policy.update

        def build(buffer, task, settings, seed):
            scoring = Drained(
                buffer,
                ClipRenderTransform(task.renderer()),
                judge,
                **{
                    "clip_transitions": 8,
                    "frames_per_clip": 8,
                    "queue_clips": 2048,
                    "batch_clips": 8,
                    "backoff_s": (0.0, 0.0),
                    "mode": "thread",
                    **options,
                },
            )
            made.append(scoring)
            extend = scoring.extend

            def watched(data, kept):
                extend(data, kept)
                on_submit(int(scoring.statistics()["transitions_submitted"]), scoring)

            scoring.extend = watched
            return scoring

        def counted(*arguments):
            updates.append(None)
            update(*arguments)

        monkeypatch.setattr(run_state, "build_scoring", build)
        monkeypatch.setattr(off_policy, "update", counted)
        cli.run(DQN, [*SHORT, f"--training.log_dir={tmp_path}", "--training.name=run"])
        rows = [row for row in read_rows(tmp_path / "run") if "loss/value" in row]
        assert rows[-1]["env_steps"] == 512
        assert len(updates) == UPDATES, "an update was lost"
        (scoring,) = made
        return scoring.books

    return run


def faults(books):
    return {k.removeprefix("faults_"): v for k, v in books.items() if "faults" in k and v}


def all_scored(books):
    assert books["clips_submitted"] > 50
    assert books["clips_scored"] + books["clips_late"] == books["clips_submitted"]
    assert books["clips_dropped"] == books["clips_failed"] == books["clips_pending"] == 0


def raises(call, clips):
    raise ValueError("the third batch")


@pytest.mark.parametrize(
    ("fail", "told"),
    [
        (raises, "raised"),
        (lambda call, clips: torch.full((clips,), torch.nan), "invalid"),
        (lambda call, clips: torch.zeros(3, 1, 1), "invalid"),
    ],
    ids=["an error", "no numbers", "another shape"],
)
def test_batch_that_fails_once_is_scored_when_it_is_asked_again(fail, told, train, caplog):
    books = train(Failing(lambda call, clips: fail(call, clips) if call == 3 else None))
    all_scored(books)
    assert faults(books) == {told: 1}
    assert books["retries"] == 1
    assert "Learning goes on" in caplog.text


@pytest.mark.slow
def test_judge_whose_process_is_killed_scores_everything_in_the_next_one(train):
    killed = []

    def kill(env_steps, scoring):
        if env_steps >= 200 and not killed and scoring.worker_pid is not None:
            killed.append(scoring.worker_pid)
            os.kill(killed[0], signal.SIGKILL)

    books = train(Yes(), kill, mode="process", niceness=0)
    all_scored(books)
    assert len(killed) == 1
    assert faults(books) == {"died": 1}


@pytest.mark.slow
def test_judge_that_hangs_is_replaced_and_scores_everything(train, tmp_path):
    """Its process does not answer the third batch, is ended after its time, and another does."""
    judge = Faulty(["works", "works", "hangs"], tmp_path)
    books = train(judge, mode="process", timeout_s=2.0, niceness=0)
    all_scored(books)
    assert faults(books) == {"timeout": 1}


def test_queue_of_one_drops_what_it_cannot_hold_and_loses_no_update(train):
    books = train(Yes(), queue_clips=1, batch_clips=1)
    assert faults(books) == {}
    assert books["clips_submitted"] > 50
    assert books["clips_pending"] == books["clips_failed"] == 0
    done = books["clips_scored"] + books["clips_late"] + books["clips_dropped"]
    assert done == books["clips_submitted"]


def test_batch_that_never_gets_a_number_is_given_up_and_no_other(train):
    lost = []

    def fail(call, clips):
        if call in (3, 4):
            lost.append(clips)
            return torch.full((clips,), torch.nan)
        return None

    books = train(Failing(fail))
    assert faults(books) == {"invalid": 2}
    assert lost[0] == lost[1] == books["clips_failed"]
    assert books["clips_scored"] + books["clips_failed"] == books["clips_submitted"]


def test_out_of_memory_halves_the_batch_and_no_clip_is_lost(train, caplog):
    """Room for 3 of at most 8 clips: the batch becomes 4, then 2."""
    caplog.set_level(logging.WARNING)
    judge = Cramped()
    books = train(judge)
    all_scored(books)
    assert faults(books) == {}
    assert judge.batch_clips <= 3
    assert sum(size > 3 for size in judge.sizes) <= 2
    assert "ran out of memory" in caplog.text


def test_judge_that_is_down_for_half_the_run_scores_everything_when_it_is_back(train):
    """It answers once 300 of 512 transitions are in clips: what came before has waited."""
    up, refused = threading.Event(), []

    def fail(call, clips):
        if not up.is_set():
            refused.append(call)
            up.wait(0.01)  # a refused connection takes its time, too
            raise ScorerUnavailableError("connection refused")

    books = train(Failing(fail), lambda env_steps, _: env_steps >= 300 and up.set())
    all_scored(books)
    assert faults(books) == {"unavailable": len(refused)}
    assert refused
