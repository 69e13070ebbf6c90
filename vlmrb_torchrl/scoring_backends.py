"""Where a scorer runs: in the thread that asks it; `scoring_process` has the process."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import Transform

from vlmrb_torchrl.checks import quoted, shown
from vlmrb_torchrl.keys import CLIP
from vlmrb_torchrl.scoring_worker import device_of, drawing_on, judge, load

Mode = Literal["auto", "process", "thread", "sync"]


class Backend(Protocol):
    """Scores one batch at a time. One thread calls `start` and `score`, any thread the others."""

    def start(self) -> None:
        """Get ready, if not ready yet; raises `ScorerError` if that fails."""

    def score(self, clips: TensorDictBase) -> NDArray[np.float32]:
        """Scores of a batch of clips, float32 ``[B]``; raises `ScorerError` if one has none."""

    def overdue(self) -> str:
        """What is to be said, once, of a call that takes longer than it may; else ``""``."""

    def abort(self) -> None:
        """End the call that runs, where it can be ended, and what was started."""


class InlineBackend:
    """Runs the scorer in the thread that calls, on CUDA in a stream of its own if told to.

    A call that hangs cannot be ended; whatever it answers, however late, is taken.

    Args:
        transform: Draws the clips, on the scorer's device.
        scorer: The scorer.
        timeout_s: Seconds for a batch, beyond which it is `overdue`.
        start_timeout_s: The same for loading, and for the first batch, which may compile.
        own_stream: Compute in a stream of priority 0, the least, which nothing else waits for.
    """

    def __init__(
        self,
        transform: Transform | None,
        scorer: TensorDictModuleBase,
        *,
        timeout_s: float,
        start_timeout_s: float,
        own_stream: bool,
    ) -> None:
        self._transform, self._scorer = transform, scorer
        self._timeout_s, self._start_timeout_s = timeout_s, start_timeout_s
        self._own_stream = own_stream
        self._stream: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        self._loaded = False
        self._limit_s = max(timeout_s, start_timeout_s)  # of the next batch
        # The call that runs: when it should have ended, and its limit; then the last that was told.
        self._call: tuple[float, float] | None = None
        self._told: tuple[float, float] | None = None

    def start(self) -> None:
        """Load the scorer."""
        if self._loaded:
            return
        with self._within(self._start_timeout_s):
            load(self._scorer)
        device = device_of(self._scorer)
        self._transform = drawing_on(self._transform, device)
        if self._own_stream and device.type == "cuda":
            stream = torch.cuda.Stream(device)
            # The weights may still be on their way. This stream waits for them, never the reverse.
            stream.wait_stream(torch.cuda.current_stream(device))
            self._stream = torch.cuda.stream(stream)
        self._loaded = True

    def score(self, clips: TensorDictBase) -> NDArray[np.float32]:
        """Score ``clips`` here and now."""
        self.start()
        try:
            with self._within(self._limit_s), self._stream:
                return judge(self._transform, self._scorer, clips)
        finally:
            self._limit_s = self._timeout_s

    @contextlib.contextmanager
    def _within(self, limit_s: float) -> Iterator[None]:
        self._call = (time.monotonic() + limit_s, limit_s)
        try:
            yield
        finally:
            self._call = None

    def overdue(self) -> str:
        """What is to be said, once, of a call that takes longer than it may; else ``""``."""
        call = self._call
        if call is None or call is self._told or time.monotonic() < call[0]:
            return ""
        self._told = call
        return (
            f"no answer within {call[1]:g} s; a thread cannot be ended, so it is waited for, and "
            "clips that find no room meanwhile are dropped"
        )

    def abort(self) -> None:
        """Nothing can be ended."""


def check_scorer(scorer: Any, transform: Any) -> None:
    """Refuse what cannot be asked for scores.

    Raises:
        TypeError: ``scorer`` is no TensorDictModule, or ``transform`` no Transform.
        ValueError: The scorer reads frames and nothing draws them.
    """
    if not isinstance(scorer, TensorDictModuleBase):
        raise TypeError(
            f"scorer is {shown(scorer)}; pass a ClipScorer or another TensorDictModule."
        )
    if transform is not None and not isinstance(transform, Transform):
        raise TypeError(f"transform is {shown(transform)}; pass ClipRenderTransform(renderer).")
    if CLIP in scorer.in_keys and transform is None:
        raise ValueError(f"{scorer!r} reads frames; pass ClipRenderTransform(renderer).")


def choose_mode(mode: str, scorer: TensorDictModuleBase) -> str:
    """The mode that ``"auto"`` stands for, else ``mode`` itself.

    A scorer on CUDA waits for the GPU, which lets go of the interpreter lock: a thread does. One
    that computes on the CPU would take the lock from the learner: a process. One that is cheap
    costs less than the way to a process.
    """
    if not isinstance(mode, str) or mode not in get_args(Mode):
        raise ValueError(f"mode is {quoted(mode)}; choose one of {get_args(Mode)}.")
    if mode != "auto":
        return mode
    wants_process = device_of(scorer).type == "cpu" and not getattr(scorer, "cheap", False)
    return "process" if wants_process and os.name == "posix" else "thread"
