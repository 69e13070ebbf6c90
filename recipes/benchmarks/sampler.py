"""What a draw and its priority update cost, against TorchRL's and cpprb's prioritized replay.

Once of the samplers alone, and once of whole buffers, which hand out the rows that were drawn.

``python -m recipes.benchmarks.sampler --help``
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer, TensorStorage
from torchrl.data.replay_buffers.samplers import PrioritizedSampler

from recipes.arguments import program
from recipes.benchmarks.timing import Spread, against_first, rates, show
from vlmrb_torchrl.buffer import VLMReplayBuffer
from vlmrb_torchrl.keys import TD_ERROR
from vlmrb_torchrl.samplers import VLMPrioritizedSampler
from vlmrb_torchrl.samplers.trees import RadixSumTree

ALPHA, BETA, EPS = 0.6, 0.4, 1e-8  # of all contestants: TorchRL's ε, PER's α and β
POSITIVE_SHARE = 0.1  # of the slots, where a judge counts


def cycle(sampler: PrioritizedSampler, slots: int, batch_size: int) -> Callable[[], int]:
    """Draw a batch and write its TD errors back, on a sampler whose every slot was visited."""
    storage, every = LazyTensorStorage(slots), torch.arange(slots)
    storage.set(every, torch.zeros(slots))  # the samplers read nothing of it but its length
    # TorchRL's tree takes priorities of its own dtype only.
    sampler.update_priority(every, torch.rand(slots, dtype=sampler.dtype))
    td_error = torch.rand(batch_size, dtype=sampler.dtype)

    def work() -> int:
        index, _ = sampler.sample(storage, batch_size)
        sampler.update_priority(index, td_error)
        return 1

    return work


def buffer_cycle(buffer: TensorDictReplayBuffer) -> Callable[[], int]:
    """The same of a buffer, which gathers the rows of the batch."""
    td_error = torch.rand(buffer.batch_size, dtype=buffer.sampler.dtype)

    def work() -> int:
        batch = buffer.sample()
        batch.set(TD_ERROR, td_error)
        buffer.update_tensordict_priority(batch)
        return 1

    return work


def cpprb_cycle(slots: int, batch_size: int, rows: TensorDict | None = None) -> Callable[[], int]:
    """The same of cpprb, whose trees are single precision; without rows it copies one number."""
    from cpprb import PrioritizedReplayBuffer

    entries = {"x": torch.zeros(slots)} if rows is None else dict(rows.flatten_keys(".").items())
    arrays = {name: entry.numpy() for name, entry in entries.items()}
    kinds = {name: {"shape": a.shape[1:] or 1, "dtype": a.dtype} for name, a in arrays.items()}
    buffer = PrioritizedReplayBuffer(slots, kinds, alpha=ALPHA, eps=EPS)
    buffer.add(**arrays, priorities=np.random.default_rng(0).random(slots))
    td_error = np.random.default_rng(1).random(batch_size)

    def work() -> int:
        batch = buffer.sample(batch_size, BETA)
        buffer.update_priorities(batch["indexes"], td_error)
        return 1

    return work


def doorkey_rows(slots: int) -> TensorDict:
    """Transitions of DoorKey-6x6, as the recipes store them."""
    grids = torch.randint(10, (2, slots, 6, 6, 3), dtype=torch.uint8).unbind()
    ended = torch.zeros(slots, 1, dtype=torch.bool)
    after = {
        "observation": grids[0],
        "reward": torch.rand(slots, 1),
        "done": ended,
        "terminated": ended.clone(),
    }
    action = torch.randint(7, (slots,))
    rows = {"observation": grids[1], "action": action, "next": after}
    return TensorDict(rows, [slots])


def judged(slots: int, dtype: torch.dtype, **arguments: Any) -> VLMPrioritizedSampler:
    """Our sampler with every slot scored, some of them positive."""
    sampler = VLMPrioritizedSampler(slots, alpha=ALPHA, eps=EPS, dtype=dtype, **arguments)
    every = torch.arange(slots)
    sampler.extend(every)
    sampler.update_score(every, (torch.rand(slots) < POSITIVE_SHARE).to(dtype))
    return sampler


def samplers(
    slots: int, dtype: torch.dtype, torchrls: torch.dtype
) -> dict[str, PrioritizedSampler]:
    """TorchRL's first, then ours, and the precision of either."""
    per = VLMPrioritizedSampler(
        slots,
        lmbda=1.0,
        td_boost=True,
        unscored_priority=1.0,
        alpha=ALPHA,
        beta=BETA,
        eps=EPS,
        dtype=dtype,
    )
    return {
        "TorchRL": PrioritizedSampler(slots, ALPHA, BETA, EPS, torchrls),
        "ours, as PER": per,
        "ours, λ 0.5, β 0": judged(slots, dtype, lmbda=0.5),
        "ours, λ 0.5, boost": judged(slots, dtype, lmbda=0.5, beta=BETA, td_boost=True),
    }


def race(
    slots: int, batch_size: int, dtype: torch.dtype, rounds: int, seconds: float
) -> dict[str, Spread]:
    """Cycles per second of each sampler."""
    fallback = judged(slots, dtype, lmbda=0.5, beta=BETA, td_boost=True)
    leaves = fallback._sum_tree.leaves()
    fallback._sum_tree = RadixSumTree(slots, dtype)
    fallback._sum_tree.update(torch.arange(slots), leaves)
    all_of_them = samplers(slots, dtype, dtype) | {"same, radix tree": fallback}
    contestants = {n: cycle(sampler, slots, batch_size) for n, sampler in all_of_them.items()}
    if find_spec("cpprb"):
        contestants["cpprb, float32"] = cpprb_cycle(slots, batch_size)
    return rates(contestants, rounds, seconds)


def buffer_race(
    slots: int, batch_size: int, dtype: torch.dtype, rounds: int, seconds: float
) -> dict[str, Spread]:
    """Cycles per second of each sampler in a buffer, TorchRL's in TorchRL's."""
    rows = doorkey_rows(slots)
    contestants = {}
    # TorchRL's buffer cannot work with its own sampler in double precision.
    for name, sampler in samplers(slots, dtype, torch.float32).items():
        kind = TensorDictReplayBuffer if name == "TorchRL" else VLMReplayBuffer
        buffer = kind(storage=TensorStorage(rows), sampler=sampler, batch_size=batch_size)
        contestants[name] = buffer_cycle(buffer)
    if find_spec("cpprb"):
        contestants["cpprb, float32"] = cpprb_cycle(slots, batch_size, rows)
    return rates(contestants, rounds, seconds)


def main(
    slots: tuple[int, ...] = (10_000, 100_000, 1_000_000),
    batch_sizes: tuple[int, ...] = (32, 256),
    dtype: Literal["float32", "float64"] = "float64",
    rounds: int = 15,
    seconds: float = 0.1,
    seed: int = 0,
) -> None:
    """Time sample + update_priority of samplers, then of buffers, on one CPU core.

    Args:
        slots: Slots of the buffers, all of them written.
        batch_sizes: Draws of a batch.
        dtype: Of the trees and TD errors of our sampler, and of TorchRL's outside a buffer.
        rounds: Repetitions, in turn for all, in one run.
        seconds: Least duration of each measurement.
        seed: Of priorities and draws.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  TorchRL draws from numpy's global generator
    if not find_spec("cpprb"):
        print("cpprb is not installed and left out: pip install cpprb")
    for title, held in (("samplers", race), ("buffers of DoorKey-6x6's rows", buffer_race)):
        rows: list[tuple[object, ...]] = []
        for n in slots:
            for batch_size in batch_sizes:
                measured = held(n, batch_size, getattr(torch, dtype), rounds, seconds)
                times = {name: speed.durations(1e6) for name, speed in measured.items()}
                rows += [(name, n, batch_size, *figures) for name, *figures in against_first(times)]
        show(
            f"sample + update_priority of {title}, {dtype}",
            ("replay", "slots", "batch", "μs/cycle", "time ÷ TorchRL's"),
            rows,
        )


if __name__ == "__main__":
    program(main)
