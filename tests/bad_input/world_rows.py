"""What renderers, environments and objectives must refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import torch
from hypothesis import strategies as st
from torch import nn
from torchrl.data import Categorical
from torchrl.modules import QValueActor

from tests.bad_input import values
from tests.bad_input.case import Case
from tests.bad_input.scorer_rows import MOST_SEED, simply
from vlmrb_torchrl.envs import DoorKeyEnv, OGBenchEnv
from vlmrb_torchrl.objectives import IQNLoss, QuantileNetwork, cvar, quantile_huber
from vlmrb_torchrl.renderers import (
    AbstractSprites,
    MiniGridRenderer,
    MuJoCoRenderer,
    SwappedSprites,
    minigrid_render_state,
)


def doorkey_step() -> Case:
    env = DoorKeyEnv(5, 3)
    start = env.reset()

    def state() -> Any:
        return env.games_state_dict()

    def step(action: Any) -> None:
        env.step(start.clone().set("action", action))

    outside = st.one_of(st.integers(-(2**60), -1), st.integers(7, 2**60))
    good = {"action": torch.tensor([0, 1, 2])}
    bad = st.one_of(
        values.spoilt([0, 1, 2], outside.map(float)).map(lambda t: t.long().clamp(-(2**40), 2**40)),
        values.tensors_but(torch.int64, 3).filter(lambda t: t.ndim and len(t) == 3),
    )
    return Case("DoorKeyEnv.step", step, good.copy, {"action": bad}, state)


def of_doorkey(method: str, argument: str, good: Any, bad: Any) -> Callable[[], Case]:
    def row() -> Case:
        env = DoorKeyEnv(5, 2, seed=7)
        call = lambda **arguments: getattr(env, method)(arguments[argument])  # noqa: E731
        return Case(
            f"DoorKeyEnv.{method}",
            call,
            lambda: {argument: good},
            {argument: bad},
            env.get_extra_state,
            called={"state": ""},
        )

    return row


def network() -> QuantileNetwork:
    return QuantileNetwork(nn.Linear(3, 4), nn.Linear(4, 2), num_features=4)


def iqn() -> Case:
    actor = QValueActor(network(), spec=Categorical(2))
    count = values.whole(1)
    return Case(
        "IQNLoss",
        IQNLoss,
        lambda: {"value_network": actor},
        {
            "value_network": values.NO_OBJECT,
            "online_quantiles": count,
            "target_quantiles": count,
            "kappa": values.real(0, above=True),
            "priority": values.other_than("mean", "pairwise"),
            "delay_value": values.flag(),
            "double_dqn": values.flag(),
            "action_space": values.other_than("categorical", "one-hot", "one_hot", or_none=True),
            "reduction": values.other_than("mean", "sum", "none", or_none=True),
            "use_prioritized_weights": st.one_of(st.text(max_size=3), st.floats(1.5), st.none()),
        },
        actor.state_dict,
    )


FLOATS = values.tensors_but(torch.float32, 2, 3).filter(lambda t: not t.is_floating_point())
SHAPES = values.tensors_but(torch.float32, 2, 3).filter(lambda t: t.ndim != 2 or t.shape[0] != 2)
HUBER = {
    "prediction": torch.zeros(2, 3),
    "tau": torch.full((2, 3), 0.5),
    "target": torch.ones(2, 5),
}
RENDERED = st.one_of(
    values.NO_OBJECT,
    values.tensors_but(torch.uint8, None, None, 4).filter(
        lambda t: t.dtype != torch.uint8 or t.ndim < 3 or t.shape[-1] != 4
    ),
    st.integers(11, 255).map(lambda kind: torch.full((1, 2, 2, 4), kind, dtype=torch.uint8)),
)


def reset(name: str) -> Any:
    import minigrid  # noqa: F401

    env = gymnasium.make(name)
    env.reset(seed=0)
    return env


ROWS: dict[str, Callable[[], Case]] = {
    "MiniGridRenderer": simply(
        MiniGridRenderer,
        {
            "tile_size": values.whole(1, 1024),
            "window": values.whole(1, 1024, or_none=True),
            "sprites": values.NO_OBJECT,
        },
    ),
    "MiniGridRenderer()": lambda: Case(
        "MiniGridRenderer()",
        MiniGridRenderer(4),
        lambda: {"render_state": torch.zeros(1, 2, 2, 4, dtype=torch.uint8)},
        {"render_state": RENDERED},
    ),
    "SwappedSprites": simply(
        SwappedSprites,
        {
            "swaps": st.one_of(
                values.NO_OBJECT.filter(lambda v: v != {}),
                st.dictionaries(st.sampled_from(["goal", "gaol"]), st.text(max_size=9), min_size=1),
            )
        },
    ),
    "AbstractSprites": simply(AbstractSprites, {"seed": values.whole(0)}),
    "minigrid_render_state": lambda: Case(
        "minigrid_render_state",
        minigrid_render_state,
        lambda: {"env": reset("MiniGrid-Empty-5x5-v0")},
        {"env": values.NO_OBJECT},
    ),
    "MuJoCoRenderer": simply(
        MuJoCoRenderer,
        {
            "stage": values.NO_OBJECT,
            "width": values.whole(1, 8192),
            "height": values.whole(1, 8192),
            "samples": values.whole(0, 8192),
            "camera": st.one_of(st.just(""), st.integers(), st.floats()),
            "shadows": values.flag(),
        },
        good={"stage": print},
    ),
    "DoorKeyEnv": simply(
        DoorKeyEnv,
        {
            "size": values.whole(5, 256),
            "num_envs": values.whole(1, 65536),
            "max_steps": values.whole(1, or_none=True),
            "seed": values.whole(0, MOST_SEED),
            "held_out": values.flag(),
            "device": values.device(or_none=True),
        },
        good={"num_envs": 1},
    ),
    "DoorKeyEnv.step": doorkey_step,
    "DoorKeyEnv.set_seed": of_doorkey("set_seed", "seed", 3, values.whole(0, or_none=True)),
    "DoorKeyEnv.set_extra_state": of_doorkey(
        "set_extra_state",
        "state",
        {"seed": 3, "episodes": [1, 1]},
        st.fixed_dictionaries(
            {"seed": st.just(3), "episodes": st.lists(values.whole(0), min_size=1, max_size=3)}
        ),
    ),
    "OGBenchEnv": simply(
        OGBenchEnv,
        {
            "env_id": st.one_of(st.text(max_size=12), st.integers(), st.none()),
            "num_envs": values.whole(1, 65536),
            "max_steps": values.whole(1, or_none=True),
            "seed": values.whole(0, MOST_SEED),
            "held_out": values.flag(),
            "workers": values.whole(1, 1),
            "device": values.device(or_none=True),
        },
        good={"num_envs": 1},
    ),
    "IQNLoss": iqn,
    "QuantileNetwork": simply(
        QuantileNetwork,
        {
            "features": values.NO_OBJECT,
            "head": values.NO_OBJECT,
            "num_features": values.whole(1, 1 << 20),
            "num_cosines": values.whole(1, 1 << 20),
            "policy_quantiles": values.whole(1, 1 << 20),
            "in_key": values.NO_NAME,
            "distortion": values.NO_OBJECT,
        },
        good={"features": nn.Linear(3, 4), "head": nn.Linear(4, 2), "num_features": 4},
    ),
    "quantile_huber": simply(
        quantile_huber,
        {
            "prediction": st.one_of(FLOATS, SHAPES),
            "tau": st.one_of(FLOATS, SHAPES),
            "target": st.one_of(FLOATS, SHAPES),
            "kappa": values.real(0, above=True),
        },
        good=HUBER,
        called={"prediction": ""},
    ),
    "cvar": simply(
        cvar,
        {"tau": st.one_of(values.NO_OBJECT, FLOATS), "risk_level": values.real(0, 1, above=True)},
        good={"tau": torch.rand(3), "risk_level": 0.5},
    ),
}
