"""Settings that are each in order and cannot work together."""

from __future__ import annotations

from contextlib import closing

import torch
from jsonargparse import Namespace

from recipes.tasks import Task
from vlmrb_torchrl import keys
from vlmrb_torchrl.checks import ConfigError, require
from vlmrb_torchrl.scorers import ClipScorer


def check(settings: Namespace) -> None:
    """Refuse combinations that cannot work.

    Args:
        settings: The configuration, instantiated.
    """
    capacity = settings.replay.capacity
    if settings.replay.uses_scores:
        clip = settings.scoring.clip_transitions
        require(
            clip <= capacity,
            "scoring.clip_transitions",
            clip,
            f"use at most replay.capacity ({capacity}), or enlarge the buffer",
        )
        check_judge(settings.env, settings.scoring.scorer)
    batch = settings.training.env_steps_per_collection
    require(
        batch <= capacity,
        "training.num_envs x training.steps_per_collection",
        batch,
        f"use at most replay.capacity ({capacity})",
    )
    n_steps = settings.algorithm.get("n_steps", 1)
    require(
        n_steps <= settings.training.steps_per_collection,
        "algorithm.n_steps",
        n_steps,
        f"use at most training.steps_per_collection ({settings.training.steps_per_collection}): a "
        "transition spans steps of one collection",
    )
    every, total = settings.training.eval_every_env_steps, settings.training.total_env_steps
    require(
        every <= total,
        "training.eval_every_env_steps",
        every,
        f"use at most training.total_env_steps ({total}), or 0 for no evaluation",
    )
    if settings.training.accelerator == "cuda":
        require(
            torch.cuda.is_available(), "training.accelerator", "cuda", "no GPU is here: use cpu"
        )
    warmup = settings.training.warmup_env_steps
    require(
        warmup < settings.training.total_env_steps,
        "training.warmup_env_steps",
        warmup,
        f"use less than training.total_env_steps ({settings.training.total_env_steps})",
    )


def check_judge(task: Task, scorer: ClipScorer) -> None:
    """Refuse a judge that the task's clips cannot be shown to.

    Faults of a judge stop no run, so what it can never read is found out before.
    """
    judge = scorer
    while isinstance(inner := getattr(judge, "scorer", None), ClipScorer):
        judge = inner  # beneath its cache or its noise
    reads, reports = getattr(judge, "event_names", None), tuple(task.event_names)
    require(
        reads is None or tuple(reads) == reports,
        f"{type(judge).__name__}'s event_names",
        reads,
        f"{type(task).__name__} reports {reports or 'no events'}",
    )
    if scorer.needs_frames:
        check_view(task, scorer)


def check_view(task: Task, scorer: ClipScorer) -> None:
    """Refuse a camera that is missing, cannot draw here, or that the judge does not know."""
    renderer = task.renderer()
    if renderer is None:
        raise ConfigError(
            f"env is {type(task).__name__}: it has no renderer for a judge's frames, write one or "
            "use --replay Uniform or Prioritized"
        )
    with closing(task.make(1, seed=0)) as env:
        first = env.reset()
        require(
            keys.RENDER_STATE in first.keys(),  # noqa: SIM118
            f"what {type(task).__name__}'s environment writes",
            sorted(map(str, first.keys())),
            f'write "{keys.RENDER_STATE}", which its renderer() draws from',
        )
        height, width = renderer(first[keys.RENDER_STATE]).shape[-2:]
    require(
        scorer.frame_size in (None, (height, width)),
        "the view of env, in pixels,",
        (height, width),
        f"{type(scorer).__name__} knows {scorer.frame_size} only: use another scoring.scorer, or "
        f"another view ('--env.help {type(task).__name__}' shows its settings)",
    )
