"""What the sampler tests share: facts about slots, told to a sampler, and q by its definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from vlmrb_torchrl.samplers import VLMPrioritizedSampler
from vlmrb_torchrl.samplers.trees import RadixSumTree

SEED = 20260201
SLOTS = 48
EVERY = torch.arange(SLOTS)


class Slots:
    """As much of a storage as a sampler reads."""

    ndim, device = 1, torch.device("cpu")

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length


def on(tree: type, sampler: VLMPrioritizedSampler) -> VLMPrioritizedSampler:
    """The same sampler on the given kind of tree."""
    if tree is RadixSumTree:
        leaves = sampler._sum_tree.leaves()
        sampler._sum_tree = RadixSumTree(sampler._max_capacity, sampler.dtype)
        sampler._sum_tree.update(torch.arange(sampler._max_capacity), leaves)
    return sampler


def facts(seed: int) -> tuple[Tensor, Tensor]:
    """Scores, a quarter of them missing (NaN), and TD errors, a quarter of them missing too."""
    rng = torch.Generator().manual_seed(seed)
    score, td_error = torch.rand(2, SLOTS, dtype=torch.float64, generator=rng)
    score[torch.rand(SLOTS, generator=rng) < 0.25] = torch.nan
    td_error[torch.rand(SLOTS, generator=rng) < 0.25] = torch.nan
    return score, 3.0 * td_error


def told(sampler: VLMPrioritizedSampler, score: Tensor, td_error: Tensor) -> VLMPrioritizedSampler:
    """A sampler that heard these facts, in an order that does not matter."""
    sampler.extend(EVERY)
    scored, visited = ~score.isnan(), ~td_error.isnan()
    sampler.update_score(EVERY[scored], score[scored])
    sampler.update_priority(EVERY[visited], td_error[visited])
    return sampler


def written(sampler: VLMPrioritizedSampler) -> int:
    """How many slots hold a row."""
    return int((sampler._td_error[: sampler._max_capacity] > -torch.inf).sum())


def mixture(score: Tensor, td_error: Tensor, **arguments: Any) -> np.ndarray:
    """q by its definition, in numpy; unvisited slots were written first, so their |δ| is 1."""
    p = score.numpy()
    if arguments["threshold"] is not None:
        p = np.where(np.isnan(p), np.nan, p >= arguments["threshold"])
    of_no = arguments.get("negative_priority", 0.0)
    p = of_no + (1 - of_no) * p
    p = np.where(np.isnan(p), arguments["unscored_priority"], p)
    delta = np.where(np.isnan(td_error.numpy()), 1.0, td_error.numpy())
    n, lmbda = len(p), arguments["lmbda"]
    if not (p > 0).any():
        return np.full(n, 1.0 / n)
    mass = (p * (delta if arguments["td_boost"] else 1.0) + arguments["eps"]) ** arguments["alpha"]
    return lmbda * mass / mass.sum() + (1.0 - lmbda) / n


def chi_square(drawn: Tensor, q: np.ndarray) -> float:
    """p-value of the counts under q."""
    counts = np.bincount(drawn.numpy(), minlength=len(q))
    return float(stats.chisquare(counts, q * counts.sum()).pvalue)


def snapshot(sampler: VLMPrioritizedSampler) -> dict[str, Any]:
    def read(state: Any) -> Any:
        if isinstance(state, dict):
            return {name: read(part) for name, part in state.items()}
        return state.tolist() if isinstance(state, Tensor) else state

    read_state: dict[str, Any] = read(sampler.state_dict())
    return read_state
