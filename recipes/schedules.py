"""What changes while a run learns: in closed form, as shares of the run."""

from __future__ import annotations

from recipes.settings import Training


def progress_of(training: Training, env_steps: int) -> float:
    """Share of the steps after the warm-up that is done after ``env_steps``, 0 to 1.

    Example:
        >>> progress_of(Training(total_env_steps=50_000, warmup_env_steps=2_000), 26_000)
        0.5
    """
    learning = training.total_env_steps - training.warmup_env_steps
    return min(1.0, (env_steps - training.warmup_env_steps) / learning)


def linear(start: float, end: float, share: float, progress: float) -> float:
    """A line from ``start`` to ``end``, which is kept from then on.

    Args:
        start: Value at the end of the warm-up.
        end: Value once ``share`` of the steps after the warm-up is done, exactly.
        share: Of the steps after the warm-up, 0 (at once) to 1 (at the end of the run).
        progress: Share of those steps that is done, 0 to 1.

    Example:
        >>> [linear(1.0, 0.1, 0.5, progress) for progress in (0.0, 0.25, 0.5, 1.0)]
        [1.0, 0.55, 0.1, 0.1]
    """
    done = 1.0 if progress >= share else progress / share
    return start * (1 - done) + end * done
