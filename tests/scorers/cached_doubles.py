"""A judge that counts what it is asked, and clips for it."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from vlmrb_torchrl.scorers import ClipScorer


class Brightness(ClipScorer):
    """The mean of a clip's pixels, of 255; counts the clips that it is asked about."""

    frame_size = (2, 2)

    def __init__(self, prompt: str = "bright?", model: str = "mean", weights: str = "1") -> None:
        super().__init__()
        self.prompt, self.model, self.weights = prompt, model, weights
        self.asked = 0

    @property
    def config(self) -> tuple[tuple[str, object], ...]:
        return (("prompt", self.prompt), ("model", self.model))

    @property
    def revision(self) -> str:
        return self.weights

    def score(self, tensordict: Any) -> Tensor:
        self.asked += len(tensordict)
        return brightness(tensordict["clip"])


def brightness(clips: Tensor) -> Tensor:
    return clips.flatten(1).float().mean(1) / 255


def some_clips(count: int, seed: int = 0, frames: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, frames, 3, 2, 2), generator=generator).to(torch.uint8)


def scores(scorer: ClipScorer, clips: Tensor) -> Tensor:
    return scorer(TensorDict({"clip": clips}, [len(clips)]))["score"]
