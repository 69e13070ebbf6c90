"""The judge that comes with the package: a tiny PerceptionLM that knows MiniGrid pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch

from vlmrb_torchrl.checks import require
from vlmrb_torchrl.prompts import MINIGRID
from vlmrb_torchrl.scorers.huggingface import HuggingFaceScorer

FOLDER = Path(__file__).parent / "judge"
"""Weights, processor and card, as ``python -m recipes.train_judge`` writes them."""
TILE_SIZE = 8
WINDOW = 8
"""The view that it was trained on: ``MiniGridRenderer(tile_size=TILE_SIZE, window=WINDOW)``."""


class EmbeddedJudge(HuggingFaceScorer):
    """The embedded judge, asked about MiniGrid events in its canonical words.

    It reads frames of 64 x 64 pixels, drawn by ``MiniGridRenderer(tile_size=8, window=8)``. It
    was trained on simulator-labelled clips of MiniGrid tasks other than DoorKey and has no
    pretrained prior: a success detector in a VLM's format. Its card, ``judge/README.md``, has
    the figures.

    Args:
        questions: Events asked about, of "goal", "door" and "key"; the score is the maximum over
            them.
        device: Where it computes.
        batch_clips: Clips of one forward pass.
        dedup: Encode equal frames once (see `HuggingFaceScorer`).
        cache_megabytes: Memory for the embeddings kept.

    Raises:
        ValueError: A question that it does not know, or none.

    Example:
        >>> EmbeddedJudge(questions=("goal", "door")).questions
        ('goal', 'door')
    """

    frame_size = (TILE_SIZE * WINDOW, TILE_SIZE * WINDOW)

    def __init__(
        self,
        questions: str | Sequence[str] = ("goal",),
        *,
        device: str | torch.device = "cpu",
        batch_clips: int = 64,
        dedup: bool | None = None,
        cache_megabytes: float = 256.0,
    ) -> None:
        asked = (questions,) if isinstance(questions, str) else questions
        good = isinstance(asked, Sequence) and bool(asked)
        good = good and all(isinstance(q, str) and q in MINIGRID for q in asked)
        require(good, "questions", questions, f"ask one or more of {', '.join(MINIGRID)}")
        super().__init__(
            FOLDER,
            [MINIGRID[q] for q in asked],
            device=device,
            batch_clips=batch_clips,
            answer_prefix="",  # it was trained to say Yes or No at once
            dedup=dedup,
            cache_megabytes=cache_megabytes,
        )

    @property
    def questions(self) -> tuple[str, ...]:
        """What is asked: events by their names, anything else word for word."""
        names = {prompt: name for name, prompt in MINIGRID.items()}
        return tuple(names.get(prompt, prompt) for prompt in self.prompts)

    def asking(self, prompts: str | Sequence[str]) -> Self:
        """The same judge, asked about other events by their names, or anything else in words."""
        other = super().asking(prompts)
        other.prompts = tuple(MINIGRID.get(prompt, prompt) for prompt in other.prompts)
        return other
