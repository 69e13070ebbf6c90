"""Which frames are equal: on the CPU and, by other digests, on a device."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vlmrb_torchrl.frames import _numbers, _sums, frame_digests


def digests_elsewhere(frames: Tensor) -> list[bytes]:
    """As on a GPU."""
    return [sums.tobytes() for sums in _sums(frames).numpy()]


@pytest.mark.parametrize("digests", [frame_digests, digests_elsewhere])
def test_equal_frames_and_only_they_have_equal_digests(
    digests: Callable[[Tensor], list[bytes]],
) -> None:
    """A frame of 75 bytes, with each bit flipped, each two words swapped, and transposed."""
    frame = torch.randint(0, 256, (3, 5, 5), generator=torch.Generator().manual_seed(1)).byte()
    bits = torch.eye(600, dtype=torch.bool).view(600, 75, 8)
    flips = (bits * 2 ** torch.arange(8)).sum(2).byte().view(600, 3, 5, 5)
    frames = [frame, *(frame ^ flip for flip in flips), frame.transpose(1, 2)]
    for first in range(0, 72, 4):
        for second in range(first + 4, 72, 4):
            places = torch.arange(75)
            places[first : first + 4], places[second : second + 4] = (
                torch.arange(second, second + 4),
                torch.arange(first, first + 4),
            )
            frames.append(frame.flatten()[places].view(3, 5, 5))
    whole = torch.stack(frames)
    found = digests(whole)
    assert len(set(found)) == len(whole) == 602 + 18 * 17 // 2
    assert all(len(digest) == 16 for digest in found)
    assert digests(whole.clone()) == found
    assert digests(whole.flip(0)) == found[::-1]
    assert digests(whole.expand(2, -1, -1, -1, -1)[1]) == found
    assert digests(whole.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)) == found


def test_a_devices_digest_is_the_sum_of_words_times_numbers_modulo_2_to_the_64() -> None:
    """By Python's integers; 75 bytes are 19 words, the last filled up with zero."""
    frame = torch.randint(0, 256, (3, 5, 5), generator=torch.Generator().manual_seed(1)).byte()
    data = bytes(frame.flatten().tolist()) + b"\0"
    words = [int.from_bytes(data[k : k + 4], "little", signed=True) for k in range(0, 76, 4)]
    expected = [
        sum(w * n for w, n in zip(words, numbers, strict=True)) % 2**64
        for numbers in _numbers(19, torch.device("cpu")).tolist()
    ]
    assert [found % 2**64 for found in _sums(frame[None])[0].tolist()] == expected


def test_a_devices_digests_are_made_where_the_frames_lie() -> None:
    """ "meta" stands for a GPU: nothing could be read back from it."""
    found = _sums(torch.zeros(7, 3, 8, 8, dtype=torch.uint8, device="meta"))
    assert found.device.type == "meta"
    assert found.shape == (7, 2)
