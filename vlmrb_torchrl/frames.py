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

    Frames come from a renderer, not from an adversary. On the CPU it is XXH3: a cryptographic
    digest of each is felt in the embedded judge's time. Elsewhere it is made where they lie (see
    `_sums`), so that 16 bytes a frame are waited for; the same frames have another one there.
    """
    if frames.device.type == "cpu":
        return [xxh3_128_digest(frame) for frame in frames.contiguous().numpy()]
    return [sums.tobytes() for sums in _sums(frames).cpu().numpy()]


def _sums(frames: Tensor) -> Tensor:
    """Two sums of each frame's 32-bit words times random 64-bit numbers, int64 ``[N, 2]``.

    Modulo 2^64. Frames that differ, by d ≠ 0 in some word, have the same sum for one choice of that
    word's number in 2^33 at most (2^31 divides d at most, of 2^64): both sums, for one in 2^66.
    """
    flat = frames.flatten(1).contiguous()
    words = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 4)).view(torch.int32)
    return torch.stack(
        [(words * each).sum(1) for each in _numbers(words.shape[1], words.device)], 1
    )


@lru_cache(maxsize=16)
def _numbers(words: int, device: torch.device) -> Tensor:
    """The same random numbers each time, int64 ``[2, words]``."""
    generator, bound = torch.Generator().manual_seed(0), 2**63
    return torch.randint(-bound, bound - 1, (2, words), generator=generator).to(device)
