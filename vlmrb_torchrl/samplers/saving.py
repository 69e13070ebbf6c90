"""How a sampler's state lies in a folder, as TorchRL's buffers ask it to."""

from __future__ import annotations

import os
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch

_FILE = "sampler.pt"


class SavedInFolder:
    """A sampler whose state is one file of tensors and numbers."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What the next draw follows from, but for the buffer's generator."""

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""

    def dumps(self, path: str | Path) -> None:
        """Writes :meth:`state_dict` into the folder ``path``, whole or not at all."""
        folder = Path(path).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{_FILE}.{os.getpid()}"
        torch.save(self.state_dict(), partial)
        partial.replace(folder / _FILE)

    def loads(self, path: str | Path) -> None:
        """Restores what :meth:`dumps` wrote.

        Raises:
            FileNotFoundError: The folder holds no sampler.
            ValueError: See :meth:`load_state_dict`.
        """
        file = Path(path) / _FILE
        self.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
