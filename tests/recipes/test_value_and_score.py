"""A judge's scores beside what critics make of an episode, on figures known by hand."""

import csv
import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from recipes import value_and_score
from recipes.dqn import DQN
from recipes.iqn import IQN
from recipes.running import cli
from recipes.sac import SAC
from recipes.td3 import TD3
from recipes.value_and_score import (
    Curves,
    clips_ending_at_each_step,
    judged,
    play,
    value_differences,
)
from tests.recipes.line_task import LineEnv
from tests.scoring_doubles import Brightness, NumberRenderer
from tests.streams import stream
from vlmrb_torchrl.checks import ConfigError
from vlmrb_torchrl.envs import DoorKeyEnv
from vlmrb_torchrl.scorers import PrivilegedScorer


class Scripted:
    """Values a state by the number that it shows."""

    def value(self, observation):
        return observation.squeeze(-1).float()


def test_value_differences_are_those_of_the_critic_and_what_ends_is_worth_nothing():
    outcome = {"observation": torch.tensor([[5], [4], [9]])}
    outcome["terminated"] = torch.tensor([[False], [False], [True]])
    episode = TensorDict({"observation": torch.tensor([[2], [5], [4]]), "next": outcome}, [3])
    assert value_differences(Scripted(), episode).tolist() == [5 - 2, 4 - 5, 0 - 4]
    episode["next", "terminated"][-1] = False  # truncated: the state is worth what it is
    assert value_differences(Scripted(), episode)[-1] == 9 - 4


@pytest.mark.parametrize("algorithm", [DQN, IQN, SAC, TD3])
def test_a_state_is_worth_what_the_greedy_action_is(algorithm):
    discrete = algorithm in (DQN, IQN)
    env = DoorKeyEnv(5, 4, seed=0) if discrete else LineEnv(4, 0, False)
    module = algorithm(env, hidden_features=(8,))
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        state = module.policy(env.reset())
        value = module.value(state["observation"])
        expected = (
            state["chosen_action_value"].squeeze(-1)
            if discrete
            else module.critics(state["observation"], state["action"]).amin(-1)
        )
    assert value == pytest.approx(expected)
    assert value.shape == (4,)


def test_each_step_is_scored_by_the_clip_that_ends_there():
    """Step t leads to state t + 1; something happens at steps 0, 5 and 10, as in `stream`."""
    clips = clips_ending_at_each_step(stream([12]), transitions=4)
    assert clips["render_state"][..., 0].tolist() == [
        [1] * 4, [1, 2, 2, 2], [1, 2, 3, 3], *([t - 2, t - 1, t, t + 1] for t in range(3, 12))
    ]  # fmt: skip
    judges = {"grey": Brightness(), "fifth": PrivilegedScorer(("fifth", "seventh"), ("fifth",))}
    scores = judged(clips, NumberRenderer(), judges)
    assert scores["grey"] == pytest.approx(np.arange(1, 13) / 255)
    assert scores["fifth"].tolist() == [1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1]
    assert judged(clips, None, {"fifth": judges["fifth"]})["fifth"].tolist() == [*scores["fifth"]]


def test_an_episode_begins_at_random_and_is_played_to_its_end():
    env = DoorKeyEnv(5, 1, seed=3, held_out=True)
    episode = play(env, env.demonstrator(), random_steps=6, seed=1)
    outcome = episode["next"]
    assert outcome["events"][-1, 0]
    assert outcome["terminated"].flatten().tolist() == [False] * (len(episode) - 1) + [True]
    assert torch.equal(episode["observation"][1:], outcome["observation"][:-1])
    again = play(DoorKeyEnv(5, 1, seed=3, held_out=True), env.demonstrator(), 6, seed=1)
    assert torch.equal(again["observation"], episode["observation"])
    straight = play(DoorKeyEnv(5, 1, seed=3, held_out=True), env.demonstrator(), 0, seed=1)
    assert len(straight) < len(episode)


def test_table_and_picture_hold_the_curves(tmp_path):
    frames = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    scores, differences = np.array([0.0, math.nan, 1.0]), np.array([0.5, -0.25, 0.0])
    curves = Curves({"goal": scores}, {0: differences}, {"goal": [2], "key": []}, frames)
    value_and_score.write_table(curves, tmp_path / "t.csv")
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["step", "events", "score goal", "value difference 0"],
        ["0", "", "0", "0.5"],
        ["1", "", "nan", "-0.25"],
        ["2", "goal", "1", "0"],
    ]
    files = [tmp_path / "t.png", tmp_path / "t.svg"]
    value_and_score.draw(curves, "title", files)
    value_and_score.draw(Curves({"goal": scores}, {0: 0 * differences}, {}, None), "", files)
    assert all(path.stat().st_size > 5000 for path in files)


SHORT = [
    f"--config={cli.CONFIGS / 'methods' / 'privileged.yaml'}",
    "--env.size=5",
    "--training.total_env_steps=384",
    "--training.num_envs=4",
    "--training.warmup_env_steps=96",
    "--training.eval_every_env_steps=0",
    "--training.progress=false",
    "--training.policies_every_env_steps=192",
]


def test_a_run_keeps_its_weights_and_the_program_reads_them(tmp_path, capsys):
    """Weights lie there from before the first update to the end."""
    cli.run(DQN, [*SHORT, f"--training.log_dir={tmp_path}", "--training.name=run"])
    run = tmp_path / "run"
    names = ("policy_0", "policy_192", "policy_384", "policy")
    assert {path.stem for path in run.glob("policy*.ckpt")} == set(names)
    saved = [torch.load(run / f"{name}.ckpt", weights_only=True) for name in names]
    assert [each["env_steps"] for each in saved] == [0, 192, 384, 384]
    weights = [torch.cat([w.flatten() for w in each["algorithm"].values()]) for each in saved]
    assert torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[0], weights[1])
    value_and_score.main(run, clip_transitions=2, random_steps=3)
    with (run / "value_and_score.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [f"value difference {steps}" in rows[0] for steps in (0, 192, 384)] == [True] * 3
    (score,) = (name for name in rows[0] if name.startswith("score"))
    goal = [row["events"] == "goal" for row in rows]
    assert goal == [False] * (len(rows) - 1) + [True]
    assert [float(row[score]) for row in rows] == goal
    for path in capsys.readouterr().out.split():
        assert path.startswith(str(run / "value_and_score."))
    value_and_score.main(run, env_steps=[200], out=tmp_path / "one")
    with (tmp_path / "one.csv").open() as file:
        assert "value difference 192" in file.readline().strip().split(",")[-1]
    for path in run.glob("policy_*.ckpt"):
        path.unlink()
    with pytest.raises(ConfigError, match="policies_every_env_steps"):
        value_and_score.main(run)
    with pytest.raises(ConfigError, match=r"run is .*: name a run's folder"):
        value_and_score.main(tmp_path)
