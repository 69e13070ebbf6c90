"""What the settings of the recipes must refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from recipes.demonstrations import Demonstrations
from recipes.dqn import DQN
from recipes.iqn import IQN
from recipes.replay import Prioritized, Uniform, VLMGuided
from recipes.sac import SAC
from recipes.settings import Scoring, Training
from recipes.tasks import Cube, DoorKey, Scene
from recipes.td3 import TD3
from tests.bad_input import values
from tests.bad_input.case import Case
from tests.recipes.chain import ChainEnv
from vlmrb_torchrl.envs import DoorKeyEnv
from vlmrb_torchrl.scorers import ConstantScorer

COUNT, NOT_NEGATIVE = values.whole(1), values.real(0)
SHARE, POSITIVE = values.real(0, 1), values.real(0, above=True)
RING = {"capacity": values.whole(1, 10**9), "batch_size": values.whole(1, 200_000)}
WIDTHS = st.one_of(
    values.whole(1, 1 << 16).map(lambda width: (8, width)),
    values.NO_OBJECT.filter(lambda v: not isinstance(v, list)),
)
LEARNER = {
    "hidden_features": WIDTHS,
    "gamma": st.one_of(values.real(0, 1), st.just(1.0)),
    "n_steps": COUNT,
    "reward_scale": POSITIVE,
    "learning_rate": POSITIVE,
    "target_update_rate": values.real(0, 1, above=True),
    "gradient_clip_norm": POSITIVE.filter(lambda v: v != math.inf),
}
DISCRETE = {"adam_eps": POSITIVE, "epsilon_final": SHARE, "epsilon_share": SHARE}
CRITICS = {"num_critics": COUNT}
SCENE = {
    "task": values.whole(1, 5),
    "max_steps": values.whole(1, or_none=True),
    "workers": values.whole(1, 8192),
    "width": values.whole(1, 8192),
    "height": values.whole(1, 8192),
}


def of(group: str, call: Callable[..., Any], bad: dict[str, Any], **good: Any) -> Case:
    """A row of settings, which refusals call ``group.name``."""
    names = {name: f"{group}.{name}" for name in bad}
    return Case(call.__name__, call, good.copy, bad, called=names)


ROWS: dict[str, Callable[[], Case]] = {
    "Training": lambda: of(
        "training",
        Training,
        {
            **dict.fromkeys(
                (
                    "total_env_steps",
                    "num_envs",
                    "steps_per_collection",
                    "eval_episodes",
                    "log_every_env_steps",
                    "torch_threads",
                ),
                COUNT,
            ),
            **dict.fromkeys(
                ("warmup_env_steps", "eval_every_env_steps", "strip_every_env_steps"),
                values.whole(0),
            ),
            "seed": values.whole(0, 2**30 - 1),
            "updates_per_env_step": values.real(0, 64, above=True),
            "eval_epsilon": SHARE,
        },
    ),
    "Scoring": lambda: of(
        "scoring",
        Scoring,
        {
            **dict.fromkeys(
                ("clip_transitions", "frames_per_clip", "queue_clips", "batch_clips"), COUNT
            ),
            "stride": values.whole(1, 32, or_none=True),
            "timeout_s": values.real(0, 1e9, above=True),
            "duty_cycle": values.real(0, 1, above=True),
        },
        scorer=ConstantScorer(),
    ),
    "Uniform": lambda: of("replay", Uniform, RING),
    "Prioritized": lambda: of(
        "replay",
        Prioritized,
        {
            **RING,
            **dict.fromkeys(("alpha", "beta_start", "beta_end", "beta_share"), SHARE),
            "td_error_offset": POSITIVE,
        },
    ),
    "VLMGuided": lambda: of(
        "replay",
        VLMGuided,
        {
            **RING,
            **dict.fromkeys(("lmbda", "lmbda_share", "beta", "unscored_priority"), SHARE),
            "alpha": NOT_NEGATIVE,
            "eps": POSITIVE,
            "td_boost": values.flag(),
            "threshold": values.real(0, 1, above=True, or_none=True),
        },
    ),
    "DoorKey": lambda: of(
        "env",
        DoorKey,
        {
            "size": values.whole(5, 256),
            "max_steps": values.whole(1, or_none=True),
            "tile_size": values.whole(1, 1024),
            "window": values.whole(1, 1024, or_none=True),
        },
    ),
    "Scene": lambda: of("env", Scene, SCENE),
    "Cube": lambda: of("env", Cube, SCENE),
    "Demonstrations": lambda: of(
        "demonstrations",
        Demonstrations,
        {
            "episodes": values.whole(0),
            "batch_share": st.one_of(values.real(0, 1), st.just(1.0)),
            "action_noise": NOT_NEGATIVE,
        },
        episodes=2,
    ),
    "DQN": lambda: of("algorithm", DQN, {**LEARNER, **DISCRETE}, env=DoorKeyEnv(5, 1)),
    "IQN": lambda: of(
        "algorithm",
        IQN,
        {**LEARNER, **DISCRETE},
        env=DoorKeyEnv(5, 1),
        hidden_features=(8,),
    ),
    "SAC": lambda: of(
        "algorithm",
        SAC,
        {
            **LEARNER,
            **CRITICS,
            "alpha_init": POSITIVE,
            "target_entropy": st.one_of(
                values.NO_NUMBER, st.sampled_from([math.nan, math.inf, -math.inf])
            ),
        },
        env=ChainEnv(2, discrete=False),
        hidden_features=(8,),
    ),
    "TD3": lambda: of(
        "algorithm",
        TD3,
        {
            **LEARNER,
            **CRITICS,
            "policy_delay": COUNT,
            **dict.fromkeys(
                ("target_noise", "target_noise_clip", "exploration_noise"), NOT_NEGATIVE
            ),
        },
        env=ChainEnv(2, discrete=False),
        hidden_features=(8,),
    ),
}
