"""Judges that count what they are asked or say what a test has them say, and clips for them.

They stand in a file because a cache takes no others.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from vlmrb_torchrl.scorers import ClipScorer, PromptedScorer


class Brightness(ClipScorer):
    """The mean of a clip's pixels, of 255; counts the clips that it is asked about."""

    frame_size = (2, 2)

    changes_no_score = frozenset({"weights"})  # in its revision

    def __init__(self, prompt: str = "bright?", model: str = "mean", weights: str = "1") -> None:
        super().__init__()
        self.prompt, self.model, self.weights = prompt, model, weights
        self.asked = 0

    @property
    def revision(self) -> str:
        return self.weights

    def score(self, tensordict: Any) -> Tensor:
        self.asked += len(tensordict)
        return brightness(tensordict["clip"])


class OutOfRange(Brightness):
    """Says 1.5 of every clip."""

    def score(self, tensordict: Any) -> Tensor:
        return super().score(tensordict) * 0 + 1.5


class Failing(Brightness):
    """Raises."""

    def score(self, tensordict: Any) -> Tensor:
        raise RuntimeError("no luck")


class Silent(Brightness):
    """Has no score for any clip."""

    def forward(self, tensordict: Any) -> Any:
        self.asked += len(tensordict)
        return tensordict.set("score", torch.full((len(tensordict),), torch.nan))


class Wavering(Brightness):
    """Is another judge from its first answer on."""

    def score(self, tensordict: Any) -> Tensor:
        self.weights = "2"
        return super().score(tensordict)


class Heard(PromptedScorer):
    """Says 0.9 when asked about a door, 0.1 otherwise."""

    def score_prompts(self, tensordict: Any) -> Tensor:
        says = [0.9 if "door" in prompt else 0.1 for prompt in self.prompts]
        return torch.tensor([says] * len(tensordict))


class Forgetful(Heard):
    """Leaves its prompts out of its ``config``."""

    @property
    def config(self) -> tuple[tuple[str, object], ...]:
        return ()


class Both(ClipScorer):
    """The product of two judges' scores."""

    def __init__(self, one: ClipScorer, other: ClipScorer) -> None:
        super().__init__()
        self.one, self.other = one, other

    def score(self, tensordict: Any) -> Tensor:
        one, other = (j(tensordict.copy())["score"] for j in (self.one, self.other))
        return one * other


class Reticent(Brightness):
    """Takes an argument and does not keep it under its name."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.factor = gain


class Opaque(Brightness):
    """Its ``config`` holds an object of which nothing is known."""

    @property
    def config(self) -> tuple[tuple[str, object], ...]:
        return (("object", object()),)


class Weighty(ClipScorer):
    """Loads weights that no ``revision`` names."""

    def load(self) -> None:
        self.weight = torch.nn.Parameter(torch.tensor(0.5))

    def score(self, tensordict: Any) -> Tensor:
        return self.weight.expand(len(tensordict))


def made_here(value: float) -> ClipScorer:
    """A judge of a class made in a function, alike for every ``value`` but in what it encloses."""

    class Made(ClipScorer):
        def score(self, tensordict: Any) -> Tensor:
            return torch.full((len(tensordict),), value)

    return Made()


def brightness(clips: Tensor) -> Tensor:
    return clips.flatten(1).float().mean(1) / 255


def some_clips(count: int, seed: int = 0, frames: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, frames, 3, 2, 2), generator=generator).to(torch.uint8)


def scores(scorer: ClipScorer, clips: Tensor) -> Tensor:
    return scorer(TensorDict({"clip": clips}, [len(clips)]))["score"]
