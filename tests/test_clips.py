"""Clips: every transition covered, the last outcome shown, whatever the batches."""

import pickle
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage
from torchrl.envs import (
    Compose,
    MultiStepTransform,
    ToTensorImage,
    Transform,
)

from tests.scoring_doubles import Brightness, NumberRenderer
from tests.streams import stream
from vlmrb_torchrl.buffer import VLMReplayBuffer
from vlmrb_torchrl.clips import ClipCutter, stack_clips
from vlmrb_torchrl.envs import DoorKeyEnv
from vlmrb_torchrl.frames import shown_outcomes
from vlmrb_torchrl.renderers import ClipRenderTransform
from vlmrb_torchrl.samplers import VLMPrioritizedSampler
from vlmrb_torchrl.scorers import PrivilegedScorer
from vlmrb_torchrl.scoring import AsyncScorer


def expected_clips(first, length, clip, frames, stride):
    """(slots, outcomes shown) of one trajectory whose transitions are ``first``, ``first`` + 1, …

    Clips of ``clip`` transitions at 0, stride, 2 stride, … as far as they fit; what the end
    leaves uncovered is one shorter clip from the next start.
    """
    spans = [(s, s + clip) for s in range(0, length, stride) if s + clip <= length]
    covered = spans[-1][1] if spans else 0
    tail = len(spans) * stride
    if max(tail, covered) < length:
        spans.append((tail, length))
    result = set()
    for start, stop in spans:
        slots = range(first + start, first + stop)
        shown = [slots[position] + 1 for position in shown_outcomes(len(slots), frames)]
        result.add((tuple(slots), tuple(shown)))
    return result


def cut(cutter, data, *, generation=None):
    """Feed one batch whose transitions are numbered by their outcome states."""
    slots = data["next", "render_state"].reshape(-1) - 1
    return cutter.cut(data, slots, torch.zeros_like(slots) if generation is None else generation)


def seen(clips):
    """Clips as a set of (slots, outcomes shown); none may come twice."""
    result = [(tuple(c.index.tolist()), tuple(c.render_state[:, 0].tolist())) for c in clips]
    assert len(result) == len(set(result))
    return set(result)


# ---------------------------------------------------------------- which frames


@given(st.integers(1, 300), st.integers(1, 64))
def test_shown_outcomes_are_ordered_even_and_end_with_the_last(transitions, frames):
    """For n > F, frame j shows outcome ceil((j + 1) n / F) - 1: gaps of n / F rounded."""
    shown = shown_outcomes(transitions, frames).tolist()
    assert len(shown) == frames
    assert shown == sorted(shown)
    assert shown[-1] == transitions - 1
    if transitions <= frames:
        assert shown[:transitions] == list(range(transitions))
        assert set(shown[transitions:]) <= {transitions - 1}
    else:
        gaps = {b - a for a, b in pairwise([-1, *shown])}
        assert gaps <= {transitions // frames, -(-transitions // frames)}


def test_128_transitions_as_32_frames_show_every_fourth_outcome():
    assert shown_outcomes(128, 32).tolist() == list(range(3, 128, 4))


# ---------------------------------------------------------------- cutting


lengths = st.lists(st.integers(1, 25), min_size=1, max_size=6)
sizes = {"clip": st.integers(1, 12), "frames": st.integers(1, 9), "stride": st.integers(1, 14)}


@settings(deadline=None, max_examples=50)
@given(data=st.data(), trajectory_lengths=lengths, ids=st.booleans(), **sizes)
def test_any_split_of_a_stream_gives_the_same_clips(
    data, trajectory_lengths, ids, clip, frames, stride
):
    transitions = stream(trajectory_lengths)
    if not ids:
        del transitions["collector"]
    T = len(transitions)
    bounds = sorted(data.draw(st.sets(st.integers(1, T))) | {0, T})
    cutter = ClipCutter(clip, frames, stride)
    clips = [c for a, b in pairwise(bounds) for c in cut(cutter, transitions[a:b])]
    expected, first = set(), 0
    for length in trajectory_lengths:
        expected |= expected_clips(first, length, clip, frames, stride)
        first += length
    assert seen(clips) == expected
    assert cutter.flush() == []
    assert len(cutter) == 0
    if stride <= clip:
        assert {slot for c in clips for slot in c.index.tolist()} == set(range(T))


@settings(deadline=None, max_examples=30)
@given(data=st.data(), rows=st.integers(1, 4), flat=st.booleans(), ids=st.booleans(), **sizes)
def test_rows_of_environments_give_the_clips_of_each(data, rows, flat, ids, clip, frames, stride):
    """N environments side by side, as [N, T] or flattened (then trajectory ids tell them apart)."""
    T = 24
    envs, expected = [], set()
    for row in range(rows):
        cuts = sorted(data.draw(st.sets(st.integers(1, T - 1), max_size=4)) | {0, T})
        row_lengths = [b - a for a, b in pairwise(cuts)]
        row_ids = [row + rows * count for count in range(len(row_lengths))]
        envs.append(stream(row_lengths, start=1000 * row, ids=row_ids))
        for start, length in zip(cuts[:-1], row_lengths, strict=True):
            expected |= expected_clips(1000 * row + start, length, clip, frames, stride)
    batch = torch.stack(envs)
    if not ids and not flat:
        del batch["collector"]
    cutter = ClipCutter(clip, frames, stride)
    clips, position = [], 0
    while position < T:
        step = data.draw(st.integers(1, T - position))
        part = batch[:, position : position + step]
        clips += cut(cutter, part.reshape(-1) if flat else part)
        position += step
    assert seen(clips) == expected


def test_events_are_those_of_all_covered_transitions_not_only_of_those_shown():
    """Transition 7 has the second event, and transitions 0, 5 the first; outcome 8 is shown."""
    (first,) = cut(ClipCutter(8, 1), stream([8]))
    assert first.render_state[:, 0].tolist() == [8]
    assert first.events.tolist() == [True, True]
    (quiet,) = cut(ClipCutter(8, 1), stream([4], start=1))
    assert quiet.events.tolist() == [False, False]


def test_generations_travel_with_their_slots():
    transitions = stream([5])
    clips = cut(ClipCutter(3, 3), transitions, generation=torch.arange(10, 15))
    assert [c.generation.tolist() for c in clips] == [[10, 11, 12], [13, 14]]


def test_kept_states_survive_a_collector_that_reuses_its_memory():
    transitions = stream([10], open_end=True)
    cutter = ClipCutter(10, 10)
    first, second = transitions[:6].clone(), transitions[6:].clone()
    assert cut(cutter, first) == []
    first["next", "render_state"].fill_(-1)
    first["next", "events"].fill_(False)
    (clip,) = cut(cutter, second)
    assert clip.render_state[:, 0].tolist() == list(range(1, 11))
    assert clip.events.tolist() == [True, True]


def test_nested_render_states_are_cut_alike():
    transitions = stream([4])
    plain = transitions["next", "render_state"]
    nested = transitions.clone()
    nested["next"] = (
        nested["next"]
        .exclude("render_state")
        .set("render_state", TensorDict({"qpos": plain, "buttons": {"on": plain > 2}}, [4]))
    )
    del nested["render_state"]
    clips = ClipCutter(3, 2).cut(nested, torch.arange(4), torch.zeros(4))
    batch = stack_clips(clips)
    assert batch["render_state", "qpos"][..., 0].tolist() == [[2, 3], [4, 4]]
    assert batch["render_state", "buttons", "on"][..., 0].tolist() == [[False, True], [True, True]]


# ---------------------------------------------------------------- trajectories without an end


def test_a_reset_within_a_row_closes_the_clip():
    """Row of one environment: trajectory 0 stops after 3 transitions, 1 takes its place."""
    transitions = stream([3, 5], open_end=True)
    transitions["next", "done"].fill_(False)
    clips = cut(ClipCutter(10, 4), transitions.unsqueeze(0))
    assert [c.index.tolist() for c in clips] == [[0, 1, 2]]


def test_a_trajectory_that_never_comes_again_is_closed_not_kept():
    cutter = ClipCutter(10, 4, patience=2)
    lost = stream([3], open_end=True, ids=[0])
    assert cut(cutter, lost) == []
    clips, start = [], 3
    for batch in range(1, 6):  # others, more than 1,024 transitions of them
        clips += cut(cutter, stream([300], start=start, ids=[batch]))
        start += 300
    assert [0, 1, 2] in [c.index.tolist() for c in clips]
    assert len(cutter) == 0


def test_one_transition_at_a_time_from_many_environments_cuts_nothing_short():
    """16 environments in turn: each is unseen for 15 insertions, more than the patience."""
    cutter = ClipCutter(4, 4, patience=8)
    envs = [stream([4], start=100 * i, ids=[i]) for i in range(16)]
    clips = [c for t in range(4) for env in envs for c in cut(cutter, env[t : t + 1])]
    assert [len(c) for c in clips] == [4] * 16


def test_same_id_from_another_state_is_another_trajectory():
    """Collectors count trajectories from 0: after a restart, id 0 is not the old id 0."""
    cutter = ClipCutter(10, 4)
    assert cut(cutter, stream([3], open_end=True, ids=[0])) == []
    (old,) = cut(cutter, stream([4], open_end=True, ids=[0], start=50))
    assert old.index.tolist() == [0, 1, 2]
    (new,) = cutter.flush()
    assert new.index.tolist() == [50, 51, 52, 53]


def test_padding_of_a_collector_lies_in_no_clip():
    transitions = stream([4, 4])
    transitions["collector", "traj_ids"][4:] = -1
    clips = cut(ClipCutter(10, 4), transitions)
    assert [c.index.tolist() for c in clips] == [[0, 1, 2, 3]]
    transitions = stream([4, 4])
    transitions["collector", "mask"] = torch.arange(8) >= 4
    assert [c.index.tolist() for c in cut(ClipCutter(10, 4), transitions)] == [[4, 5, 6, 7]]


def test_flush_closes_what_is_open_and_the_trajectory_goes_on_in_a_new_clip():
    transitions = stream([9])
    cutter = ClipCutter(6, 6)
    assert cut(cutter, transitions[:4]) == []
    assert [c.index.tolist() for c in cutter.flush()] == [[0, 1, 2, 3]]
    assert [c.index.tolist() for c in cut(cutter, transitions[4:])] == [[4, 5, 6, 7, 8]]


@settings(deadline=None, max_examples=15)
@given(at=st.integers(0, 30), **sizes)
def test_a_restored_cutter_goes_on_as_the_old_one(at, clip, frames, stride):
    transitions = stream([7, 24])
    cutter = ClipCutter(clip, frames, stride)
    before = cut(cutter, transitions[:at]) if at else []
    restored = ClipCutter(clip, frames, stride)
    restored.load_state_dict(pickle.loads(pickle.dumps(cutter.state_dict())))
    whole = seen(before + cut(restored, transitions[at:]))
    assert whole == expected_clips(0, 7, clip, frames, stride) | expected_clips(
        7, 24, clip, frames, stride
    )
    assert restored.transitions == 31


# ---------------------------------------------------------------- whose transitions are whose


def test_flattened_environments_without_ids_are_told_apart_by_their_states():
    """Rows 0 to 3 and 50 to 53, twice: no clip holds transitions of both environments."""
    cutter, clips = ClipCutter(10, 4), []
    envs = [stream([8], open_end=True), stream([8], start=50, open_end=True)]
    for part in (slice(0, 4), slice(4, 8)):
        clips += cut(cutter, torch.cat([env[part] for env in envs]).exclude("collector"))
    clips += cutter.flush()
    assert sorted(c.index.tolist() for c in clips) == [
        list(range(first, first + 4)) for first in (0, 4, 50, 54)
    ]


def test_one_environment_without_ids_is_followed_by_its_states():
    transitions = stream([9, 3]).exclude("collector")
    cutter = ClipCutter(6, 6)
    clips = [c for part in transitions.split([4, 4, 4]) for c in cut(cutter, part)]
    assert [c.index.tolist() for c in clips] == [[*range(6)], [6, 7, 8], [9, 10, 11]]


@pytest.mark.parametrize("lost", ["render_state", ("next", "render_state")])
def test_where_nothing_tells_environments_apart_data_is_refused(lost):
    """Two environments; as rows, or with trajectory ids, the same transitions are cut."""
    rows = torch.stack([stream([4], open_end=True), stream([4], start=50)]).exclude(lost)
    zeros = torch.zeros(8, dtype=torch.int64)
    cutter = ClipCutter(10, 4, needs=())
    with pytest.raises(KeyError, match=r"pass it as \[N, T\], one environment a row"):
        cutter.cut(rows.reshape(-1).exclude("collector"), torch.arange(8), zeros)
    assert cutter.transitions == 0
    (clip,) = cutter.cut(rows.exclude("collector"), torch.arange(8), zeros)
    assert clip.index.tolist() == [4, 5, 6, 7]
    rows["collector", "traj_ids"][1] = 1
    (clip,) = ClipCutter(10, 4, needs=()).cut(rows.reshape(-1), torch.arange(8), zeros)
    assert clip.index.tolist() == [4, 5, 6, 7]


def test_root_states_of_another_shape_tell_nothing_and_raise_nothing():
    transitions = stream([4])
    transitions["render_state"] = torch.zeros(4, 3)
    assert [len(clip) for clip in cut(ClipCutter(10, 4), transitions)] == [4]
    with pytest.raises(KeyError, match=r"pass it as \[N, T\]"):
        cut(ClipCutter(10, 4), transitions.exclude("collector"))


def test_two_collectors_that_count_from_0_share_no_clip():
    """In one batch the states tell; by ``source`` even where there are none, over batches."""
    both = [stream([6], open_end=True), stream([6], start=50, open_end=True)]
    cutter = ClipCutter(10, 4)
    clips = cut(cutter, torch.cat(both)) + cutter.flush()
    assert [c.index.tolist() for c in clips] == [[*range(6)], [*range(50, 56)]]
    blind, clips = ClipCutter(6, 4, needs=()), []
    for part in (slice(0, 3), slice(3, 6)):
        for source, data in enumerate(both):
            slots = data["next", "render_state"][part, 0] - 1
            bare = data[part].select(("next", "done"), "collector")
            clips += blind.cut(bare, slots, torch.zeros_like(slots), source)
    assert [c.index.tolist() for c in clips] == [[*range(6)], [*range(50, 56)]]


def test_a_state_that_holds_nan_goes_on_where_it_is_the_same():
    transitions = stream([6])
    for state in (transitions, transitions["next"]):
        number = state["render_state"].double()
        state["render_state"] = torch.cat([number, number.new_full((6, 1), torch.nan)], -1)
    cutter = ClipCutter(6, 1)
    zeros = torch.zeros(3)
    assert cutter.cut(transitions[:3], torch.arange(3), zeros) == []
    (clip,) = cutter.cut(transitions[3:], torch.arange(3, 6), zeros)
    assert clip.index.tolist() == [*range(6)]


# ---------------------------------------------------------------- AsyncScorer.extend


def judged(transform=None, capacity=64, **settings):
    """A buffer and a judge that says, of 255, the number of the last state it is shown."""
    buffer = VLMReplayBuffer(
        storage=LazyTensorStorage(capacity),
        sampler=VLMPrioritizedSampler(capacity, threshold=None),
        transform=transform,
        batch_size=4,
    )
    settings = {"clip_transitions": 1, "frames_per_clip": 1, "mode": "sync", **settings}
    draw = ClipRenderTransform(NumberRenderer())
    return buffer, AsyncScorer(buffer, draw, Brightness(), **settings)


def scores(buffer):
    """Score of each slot in use, in 1/255; -1 where there is none."""
    score = buffer.sampler.state_dict()["_score"][: len(buffer)]
    return torch.where(score < 0, -1, (score * 255).round()).int().tolist()


@settings(deadline=None, max_examples=12)
@given(data=st.data(), clip=st.sampled_from([1, 4]), rows=st.sampled_from([0, 2]))
def test_n_step_transitions_get_the_score_of_where_they_lead(clip, rows, data):
    """Transition k of a trajectory that ends in state e leads to state min(k + 3, e).

    The last 3 of each row are held back by the transform, which is TorchRL's; what a slot holds is
    told by its root state. Clips of 4 have the score of their last transition. Row 1 is row 0,
    100 later.
    """
    T, trajectories = 20, [(0, 7), (7, 8), (8, 20)]
    env = stream([7, 1, 12], open_end=True)
    other = stream([7, 1, 12], open_end=True, start=100, ids=[3, 4, 5])
    batch = torch.stack([env, other]) if rows else env
    batch["next", "reward"] = torch.zeros(*batch.shape, 1)
    buffer, scoring = judged(MultiStepTransform(3, 0.9), clip_transitions=clip)
    bounds = sorted(data.draw(st.sets(st.integers(1, T))) | {0, T})
    stored = 0
    for start, stop in pairwise(bounds):
        stored += scoring.extend(batch[..., start:stop].clone()).numel()
    scoring.flush()
    numbers = buffer[:]["render_state"][:, 0]
    numbers = torch.where(numbers < 0, -numbers - 1, numbers).tolist()
    assert stored == len(buffer)
    assert sorted(numbers) == [*range(17), *(range(100, 117) if rows else ())]
    expected = []
    for number in numbers:
        row, k = divmod(number, 100)
        first, end = next(span for span in trajectories if k < span[1])
        last = first + (k - first) // clip * clip + clip - 1  # of its clip, if that is whole
        expected.append(100 * row + min(min(last, 16) + 3, end))
    assert scores(buffer) == expected


class Filter(Transform):
    """Stores every transition but each fifth."""

    def _inv_call(self, tensordict):
        return tensordict[tensordict["next", "render_state"][:, 0] % 5 != 0]


def test_a_transform_that_drops_rows_leaves_each_its_own_score():
    """Outcomes 5, 10 and 15 are not stored: clips end before them and at state 8."""
    buffer, scoring = judged(Filter(), clip_transitions=8)
    for part in stream([8, 8]).split([2, 2, 1, 11]):
        scoring.extend(part)
    assert buffer[:]["next", "render_state"][:, 0].tolist() == [
        1, 2, 3, 4, 6, 7, 8, 9, 11, 12, 13, 14, 16
    ]  # fmt: skip
    assert scores(buffer) == [4] * 4 + [8] * 3 + [9] + [14] * 4 + [16]


def test_submit_refuses_what_a_transform_may_have_moved():
    """From the second batch on as many rows are stored as are given: the number tells nothing."""
    buffer, scoring = judged(MultiStepTransform(3, 0.9))
    transitions = stream([16])
    transitions["next", "reward"] = torch.zeros(16, 1)
    for part in transitions.split(8):
        index = buffer.extend(part)
        with pytest.raises(ValueError, match=r"let AsyncScorer\.extend insert"):
            scoring.submit(part, index)
    assert scores(buffer) == [-1] * 13
    buffer, scoring = judged(lambda batch: batch)  # leaves the rows alone, so they are stamped
    transitions = stream([4])
    scoring.submit(transitions, buffer.extend(transitions))
    assert scores(buffer) == [1, 2, 3, 4]


def test_what_the_judge_sees_need_not_lie_in_the_buffer():
    rows = torch.stack([stream([4]), stream([4], start=50)])
    buffer, scoring = judged()
    kept = rows.select(("next", "done"))
    assert scoring.extend(rows, kept).tolist() == [*range(8)]
    assert scores(buffer) == [1, 2, 3, 4, 51, 52, 53, 54]
    assert "render_state" not in buffer[:]
    with pytest.raises(ValueError, match=r"stored is .*: pass a TensorDict \[2, 4\]"):
        scoring.extend(rows, kept.reshape(-1))
    with pytest.raises(KeyError, match="let the environment write"):
        scoring.extend(kept)
    scoring.close()
    with pytest.raises(RuntimeError, match="is closed"):
        scoring.extend(rows, kept)
    assert len(buffer) == 8


def test_keys_that_no_clip_has_are_refused_when_the_scorer_is_built():
    """The scorer reads "clip", the transform "render_state"; of other names every clip fails."""
    buffer, _ = judged()
    for keys, text in (
        ({"in_keys": ["state"]}, r"transform reads \['state'\], but clips hold \['events', 'rend"),
        ({"out_keys": ["pixels"]}, r"scorer reads \['clip'\], .* \['events', 'pixels', 'render"),
    ):
        with pytest.raises(ValueError, match=text):
            AsyncScorer(buffer, ClipRenderTransform(NumberRenderer(), **keys), Brightness())
    scorer = Brightness()
    scorer.in_keys = ["reward"]
    with pytest.raises(ValueError, match=r"scorer reads \['reward'\]"):
        AsyncScorer(buffer, None, scorer)
    chain = Compose(ClipRenderTransform(NumberRenderer()), ToTensorImage(in_keys=["clip"]))
    AsyncScorer(buffer, chain, Brightness(), mode="sync", clip_transitions=1).close()
    with pytest.raises(KeyError, match=r"events.*which the scorer wants"):
        AsyncScorer(buffer, None, PrivilegedScorer(["goal"]), mode="sync").extend(
            stream([4]).exclude(("next", "events"))
        )


def test_threads_that_extend_leave_each_slot_the_score_of_its_transition():
    """Ring of 64, written 6 times over by 3 threads: outcome k has score k mod 256."""
    buffer, scoring = judged(clip_transitions=1)

    def insert(source):
        for batch in range(4):
            scoring.extend(stream([32], start=1000 * source + 32 * batch), source=source)

    threads = [threading.Thread(target=insert, args=(source,)) for source in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scores(buffer) == (buffer[:]["next", "render_state"][:, 0] % 256).tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("storage", ["cpu", "cuda"])
def test_transitions_on_a_gpu_get_their_scores(storage):
    """Batches with and without a device of their own, inserted both ways."""
    buffer = VLMReplayBuffer(
        storage=LazyTensorStorage(64, device=storage),
        sampler=VLMPrioritizedSampler(64, threshold=None),
        batch_size=4,
    )
    draw = ClipRenderTransform(NumberRenderer())
    scoring = AsyncScorer(
        buffer, draw, Brightness(), clip_transitions=4, frames_per_clip=1, mode="sync"
    )
    first, second = stream([8]).to("cuda"), stream([8], start=8).to("cuda").clear_device_()
    scoring.extend(first)
    buffer.sample()
    scoring.submit(second, buffer.extend(second))
    assert scores(buffer) == [4] * 4 + [8] * 4 + [12] * 4 + [16] * 4


# ---------------------------------------------------------------- TorchRL's collector


@pytest.mark.parametrize("n_steps", [1, 3])
def test_a_collector_that_has_the_scorer_for_its_buffer_has_its_steps_judged(n_steps):
    """Each transition is a clip; the judge says whether its outcome is a success.

    Truth is what the buffer holds: of an n-step transition, the event of its last step.
    """
    env = DoorKeyEnv(5, 3, max_steps=11, seed=3)
    transform = MultiStepTransform(n_steps, 0.9) if n_steps > 1 else None
    buffer = VLMReplayBuffer(
        storage=LazyTensorStorage(1000),
        sampler=VLMPrioritizedSampler(1000, threshold=None),
        transform=transform,
        batch_size=4,
    )
    judge = PrivilegedScorer(env.event_names, events=("key",))
    scoring = AsyncScorer(buffer, None, judge, clip_transitions=1, mode="sync")
    collector = Collector(
        env,
        frames_per_batch=21,
        total_frames=21 * 12,
        replay_buffer=scoring,
        init_random_frames=42,
    )
    assert list(collector) == [None] * 12
    collector.shutdown()
    held = 3 * n_steps if n_steps > 1 else 0
    assert len(buffer) == scoring.write_count == 21 * 12 - held
    event = buffer[:]["next", "events"][:, env.event_names.index("key")]
    assert buffer.sampler.state_dict()["_score"][: len(buffer)].tolist() == event.float().tolist()
    assert 0 < event.sum() < len(event)


@pytest.mark.parametrize("flat", [True, False])
def test_clips_of_torchrls_collector_follow_its_environments(flat):
    """Truth: the done flags of each environment's row, over all batches."""
    N, T, batches, clip = 3, 7, 12, 5
    env = DoorKeyEnv(5, N, max_steps=11, seed=3)
    collector = Collector(env, frames_per_batch=N * T, total_frames=N * T * batches)
    cutter, clips, done, outcome = ClipCutter(clip, clip), [], [], []
    for count, data in enumerate(collector):
        slots = torch.arange(count * N * T, (count + 1) * N * T)
        batch = data.reshape(-1) if flat else data
        clips += cutter.cut(batch, slots, torch.zeros_like(slots))
        done.append(data["next", "done"][..., 0])
        outcome.append(data["next", "render_state"].clone())
    clips += cutter.flush()
    collector.shutdown()
    done, outcome = torch.cat(done, 1), torch.cat(outcome, 1)
    expected = {}
    for row in range(N):
        ends = (done[row].nonzero()[:, 0] + 1).tolist()
        for first, stop in pairwise([0, *ends, batches * T]):
            for start in range(first, stop, clip):
                steps = range(start, min(start + clip, stop))
                slots = tuple(t // T * N * T + row * T + t % T for t in steps)
                expected[slots] = outcome[row, list(steps)]
    assert {tuple(c.index.tolist()) for c in clips} == set(expected)
    for c in clips:
        shown = expected[tuple(c.index.tolist())]
        assert torch.equal(c.render_state[: len(shown)], shown)


# ---------------------------------------------------------------- boundary


def test_impossible_numbers_are_refused_by_name():
    for name in ("clip_transitions", "frames_per_clip", "stride", "patience"):
        with pytest.raises(ValueError, match=f"^{name} is 0: use a whole number from 1 on$"):
            ClipCutter(**{name: 0})


def test_wrong_data_is_refused_in_one_line():
    cutter, good = ClipCutter(3, 3), stream([4])
    zeros = torch.zeros(4)
    with pytest.raises(ValueError, match=r"4 transitions, index 2 slots .* data.reshape"):
        cutter.cut(good, torch.arange(2), torch.zeros(2))
    with pytest.raises(KeyError, match="done"):
        cutter.cut(good.exclude(("next", "done")), torch.arange(4), zeros)
    with pytest.raises(KeyError, match="let the environment write"):
        cutter.cut(good.exclude(("next", "render_state")), torch.arange(4), zeros)
    with pytest.raises(KeyError, match=r"events.*which the scorer wants"):
        ClipCutter(3, 3, needs=["events"]).cut(
            good.exclude(("next", "events")), torch.arange(4), zeros
        )


def test_without_frames_neither_states_nor_events_are_needed():
    bare = stream([4]).select(("next", "done")).unsqueeze(0)
    (clip,) = ClipCutter(4, 4, needs=()).cut(bare, torch.arange(4), torch.zeros(4))
    assert clip.render_state is None
    assert clip.events is None
    assert stack_clips([clip]).batch_size == torch.Size([1])


def test_stacked_clips_are_what_scorers_read():
    clips = cut(ClipCutter(3, 2), stream([6]))
    batch = stack_clips(clips)
    assert batch["render_state"].shape == (2, 2, 1)
    assert batch["events"].dtype == torch.bool
    assert np.array_equal(batch["events"].numpy(), np.stack([c.events for c in clips]))
