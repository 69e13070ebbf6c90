"""Ctrl-C and SIGTERM as a request: the loop finishes its step, saves, and ends."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

import torch
from lightning.fabric import Fabric


class StoppedError(Exception):
    """A run ended because a signal asked it to; ``saved``: a checkpoint holds where it was."""

    def __init__(self, number: int, saved: bool) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal, self.saved = number, saved


class Interruption:
    """While it is entered, a first signal is only noted; the same once more ends at once.

    Not the same: a shell's Ctrl-C reaches a run and whoever started it, who then asks by SIGTERM.
    The ranks of ``fabric`` agree on when to end.
    """

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self._noted = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted == number:
            raise KeyboardInterrupt
        self._noted = self._noted or number

    def requested(self) -> int:
        """The signal that asks this run, on any rank, to end; 0: none does."""
        if self._fabric.world_size == 1:
            return self._noted
        noted = torch.tensor(float(self._noted), device=self._fabric.device)
        largest = self._fabric.all_gather(noted).max()  # type: ignore[union-attr]
        return int(largest)
