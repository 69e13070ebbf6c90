"""Which frames of a clip are shown, and what makes two frames the same."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from xxhash import xxh3_128_digest


@lru_cache(maxsize=1024)
def shown_outcomes(transitions: int, frames: int) -> NDArray[np.int64]:
    """Which outcomes of a clip are shown: int64 ``[frames]``, positions from 0.

    Up to ``frames`` transitions: all of them, then the last one repeated. More: spread evenly,
    the last always among them, since an episode's success may be visible only there.

    Example:
        >>> shown_outcomes(2, 4), shown_outcomes(8, 4)
        (array([0, 1, 1, 1]), array([1, 3, 5, 7]))
    """
    step = np.arange(frames, dtype=np.int64)
    if transitions <= frames:
        return step.clip(max=transitions - 1)
    return -(-(step + 1) * transitions // frames) - 1  # ceil((step + 1) n / F) - 1


def thin(clips: Tensor, frames: int | None) -> Tensor:
    """Keep ``frames`` of each clip's frames, spread evenly, the last always among them.

    B: clips, F: frames of a clip.

    Args:
        clips: ``[B, F, ...]``.
        frames: How many to keep; None, or F and more: all of them.

    Example:
        >>> thin(torch.arange(8)[None], 4)
        tensor([[1, 3, 5, 7]])
    """
    if frames is None or frames >= clips.shape[1]:
        return clips
    return clips[:, torch.from_numpy(shown_outcomes(clips.shape[1], frames))]


def frame_digests(frames: Tensor) -> list[bytes]:
    """A 128-bit digest of each frame of uint8 ``[N, ...]``: equal frames, equal digests.

    XXH3: a cryptographic digest of each frame is felt in the embedded judge's time, and frames come
    from a renderer, not from an adversary.
    """
    here = frames.to("cpu", non_blocking=True)  # from CUDA into pinned memory, several times faster
    if frames.is_cuda:
        torch.cuda.current_stream(frames.device).synchronize()
    return [xxh3_128_digest(frame) for frame in here.contiguous().numpy()]
