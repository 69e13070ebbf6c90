"""Replay guided by a frozen judge: a mixture of the judged priority and uniform replay.

Source: Sharony et al. 2026, VLM-Guided Experience Replay, arXiv 2602.01915; on top of Schaul et
al. 2016, Prioritized Experience Replay, arXiv 1511.05952.

N: slots written, B: items of one call.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchrl.data.replay_buffers.utils import unravel_index

from vlmrb_torchrl.checks import checked_device, is_real, is_whole, shown
from vlmrb_torchrl.keys import PROBABILITY, WEIGHT
from vlmrb_torchrl.samplers.writes import SlotWrites


class VLMPrioritizedSampler(SlotWrites):
    r"""Draws slot i with probability q(i) = λ q^P(i) + (1 − λ)/N.

    q^P(i) ∝ (p_i + ε)^α, or (p_i |δ_i| + ε)^α with the TD boost, where p_i is the judge's score of
    the slot, thresholded to 0 or 1 unless ``threshold`` is None, and δ_i the latest TD error. While
    no slot has p > 0 there is nothing to prefer, and q is exactly uniform.

    Every batch comes with ``priority_weight`` = (N q)^−β, float32, the weight of the mixture that
    was drawn from (at most (1 − λ)^−β, so no minimum over the buffer is tracked), and with
    ``sampling_probability`` = q, float64. With ``lmbda=1, td_boost=True, unscored_priority=1`` it
    is prioritized experience replay, with weights before TorchRL's division by the greatest one.

    A slot that is (over)written is unscored and unvisited. Unscored, its p is
    ``unscored_priority``; unvisited, its |δ| is the greatest |δ| seen before it was written, 1
    before the first. Of several scores of one slot (clips may overlap) the greatest counts.

    Args:
        max_capacity: Slots of the storage.
        lmbda: λ in [0, 1], the share of draws that follow the judge; torchrl's ``LinearScheduler``
            can drive it. The paper's is at most 0.5; 0 is uniform replay.
        alpha: α >= 0, exponent of the priority.
        beta: β >= 0, exponent of the weight; 0 (as in the paper) switches it off.
        eps: ε >= 0, keeps every slot drawable under λ = 1. With a million slots scored 0 and one
            positive 32-step clip, q^P gives the clip 99.8 % at 1e-12 and 67 % at 1e-8 (α = 0.6).
        td_boost: Multiply p by |δ| (the paper: in continuous control).
        threshold: Score from which p = 1, else 0; None takes the score itself as p.
        unscored_priority: p̄ in [0, 1], p of a slot that has no score yet.
        dtype: Of priorities and sums. In float64 a slot takes 24 bytes, and 16 to 32 in the tree.
        device: Of arrays and tree; None follows a CUDA storage and is the CPU else.
        reduction: How a buffer reduces a priority per step of a stored trajectory to one per slot:
            ``"max"``, ``"min"``, ``"median"`` or ``"mean"``.
        max_priority_within_buffer: The running maximum of |δ| is over the slots that still hold
            it, instead of over all time.

    Raises:
        ValueError: An argument is outside its range.

    Example:
        >>> from torchrl.data import LazyTensorStorage, ReplayBuffer
        >>> sampler = VLMPrioritizedSampler(4)
        >>> buffer = ReplayBuffer(storage=LazyTensorStorage(4), sampler=sampler, batch_size=2)
        >>> index = buffer.extend(torch.arange(4))
        >>> sampler.update_score(index, torch.tensor([0.9, 0.1, 0.2, 0.3]))
        >>> slots, info = buffer.sample(return_info=True)
        >>> q = info["sampling_probability"]
        >>> bool(torch.where(slots == 0, 0.625, 0.125).sub(q).abs().max() < 1e-6)
        True
    """

    _td_boost: bool
    _threshold: float | None
    _unscored_priority: float

    def __init__(
        self,
        max_capacity: int,
        *,
        lmbda: float = 0.5,
        alpha: float = 0.6,
        beta: float = 0.0,
        eps: float = 1e-12,
        td_boost: bool = False,
        threshold: float | None = 0.5,
        unscored_priority: float = 0.0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
        reduction: str = "max",
        max_priority_within_buffer: bool = False,
    ) -> None:
        # Not super().__init__: it requires the compiled extension, and builds a min tree that
        # nothing here reads. These are all the attributes that it sets.
        _require(is_whole(max_capacity, 1), "max_capacity", max_capacity, "a whole number >= 1")
        _require(is_real(eps, 0), "eps", eps, "finite and >= 0")
        choices = ("max", "min", "median", "mean")
        known = isinstance(reduction, str) and reduction in choices
        _require(known, "reduction", reduction, f"one of {', '.join(choices)}")
        within = max_priority_within_buffer
        _require(isinstance(within, bool), "max_priority_within_buffer", within, "True or False")
        self._max_capacity = max_capacity
        self._eps = eps
        self.reduction = reduction
        self.dtype = dtype
        self._max_priority_within_buffer = max_priority_within_buffer
        self._device = None if device is None else _present(device)
        self._init()
        self.lmbda = lmbda
        self.alpha = alpha
        self.beta = beta
        self.td_boost = td_boost
        self.threshold = threshold
        self.unscored_priority = unscored_priority

    # ---------------------------------------------------------------- parameters

    @property
    def lmbda(self) -> float:
        """λ in [0, 1]: the share of draws that follow the judge."""
        return self._lmbda

    @lmbda.setter
    def lmbda(self, value: float) -> None:
        value = _number("lmbda", value)
        _require(0.0 <= value <= 1.0, "lmbda", value, "in [0, 1]")
        self._lmbda = value

    @property
    def alpha(self) -> float:
        """α >= 0: exponent of the priority. Setting it recomputes every leaf, O(capacity)."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        value = _number("alpha", value)
        # TorchRL's words, for those who match them.
        _require(0.0 <= value < math.inf, "alpha", value, "greater or equal than 0 and finite")
        self._set("_alpha", value)

    @property
    def beta(self) -> float:
        """β >= 0: exponent of the importance weight; 0 switches it off."""
        return self._beta

    @beta.setter
    def beta(self, value: float) -> None:
        value = _number("beta", value)
        _require(0.0 <= value < math.inf, "beta", value, "greater or equal to 0 and finite")
        self._beta = value

    @property
    def td_boost(self) -> bool:
        """Whether p is multiplied by |δ|. Setting it recomputes every leaf, O(capacity)."""
        return self._td_boost

    @td_boost.setter
    def td_boost(self, value: bool) -> None:
        _require(isinstance(value, bool), "td_boost", value, "True or False")
        self._set("_td_boost", value)

    @property
    def threshold(self) -> float | None:
        """Score from which p = 1, or None. Setting it judges every score anew, O(capacity)."""
        return self._threshold

    @threshold.setter
    def threshold(self, value: float | None) -> None:
        _require(value is None or is_real(value, 0, 1), "threshold", value, "in [0, 1], or None")
        self._set("_threshold", value)

    @property
    def unscored_priority(self) -> float:
        """p̄ in [0, 1]: p of a slot without a score. Setting it changes them all, O(capacity)."""
        return self._unscored_priority

    @unscored_priority.setter
    def unscored_priority(self, value: float) -> None:
        _require(is_real(value, 0, 1), "unscored_priority", value, "in [0, 1]")
        self._set("_unscored_priority", value)

    def _set(self, name: str, value: Any) -> None:
        """Sets what every leaf follows from, and lets them follow."""
        changed = getattr(self, name, None) != value
        setattr(self, name, value)
        if changed and self._written:
            self._rejudge()

    @property
    def uses_td_error(self) -> bool:
        """Whether draws depend on the TD errors passed to :meth:`update_priority`."""
        return self.td_boost

    # ---------------------------------------------------------------- drawing

    def sample(self, storage: Any, batch_size: int) -> tuple[Any, dict[str, Tensor]]:
        """Draws slots with replacement.

        Args:
            storage: The storage whose written slots, N = ``len(storage)``, are drawn from.
            batch_size: Number of draws, B.

        Returns:
            Slots, int64 ``[B]`` (a tuple of coordinates for a storage of several dimensions), and
            ``{"priority_weight": (N q)^-β float32 [B], "sampling_probability": q float64 [B]}``,
            all where the storage is.

        Raises:
            RuntimeError: The storage is empty.
            ValueError: ``batch_size`` is no number of draws.
        """
        _require(is_whole(batch_size, 0), "batch_size", batch_size, "a whole number >= 0")
        self._maybe_init_from_storage(storage)
        self._just_marked = None
        slots = len(storage)
        if slots == 0:
            raise RuntimeError("Cannot sample from an empty storage.")
        if self._written != slots:
            self.match_storage(storage)
        index, density = self._draw(slots, batch_size)
        home = getattr(storage, "device", None)
        if home != index.device:
            home = "cpu" if home in (None, "auto") else home
            index, density = index.to(home), density.to(home)
        weight = density.pow(-self._beta) if self._beta else torch.ones_like(density)
        info = {WEIGHT: weight.float(), PROBABILITY: density.div_(slots)}
        if storage.ndim > 1:
            return unravel_index(index, storage.shape), info
        return index, info

    def _draw(self, slots: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Slots ``[B]``, and N q of each, float64 ``[B]``."""
        draw = self._uniform(batch_size)
        lmbda, _ = self._mixture()
        if lmbda > 0.0:
            return self._sum_tree.mix(draw, slots, lmbda)
        return (draw * slots).long().clamp_max_(slots - 1), torch.ones_like(draw)

    def _mixture(self) -> tuple[float, float]:
        """The λ to draw with, 0 while there is nothing to prefer, and the tree's total."""
        positive = self._positive > 0
        positive |= self.unscored_priority > 0.0 and self._scored < self._written
        total = self._sum_tree.total() if positive and self._lmbda > 0.0 else 0.0
        return (self._lmbda, total) if total > 0.0 else (0.0, 0.0)  # 0 under eps=0, all |δ| 0

    def _uniform(self, batch_size: int) -> Tensor:
        rng, device = self._rng, self._p.device
        source = device if rng is None else rng.device
        draw = torch.rand(batch_size, dtype=torch.float64, device=source, generator=rng)
        return draw.to(device)

    # ---------------------------------------------------------------- reporting

    def probabilities(self, length: int) -> Tensor:
        """The probability q of every slot, float64 ``[length]``, in closed form.

        Args:
            length: Slots written, N = ``len(buffer)``.

        Raises:
            ValueError: The sampler does not have that many slots, or none is asked for.
        """
        self._check_length(length, 1)
        lmbda, total = self._mixture()
        uniform = torch.full((length,), (1.0 - lmbda) / length, dtype=torch.float64)
        uniform = uniform.to(self._p.device)
        if lmbda == 0.0:
            return uniform
        return uniform.add_(self._sum_tree.leaves()[:length].double(), alpha=lmbda / total)

    def statistics(self, length: int) -> dict[str, float]:
        """Figures for a logger, in one O(N) pass.

        Args:
            length: Slots written, N = ``len(buffer)``.

        Returns:
            ``share_scored``: slots with a score; ``share_positive``: slots with a score and p > 0;
            ``effective_sample_size``: 1 / Σ q²; each as a share of N, in [0, 1].
        """
        self._check_length(length, 0)
        if length == 0:
            return {"share_scored": 0.0, "share_positive": 0.0, "effective_sample_size": 0.0}
        density = self.probabilities(length).mul_(length)
        return {
            "share_scored": self._scored / length,
            "share_positive": self._positive / length,
            "effective_sample_size": 1.0 / float(density.square_().mean()),
        }

    def _check_length(self, length: int, least: int) -> None:
        most = self._max_capacity
        _require(
            is_whole(length, least, most), "length", length, f"a number of slots, up to {most}"
        )

    def __repr__(self) -> str:
        names = "lmbda", "alpha", "beta", "td_boost", "threshold", "unscored_priority"
        arguments = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        tree = type(self._sum_tree).__name__
        return f"{type(self).__name__}({self._max_capacity}, {arguments}, tree={tree})"


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {name}={shown(value)}")


def _number(name: str, value: Any) -> float:
    """``value``, or what a tensor of one element holds; a string is no number."""
    try:
        if not isinstance(value, (str, bytes)):
            return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    raise ValueError(f"{name} must be a number, got {name}={shown(value)}")


def _present(device: Any) -> torch.device:
    """A device with its ordinal, as tensors report it: "cuda" is not equal to "cuda:0"."""
    named = checked_device(device)
    try:
        return torch.empty(0, device=named).device
    except Exception as error:  # torch says it in a different one for each kind of device
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device must be one that is here, got device={named} ({reason})"
        ) from None
