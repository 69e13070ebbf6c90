"""Late writes reach the transition that they were meant for, or nothing."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from tempfile import TemporaryDirectory
from threading import Barrier
from typing import Any

import pytest
import torch
from numpy.random import seed as numpy_seed
from tensordict import TensorDict
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    TensorDictMaxValueWriter,
    TensorDictReplayBuffer,
    TensorStorage,
)
from torchrl.data.replay_buffers.samplers import PrioritizedSampler, RandomSampler
from torchrl.data.replay_buffers.writers import TensorDictRoundRobinWriter
from torchrl.envs.transforms import Transform

from vlmrb_torchrl.buffer import VLMReplayBuffer
from vlmrb_torchrl.samplers import VLMPrioritizedSampler
from vlmrb_torchrl.samplers.trees import RadixSumTree


def transitions(first: int, length: int) -> TensorDict:
    return TensorDict({"id": torch.arange(first, first + length)}, [length])


def make(capacity: int = 8, sampler: Any = None, **arguments: Any) -> VLMReplayBuffer:
    sampler = sampler or VLMPrioritizedSampler(capacity, threshold=None, td_boost=True)
    storage = LazyTensorStorage(capacity)
    return VLMReplayBuffer(storage=storage, sampler=sampler, batch_size=4, **arguments)


both_shared = pytest.mark.parametrize("shared", [False, True])


# ---------------------------------------------------------------- stamps


def test_extend_leaves_slot_and_stamp_of_each_transition() -> None:
    buffer = make()
    first, second, third = transitions(0, 6), transitions(6, 6), transitions(12, 6)
    for data in (first, second, third):
        assert torch.equal(buffer.extend(data), data["index"])
    assert second["index"].tolist() == [6, 7, 0, 1, 2, 3]
    assert second["index_generation"].tolist() == [0, 0, 1, 1, 1, 1]
    assert third["index_generation"].tolist() == [1, 1, 1, 1, 2, 2]


def test_add_leaves_slot_and_stamp() -> None:
    buffer = make(capacity=2)
    for write in range(5):
        data = transitions(write, 1)[0]
        assert buffer.add(data) == data["index"] == write % 2
        assert data["index_generation"] == write // 2


def test_a_stamp_is_of_its_own_write_whoever_writes_next() -> None:
    """What ``generations_of`` cannot promise: here another thread writes right after ``extend``."""
    buffer = make(capacity=4)
    mine = transitions(0, 4)
    index = buffer.extend(mine)
    with ThreadPoolExecutor(1) as other:
        other.submit(buffer.extend, transitions(4, 4)).result()
    assert not torch.equal(buffer.generations_of(index), mine["index_generation"])
    assert not buffer.write_scores(index, mine["index_generation"], torch.ones(4)).any()
    assert not buffer.sampler.scored.any()


@both_shared
def test_stamps_of_threads_that_extend_at_once_each_name_their_own_transitions(
    shared: bool,
) -> None:
    buffer, threads, writes = make(capacity=64, shared=shared), 3, 12
    start = Barrier(threads)

    def insert(thread: int) -> list[TensorDict]:
        start.wait()
        batches = [transitions(1000 * thread + 5 * write, 5) for write in range(writes)]
        for data in batches:
            buffer.extend(data)
        return batches

    with ThreadPoolExecutor(threads) as pool:
        batches = [b for done in pool.map(insert, range(threads)) for b in done]
    everything = torch.cat(batches)
    stamps = torch.stack([everything["index"], everything["index_generation"]], -1)
    assert stamps.unique(dim=0).shape[0] == threads * writes * 5  # no two writes share a stamp
    live = buffer.generations_of(everything["index"]) == everything["index_generation"]
    assert int(live.sum()) == 64
    stored = buffer.storage.get(everything["index"][live])
    assert torch.equal(stored["id"], everything["id"][live])


def test_a_batch_longer_than_the_ring_stamps_only_what_is_left_of_it() -> None:
    buffer = make(capacity=4)
    data = transitions(0, 6)
    buffer.extend(data)
    live = buffer.write_scores(data["index"], data["index_generation"], data["id"] / 8)
    assert live.tolist() == [False, False, True, True, True, True]
    stored = buffer.storage.get(torch.arange(4))["id"]
    assert torch.equal(buffer.sampler._score, stored.double() / 8)


def test_stamps_are_no_part_of_what_is_stored_also_when_a_batch_comes_twice() -> None:
    locked = transitions(0, 3).lock_()
    make().extend(locked)
    assert set(locked.keys()) == {"id"}
    buffer = make()
    data = transitions(0, 3)
    for generation, start in ((0, 0), (0, 3), (0, 6), (1, 1)):
        buffer.extend(data)
        assert data["index"][0] == start
        assert data["index_generation"][-1] == max(generation, int(start == 6))
    assert set(buffer.storage.get(0).keys()) == {"id", "index"}


@pytest.mark.parametrize("dim_extend", [0, 1])
def test_in_two_dimensions_each_cell_has_its_coordinates_and_stamp(dim_extend: int) -> None:
    sampler = VLMPrioritizedSampler(40, threshold=None)
    buffer = VLMReplayBuffer(
        storage=LazyTensorStorage(40, ndim=2),
        sampler=sampler,
        dim_extend=dim_extend,
        batch_size=4,
        generator=torch.Generator().manual_seed(0),
    )
    for write in range(3):
        data = TensorDict({"id": torch.arange(20).reshape(4, 5) + 100 * write}, [4, 5])
        buffer.extend(data)
        assert data["index_generation"].eq(write // 2).all()
        coordinates = data["index"].reshape(-1, 2)
        stored = buffer.storage.get(coordinates.unbind(-1))["id"]
        assert torch.equal(stored, data["id"].flatten())
    score = data["id"].flatten() / 1000
    stamps = data["index_generation"].flatten()
    assert buffer.write_scores(tuple(coordinates.unbind(-1)), stamps, score).all()
    flat = (coordinates * torch.tensor([buffer.storage.shape[1], 1])).sum(-1)
    assert torch.equal(sampler._score[flat], score.double())
    sampler.check_valid()
    batch = buffer.sample()
    buffer.extend(
        TensorDict({"id": torch.zeros(4, 5, dtype=torch.long)}, [4, 5])
    )  # overwrites half of the rows
    buffer.update_tensordict_priority(batch.set("td_error", torch.ones(4, 1)))
    live = buffer.generations_of(batch["index"]) == batch["index_generation"]
    coordinates = batch["index"][live]
    flat = (coordinates * torch.tensor([buffer.storage.shape[1], 1])).sum(-1)
    assert sampler.visited.nonzero().flatten().tolist() == sorted(set(flat.tolist()))
    assert 0 < int(live.sum()) < 4, "another seed, please: this one proves nothing"


def test_trajectories_in_slots_are_stamped_at_each_step() -> None:
    buffer = make(capacity=3)
    data = TensorDict({"id": torch.zeros(4, 7)}, [4, 7])
    buffer.extend(data)
    assert data["index"].tolist() == [[slot] * 7 for slot in (0, 1, 2, 0)]
    assert data["index_generation"][:, 0].tolist() == [-1, 0, 0, 1]
    batch = buffer.sample()  # [4, 7]: one TD error a step, reduced to the greatest
    batch.set("td_error", torch.arange(7.0).expand(4, 7))
    buffer.extend(data[:1])  # overwrites slot 1
    buffer.update_tensordict_priority(batch)
    kept = set(batch["index"][:, 0].tolist()) - {1}
    assert buffer.sampler.visited.tolist() == [slot in kept for slot in range(3)]
    assert all(buffer.sampler._td_error[slot] == 6.0 for slot in kept)
    buffer.sampler.check_valid()


# ---------------------------------------------------------------- rows of before


def came_with_the_storage(sampler: Any) -> VLMReplayBuffer:
    return VLMReplayBuffer(storage=TensorStorage(transitions(0, 8)), sampler=sampler)


def came_from_another_buffer(sampler: Any) -> VLMReplayBuffer:
    storage = LazyTensorStorage(8)
    TensorDictReplayBuffer(storage=storage).extend(transitions(0, 8))
    return VLMReplayBuffer(storage=storage, sampler=sampler)


def came_in_behind_its_back(sampler: Any) -> VLMReplayBuffer:
    buffer = make(sampler=sampler)
    TensorDictReplayBuffer(storage=buffer.storage).extend(transitions(0, 8))
    return buffer


def plain(sampler: Any) -> TensorDictReplayBuffer:
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(8), sampler=sampler)
    buffer.extend(transitions(0, 8))
    return buffer


def came_with_a_plain_state(sampler: Any) -> VLMReplayBuffer:
    buffer = make(sampler=sampler)
    buffer.load_state_dict(plain(copy.deepcopy(sampler)).state_dict())
    return buffer


def came_with_plain_files(sampler: Any) -> VLMReplayBuffer:
    buffer = make(sampler=sampler)
    buffer.extend(transitions(0, 1))  # LazyTensorStorage learns its fields
    with TemporaryDirectory() as folder:
        plain(copy.deepcopy(sampler)).dumps(folder)
        buffer.loads(folder)
    return buffer


@pytest.mark.parametrize(
    "made",
    [
        came_with_the_storage,
        came_from_another_buffer,
        came_in_behind_its_back,
        came_with_a_plain_state,
        came_with_plain_files,
    ],
)
@pytest.mark.parametrize("ours", [True, False])
def test_rows_of_before_take_td_errors_as_those_of_a_plain_buffer_do(
    made: Callable[[Any], VLMReplayBuffer], ours: bool
) -> None:
    """α = 1, ε = 0: a leaf is |δ|. 640 draws of 8 slots leave none out (1 in 10³⁶ times)."""
    exact: dict[str, Any] = {"alpha": 1.0, "eps": 0.0, "beta": 0.0}
    boosted: dict[str, Any] = {"lmbda": 1.0, "td_boost": True, "unscored_priority": 1.0}
    buffer = made(
        VLMPrioritizedSampler(8, **exact, **boosted) if ours else PrioritizedSampler(8, **exact)
    )
    if ours:
        assert not buffer.sampler.visited.any()
        assert buffer.sampler.statistics(8)["effective_sample_size"] == 1.0
    for _ in range(10):
        batch = buffer.sample(64)
        buffer.update_tensordict_priority(batch.set("td_error", torch.full((64,), 7.0)))
    assert buffer.sampler._sum_tree[torch.arange(8)].tolist() == [7.0] * 8
    assert batch["index_generation"].min() >= 0
    late = batch[:1].clone()
    buffer.extend(transitions(8, 8))
    buffer.update_tensordict_priority(late.set("td_error", torch.full((1,), 99.0)))
    assert buffer.sampler.default_priority == 7.0  # void, though never stamped by an insertion


def test_buffers_of_one_storage_insert_behind_each_other_and_draw_what_is_there() -> None:
    storage = LazyTensorStorage(8)
    first, second = (
        VLMReplayBuffer(storage=storage, sampler=VLMPrioritizedSampler(8), batch_size=64)
        for _ in range(2)
    )
    assert first.extend(transitions(0, 5)).tolist() == [0, 1, 2, 3, 4]
    assert second.extend(transitions(5, 1)).tolist() == [5]
    assert first.add(transitions(6, 1)[0]) == 6
    for buffer in (first, second):
        batch = buffer.sample()
        assert torch.equal(batch["id"], batch["index"])
        assert (batch["sampling_probability"] == 1 / 7).all()
    stamps = second.generations_of(torch.arange(7))
    second.write_scores(torch.arange(7), stamps, torch.ones(7))
    first.empty()  # its rows are the second one's too
    first.extend(transitions(10, 2))
    assert not second.write_scores(torch.arange(7), stamps, torch.ones(7)).any()
    assert (second.sample()["sampling_probability"] == 0.5).all()
    second.sampler.check_valid()


# ---------------------------------------------------------------- rows replaced, emptied, restored


def test_emptying_voids_stamps_and_leaves_q_exact() -> None:
    """α = 1, λ = 0.5: of two slots, scored 0 and 1, the draws are 1/4 and 3/4."""
    buffer = make(sampler=VLMPrioritizedSampler(4, alpha=1.0, eps=0.0), capacity=4)
    old = transitions(0, 4)
    buffer.extend(old)
    buffer.write_scores(old["index"], old["index_generation"], torch.ones(4))
    buffer.empty()
    every = torch.arange(4)
    assert buffer.generations_of(every).tolist() == [-1] * 4
    for stamps in (old["index_generation"], buffer.generations_of(every), torch.ones(4).long()):
        assert not buffer.write_scores(every, stamps, torch.ones(4)).any()
    new = transitions(4, 2)
    assert buffer.extend(new).tolist() == [0, 1]
    stamps = buffer.generations_of(every)
    assert stamps[2:].tolist() == [-1, -1]
    assert torch.equal(stamps[:2], new["index_generation"])
    assert not buffer.write_scores(old["index"], old["index_generation"], torch.ones(4)).any()
    assert (buffer.sample(64)["sampling_probability"] == 0.5).all()
    buffer.write_scores(new["index"], new["index_generation"], torch.tensor([0.0, 1.0]))
    batch = buffer.sample(64)
    q = torch.tensor([0.25, 0.75], dtype=torch.float64)
    assert torch.equal(batch["sampling_probability"], q[batch["index"]])
    assert buffer.sampler.statistics(2)["share_positive"] == 0.5
    buffer.sampler.check_valid()


def test_emptying_holds_both_locks() -> None:
    buffer, seen = make(shared=True), []
    buffer.extend(transitions(0, 4))

    class Watching(VLMPrioritizedSampler):
        def _empty(self) -> None:
            with ThreadPoolExecutor(1) as other:
                lock = buffer._replay_lock._lock
                seen.append(other.submit(lock.acquire, blocking=False).result())
            seen.append(buffer._write_lock.acquire(block=False))
            super()._empty()

    buffer.set_sampler(Watching(8))
    buffer.empty()
    assert seen == [False, False]
    buffer.extend(transitions(0, 4))


@both_shared
@pytest.mark.parametrize(
    ("index", "slots"),
    [
        (2, [2]),
        (slice(1, 3), [1, 2]),
        (torch.tensor([4, 0]), [0, 4]),
        ([4, -8], [0, 4]),
        (range(2), [0, 1]),
        (torch.arange(8) == 3, [3]),
        ((torch.tensor([1]),), [1]),
    ],
)
def test_a_replaced_row_loses_score_td_error_and_stamp(
    index: Any, slots: list[int], shared: bool
) -> None:
    buffer = make(shared=shared)
    old = transitions(0, 5)
    buffer.extend(old)
    pair = old["index"], old["index_generation"]
    buffer.write_scores(*pair, torch.ones(5))
    buffer.write_td_errors(*pair, torch.ones(5))
    new = transitions(100, len(slots))
    buffer[index] = new[0] if isinstance(index, int) else new
    kept = [slot not in slots for slot in range(5)]
    assert (
        buffer.sampler.scored.tolist() == buffer.sampler.visited.tolist() == [*kept, *[False] * 3]
    )
    assert buffer.write_scores(*pair, torch.ones(5)).tolist() == kept
    buffer["id"] = torch.arange(5)  # an entry of the same transitions
    assert buffer.write_td_errors(*pair, torch.ones(5)).tolist() == kept
    assert buffer.extend(transitions(5, 1)).tolist() == [5]
    buffer.sampler.check_valid()


def test_a_replaced_column_of_two_dimensions_loses_its_scores_and_the_stamps_of_its_rows() -> None:
    """Three environments, four steps: the storage is [4, 3], and a stamp is of a whole row."""
    sampler = VLMPrioritizedSampler(12, threshold=None)
    buffer = VLMReplayBuffer(storage=LazyTensorStorage(12, ndim=2), sampler=sampler, dim_extend=1)
    data = TensorDict({"id": torch.arange(12).reshape(3, 4)}, [3, 4])
    buffer.extend(data)
    pair = data["index"].reshape(-1, 2), data["index_generation"].flatten()
    assert buffer.write_scores(*pair, torch.ones(12)).all()
    buffer[1:2] = TensorDict({"id": torch.full((1, 4), 99)}, [1, 4])
    assert sampler.scored.reshape(4, 3).tolist() == [[True, False, True]] * 4
    assert not buffer.write_scores(*pair, torch.ones(12)).any()
    sampler.check_valid()


@pytest.mark.parametrize("own", [True, False])
def test_loading_a_state_voids_every_stamp_given_before(own: bool) -> None:
    """Also of slots that the state has not: the next row there has another stamp."""
    buffer = make()
    first, second, third = transitions(0, 5), transitions(5, 6), transitions(20, 8)
    buffer.extend(first)
    state = copy.deepcopy(buffer.state_dict())
    if not own:  # a plain buffer with as many rows
        del state["_writer"]["_generation"]
    buffer.extend(second)
    buffer.load_state_dict(state)
    assert len(buffer) == 5
    for data in (first, second):
        pair = data["index"], data["index_generation"]
        assert not buffer.write_scores(*pair, torch.ones(len(data))).any()
    batch = buffer.sample()
    buffer.update_tensordict_priority(batch.set("td_error", torch.ones(4)))
    assert buffer.sampler.visited[batch["index"]].all()
    assert buffer.extend(third)[0] == 5
    for data in (first, second):
        pair = data["index"], data["index_generation"]
        assert not buffer.write_scores(*pair, torch.ones(len(data))).any()
    assert buffer.write_scores(third["index"], third["index_generation"], torch.ones(8)).all()


def test_a_state_whose_sampler_is_refused_leaves_the_buffer_as_it_was(tmp_path: Any) -> None:
    buffer, other = make(), make(sampler=VLMPrioritizedSampler(8))  # without a TD boost
    data = transitions(0, 8)
    buffer.extend(data)
    other.extend(transitions(8, 8))
    other.dumps(tmp_path)
    for load in (
        lambda: buffer.load_state_dict(other.state_dict()),
        lambda: buffer.loads(tmp_path),
    ):
        with pytest.raises(ValueError, match="td_boost"):
            load()
        assert torch.equal(buffer.storage[:]["id"], data["id"])
        assert buffer.write_scores(data["index"], data["index_generation"], torch.ones(8)).all()


# ---------------------------------------------------------------- processes and streams


def test_a_fork_of_the_process_inserts_and_writes_nothing() -> None:
    """Its writes would bump its own generations and reset its own scores, not those here."""
    buffer, uniform = make(shared=True), make(sampler=RandomSampler(), shared=True)
    data, moved = transitions(0, 4), pickle.dumps(make())
    buffer.extend(data)
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()

    def attempt() -> None:
        for write in (
            lambda: buffer.extend(transitions(4, 4)),
            lambda: buffer.insert(transitions(4, 4)),
            lambda: buffer.add(transitions(4, 1)[0]),
            lambda: buffer.__setitem__(0, data[0]),
            lambda: buffer.write_scores(data["index"], data["index_generation"], torch.ones(4)),
            lambda: uniform.extend(transitions(0, 4)),  # has nothing that could go wrong
            lambda: pickle.loads(moved).extend(transitions(0, 4)),  # is of that process now
        ):
            try:
                write()
                there.send("written")
            except RuntimeError as error:
                there.send(str(error))

    child = fork.Process(target=attempt)
    child.start()
    answers = [here.recv() for _ in range(7)]
    child.join()
    assert [answer.rsplit(": ")[-1] for answer in answers[:5]] == [
        "insert and write where it was built."
    ] * 5
    assert answers[5:] == ["written"] * 2


def test_work_on_a_gpu_follows_the_work_queued_under_the_lock_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two streams that stand for a learner's and a judge's, and what they are told."""
    told: list[tuple[str, Any]] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def record_event(self) -> str:
            told.append((self.name, "records"))
            return f"{self.name}'s event"

        def wait_event(self, event: str) -> None:
            told.append((self.name, f"waits for {event}"))

    buffer = make()
    buffer.extend(transitions(0, 4))
    monkeypatch.setattr(buffer._replay_lock, "_device", lambda: torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("learner", "judge"):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, of=name: Stream(of))
        data = transitions(4, 2)
        buffer.extend(data)  # takes the lock many times over, once from without
    # A stream that is captured queues nothing, and can wait for nothing from outside.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    buffer.sample()
    assert told == [
        ("learner", "records"),
        ("judge", "waits for learner's event"),
        ("judge", "records"),
    ]


# ---------------------------------------------------------------- late writes


@both_shared
def test_score_and_td_error_of_an_overwritten_slot_are_dropped(shared: bool) -> None:
    buffer = make(shared=shared)
    old, new = transitions(0, 8), transitions(8, 3)
    buffer.extend(old)
    buffer.extend(new)
    live = buffer.write_scores(old["index"], old["index_generation"], torch.full((8, 1), 0.5))
    assert live.tolist() == [False] * 3 + [True] * 5
    assert torch.equal(buffer.sampler.scored, live)
    late = old.set("td_error", torch.ones(8, 1))
    buffer.update_tensordict_priority(late)
    assert torch.equal(buffer.sampler.visited, live)
    buffer.sampler.check_valid()


def test_a_slot_never_written_is_never_live() -> None:
    buffer = make()
    buffer.extend(transitions(0, 2))
    index = torch.tensor([5, -1])
    live = buffer.write_scores(index, buffer.generations_of(index), torch.ones(2))
    assert not live.any()
    assert not buffer.sampler.scored.any()


@pytest.mark.parametrize(
    ("slot", "score", "refusal"),
    [
        (8, 0.5, "index 8 is no slot of a buffer of 8"),
        (-2, 0.5, "index -2 is no slot"),
        (1, torch.nan, "nothing was written"),
        (1, 2.0, "nothing was written"),
    ],
)
def test_a_bad_late_write_is_refused_whole_and_gives_the_locks_back(
    slot: int, score: float, refusal: str
) -> None:
    buffer = make()
    buffer.extend(transitions(0, 4))
    index = torch.tensor([0, slot])
    with pytest.raises((IndexError, ValueError), match=refusal):
        buffer.write_scores(index, buffer.generations_of(index), torch.tensor([0.5, score]))
    assert not buffer.sampler.scored.any()
    with ThreadPoolExecutor(1) as other:
        other.submit(buffer.extend, transitions(4, 1)).result(10)


def test_a_checkpoint_keeps_stamps_so_late_writes_outlive_it(tmp_path: Any) -> None:
    buffer, restored = make(), make()
    old = transitions(0, 8)
    buffer.extend(old)
    buffer.extend(transitions(8, 2))
    restored.load_state_dict(buffer.state_dict())
    by_files = make()
    by_files.extend(transitions(0, 1))  # LazyTensorStorage learns its fields
    buffer.dumps(tmp_path)
    by_files.loads(tmp_path)
    for twin in (restored, by_files):
        live = twin.write_scores(old["index"], old["index_generation"], torch.ones(8))
        assert live.tolist() == [False, False] + [True] * 6
        twin.sampler.check_valid()


# ---------------------------------------------------------------- priorities of a batch


def test_priorities_reach_torchrls_sampler_and_spare_what_was_overwritten() -> None:
    sampler = PrioritizedSampler(8, alpha=1.0, beta=0.0, eps=0.0)
    buffer = make(sampler=sampler)
    buffer.extend(transitions(0, 8))
    batch = buffer.sample().set("td_error", torch.full((4, 1), 7.0))
    buffer.extend(transitions(8, 4))
    buffer.update_tensordict_priority(batch)
    expected = torch.ones(8)
    expected[batch["index"][batch["index"] >= 4]] = 7.0
    assert torch.equal(sampler._sum_tree[torch.arange(8)], expected)


def test_a_sampler_without_priorities_hears_nothing() -> None:
    buffer = make(sampler=RandomSampler())
    data = transitions(0, 8)
    buffer.extend(data)
    batch = buffer.sample()
    assert "sampling_probability" not in batch
    buffer.update_tensordict_priority(batch.set("td_error", torch.ones(4)))
    pair = data["index"], data["index_generation"]
    with pytest.raises(TypeError, match="RandomSampler keeps no scores"):
        buffer.write_scores(*pair, torch.ones(8))
    with pytest.raises(TypeError, match="RandomSampler keeps no priorities"):
        buffer.write_td_errors(*pair, torch.ones(8))


def test_a_batch_without_td_errors_is_refused_only_where_draws_need_them() -> None:
    for td_boost in (True, False):
        buffer = make(sampler=VLMPrioritizedSampler(8, td_boost=td_boost))
        buffer.extend(transitions(0, 8))
        batch = buffer.sample()
        if td_boost:
            with pytest.raises(KeyError, match="td_error"):
                buffer.update_tensordict_priority(batch)
        else:
            buffer.update_tensordict_priority(batch)
        assert not buffer.sampler.visited.any()


def test_td_errors_that_come_with_the_data_are_taken_at_insertion() -> None:
    buffer = make(sampler=VLMPrioritizedSampler(8, td_boost=True))
    buffer.extend(transitions(0, 3).set("td_error", torch.tensor([0.5, 0.0, 2.0])))
    one = transitions(3, 1).set("td_error", torch.ones(1))[0]
    buffer.add(one)
    buffer.add(transitions(4, 1)[0])  # without one
    assert buffer.sampler._td_error[:4].tolist() == [0.5, 0.0, 2.0, 1.0]
    assert buffer.sampler.visited.tolist() == [True] * 4 + [False] * 4


def test_priority_key_names_the_td_error() -> None:
    buffer = make(priority_key="delta")
    buffer.extend(transitions(0, 8))
    buffer.update_tensordict_priority(buffer.sample().set("delta", torch.ones(4)))
    assert buffer.sampler.visited.any()


# ---------------------------------------------------------------- other parts of a buffer


class Doubling(Transform):
    """Stores each transition twice: the stored rows are not the caller's."""

    def _inv_call(self, tensordict: TensorDict) -> TensorDict:
        return torch.cat([tensordict, tensordict])


class Delayed(Transform):
    """Stores each batch with the next one, as `MultiStepTransform` does with its last rows."""

    held: TensorDict | None = None

    def _inv_call(self, tensordict: TensorDict) -> TensorDict | None:
        stored, self.held = self.held, tensordict
        return stored


def test_a_batch_is_stamped_only_if_its_very_rows_were_stored() -> None:
    buffer, data = make(transform=Doubling()), transitions(0, 3)
    assert len(buffer.extend(data)) == 6
    assert set(data.keys()) == {"id"}
    buffer, second = make(transform=Delayed()), transitions(3, 3)
    assert len(buffer.extend(data)) == 0
    assert buffer.extend(second).tolist() == [0, 1, 2]  # as many, but the first ones
    assert set(second.keys()) == {"id"}
    buffer = make(transform=lambda batch: batch)
    assert buffer.extend(data).tolist() == data["index"].tolist() == [0, 1, 2]
    assert data["index_generation"].tolist() == [0, 0, 0]


def test_inserting_rows_of_any_shape_fills_a_slot_each_and_says_which() -> None:
    """Ring of 8: rows [2, 3] after 5 fill slots 5, 6, 7 and, for the second time, 0, 1, 2."""
    buffer = make()
    assert buffer.insert(transitions(0, 5))["index"].tolist() == [0, 1, 2, 3, 4]
    data = transitions(5, 6).reshape(2, 3)
    stored = buffer.insert(data)
    assert stored["index"].tolist() == [[5, 6, 7], [0, 1, 2]]
    assert stored["index_generation"].tolist() == [[0, 0, 0], [1, 1, 1]]
    assert buffer[:]["id"].tolist() == [8, 9, 10, 3, 4, 5, 6, 7]
    assert set(data.keys()) == {"id"}
    assert make(transform=Delayed()).insert(data) is None


def test_a_writer_without_generations_cannot_take_late_writes() -> None:
    for writer in (TensorDictRoundRobinWriter(), TensorDictMaxValueWriter(rank_key="id")):
        buffer = make(writer=writer)
        data = transitions(0, 3)
        index = buffer.extend(data)
        assert "index_generation" not in data
        assert "index_generation" not in buffer.sample()
        with pytest.raises(TypeError, match="keeps no generations"):
            buffer.write_scores(index, torch.zeros(3, dtype=torch.long), torch.ones(3))


def test_a_writer_whose_generations_miss_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="writer is TensorDictRoundRobinWriter: leave it out"):
        make(writer=TensorDictRoundRobinWriter(track_generations=True))


@pytest.mark.parametrize("arguments", [{"prefetch": 2}, {"storage": ListStorage(8)}])
def test_prefetching_and_list_storages_work(arguments: dict[str, Any]) -> None:
    defaults: dict[str, Any] = {"storage": LazyTensorStorage(8), "batch_size": 4}
    sampler = VLMPrioritizedSampler(8, lmbda=0.5, td_boost=True)
    buffer = VLMReplayBuffer(sampler=sampler, **{**defaults, **arguments})
    data = transitions(0, 8)
    buffer.extend(data)
    buffer.write_scores(data["index"], data["index_generation"], torch.rand(8))
    for _ in range(20):
        batch = buffer.sample()
        assert torch.equal(batch["id"], batch["index"])
        buffer.update_tensordict_priority(batch.set("td_error", torch.rand(4)))
    sampler.check_valid()


# ---------------------------------------------------------------- drawing


def rows_of_every_kind(length: int) -> TensorDict:
    number = torch.arange(length)
    nested = TensorDict({"done": number % 2 == 0, "pixels": number.byte().reshape(-1, 1, 1)})
    rows = TensorDict({"id": number, "next": nested, "reward": number.float().unsqueeze(-1)})
    rows["next", "deep"] = {"x": torch.randn(length, 2, 3, dtype=torch.float64)}
    rows.auto_batch_size_(1)
    return rows.set("name", [f"row {i}" for i in range(length)])


@pytest.mark.parametrize("rows", [5, 8, 11], ids=["filling", "full", "overwritten"])
@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage])
@pytest.mark.parametrize(
    "sampler",
    [
        RandomSampler,
        lambda: PrioritizedSampler(8, 0.5, 0.5),
        lambda: VLMPrioritizedSampler(8, beta=0.5),
    ],
)
@pytest.mark.parametrize("arguments", [{}, {"transform": lambda rows: rows}])
def test_a_batch_is_what_torchrls_buffer_makes_of_the_same_draw(
    sampler: Any, storage: Any, rows: int, arguments: dict[str, Any]
) -> None:
    batches = []
    for kind in (VLMReplayBuffer, TensorDictReplayBuffer):
        numpy_seed(1)  # noqa: NPY002  TorchRL's prioritized sampler draws from it
        torch.manual_seed(1)
        buffer = kind(
            storage=storage(8),
            sampler=sampler(),
            batch_size=16,
            writer=TensorDictRoundRobinWriter() if kind is TensorDictReplayBuffer else None,
            **arguments,
        )
        data = rows_of_every_kind(rows)
        if storage is LazyMemmapStorage:
            del data["name"]
        for part in data.split(5):
            buffer.extend(part)
        batches.append(buffer.sample())
    ours, theirs = batches
    assert (ours.pop("index_generation") == (ours["id"] > 7).int()).all()
    assert ours.batch_size == theirs.batch_size
    assert ours.device == theirs.device
    assert ours.is_locked == theirs.is_locked
    assert set(ours.keys(True, True)) == set(theirs.keys(True, True))
    for key in theirs.keys(True, True):
        ours_is, theirs_is = ours[key], theirs[key]
        same = torch.equal if isinstance(theirs_is, torch.Tensor) else list.__eq__
        assert same(ours_is, theirs_is), key
    id_before = buffer[0]["id"]
    ours["id"].fill_(-1)  # the batch is a copy
    assert buffer[0]["id"] == id_before


def test_a_smaller_batch_and_its_information_can_be_asked_for() -> None:
    buffer = make()
    buffer.extend(transitions(0, 8))
    assert buffer.sample(3).batch_size == (3,)
    batch, info = buffer.sample(3, return_info=True)
    assert torch.equal(batch["index"], info["index"])
    assert torch.equal(batch["sampling_probability"], info["sampling_probability"])


def test_on_a_gpu_neither_a_batch_nor_its_td_errors_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tensors without data stand for a GPU's: what reads a value of one raises."""
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda values: values)  # wants a real one
    with FakeTensorMode():
        rows = transitions(0, 8).to(gpu).set("index", torch.arange(8, device=gpu))
        sampler = VLMPrioritizedSampler(8, td_boost=True, device=gpu)
        storage = TensorStorage(rows, device=gpu)
        buffer = VLMReplayBuffer(storage=storage, sampler=sampler, batch_size=4)
        monkeypatch.setattr(buffer._replay_lock, "_device", lambda: None)
        monkeypatch.setattr(buffer, "_cuda", lambda: gpu)
        for _ in range(2):
            batch = buffer.sample()
            assert {entry.device for entry in batch.values()} == {gpu}
            batch["td_error"] = torch.rand(4, 1, device=gpu)
            buffer.update_tensordict_priority(batch)
            late = [batch[key] for key in ("index", "index_generation")]
            assert buffer.write_scores(*late, torch.rand(4, device=gpu)).device == gpu
            fake = [torch.zeros(4, dtype=torch.long)] * 2
            assert buffer.write_scores(*fake, torch.rand(4)).device == gpu  # of a judge on the CPU
            with pytest.raises(DataDependentOutputException):
                bool(batch["td_error"].max() > 0)


def test_a_replayed_graph_holds_the_lock_and_sees_rows_and_settings_of_now() -> None:
    sampler = VLMPrioritizedSampler(8, lmbda=0.25)
    sampler._sum_tree = RadixSumTree(8)
    buffer = make(sampler=sampler)
    buffer.extend(transitions(0, 3))
    sampler.lmbda = 0.75
    with ThreadPoolExecutor(1) as other, buffer.replaying():
        assert sampler._drawn_with.tolist() == [3.0, 2.0, 0.75, 0.0]
        assert not other.submit(buffer._replay_lock._lock.acquire, blocking=False).result()
