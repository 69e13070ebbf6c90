"""The README's table of scorer families, on tiny random models: ``python -m tests.scorers.family_table``.

Batch = single: the greatest difference of a clip's score alone and in a batch.  Dedup: clips/s with
equal frames of the stream encoded once, over every frame encoded; the language model of a tiny
model is tiny, so the figure says that it works and how little is encoded, not what a large model
gains.
"""  # noqa: E501

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tensordict import TensorDict

from recipes.benchmarks.scoring import doorkey_clips
from recipes.benchmarks.timing import rates
from tests.scorers import contrastive_models, families
from vlmrb_torchrl.scorers import ContrastiveScorer, EmbeddedJudge, HuggingFaceScorer
from vlmrb_torchrl.scorers.local import LocalScorer

CLIPS, ROUNDS = 64, 3


def batch_error(scorer: LocalScorer, clips: torch.Tensor) -> float:
    """Greatest difference of a clip's score alone and in a batch."""
    whole = scorer(TensorDict({"clip": clips}, [len(clips)]))["score"]
    alone = [scorer(TensorDict({"clip": clip[None]}, [1]))["score"] for clip in clips]
    return float((whole - torch.cat(alone)).abs().max())


def dedup_speedup(make: Any, clips: torch.Tensor) -> str:
    """Clips/s with equal frames encoded once ÷ without; "-" where frames are encoded together."""
    reusing, plain = make(dedup=None), make(dedup=False)
    reusing.load()
    embeddings = reusing._loaded.embeddings
    if embeddings is None:
        return "-"

    def score(scorer: LocalScorer) -> int:
        embeddings.clear()
        for part in clips.split(16):
            scorer(TensorDict({"clip": part}, [len(part)]))
        return len(clips)

    speeds = rates({"once": lambda: score(reusing), "all": lambda: score(plain)}, ROUNDS, 0.0)
    return str(speeds["once"] / speeds["all"])


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    clips = doorkey_clips(CLIPS, tile_size=8, window=8)
    table = Table("family", "batch = single", "dedup: x every frame")
    with tempfile.TemporaryDirectory() as root:
        made: dict[str, Any] = {"embedded judge": EmbeddedJudge}
        for name in families.FAMILIES:
            folder = families.save(name, Path(root) / name)
            made[name] = lambda folder=folder, **o: HuggingFaceScorer(folder, **o)
        for name in contrastive_models.FAMILIES:
            folder = contrastive_models.FAMILIES[name](Path(root) / name)
            made[name] = lambda folder=folder, **o: ContrastiveScorer(folder, **o)
        for name, make in made.items():
            error = batch_error(make(), clips[:16])
            table.add_row(name, f"{error:.0e}", dedup_speedup(make, clips))
    Console().print(table)


if __name__ == "__main__":
    main()
