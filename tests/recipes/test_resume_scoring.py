"""A judge beside the learner: no score is lost over a resume, and what waited is judged."""

import io
import threading

import torch

from recipes.demonstrations import Batches
from recipes.dqn import DQN
from recipes.running import run_state
from recipes.running.metrics import read_rows
from recipes.running.run_state import Memory, RunState
from tests.recipes.resuming import resume, stopped
from tests.recipes.test_resume import DOORKEY, PRIVILEGED
from tests.scoring_doubles import Gate, Gated, Yes
from tests.streams import stream
from tests.test_scoring import PATIENT, books, insert, make, make_buffer, scores
from vlmrb_torchrl.scorers import PrivilegedScorer


def saved(run):
    file = io.BytesIO()
    torch.save(run.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Beside(Memory):
    """A buffer and its judge, without a run."""

    def __init__(self, buffer, scoring):
        self.buffer, self.scoring, self.batches = buffer, scoring, Batches(buffer)
        self._draws = torch.Generator()


def run_of(buffer, scoring):
    return RunState({"memory": Beside(buffer, scoring)})


def saved_scores(state, rows):
    return state["memory"]["buffer"]["sampler"]["_score"][:rows].tolist()


def test_clips_that_wait_and_that_are_being_judged_are_judged_after_the_resume(tmp_path):
    """Four clips of 4: one is scored, one is being judged, one waits, one of 2 is open."""
    gate = Gate(tmp_path)
    buffer = make_buffer()
    with make(buffer, Gated(gate), "thread") as scoring:
        insert(buffer, scoring, stream([4]))
        gate.await_arrival()
        gate.release()
        assert scoring.drain(PATIENT)
        insert(buffer, scoring, stream([4], start=4))
        gate.await_arrival()
        insert(buffer, scoring, stream([4, 2], start=8, open_end=True))
        state = saved(run_of(buffer, scoring))
        gate.release(9)
    assert saved_scores(state, 16) == [1] * 4 + [-1] * 12
    restored = make_buffer()
    with make(restored, Yes(), "thread") as after:
        run_of(restored, after).load_state_dict(state)
        assert after.drain(PATIENT, flush=True)
        figures = books(after)
    assert scores(restored)[:16] == [1] * 14 + [-1] * 2
    assert figures["clips_submitted"] == figures["clips_scored"] == 4


def test_score_that_comes_while_the_run_is_saved_is_not_lost(tmp_path, monkeypatch):
    """It comes between the first read, of the clips, and the second: it is in the buffer."""
    gate = Gate(tmp_path)
    buffer = make_buffer()
    with make(buffer, Gated(gate), "thread") as scoring:
        insert(buffer, scoring, stream([4]))
        gate.await_arrival()
        reads = []

        def then_scored(read):
            def first(*buffer):
                state = read(*buffer)
                if not reads:
                    gate.release()
                    assert scoring.drain(PATIENT)
                reads.append(read)
                return state

            return first

        for owner, name in ((run_state, "state_of_buffer"), (scoring, "state_dict")):
            monkeypatch.setattr(owner, name, then_scored(getattr(owner, name)))
        state = saved(run_of(buffer, scoring))
    assert saved_scores(state, 4) == [1] * 4
    restored = make_buffer()
    with make(restored, Yes(), "thread") as after:
        run_of(restored, after).load_state_dict(state)
        assert after.drain(PATIENT)
        figures = books(after)
    assert scores(restored)[:4] == [1] * 4
    assert figures["clips_submitted"] == 1


def test_full_queue_waits_whole_after_the_resume(tmp_path):
    """Of a queue of 2 clips all are kept beside the one that is being judged."""
    gate = Gate(tmp_path)
    buffer = make_buffer()
    with make(buffer, Gated(gate), "thread", queue_clips=2) as scoring:
        insert(buffer, scoring, stream([4]))
        gate.await_arrival()
        insert(buffer, scoring, stream([4, 4], start=4))
        state = saved(run_of(buffer, scoring))
        gate.release(9)
    restored, held = make_buffer(), Gate((tmp_path / "other").mkdir() or tmp_path / "other")
    with make(restored, Gated(held), "thread", queue_clips=2) as after:
        run_of(restored, after).load_state_dict(state)
        held.release(3)
        assert after.drain(PATIENT)
        assert books(after)["clips_dropped"] == 0
    assert scores(restored)[:12] == [1] * 12


class Held(PrivilegedScorer):
    """Judges when it may."""

    may = threading.Event()

    def score(self, tensordict):
        assert self.may.wait(PATIENT)
        return super().score(tensordict)


def test_run_with_a_judge_that_has_answered_nothing_yet_is_judged_after_the_resume(
    tmp_path, monkeypatch
):
    """Every transition inserted is, at the end, scored or waits or was overwritten."""
    build, built = run_state.build_scoring, []

    def of_held(buffer, task, settings, seed):
        settings.scorer = Held(["goal", "door", "key"], ["goal"])
        settings.mode = "thread"
        built.append((build(buffer, task, settings, seed), buffer))
        return built[-1][0]

    monkeypatch.setattr(run_state, "build_scoring", of_held)
    folder, arguments = tmp_path / "run", [*DOORKEY, PRIVILEGED, "--scoring.clip_transitions=8"]
    Held.may.clear()
    stopped(monkeypatch, DQN, folder, *arguments, after=10)
    before = built[-1][0].statistics()
    assert before["clips_scored"] == 0
    assert before["clips_submitted"] > 25
    Held.may.set()
    resume(DQN, folder)
    last = [row for row in read_rows(folder) if "scoring/clips_scored" in row][-1]
    books = {name.removeprefix("scoring/"): value for name, value in last.items()}
    assert books["clips_dropped"] == books["clips_failed"] == 0
    done = sum(books[f"transitions_{fate}"] for fate in ("scored", "late", "pending", "open"))
    assert done == books["env_steps"] == 512
