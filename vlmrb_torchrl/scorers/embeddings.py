"""Encodes each frame once: equal frames of a batch share an embedding, recent ones are kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmrb_torchrl.frames import frame_digests

_FRAMES_AT_ONCE = 64


class FrameEmbeddings:
    """Embeddings of the frames met last, by the frames' content.

    N: frames, U: different ones among them.

    Args:
        encode: Embeds frames, uint8 ``[U, 3, H, W]`` to ``[U, ...]``, each by itself.
        megabytes: Memory for what is kept; the least recently used goes first.

    Example:
        >>> mean = FrameEmbeddings(lambda frames: frames.float().mean((1, 2, 3)), megabytes=1)
        >>> mean(torch.ones(3, 3, 2, 2, dtype=torch.uint8))
        tensor([1., 1., 1.])
        >>> len(mean)
        1
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], megabytes: float) -> None:
        self._encode = encode
        self._bytes = megabytes * 1e6
        self._kept: OrderedDict[tuple[torch.Size, bytes], Tensor] = OrderedDict()
        self.encoded = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Memory of what is kept."""
        return sum(embedding.nbytes for embedding in self._kept.values())

    def clear(self) -> None:
        """Let go of everything."""
        self._kept.clear()

    def state_dict(self) -> dict[str, Any]:
        """What is kept, the least recently used first."""
        return {
            "keys": list(self._kept),
            # Of one camera's frames, and so of one shape.
            "embeddings": torch.stack(list(self._kept.values())).cpu() if self._kept else None,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Keep, on ``device``, what `state_dict` returned."""
        self.clear()
        if state["keys"]:
            kept = state["embeddings"].to(device).unbind()
            self._kept.update((key, e.clone()) for key, e in zip(state["keys"], kept, strict=True))

    def __call__(self, frames: Tensor) -> Tensor:
        """Embeddings of ``[N, 3, H, W]``, one a frame, in their order.

        ``encoded`` counts the frames that had to be embedded, ever.
        """
        keys = [(frames.shape[1:], digest) for digest in frame_digests(frames)]
        place: dict[tuple[torch.Size, bytes], int] = {}
        rows = torch.tensor([place.setdefault(key, len(place)) for key in keys])
        first = {key: k for k, key in reversed(list(enumerate(keys)))}
        missing = [key for key in place if key not in self._kept]
        for start in range(0, len(missing), _FRAMES_AT_ONCE):
            part = missing[start : start + _FRAMES_AT_ONCE]
            encoded = self._encode(frames[[first[key] for key in part]])
            # Copies: a view would keep the whole batch of embeddings in memory.
            self._kept.update((key, e.clone()) for key, e in zip(part, encoded, strict=True))
        self.encoded += len(missing)
        distinct = []
        for key in place:
            self._kept.move_to_end(key)
            distinct.append(self._kept[key])
        while len(self._kept) * distinct[0].nbytes > self._bytes:
            self._kept.popitem(last=False)
        whole = torch.stack(distinct)
        return whole[rows.to(whole.device)]
