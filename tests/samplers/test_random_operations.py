"""Random operations from three threads: no score and no TD error ever sits on a wrong transition.

Each transition carries an id, and its score and |δ| are functions of the id. One thread inserts
over the end of a small ring that came with rows, and now and then replaces rows, empties the buffer
or goes back to a state of before; one scores insertions in random order, on a CUDA stream of its
own where the rows are on a GPU; one samples and writes TD errors back in random order. Between
rounds all three stand still and every slot is compared with the id that lies in it. Nothing sleeps:
threads only ever wait for the buffer's locks.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from tests.samplers.sampler_facts import written
from vlmrb_torchrl.buffer import VLMReplayBuffer
from vlmrb_torchrl.samplers import GuidedPERSampler, VLMPrioritizedSampler

CAPACITY = 101
SEED = 31
KEPT = 12  # insertions and samples that are held back, to make their writes late


def score_of(ids: Tensor) -> Tensor:
    return (ids * 2654435761 % 2**32).double() / 2**32


def td_error_of(ids: Tensor) -> Tensor:
    return (ids * 40503 % 2**16).double() / 2**12


class World:
    """A buffer under random operations."""

    def __init__(
        self, seed: int, shared: bool, device: str = "cpu", kind: type = VLMPrioritizedSampler
    ) -> None:
        self.sampler = kind(CAPACITY, td_boost=True, threshold=None)
        storage = LazyTensorStorage(CAPACITY, device=device)
        self.ids = 0
        TensorDictReplayBuffer(storage=storage).extend(self.new(40))
        self.buffer = VLMReplayBuffer(
            storage=storage,
            sampler=self.sampler,
            batch_size=16,
            shared=shared,
            generator=torch.Generator().manual_seed(seed),
        )
        self.stream = torch.cuda.Stream() if device == "cuda" else None
        self.chance = [random.Random(seed + thread) for thread in range(3)]
        self.unscored: list[TensorDict] = []
        self.unvisited: list[TensorDict] = []
        self.live = self.late = self.wraps = 0
        self.operations = dict.fromkeys(("replace", "empty", "save", "load"), 0)
        self.insert()
        self.save()

    def new(self, length: int) -> TensorDict:
        ids = torch.arange(self.ids, self.ids + length)
        self.ids += length
        return TensorDict({"id": ids}, [length])

    def change(self) -> None:
        """Inserts mostly."""
        chance = self.chance[0]
        odds = {"insert": 40, "replace": 6, "empty": 1, "save": 1, "load": 2}
        (operation,) = chance.choices([*odds], [*odds.values()])
        getattr(self, operation)()
        if operation != "insert":
            self.operations[operation] += 1

    def insert(self) -> None:
        """Extends, now and then by more than the whole ring."""
        data = self.new(self.chance[0].choice([1, 7, 16, 16, 16, 40, CAPACITY + 20]))
        index = self.buffer.extend(data)
        self.wraps += int(index[0] > index[-1])
        self.unscored.append(data)
        if len(self.unscored) > KEPT:
            self.unscored.pop(0)

    def replace(self) -> None:
        rows = self.chance[0].sample(range(len(self.buffer)), min(5, len(self.buffer)))
        self.buffer[torch.tensor(rows)] = self.new(len(rows))

    def empty(self) -> None:
        self.buffer.empty()
        self.insert()

    def save(self) -> None:
        # Only this thread changes rows, which a state refers to; of the rest it is a copy.
        self.state = copy.deepcopy(self.buffer.state_dict())

    def load(self) -> None:
        self.buffer.load_state_dict(self.state)

    def score(self) -> None:
        """Scores some rows of some insertion, old or new, for the first time or again."""
        chance = self.chance[1]
        data = chance.choice(tuple(self.unscored))
        rows = data[torch.tensor([chance.random() < 0.7 for _ in range(len(data))])]
        with torch.cuda.stream(self.stream):
            live = self.buffer.write_scores(
                rows["index"], rows["index_generation"], score_of(rows["id"])
            )
        self.live += int(live.sum())
        self.late += int((~live).sum())

    def learn(self) -> None:
        """Samples, and writes back the TD errors of some earlier sample."""
        chance = self.chance[2]
        try:
            batch = self.buffer.sample()
        except RuntimeError as error:
            if "empty storage" in str(error):
                return
            raise
        self.unvisited.append(batch.set("td_error", td_error_of(batch["id"]).unsqueeze(-1)))
        if len(self.unvisited) >= KEPT:
            self.buffer.update_tensordict_priority(self.unvisited.pop(chance.randrange(KEPT)))

    def run(self, rounds: int, operations_each: int) -> None:
        """Rounds of so many operations by each of the three threads, a check after each."""

        def repeat(operation: Callable[[], None]) -> None:
            for _ in range(operations_each):
                operation()

        with ThreadPoolExecutor(3) as threads:
            for _ in range(rounds):
                running = [threads.submit(repeat, o) for o in (self.change, self.score, self.learn)]
                for thread in running:
                    thread.result()
                self.check()

    def check(self) -> None:
        """Compares every slot with the transition in it."""
        ids = self.buffer.storage.get(torch.arange(len(self.buffer)))["id"].cpu()
        state = self.sampler.state_dict()
        score, td_error = state["_score"].cpu(), state["_td_error"].cpu()
        scored, visited = (score >= 0)[: len(ids)], (td_error >= 0)[: len(ids)]
        assert torch.equal(score[: len(ids)][scored], score_of(ids[scored]))
        assert torch.equal(td_error[: len(ids)][visited], td_error_of(ids[visited]))
        assert written(self.sampler) == len(ids)
        assert float(self.sampler.probabilities(len(ids)).sum()) == pytest.approx(1.0)
        self.sampler.check_valid()


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize(
    ("device", "shared"),
    [
        ("cpu", False),
        ("cpu", True),
        ("played", False),
        pytest.param("cuda", False, marks=needs_gpu),
    ],
)
@pytest.mark.parametrize("kind", [VLMPrioritizedSampler, GuidedPERSampler])
@pytest.mark.parametrize(
    ("rounds", "operations_each"),
    [
        (8, 20),
        pytest.param(20, 50, marks=pytest.mark.slow),
        pytest.param(500, 667, marks=pytest.mark.slow),
    ],
    ids=["hundreds", "thousands", "million"],
)
def test_no_write_lands_on_a_wrong_transition(
    request: Any, rounds: int, operations_each: int, device: str, shared: bool, kind: type
) -> None:
    torch.set_num_threads(1)
    if device == "played":
        request.getfixturevalue("as_on_a_gpu")
        device = "cpu"
    world = World(SEED, shared, device, kind)
    print("seed", SEED)
    world.run(rounds, operations_each)
    print(
        f"{3 * rounds * operations_each} operations, {world.ids} transitions, {world.wraps} wraps"
    )
    print(f"{world.operations}; scores: {world.live} live, {world.late} late")
    assert world.wraps > rounds
    assert min(world.operations.values()) >= 1
    assert min(world.live, world.late) > 100  # else the run would prove nothing


def test_the_check_would_notice_a_write_without_a_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    def unguarded(
        self: VLMReplayBuffer, write: Any, index: Tensor, generation: Tensor, value: Tensor
    ) -> Tensor:
        with self._replay_lock:
            write(index, value.reshape(-1))
        return torch.ones_like(index, dtype=torch.bool)

    monkeypatch.setattr(VLMReplayBuffer, "_write_live", unguarded)
    with pytest.raises(AssertionError):
        World(SEED, shared=False).run(8, 20)
