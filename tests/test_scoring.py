"""Scoring beside the learner: right slots, nothing lost from the books, no fault gets through."""

import functools
import gc
import itertools
import logging
import math
import operator
import os
import pickle
import queue
import select
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, RandomSampler

from tests.recipes.resuming import assert_equal
from tests.scoring_doubles import (
    Brightness,
    Faulty,
    Foreign,
    Forked,
    Gate,
    Gated,
    NumberRenderer,
    ThirdIs,
    Yes,
)
from tests.streams import stream
from vlmrb_torchrl.buffer import VLMReplayBuffer
from vlmrb_torchrl.clips import ClipCutter
from vlmrb_torchrl.envs import DoorKeyEnv
from vlmrb_torchrl.renderers import ClipRenderTransform, MiniGridRenderer
from vlmrb_torchrl.samplers import VLMPrioritizedSampler
from vlmrb_torchrl.scorers import (
    ConstantScorer,
    EmbeddedJudge,
    NoisyScorer,
    PrivilegedScorer,
    RandomScorer,
)
from vlmrb_torchrl.scoring import AsyncScorer, choose_mode
from vlmrb_torchrl.scoring_worker import InPlaceWorker, ProcessWorker, ScorerError, judge

ROOT = Path(__file__).parent.parent
PATIENT = 60.0  # seconds; only a failing test waits as long


def make_buffer(capacity=64):
    return VLMReplayBuffer(
        storage=LazyTensorStorage(capacity),
        sampler=VLMPrioritizedSampler(capacity, threshold=None),
        batch_size=4,
    )


def make(buffer, scorer, mode, **settings):
    settings = {"clip_transitions": 4, "frames_per_clip": 2, "batch_clips": 1, **settings}
    settings = {"max_wait_s": 0.0, "backoff_s": (0.0, 0.0), "niceness": 0, **settings}
    return AsyncScorer(buffer, ClipRenderTransform(NumberRenderer()), scorer, mode=mode, **settings)


def insert(buffer, scoring, transitions):
    scoring.submit(transitions, buffer.extend(transitions))


def scores(buffer):
    """Score of each slot, -1 where there is none."""
    return buffer.sampler.state_dict()["_score"].tolist()


def books(scoring):
    """The statistics, after checking that every clip and transition is accounted for."""
    figures = scoring.statistics()
    for unit in ("clips", "transitions"):
        fates = [figures[f"{unit}_{fate}"] for fate in ("scored", "late", "dropped", "failed")]
        assert figures[f"{unit}_submitted"] == sum(fates) + figures[f"{unit}_pending"]
        assert min(fates) >= 0
        assert figures[f"{unit}_pending"] >= 0
    return figures


def judged(scorer, mode, transitions, **settings):
    """The score of each slot, and the statistics, once everything is scored or given up."""
    buffer = make_buffer()
    with make(buffer, scorer, mode, **settings) as scoring:
        insert(buffer, scoring, transitions)
        assert scoring.drain(PATIENT)
        return scores(buffer), books(scoring)


def vanishes(pid, timeout_s=PATIENT):
    """Whether process ``pid`` ends (or has ended) within the time."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], timeout_s)[0])
    finally:
        os.close(handle)


def children(pid):
    lists = Path(f"/proc/{pid}/task").glob("*/children")  # of each of its threads
    return [int(child) for some in lists for child in some.read_text().split()]


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """Worker processes start at once."""
    monkeypatch.setattr("vlmrb_torchrl.scoring_worker.Popen", Forked)


@pytest.fixture
def gate(tmp_path):
    gate = Gate(tmp_path)
    yield gate
    gate.release(1000)  # threads that a test left behind


# ---------------------------------------------------------------- the right slots


@pytest.mark.parametrize("mode", ["sync", "thread", "process"])
def test_every_transition_gets_the_score_of_its_clip(mode, monkeypatch):
    """Clips of 4: the last outcome of clip c is state 4c + 4, its grey level the score."""
    monkeypatch.setattr("vlmrb_torchrl.scoring_worker.Popen", subprocess.Popen)  # a real one, once
    found, figures = judged(Brightness(), mode, stream([10, 10]), batch_clips=3)
    last = [4] * 4 + [8] * 4 + [10] * 2 + [14] * 4 + [18] * 4 + [20] * 2
    assert found[:20] == pytest.approx([state / 255 for state in last])
    assert found[20:] == [-1] * 44
    assert figures["clips_submitted"] == figures["clips_scored"] == 6
    assert figures["transitions_submitted"] == figures["transitions_scored"] == 20
    assert figures["clips_positive"] == 0


def test_overlapping_clips_leave_the_greatest_score():
    """Clips of 4 every 2: transition k lies in two clips, the later one is brighter."""
    found, _ = judged(Brightness(), "sync", stream([8]), stride=2)
    assert found[:8] == pytest.approx([state / 255 for state in (4, 4, 6, 6, 8, 8, 8, 8)])


@pytest.mark.parametrize("mode", ["thread", "process"])
@pytest.mark.parametrize("written", [6, 12])
def test_score_of_overwritten_slot_is_dropped(written, mode, gate):
    """Ring of 8: the clip of slots 0 to 3 is being judged while 6 (or 12) transitions come in, to
    slots 4 to 7, 0 and 1 (and 2 and 3, ...), which are never submitted. As a whole it is late."""
    buffer = make_buffer(8)
    with make(buffer, Gated(gate), mode) as scoring:
        insert(buffer, scoring, stream([4]))
        gate.await_arrival()
        buffer.extend(stream([written], start=100))
        gate.release()
        assert scoring.drain(PATIENT)
        figures = books(scoring)
    left = 2 if written == 6 else 0
    assert scores(buffer) == [-1, -1, *[1] * left, *[-1] * (6 - left)]
    assert (figures["clips_scored"], figures["clips_late"]) == ((1, 0) if left else (0, 1))
    assert (figures["transitions_scored"], figures["transitions_late"]) == (left, 4 - left)


def test_a_batch_longer_than_the_ring_scores_only_what_is_left_of_it():
    """Transitions 0 to 11 in a ring of 8: slots 0 to 3 hold 8 to 11, and 4 to 7 are themselves."""
    for locked in (False, True):  # a locked batch gets no stamps from the buffer
        buffer = make_buffer(8)
        transitions = stream([12])
        with make(buffer, Brightness(), "sync") as scoring:
            insert(buffer, scoring, transitions.lock_() if locked else transitions)
            figures = books(scoring)
        assert scores(buffer) == pytest.approx([12 / 255] * 4 + [8 / 255] * 4)
        assert figures["clips_late"] == 1


def test_rows_of_environments_go_with_their_flattened_slots():
    buffer = make_buffer()
    rows = torch.stack([stream([4]), stream([4], start=50)])
    with make(buffer, Brightness(), "sync") as scoring:
        scoring.submit(rows, buffer.extend(rows.reshape(-1)))
    assert scores(buffer)[:8] == pytest.approx([4 / 255] * 4 + [54 / 255] * 4)


@pytest.mark.parametrize("mode", ["sync", "thread", "process"])
def test_doorkey_end_to_end_no_score_on_a_wrong_transition(mode):
    """A ring that is overwritten four times: a slot's score is whether its clip holds the event.

    Truth is taken from the stream itself: the clips of each trajectory, 8 transitions each.
    """
    torch.manual_seed(0)  # of the actions: a key is picked up in some of the last clips
    N, T, batches, capacity, clip = 4, 8, 14, 100, 8
    env = DoorKeyEnv(5, N, max_steps=21, seed=1)
    collector = Collector(env, frames_per_batch=N * T, total_frames=N * T * batches)
    buffer = make_buffer(capacity)
    scorer = PrivilegedScorer(env.event_names, events=("key",))
    trajectories, holder = {}, {}
    with make(buffer, scorer, mode, clip_transitions=clip, queue_clips=10_000) as scoring:
        assert scoring.wait_until_ready(PATIENT)
        for data in collector:
            batch = data.reshape(-1)
            index = buffer.extend(batch)
            scoring.submit(batch, index)
            event = batch["next", "events"][:, env.event_names.index("key")].tolist()
            ids = batch["collector", "traj_ids"].tolist()
            for slot, trajectory, happened in zip(index.tolist(), ids, event, strict=True):
                trajectories.setdefault(trajectory, []).append(happened)
                holder[slot] = (trajectory, len(trajectories[trajectory]) - 1)
        assert scoring.drain(PATIENT, flush=True)
        figures = books(scoring)
    collector.shutdown()
    expected = []
    for slot in range(capacity):
        trajectory, position = holder[slot]
        start = position // clip * clip
        expected.append(float(any(trajectories[trajectory][start : start + clip])))
    assert scores(buffer) == expected
    assert 0 < sum(expected) < capacity
    assert figures["transitions_submitted"] == N * T * batches
    assert figures["clips_dropped"] == figures["clips_failed"] == 0


def test_threads_that_insert_and_score_side_by_side_never_mix_up_a_slot():
    """Three learners in a ring of 64, written over 45 times; every tenth batch fails.

    The first batch is held back for half of a learner's transitions, far more than the ring.

    Transition k of the stream lies in the clip whose last outcome is 4 (k // 4) + 4: whatever a
    slot holds at the end, its score must be that outcome's grey level or missing.
    """
    buffer = make_buffer(64)
    calls = itertools.count(1)
    half_time = threading.Event()

    class SometimesFails(Brightness):
        def score(self, tensordict):
            assert half_time.wait(PATIENT)
            if next(calls) % 10 == 0:
                raise RuntimeError
            return super().score(tensordict)

    def learn(number):
        for batch in range(30):
            start = 4 * 10_000 * number + 32 * batch
            insert(buffer, scoring, stream([8, 4, 20], start=start, ids=[3 * number] * 3))
            if batch == 15:
                half_time.set()

    with make(buffer, SometimesFails(), "thread", queue_clips=20, batch_clips=4) as scoring:
        learners = [threading.Thread(target=learn, args=(number,)) for number in range(3)]
        for learner in learners:
            learner.start()
        for learner in learners:
            learner.join()
        assert scoring.drain(PATIENT)
        figures = books(scoring)
    assert figures["transitions_submitted"] == 3 * 30 * 32
    assert figures["transitions_late"] > 0
    states = buffer[:]["next", "render_state"][:, 0]
    expected = (((states - 1) // 4 * 4 + 4) % 256 / 255).tolist()
    found = scores(buffer)
    assert sum(score >= 0 for score in found) > 0
    wrong = [(f, e) for f, e in zip(found, expected, strict=True) if f >= 0 and abs(f - e) > 1e-6]
    assert wrong == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_a_thread_scores_in_a_stream_of_its_own():
    streams = []

    class OnGPU(Brightness):
        device = torch.device("cuda", 0)

        def score(self, tensordict):
            assert tensordict["clip"].device == self.device
            streams.append(torch.cuda.current_stream(self.device))
            return super().score(tensordict)

    buffer = make_buffer()
    with make(buffer, OnGPU(), "thread") as scoring:
        insert(buffer, scoring, stream([4, 4]))
        assert scoring.drain(PATIENT)
    assert scores(buffer)[:8] == pytest.approx([4 / 255] * 4 + [8 / 255] * 4)
    assert torch.cuda.default_stream() not in streams


# ---------------------------------------------------------------- the queue


@pytest.mark.parametrize("mode", ["thread", "process"])
def test_a_full_queue_drops_the_oldest_and_submit_waits_for_nothing(mode, gate):
    """Queue of one: clip 0 is being judged, 1 to 3 come; 3 is left of them."""
    buffer = make_buffer()
    with make(buffer, Gated(gate), mode, queue_clips=1) as scoring:
        insert(buffer, scoring, stream([4]))
        gate.await_arrival()
        insert(buffer, scoring, stream([4, 4, 4], start=4))
        assert books(scoring)["clips_pending"] == 2
        assert not scoring.drain(0.0)
        gate.release(2)
        assert scoring.drain(PATIENT)
        figures = books(scoring)
    assert scores(buffer)[:16] == [1] * 4 + [-1] * 8 + [1] * 4
    assert figures["clips_dropped"] == 2
    assert figures["transitions_dropped"] == 8
    assert figures["clips_scored"] == 2


def test_a_batch_takes_what_waits_up_to_its_size_or_waits_to_fill_but_not_in_a_drain(gate):
    """8 clips wait behind the first: batches of 3, 3 and 2 after that of 1."""
    sizes = queue.SimpleQueue()

    def told(batches):
        return [sizes.get(timeout=PATIENT) for _ in range(batches)]

    class Sizes(Gated):
        def score(self, tensordict):
            sizes.put(tensordict.shape[0])
            return super().score(tensordict)

    buffer = make_buffer()
    with make(buffer, Sizes(gate), "thread", batch_clips=3) as scoring:
        insert(buffer, scoring, stream([4]))
        gate.await_arrival()
        insert(buffer, scoring, stream([4] * 8, start=4))
        gate.release(1000)
        assert told(4) == [1, 3, 3, 2]
    with make(buffer, Sizes(gate), "thread", batch_clips=5, max_wait_s=3600.0) as scoring:
        insert(buffer, scoring, stream([4]))
        assert books(scoring)["clips_pending"] == 1
        assert scoring.drain(PATIENT)
        insert(buffer, scoring, stream([4] * 4, start=4))
        assert books(scoring)["clips_pending"] == 4
        insert(buffer, scoring, stream([4], start=20))  # the fifth fills the batch
        assert told(2) == [1, 5]
    with make(buffer, Sizes(gate), "thread", batch_clips=5, max_wait_s=0.02) as scoring:
        insert(buffer, scoring, stream([4]))
        assert told(1) == [1]


def test_drain_with_flush_scores_the_open_clips():
    buffer = make_buffer()
    with make(buffer, Yes(), "thread") as scoring:
        insert(buffer, scoring, stream([6], open_end=True))
        assert scoring.drain(PATIENT)
        assert scores(buffer)[:6] == [1] * 4 + [-1] * 2
        assert books(scoring)["transitions_open"] == 2
        assert scoring.drain(PATIENT, flush=True)
        assert scores(buffer)[:6] == [1] * 6
        assert books(scoring)["transitions_open"] == 0


def test_latency_counts_what_was_inserted_between_a_clips_end_and_its_score(gate):
    """The clip ends with transition 4; 3 + 5 more come before its score."""
    buffer = make_buffer()
    with make(buffer, Gated(gate), "thread") as scoring:
        insert(buffer, scoring, stream([4, 3], open_end=True))
        gate.await_arrival()
        insert(buffer, scoring, stream([4], open_end=True, start=50, ids=[9])[:1])
        insert(buffer, scoring, stream([2, 2], open_end=True, start=60, ids=[10, 11]))
        gate.release(2)
        assert scoring.drain(PATIENT)
        figures = books(scoring)
    # the second clip, of the ended trajectory 10, was complete at transition 10 of 12
    assert figures["clips_scored"] == 2
    assert figures["latency_env_steps"] == pytest.approx(((12 - 4) + (12 - 10)) / 2)
    assert figures["latency_s"] > 0
    assert figures["clips_per_s"] > 0


# ---------------------------------------------------------------- controls: late, and not at all


@pytest.mark.parametrize("mode", ["sync", "thread"])
@pytest.mark.parametrize("delay", [0, 1, 5, 8])
def test_a_delayed_clip_is_scored_as_soon_as_that_many_transitions_came_after_its_end(delay, mode):
    """Clips of 4, transition by transition: after t of them those that end by t - delay."""
    buffer, whole = make_buffer(), stream([17], open_end=True)
    with make(buffer, Yes(), mode, delay_env_steps=delay) as scoring:
        for t in range(1, 17):
            insert(buffer, scoring, whole[t - 1 : t])
            assert scoring.drain(PATIENT)
            done = max(t - delay, 0) // 4
            assert scores(buffer)[:t] == ([1] * 4 * done + [-1] * t)[:t]
            figures = books(scoring)
            assert figures["clips_pending"] == t // 4 - done
            assert figures["latency_env_steps"] == (delay if done else 0)
    assert books(scoring)["clips_dropped"] == figures["clips_pending"]


def test_scores_that_are_delayed_for_longer_than_the_ring_is_long_are_all_late():
    buffer = make_buffer(8)
    with make(buffer, Yes(), "sync", delay_env_steps=8) as scoring:
        for start in range(0, 64, 4):
            insert(buffer, scoring, stream([4], start=start))
        assert set(scores(buffer)) == {-1}
        assert (books(scoring)["clips_late"], books(scoring)["clips_pending"]) == (14, 2)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_dropped_share_is_dropped_by_the_seed_and_has_no_score(share):
    """2,000 clips: within 4.5 standard errors."""

    def dropped(seed):
        buffer, settings = make_buffer(2000), {"clip_transitions": 1, "batch_clips": 1000}
        with make(buffer, Yes(), "sync", dropped_share=share, seed=seed, **settings) as scoring:
            for start in (0, 1000):
                insert(buffer, scoring, stream([1000], start=start))
            figures = books(scoring)
        assert figures["clips_scored"] + figures["clips_dropped"] == 2000
        return [score == -1 for score in scores(buffer)]

    first = dropped(seed=7)
    assert abs(sum(first) / 2000 - share) <= 4.5 * math.sqrt(share * (1 - share) / 2000)
    assert dropped(seed=7) == first
    assert (dropped(seed=8) != first) == (0 < share < 1)


# ---------------------------------------------------------------- faults


FAULTS = {
    "raises": "raised",
    "answers NaN": "invalid",
    "answers 2": "invalid",
    "answers one too many": "invalid",
    "leaves": "raised",
    "is unavailable": "unavailable",  # where learning would wait: elsewhere its batch does
    "hangs": "timeout",
    "breaks its GPU": "died",
    "exits": "died",
}


def cut(transitions, slots):
    slots = torch.tensor(slots)
    return ClipCutter(4, 2).cut(transitions, slots, torch.zeros_like(slots))


def faults(figures):
    return {k.removeprefix("faults_"): v for k, v in figures.items() if "faults" in k and v}


@pytest.mark.parametrize(
    ("how", "mode"),
    [
        (how, mode)
        for how in FAULTS
        for mode in ("sync", "thread")
        if how not in ("exits", "hangs")  # none survives
        and (how, mode) not in [("leaves", "sync"), ("is unavailable", "thread")]
    ],
)
def test_a_fault_is_counted_logged_once_retried_and_survived(how, mode, tmp_path, caplog):
    """Three bad calls: the first batch fails twice and is given up, the second is saved by its
    retry, the third meets a sound scorer."""
    caplog.set_level(logging.WARNING)
    found, figures = judged(Faulty([how] * 3, tmp_path), mode, stream([4, 4, 4]))
    assert found[:12] == [-1] * 4 + [1] * 8
    assert (figures["clips_failed"], figures["clips_scored"]) == (1, 2)
    assert figures["retries"] == 2
    assert faults(figures) == {FAULTS[how]: 3}
    fault, silence = (record.message for record in caplog.records)
    assert "Learning goes on" in fault
    assert "\n" not in fault
    assert "no clip has a score yet" in silence


@pytest.mark.parametrize("mode", ["sync", "thread"])
def test_clips_that_fit_into_no_batch_are_asked_about_one_by_one(mode):
    """The states of the second are of another shape: nothing of that is the scorer's fault."""
    buffer, other = make_buffer(), stream([4], start=4)
    for states in (other, other["next"]):
        states["render_state"] = states["render_state"].expand(4, 2)
    with make(buffer, Yes(), mode, batch_clips=2, max_wait_s=3600.0) as scoring:
        scoring._queue.put(cut(stream([4]), range(4)) + cut(other, range(4, 8)), 8)
        assert scoring.drain(PATIENT)
        figures = books(scoring)
    assert faults(figures) == {"raised": 1}
    assert figures["clips_scored"] + figures["clips_late"] == 2


@pytest.mark.parametrize("mode", ["sync", "thread", "process"])
@pytest.mark.parametrize("answer", [math.nan, 1.7, math.inf, None], ids=str)
def test_a_clip_without_a_score_costs_the_others_nothing(answer, mode, tmp_path):
    """Of 16 clips the third gets no score: asked once more, alone, it alone fails.

    A scorer that raises (None) does not say about which: then each is asked about alone. Pauses
    are for scorers that answer nothing; one here of an hour would be noticed.
    """
    pause, scorer = 0.0 if answer is None else 3600.0, ThirdIs(answer, tmp_path)
    settings = {"batch_clips": 16, "max_wait_s": 3600.0, "backoff_s": (pause, pause)}
    found, figures = judged(scorer, mode, stream([4] * 16), **settings)
    assert [score >= 0 for score in found] == [True] * 8 + [False] * 4 + [True] * 52
    assert (figures["clips_scored"], figures["clips_failed"]) == (15, 1)
    assert figures["transitions_failed"] == 4
    assert faults(figures) == {"raised" if answer is None else "invalid": 2}
    alone = [1] * 16 if answer is None else [1]
    assert [int(size) for size in scorer.log.read_text().split()] == [16, *alone]


def test_what_a_judge_behind_the_scorer_answered_is_not_taken_for_its_own_answer(tmp_path):
    """Its own is the inverse; that of the third clip is none."""

    class Inverse(Brightness):
        def score(self, tensordict):
            return 1 - ThirdIs(1.7, tmp_path)(tensordict)["score"]

    found, figures = judged(Inverse(), "sync", stream([4] * 4), batch_clips=16)
    assert figures["clips_failed"] == 1
    assert found[8:12] == [-1] * 4
    known = [1 - state / 255 for state in (4, 8, 16) for _ in range(4)]
    assert found[:8] + found[12:16] == pytest.approx(known)


@pytest.mark.parametrize("mode", ["thread", "process"])
def test_while_a_scorer_is_unavailable_its_batch_waits_and_nothing_is_given_up(mode, tmp_path):
    """Seven refusals in a row, more than the two tries that any other fault gets."""
    found, figures = judged(Faulty(["is unavailable"] * 7, tmp_path), mode, stream([4, 4, 4]))
    assert found[:12] == [1] * 12
    assert figures["clips_scored"] == 3
    assert figures["retries"] == 7
    assert faults(figures) == {"unavailable": 7}


def test_a_process_survives_every_fault_or_is_replaced(tmp_path, caplog):
    """Every batch is saved by its retry but the last, whose process exits twice."""
    caplog.set_level(logging.WARNING)
    survived = ["raises", "answers NaN", "answers 2", "answers one too many", "hangs"]
    survived.append("breaks its GPU")
    script = [step for how in survived for step in (how, "works")] + ["exits"] * 2
    found, figures = judged(Faulty(script, tmp_path), "process", stream([4] * 7), timeout_s=0.5)
    assert found[:28] == [1] * 24 + [-1] * 4
    assert figures["retries"] == 7
    assert faults(figures) == {"raised": 1, "invalid": 3, "timeout": 1, "died": 3}
    assert "launch failure" in caplog.text
    assert len(caplog.records) == 4


def test_a_process_whose_gpu_failed_is_replaced(tmp_path):
    """What a GPU's fault leaves in a process runs no kernel any more."""
    script = ["works", "breaks its GPU", "works"]
    buffer, pids = make_buffer(), []
    with make(buffer, Faulty(script, tmp_path), "process") as scoring:
        for start in (0, 4):
            insert(buffer, scoring, stream([4], start=start))
            assert scoring.drain(PATIENT)
            pids.append(scoring.worker_pid)
    assert scores(buffer)[:8] == [1] * 8
    assert pids[0] != pids[1]
    assert vanishes(pids[0])


def test_a_judge_on_cuda_begins_with_the_gpu_in_its_own_process_alone(monkeypatch, caplog):
    """A learner that had begun with it would hold memory there, and could not be forked."""
    begun = []  # of this process: the judge's has a copy

    def begin():
        begun.append(True)
        raise RuntimeError("it begins")

    monkeypatch.setattr(torch.cuda, "_lazy_init", begin)
    buffer = make_buffer()
    with make(buffer, EmbeddedJudge(device="cuda"), "auto") as scoring:
        insert(buffer, scoring, stream([4]))
        assert not scoring.wait_until_ready(PATIENT)
        scoring.state_dict(), scoring.showcase(), books(scoring)
    assert begun == []
    assert "loading the scorer failed: RuntimeError: it begins" in caplog.text


def test_a_model_in_a_process_scores_as_in_a_thread():
    """The embedded judge, from the render states on, which alone go there."""
    env, found = DoorKeyEnv(6, 2, seed=1), {}
    data = env.rollout(32, break_when_any_done=False).reshape(-1)
    for mode in ("thread", "process"):
        buffer = make_buffer()
        transform = ClipRenderTransform(MiniGridRenderer(8, window=8))
        with AsyncScorer(buffer, transform, EmbeddedJudge(), clip_transitions=8, mode=mode) as it:
            it.extend(data)
            assert it.drain(PATIENT, flush=True)
            assert faults(books(it)) == {}
        found[mode] = scores(buffer)
    assert min(found["thread"]) >= 0
    assert found["process"] == pytest.approx(found["thread"], abs=1e-6)


@pytest.mark.parametrize("mode", ["sync", "thread", "process"])
def test_a_scorer_that_does_not_load_is_a_fault_like_another(mode, tmp_path, caplog):
    buffer = make_buffer()
    scorer = Faulty(["raises"] * 2, tmp_path, in_load=True)
    with make(buffer, scorer, mode) as scoring:
        assert not scoring.wait_until_ready(PATIENT)
        insert(buffer, scoring, stream([4, 4]))
        assert scoring.drain(PATIENT)
        assert scoring.wait_until_ready(PATIENT)
        figures = books(scoring)
    assert figures["faults_raised"] == 2
    assert figures["clips_scored"] == 2
    assert "loading the scorer failed: RuntimeError: no luck" in caplog.text


def test_a_process_that_does_not_start_in_time_is_not_ready_and_is_replaced(tmp_path):
    """The first hangs while it loads the scorer."""
    buffer, scorer = make_buffer(), Faulty(["hangs"], tmp_path, in_load=True)
    with make(buffer, scorer, "process", start_timeout_s=0.3) as scoring:
        assert not scoring.wait_until_ready()
        scoring._worker.start_timeout_s = PATIENT
        insert(buffer, scoring, stream([4]))
        assert scoring.drain(PATIENT)
        assert scoring.wait_until_ready()
        figures = books(scoring)
    assert faults(figures) == {"timeout": 1}
    assert figures["clips_scored"] == 1


def test_a_thread_that_is_late_is_told_once_never_doubled_and_its_answer_taken(gate, caplog):
    """Every call is later than its limit of a nanosecond, as is loading, at the gate, too."""
    caplog.set_level(logging.WARNING)
    entered = threading.Lock()

    class Late(Gated):
        def load(self):
            self.gate.pass_through()

        def score(self, tensordict):
            assert entered.acquire(blocking=False), "two threads in one scorer"
            score = super().score(tensordict)
            entered.release()
            return score

    buffer, limit = make_buffer(), {"timeout_s": 1e-9, "start_timeout_s": 1e-9}
    with make(buffer, Late(gate), "thread", queue_clips=1, **limit) as scoring:
        gate.await_arrival()
        assert not scoring.wait_until_ready(0.0)
        assert faults(books(scoring)) == {"timeout": 1}
        gate.release()
        assert scoring.wait_until_ready(PATIENT)
        insert(buffer, scoring, stream([4]))
        gate.await_arrival()
        insert(buffer, scoring, stream([4, 4], start=4))  # the queue holds one of them
        assert not scoring.drain(0.0)
        figures = books(scoring)
        assert faults(figures) == {"timeout": 2}
        assert (figures["clips_pending"], figures["clips_dropped"]) == (2, 1)
        gate.release(2)
        assert scoring.drain(PATIENT)
        figures = books(scoring)
    assert scores(buffer)[:12] == [1] * 4 + [-1] * 4 + [1] * 4
    assert figures["clips_scored"] == 2
    assert figures["retries"] == 0
    (record,) = caplog.records
    assert "no answer within 1e-09 s; a thread cannot be ended" in record.message


def test_loading_and_the_first_batch_have_a_limit_of_their_own():
    """An hour for them, a nanosecond for every batch after."""

    class Asks(Yes):
        def load(self):
            said.append(backend.overdue())

        def score(self, tensordict):
            said.append(backend.overdue())
            return super().score(tensordict)

    said, clips = [], TensorDict({}, [1])
    limits = {"timeout_s": 1e-9, "start_timeout_s": 3600.0}
    backend = InPlaceWorker(None, Asks(), own_stream=False, **limits)
    for _ in range(3):
        backend.score(clips)
    assert [bool(text) for text in said] == [False, False, True, True]
    assert backend.overdue() == ""


def test_a_process_has_the_time_of_a_start_for_its_first_batch_too(monkeypatch):
    limits = []
    backend = ProcessWorker(None, Yes(), timeout_s=1.0, start_timeout_s=7.0, niceness=0, threads=1)

    def exchange(timeout_s, *messages):
        limits.append(timeout_s)
        return np.ones(1)

    monkeypatch.setattr("vlmrb_torchrl.scoring_worker.Popen", lambda *_, **__: None)
    monkeypatch.setattr(backend, "_exchange", exchange)
    for gone in (False, True, False):  # after four batches
        for _ in range(2):
            backend.score(TensorDict({}, [1]))
        if gone:
            backend._end()
    assert limits == [7, 7, 1, 1, 1, 7, 7, 1]


def test_a_stopped_process_is_replaced_although_a_batch_fills_its_pipe(monkeypatch):
    monkeypatch.setattr("vlmrb_torchrl.scoring_worker._EXIT_SECONDS", 0.1)
    clips = TensorDict({"render_state": torch.zeros(2, 1 << 18)}, [2])
    limits = {"timeout_s": 0.5, "start_timeout_s": PATIENT}
    backend = ProcessWorker(None, Yes(), niceness=0, threads=1, **limits)
    for _ in range(2):  # the first batch has the time of a start
        assert backend.score(clips).tolist() == [1, 1]
    stopped = backend.pid
    os.kill(stopped, signal.SIGSTOP)
    with pytest.raises(ScorerError, match=r"no answer within 0\.5 s; its process") as refusal:
        backend.score(clips)
    assert refusal.value.kind == "timeout"
    assert vanishes(stopped)
    assert backend.score(clips).tolist() == [1, 1]
    backend.abort()


def test_the_pause_doubles_from_fault_to_fault_up_to_its_longest(tmp_path, monkeypatch):
    pauses = []
    buffer = make_buffer()
    scoring = make(buffer, Faulty(["raises"] * 5, tmp_path), "thread", backoff_s=(0.25, 1.0))
    wait_for = scoring._queue.changed.wait_for

    def skip(predicate, timeout=None):
        if timeout is not None and timeout < PATIENT:
            pauses.append(timeout)
            return predicate()
        return wait_for(predicate, timeout)

    monkeypatch.setattr(scoring._queue.changed, "wait_for", skip)
    with scoring:
        insert(buffer, scoring, stream([4] * 4))
        assert scoring.drain(PATIENT)
    assert pauses == [0.25, 0.5, 1.0, 1.0, 1.0]


def test_a_scorer_rests_until_its_share_of_the_time_is_kept(monkeypatch):
    """A quarter of the time: after a batch of t seconds come 3 t of rest."""
    clock = itertools.count()  # each look at the clock is a second later
    rests = []
    buffer = make_buffer()
    scoring = make(buffer, Yes(), "thread", duty_cycle=0.25, batch_clips=2, max_wait_s=3600.0)
    dispatcher = scoring._queue
    assert scoring.wait_until_ready(PATIENT)
    rested = threading.Event()
    wait_for = dispatcher.changed.wait_for

    def rest(predicate, timeout=None):
        if threading.current_thread() is not dispatcher._thread:
            return wait_for(predicate, timeout)
        rests.append(timeout)
        rested.set()
        return True

    monkeypatch.setattr(dispatcher.changed, "wait_for", rest)
    with scoring:
        monkeypatch.setattr("vlmrb_torchrl.scoring.time.monotonic", clock.__next__)
        insert(buffer, scoring, stream([8]))
        assert rested.wait(PATIENT)
        monkeypatch.undo()
    (seconds,) = rests
    assert seconds > 0
    assert seconds % 3 == 0


@pytest.mark.parametrize("how", ["raises", "is unavailable"])
def test_a_pause_ends_when_the_scorer_is_closed_and_the_books_balance(how, tmp_path):
    buffer = make_buffer()
    scoring = make(buffer, Faulty([how] * 9, tmp_path), "thread", backoff_s=(3600.0, 3600.0))
    insert(buffer, scoring, stream([4, 4]))
    assert not scoring.drain(0.05)
    scoring.close()
    assert not scoring._queue._thread.is_alive()
    assert books(scoring)["clips_dropped"] == 2


@pytest.mark.parametrize("mode", ["sync", "thread"])
def test_a_buffer_that_refuses_a_write_is_a_fault_too(mode, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    buffer = make_buffer()
    with make(buffer, Yes(), mode) as scoring:
        with monkeypatch.context() as patch:
            patch.setattr(buffer, "write_scores", lambda *_: 1 / 0)
            insert(buffer, scoring, stream([4, 4]))
            assert scoring.drain(PATIENT)
        insert(buffer, scoring, stream([4], start=8))
        assert scoring.drain(PATIENT)
        figures = books(scoring)
    assert figures["faults_write"] == 2
    assert figures["clips_failed"] == 2
    assert figures["clips_scored"] == 1
    assert [record.name for record in caplog.records] == ["vlmrb_torchrl.scoring"]


def test_a_scorer_that_checks_nothing_is_checked():
    buffer = make_buffer()
    for answer, invalid in ((0.25, 0), (7.0, 2)):
        with make(buffer, Foreign(answer), "sync") as scoring:
            insert(buffer, scoring, stream([4]))
            assert books(scoring)["faults_invalid"] == invalid
    assert scores(buffer)[:8] == [0.25] * 4 + [-1] * 4


def test_signals_and_forks_leave_the_worker_alone_and_a_killed_one_is_replaced():
    """Ctrl-C of a terminal reaches the worker, too. A forked child (of a ParallelEnv, say) that
    collects its copy of the scorer must not end what is its parent's."""
    buffer = make_buffer()
    with make(buffer, Yes(), "process") as scoring:
        assert scoring.wait_until_ready(PATIENT)
        pid = scoring.worker_pid
        os.kill(pid, signal.SIGINT)
        child = os.fork()
        if child == 0:
            scoring.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        insert(buffer, scoring, stream([4]))
        assert scoring.drain(PATIENT)
        assert scoring.worker_pid == pid
        assert faults(books(scoring)) == {}
        os.kill(pid, signal.SIGKILL)
        insert(buffer, scoring, stream([4], start=4))
        assert scoring.drain(PATIENT)
        assert faults(books(scoring)) == {"died": 1}
    assert scores(buffer)[:8] == [1] * 8


# ---------------------------------------------------------------- the end


@pytest.mark.parametrize("mode", ["sync", "thread"])
def test_close_may_come_twice_and_what_comes_after_it_is_dropped_or_refused(mode):
    buffer = make_buffer()
    scoring = make(buffer, Yes(), mode)
    insert(buffer, scoring, stream([2], open_end=True))
    scoring.close()
    scoring.close()
    scoring.flush()
    assert books(scoring)["clips_dropped"] == 1
    with pytest.raises(RuntimeError, match="closed; make a new one"):
        insert(buffer, scoring, stream([4]))
    assert scoring.drain(PATIENT)


@pytest.mark.parametrize("mode", ["thread", "process"])
def test_closing_in_the_middle_of_a_batch_leaves_no_worker_and_balanced_books(
    mode, gate, monkeypatch
):
    """A thread that sits in its scorer cannot be ended: it ends, and writes nothing, once back."""
    if mode == "thread":
        monkeypatch.setattr("vlmrb_torchrl.scoring._END_SECONDS", 0.01)
    buffer = make_buffer()
    scoring = make(buffer, Gated(gate), mode)
    insert(buffer, scoring, stream([4, 4]))
    gate.await_arrival()
    pid = scoring.worker_pid
    with pytest.raises(ZeroDivisionError), scoring:
        raise ZeroDivisionError
    assert books(scoring)["clips_dropped"] == 2
    assert scoring._queue._thread.is_alive() == (mode == "thread")
    gate.release()
    scoring._queue._thread.join(PATIENT)
    assert (pid is None) == (mode == "thread")
    assert pid is None or vanishes(pid)
    assert scoring.worker_pid is None
    figures = books(scoring)
    assert figures["clips_dropped"] == 2
    assert figures["clips_pending"] == 0
    assert scores(buffer) == [-1] * 64


def test_closing_while_scores_are_written_counts_no_clip_twice(monkeypatch):
    monkeypatch.setattr("vlmrb_torchrl.scoring._END_SECONDS", 0.01)
    buffer, writes, may = make_buffer(), threading.Event(), threading.Event()
    write = buffer.write_scores

    def held(*arguments):
        writes.set()
        assert may.wait(PATIENT)
        return write(*arguments)

    monkeypatch.setattr(buffer, "write_scores", held)
    scoring = make(buffer, Yes(), "thread")
    insert(buffer, scoring, stream([4]))
    assert writes.wait(PATIENT)
    scoring.close()
    may.set()
    scoring._queue._thread.join(PATIENT)
    figures = books(scoring)
    assert (figures["clips_submitted"], figures["clips_dropped"]) == (1, 1)


def test_a_forgotten_scorer_ends_its_worker(gate):
    buffer = make_buffer()
    scoring = make(buffer, Gated(gate), "process")
    insert(buffer, scoring, stream([4]))
    gate.await_arrival()
    pid, thread = scoring.worker_pid, scoring._queue._thread
    del scoring
    gc.collect()
    assert vanishes(pid)
    thread.join(PATIENT)
    assert not thread.is_alive()


@pytest.mark.parametrize("ready", [False, True], ids=["still_starting", "ready"])
def test_a_closed_scorer_has_no_worker(ready):
    scoring = make(make_buffer(), Yes(), "process")
    if ready:
        assert scoring.wait_until_ready(PATIENT)
    scoring.close()
    scoring._queue._thread.join(PATIENT)  # on a busy machine it ends after the close
    assert not scoring._queue._thread.is_alive()
    assert scoring.worker_pid is None


def test_no_worker_outlives_a_learner_that_is_killed(gate, monkeypatch):
    """The worker sits in its scorer, which never comes back."""
    monkeypatch.setattr("vlmrb_torchrl.scoring_worker._WATCH_SECONDS", 0.02)
    told, tell = os.pipe()
    learner = os.fork()
    if learner == 0:
        try:
            buffer = make_buffer()
            scoring = make(buffer, Gated(gate), "process")
            insert(buffer, scoring, stream([4]))
            gate.await_arrival()
            os.write(tell, str(scoring.worker_pid).encode())
            signal.pause()
        finally:
            os._exit(1)
    os.close(tell)
    pid = int(os.read(told, 20))
    os.kill(learner, signal.SIGKILL)
    assert vanishes(pid)
    assert os.waitpid(learner, 0)[1] == signal.SIGKILL
    os.close(told)


HEAD = """
import pickle, sys
sys.path.insert(0, {root!r})
import torch
from tests.scoring_doubles import Gated, Yes
from tests.streams import stream
from tests.test_scoring import insert, make, make_buffer, scores
from vlmrb_torchrl.scorers import ClipScorer

def score(scorer):
    buffer = make_buffer()
    with make(buffer, scorer, "process") as scoring:
        insert(buffer, scoring, stream([4]))
        assert scoring.drain(60)
        return scores(buffer)[:4]

class Mine(ClipScorer):
    def score(self, tensordict):
        return torch.full((tensordict.shape[0],), 0.5)

"""
SCRIPTS = {
    "without a main guard it works and is not run again": (
        "print('run', *score(Yes()))",
        "run 1.0 1.0 1.0 1.0\n",
        "",
    ),
    "with the scorer, behind a main guard, it works": (
        "if __name__ == '__main__': print(*score(Mine()))",
        "0.5 0.5 0.5 0.5\n",
        "",
    ),
    "with the scorer, without a guard, it fails with the remedy": (
        """
with make(make_buffer(), Mine(), "process") as scoring:
    print(scoring.wait_until_ready(60), scoring.statistics()["faults_died"])
""",
        "False 1.0\n",
        'put the script\'s code under `if __name__ == "__main__":`',
    ),
}


def run_script(tmp_path, body):
    """Start a script; its output is a pipe."""
    script = tmp_path / "script.py"
    script.write_text(HEAD.format(root=str(ROOT)) + body)
    return subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RL_LOGGING_LEVEL": "ERROR"},  # torchrl logs to the standard output
    )


@pytest.mark.slow
@pytest.mark.parametrize("which", SCRIPTS)
def test_a_script(which, tmp_path):
    body, expected, told = SCRIPTS[which]
    with run_script(tmp_path, body) as script:
        out, error = script.communicate(timeout=PATIENT)
    assert out == expected, error
    assert told in error


@pytest.mark.slow
def test_no_worker_outlives_a_script_that_is_interrupted(gate, tmp_path):
    """The worker sits in its scorer, which never comes back."""
    body = f"score(Gated(pickle.loads({pickle.dumps(gate)!r})))"
    with run_script(tmp_path, body) as parent:
        gate.await_arrival()
        workers = children(parent.pid)
        parent.send_signal(signal.SIGINT)
        assert workers
        assert all(map(vanishes, workers))
        error = parent.communicate(timeout=PATIENT)[1]
    assert error.rstrip().endswith("KeyboardInterrupt")
    assert error.count("Traceback") == 1


def test_a_synchronous_run_is_repeated_bit_for_bit_and_resumed_as_if_uninterrupted():
    batches = [stream([4, 3, 5], start=12 * i, ids=[3 * i, 3 * i + 1, 3 * i + 2]) for i in range(4)]
    batches[1]["next", "done"][-1] = False  # a clip is open when the run is interrupted
    batches[2]["collector", "traj_ids"][:4] = 5
    batches[2]["render_state"][0] = 24

    def scorer():
        return NoisyScorer(ConstantScorer(1.0), 0.5, 0.5, seed=3)

    def run(buffer, scoring, some):
        for batch in some:
            insert(buffer, scoring, batch.clone())

    def new():
        buffer = make_buffer()
        lacks = {"delay_env_steps": 5, "dropped_share": 0.3, "seed": 2}
        return buffer, make(buffer, scorer(), "sync", clip_transitions=3, **lacks)

    whole, scoring = new()
    run(whole, scoring, batches)
    again, scoring_again = new()
    run(again, scoring_again, batches)
    assert scores(again) == scores(whole)

    first, before = new()
    run(first, before, batches[:2])
    saved = pickle.dumps((first.state_dict(), before.state_dict()))
    second, after = new()
    buffer_state, scoring_state = pickle.loads(saved)
    run(second, after, [stream([1])])  # allocates the storage; overwritten by what is loaded
    second.load_state_dict(buffer_state)
    after.load_state_dict(scoring_state)
    run(second, after, batches[2:])
    assert scores(second) == scores(whole)
    assert {0.0, 1.0} <= set(scores(whole))
    assert after._queue.counts.count == scoring._queue.counts.count


def test_what_is_pending_is_saved_and_scored_after_loading(gate):
    buffer = make_buffer()
    with make(buffer, Gated(gate), "thread", batch_clips=2) as scoring:
        insert(buffer, scoring, stream([4]))
        gate.await_arrival()
        insert(buffer, scoring, stream([4, 4, 2], start=4, open_end=True))
        state = pickle.loads(pickle.dumps(scoring.state_dict()))
        gate.release(9)
    with make(buffer, Yes(), "thread") as restored:
        restored.load_state_dict(state)
        assert restored.drain(PATIENT, flush=True)
        figures = books(restored)
    assert scores(buffer)[:14] == [1] * 14
    assert figures["clips_submitted"] == 4
    assert figures["clips_scored"] == 4


GONE = object()
DAMAGES = [
    *[([part], GONE) for part in ("cutter", "pending", "counts", "scorer")],
    (["scorer", ""], 3),
    (["pending", 0, "index"], GONE),
    (["pending", 0, "index"], torch.tensor([10**6])),  # beyond the buffer
    (["pending", 0, "index"], torch.ones(4)),
    (["pending", 0, "generation"], torch.tensor([1])),  # fewer than slots
    (["counts", "clips_scored"], GONE),
    (["counts", "clips_scored"], math.nan),
    (["cutter", "tracks", 0], {}),
]


def test_damaged_state_is_refused_and_changes_nothing(gate):
    buffer = make_buffer()
    with make(buffer, Gated(gate), "thread", batch_clips=2) as scoring:
        insert(buffer, scoring, stream([4]))
        gate.await_arrival()
        insert(buffer, scoring, stream([4, 2], start=4, open_end=True))
        state = scoring.state_dict()
        gate.release(9)
    state["scorer"] = make(buffer, RandomScorer(seed=1), "sync").state_dict()["scorer"]
    with make(buffer, RandomScorer(seed=0), "sync") as other:
        insert(buffer, other, stream([4, 3], start=10, open_end=True))
        before = pickle.loads(pickle.dumps(other.state_dict()))
        for (*path, name), value in DAMAGES:
            damaged = pickle.loads(pickle.dumps(state))
            part = functools.reduce(operator.getitem, path, damaged)
            part[name] = value
            if value is GONE:
                del part[name]
            with pytest.raises(ValueError, match=r"AsyncScorer\.state_dict"):
                other.load_state_dict(damaged)
            assert_equal(other.state_dict(), before, str([*path, name]))
        other.load_state_dict(state)
        assert books(other)["clips_scored"] == 2


def test_showcase_draws_the_best_and_a_random_clip_since_the_last_call():
    buffer = make_buffer()
    with make(buffer, Brightness(), "sync") as scoring:
        assert scoring.showcase() == {}
        insert(buffer, scoring, stream([4] * 8))
        shown = scoring.showcase()
        assert set(shown) == {"best", "random"}
        frames, score = shown["best"]
        assert score == pytest.approx(32 / 255)
        assert frames.dtype == torch.uint8
        assert frames.shape == (2, 3, 2, 2)
        assert frames[:, 0, 0, 0].tolist() == [30, 32]  # outcomes 2 and 4 of 29 to 32
        frames, score = shown["random"]
        assert frames[-1].max().item() / 255 == pytest.approx(score)
        assert scoring.showcase() == {}
        others = (
            set()
        )  # 12 clips, 20 times: that the random one is always the last is 12^-20 likely
        for _ in range(20):
            insert(buffer, scoring, stream([4] * 12))
            others.add(round(scoring.showcase()["random"][1] * 255))
    assert len(others) > 5
    assert others <= set(range(4, 49, 4))


def test_clips_that_cannot_be_drawn_are_not_shown_and_that_is_said_once(caplog):
    """A judge that looks at no frames works without graphics; its pictures must not stop a run."""

    def fail(render_state):
        raise RuntimeError("no\ngraphics")

    buffer = make_buffer()
    with AsyncScorer(buffer, ClipRenderTransform(fail), ConstantScorer(), mode="sync") as scoring:
        for _ in range(2):
            insert(buffer, scoring, stream([32]))
            assert scoring.showcase() == {}
        assert books(scoring)["clips_scored"] == 2
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["No clips will be shown: RuntimeError: no graphics"]


def test_auto_takes_a_thread_for_the_cheap_and_a_process_for_the_others():
    class OnGPU(Yes):
        device = torch.device("cuda", 0)

    assert choose_mode("auto", Yes()) == "process"
    assert choose_mode("auto", OnGPU()) == "process"
    assert choose_mode("auto", ConstantScorer()) == "thread"
    assert choose_mode("auto", NoisyScorer(Yes())) == "process"
    assert choose_mode("sync", Yes()) == "sync"
    with pytest.raises(ValueError, match="mode is fast: use one of"):
        choose_mode("fast", Yes())


def test_what_cannot_take_scores_or_be_sent_is_refused_when_it_is_built():
    class Local(Yes):
        pass

    uniform = VLMReplayBuffer(storage=LazyTensorStorage(8), sampler=RandomSampler())
    rows = VLMReplayBuffer(
        storage=LazyTensorStorage(8, ndim=2), sampler=VLMPrioritizedSampler(8), batch_size=2
    )
    for buffer, scorer, mode, error, told in (
        (uniform, Yes(), "sync", TypeError, "RandomSampler takes no scores"),
        (object(), Yes(), "sync", TypeError, "scores go to a VLMReplayBuffer"),
        (rows, Yes(), "sync", ValueError, "leave ndim at 1"),
        (make_buffer(), Local(), "process", ValueError, 'of a module, or pass mode="thread"'),
    ):
        with pytest.raises(error, match=told):
            make(buffer, scorer, mode)
    with pytest.raises(ValueError, match="reads frames; pass ClipRenderTransform"):
        AsyncScorer(make_buffer(), None, Brightness(), mode="sync")


def test_a_scorer_of_a_script_that_is_no_file_is_refused_when_it_is_built(monkeypatch):
    """As on standard input: `__main__` has no file that a process could import."""

    class Mine(Yes):
        pass

    script = types.ModuleType("__main__")
    script.__file__, script.Mine = "<stdin>", Mine
    Mine.__module__, Mine.__qualname__ = "__main__", "Mine"
    monkeypatch.setitem(sys.modules, "__main__", script)
    with pytest.raises(ValueError, match='put it into a module, or pass mode="thread"') as refusal:
        make(make_buffer(), Mine(), "process")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("draws", ["meta", "cpu"])
def test_states_or_frames_go_to_the_scorers_device_once(draws):
    """Devices as seen on the road; "meta" stands for a GPU. What the scorer does not read stays."""
    seen = []

    class Renderer(NumberRenderer):
        def __call__(self, render_state):
            seen.append(render_state.device.type)
            return super().__call__(render_state)

    class OnMeta(Brightness):
        device = torch.device("meta")

        def score(self, tensordict):
            seen.append({key: value.device.type for key, value in tensordict.items()})
            return torch.ones(tensordict.shape[0])

    renderer = Renderer()
    if draws == "cpu":
        renderer.device = torch.device("cpu")
    clips = TensorDict({"render_state": torch.zeros(2, 3, 1)}, [2])
    assert judge(ClipRenderTransform(renderer), OnMeta(), clips).tolist() == [1, 1]
    assert seen == [draws, {"clip": "meta"}]


def test_minigrid_reads_states_on_the_host_and_draws_on_the_scorers_device():
    """ "meta" stands for a GPU: nothing could be read back from it."""
    seen = []

    class OnMeta(Brightness):
        device = torch.device("meta")

        def score(self, tensordict):
            seen.append((tensordict["clip"].device.type, tensordict["clip"].shape))
            return torch.ones(tensordict.shape[0])

    transform = ClipRenderTransform(MiniGridRenderer(tile_size=4))
    limits = {"timeout_s": 60, "start_timeout_s": 60}
    backend = InPlaceWorker(transform, OnMeta(), own_stream=False, **limits)
    clips = TensorDict({"render_state": torch.zeros(2, 3, 5, 5, 4, dtype=torch.uint8)}, [2])
    assert backend.score(clips).tolist() == [1, 1]
    assert seen == [("meta", (2, 3, 3, 20, 20))]
    assert transform(clips)["clip"].device.type == "cpu"  # the one given is as it was


def test_wrong_data_is_the_callers_error_and_leaves_the_books_alone():
    buffer = make_buffer()
    with make(buffer, Yes(), "sync") as scoring:
        transitions = stream([4])
        index = buffer.extend(transitions)
        with pytest.raises(ValueError, match=r"insert data\.reshape"):
            scoring.submit(transitions, index[:2])
        assert books(scoring)["clips_submitted"] == 0


def test_a_clip_of_score_one_half_is_counted_as_positive():
    with make(make_buffer(), ConstantScorer(0.5), "sync") as scoring:
        scoring.extend(stream([8]))
        counts = scoring.statistics()
    assert counts["clips_positive"] == counts["clips_scored"] == 2
