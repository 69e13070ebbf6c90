"""Clips: every transition covered, the last outcome shown, whatever the batches."""

import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import TransformedEnv
from torchrl.envs.utils import check_env_specs

from tests.streams import stream
from vlmrb_torchrl.clips import ClipRenderTransform, stack_clips
from vlmrb_torchrl.cutting import ClipCutter
from vlmrb_torchrl.envs import DoorKeyEnv
from vlmrb_torchrl.frames import shown_outcomes
from vlmrb_torchrl.renderers import MiniGridRenderer


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


@settings(deadline=None, max_examples=150)
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


@settings(deadline=None, max_examples=80)
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
    """64 environments in turn: each is unseen for 63 insertions, far more than the patience."""
    cutter = ClipCutter(4, 4, patience=8)
    envs = [stream([4], start=100 * i, ids=[i]) for i in range(64)]
    clips = [c for t in range(4) for env in envs for c in cut(cutter, env[t : t + 1])]
    assert [len(c) for c in clips] == [4] * 64


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


@settings(deadline=None, max_examples=30)
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


# ---------------------------------------------------------------- TorchRL's collector


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
        with pytest.raises(ValueError, match=f"^{name} is 0; it must be a whole number >= 1.$"):
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


def test_without_frames_neither_states_nor_events_are_needed():
    bare = stream([4]).select(("next", "done"))
    (clip,) = ClipCutter(4, 4, needs_frames=False).cut(bare, torch.arange(4), torch.zeros(4))
    assert clip.render_state is None
    assert clip.events is None
    assert stack_clips([clip]).batch_size == torch.Size([1])


# ---------------------------------------------------------------- drawing


def test_frames_of_clips_are_the_renderers():
    renderer = MiniGridRenderer(tile_size=4)
    states = DoorKeyEnv(5, 6, seed=0).reset()["render_state"].reshape(2, 3, 5, 5, 4)
    clips = ClipRenderTransform(renderer)(TensorDict({"render_state": states}, [2]))
    assert clips["clip"].dtype == torch.uint8
    assert clips["clip"].shape == (2, 3, 3, 20, 20)
    assert torch.equal(clips["clip"][1, 2], renderer(states[1, 2]))


def test_a_transformed_environment_keeps_its_specs():
    env = TransformedEnv(
        DoorKeyEnv(5, 2),
        ClipRenderTransform(MiniGridRenderer(tile_size=4), out_keys=[("picture", "now")]),
    )
    check_env_specs(env)
    rollout = env.rollout(3)
    assert rollout["next", "picture", "now"].shape == (2, 3, 3, 20, 20)
    drawn = MiniGridRenderer(tile_size=4)(rollout["next", "render_state"])
    assert torch.equal(rollout["next", "picture", "now"], drawn)


def test_a_replay_buffer_draws_what_it_samples():
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(10),
        transform=ClipRenderTransform(MiniGridRenderer(tile_size=4)),
        batch_size=5,
    )
    states = DoorKeyEnv(5, 10, seed=0).reset().select("render_state")
    buffer.extend(states)
    sample = buffer.sample()
    assert torch.equal(sample["clip"], MiniGridRenderer(tile_size=4)(sample["render_state"]))


def test_the_transform_pickles_and_checks_its_keys():
    transform = ClipRenderTransform(MiniGridRenderer(tile_size=4))
    state = TensorDict({"render_state": torch.zeros(1, 2, 5, 5, 4, dtype=torch.uint8)}, [1])
    again = pickle.loads(pickle.dumps(transform))
    assert torch.equal(transform(state.clone())["clip"], again(state.clone())["clip"])
    with pytest.raises(ValueError, match="name one output for each input"):
        ClipRenderTransform(MiniGridRenderer(), in_keys=["a", "b"])


def test_stacked_clips_are_what_scorers_read():
    clips = cut(ClipCutter(3, 2), stream([6]))
    batch = stack_clips(clips)
    assert batch["render_state"].shape == (2, 2, 1)
    assert batch["events"].dtype == torch.bool
    assert np.array_equal(batch["events"].numpy(), np.stack([c.events for c in clips]))
