"""The command line refuses bad settings in one line, before anything is launched."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from recipes.dqn import DQN
from recipes.iqn import IQN
from recipes.running import cli
from recipes.sac import SAC
from recipes.td3 import TD3

COUNT, FROM_0, NOT_NEGATIVE, POSITIVE = ("0",), ("-1",), ("-0.1",), ("0",)
SHARE, POSITIVE_SHARE, BELOW_1 = ("-0.1", "1.1"), ("0", "1.1"), ("-0.1", "1")
LEARNER = {
    "hidden_features": ("[8, 0]",),
    "gamma": BELOW_1,
    "n_steps": COUNT,
    "target_update_rate": POSITIVE_SHARE,
    **dict.fromkeys(("reward_scale", "learning_rate", "gradient_clip_norm"), POSITIVE),
}
VALUES = {**LEARNER, "adam_eps": POSITIVE, "epsilon_final": SHARE, "epsilon_share": SHARE}
CRITICS = {**LEARNER, "num_critics": COUNT}
RING = {"capacity": COUNT, "batch_size": ("0", "200001")}  # more than the ring holds
QUICK = ("--scoring.scorer=ConstantScorer",)  # quickly built
LINE = (*QUICK, "--replay=Uniform", "--env=tests.recipes.line_task.Line")

# By a command line that is good so far: the group of settings, and values that each must refuse.
BAD: dict[tuple[Any, ...], tuple[str, dict[str, tuple[str, ...]]]] = {
    (DQN, *QUICK): (
        "training",
        {
            **dict.fromkeys(("total_env_steps", "num_envs", "steps_per_collection"), COUNT),
            **dict.fromkeys(("eval_episodes", "log_every_env_steps", "torch_threads"), COUNT),
            **dict.fromkeys(("warmup_env_steps", "seed"), FROM_0),
            **{f"{what}_every_env_steps": FROM_0 for what in ("eval", "strip", "checkpoint")},
            "updates_per_env_step": POSITIVE,
            "eval_epsilon": SHARE,
        },
    ),
    (DQN, "--scoring.mode=sync"): (
        "scoring",
        {
            **dict.fromkeys(("clip_transitions", "frames_per_clip", "queue_clips"), COUNT),
            "batch_clips": COUNT,
            "stride": ("0", "33"),  # more than a clip covers
            "timeout_s": POSITIVE,
            "duty_cycle": POSITIVE_SHARE,
            "mode": ("other",),
            "scorer": ("Other",),
        },
    ),
    (DQN, *QUICK, "--replay=Uniform"): ("replay", RING),
    (DQN, *QUICK, "--replay=Prioritized"): (
        "replay",
        {
            **RING,
            **dict.fromkeys(("alpha", "beta_start", "beta_end", "beta_share"), SHARE),
            "td_error_offset": POSITIVE,
        },
    ),
    (DQN, *QUICK, "--replay=ReLo"): (
        "replay",
        {**RING, "alpha": SHARE, "td_error_offset": POSITIVE, "mapping": ("other",)},
    ),
    (DQN, *QUICK, "--replay=VLMGuided"): (
        "replay",
        {
            **dict.fromkeys(
                ("lmbda", "lmbda_share", "beta", "negative_priority", "unscored_priority"), SHARE
            ),
            "alpha": NOT_NEGATIVE,
            "eps": POSITIVE,
            "td_boost": ("2", "other"),
            "threshold": POSITIVE_SHARE,
        },
    ),
    (DQN, *QUICK, "--replay=AER"): (
        "replay",
        {**RING, "oversampling_start": ("0.9", ".inf"), "oversampling_share": SHARE},
    ),
    (DQN, *QUICK, "--replay=ERO"): (
        "replay",
        {
            **RING,
            "policy_features": ("[8, 0]",),
            "policy_learning_rate": POSITIVE,
            **dict.fromkeys(("policy_updates", "policy_batch_size"), COUNT),
            "unvisited_score": SHARE,
        },
    ),
    (DQN, *QUICK, "--replay=RewardBonus"): (
        "replay",
        {**RING, "bonus": (".inf", ".nan"), "threshold": POSITIVE_SHARE},
    ),
    (DQN, *QUICK, "--env=DoorKey"): (
        "env",
        {"size": ("4",), **dict.fromkeys(("max_steps", "tile_size", "window"), COUNT)},
    ),
    (SAC, *QUICK, "--env=Scene"): (
        "env",
        {
            "task": ("0", "6"),
            **dict.fromkeys(("max_steps", "workers", "width", "height"), COUNT),
        },
    ),
    (DQN, *QUICK, "--demonstrations.episodes=2"): (
        "demonstrations",
        {"episodes": FROM_0, "batch_share": BELOW_1, "action_noise": NOT_NEGATIVE},
    ),
    (DQN, *QUICK, "--env.size=5"): ("algorithm", VALUES),
    (IQN, *QUICK, "--env.size=5"): (
        "algorithm",
        {
            **VALUES,
            **{f"{whose}_quantiles": COUNT for whose in ("online", "target", "policy")},
            "kappa": POSITIVE,
            "priority": ("other",),
        },
    ),
    (SAC, *LINE): ("algorithm", {**CRITICS, "alpha_init": POSITIVE, "target_entropy": (".nan",)}),
    (TD3, *LINE): (
        "algorithm",
        {
            **CRITICS,
            "policy_delay": COUNT,
            **dict.fromkeys(("target_noise", "target_noise_clip"), NOT_NEGATIVE),
            "exploration_noise": NOT_NEGATIVE,
        },
    ),
}
build_parser = cache(cli.build_parser)


@pytest.fixture(autouse=True)
def nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "launch", lambda *_, **__: pytest.fail("something was launched"))
    monkeypatch.setattr(cli, "build_parser", build_parser)


def refusal(algorithm: Any, *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.run(algorithm, list(argv))
    assert isinstance(ended.value.code, str), f"{argv} ended with {ended.value.code!r}"
    assert len(ended.value.code.splitlines()) == 1
    return ended.value.code


@pytest.mark.parametrize("given", BAD, ids=lambda given: f"{given[0].__name__} {given[-1]}")
def test_a_value_outside_its_range_is_refused(given: tuple[Any, ...]) -> None:
    group, arguments = BAD[given]
    for name, values in arguments.items():
        for value in values:
            said = refusal(*given, f"--{group}.{name}={value}")
            assert name in said
            assert value.strip("[].").split()[-1] in said, f"{value} is not shown: {said}"


def test_a_device_that_is_none_is_refused() -> None:
    said = refusal(DQN, "--scoring.scorer=EmbeddedJudge", "--scoring.scorer.device=abc")
    assert "device is abc" in said


@pytest.mark.parametrize(
    ("setting", "values"),
    {
        "training.num_envs": ("x", "2.5", "null", "[1]", "{}", ".inf"),
        "scoring.stride": ("x", "2.5", "[1]"),
        "replay.capacity": ("x", "2.5", "null"),
        "replay.lmbda": ("x", ".nan", "null", "[0.5]"),
        "algorithm.learning_rate": ("x", ".nan", "null"),
        "algorithm.hidden_features": ("x", "8", "null", "[x]", "[2.5]"),
        "demonstrations.action_noise": ("x", ".nan"),
    }.items(),
)
def test_what_is_no_number_is_refused(setting: str, values: tuple[str, ...]) -> None:
    for value in values:
        assert setting.split(".")[1] in refusal(DQN, *QUICK, f"--{setting}={value}")


@pytest.mark.parametrize("setting", ["xyz", "replay.xyz", "training.x.y", "algorithm.env", "env.x"])
def test_an_unknown_setting_is_refused(setting: str) -> None:
    assert setting.rsplit(".", maxsplit=1)[-1] in refusal(DQN, *QUICK, f"--{setting}=1")


@pytest.mark.parametrize(
    "content",
    [
        *(b"x: 1", b"replay: {x: 1}", b"training: 3", b"training: [1, 2", b"- training", b"word"),
        *(b"\xff\xfe: 1", b"training: {seed: x}", b"config: x", b"replay: {class_path: X}"),
    ],
)
def test_a_file_of_other_settings_or_none_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_bytes(content)
    refusal(DQN, f"--config={file}")
