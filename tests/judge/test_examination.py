"""Clips know what happened in them; known judges get the figures they must get."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule

from tests.judge.worlds import Counter, Grey, counted, examined
from vlmrb_torchrl.checks import ConfigError
from vlmrb_torchrl.envs import DoorKeyEnv
from vlmrb_torchrl.judge.collection import collect
from vlmrb_torchrl.judge.judging import asked_scorers
from vlmrb_torchrl.judge.report import keep
from vlmrb_torchrl.judge.settings import Settings
from vlmrb_torchrl.scorers import ClipScorer, ConstantScorer, NoisyScorer, PrivilegedScorer

DOORKEY = ("goal", "door", "key")


class Broken(ClipScorer):
    def score(self, tensordict):
        raise RuntimeError("out of\nmemory")


class Silent(ClipScorer):
    def score(self, tensordict):
        return torch.full((len(tensordict),), torch.nan)


class Shy(PrivilegedScorer):
    def score(self, tensordict):
        said = super().score(tensordict)
        return said.masked_fill(said > 0, torch.nan)


def advance(_: int) -> None:
    pass


def doorkey(**arguments) -> Settings:
    return Settings(
        DoorKeyEnv(6, num_envs=8, max_steps=60),
        arguments.pop("scorers", None) or [PrivilegedScorer(DOORKEY)],
        **{"clips": 60, "clip_transitions": 8, "frames_per_clip": 4, "resamples": 300} | arguments,
    )


def test_clips_say_where_they_lie_what_they_show_and_what_happened() -> None:
    """Episodes of 10 steps in clips of 4, 4 and 2 transitions, two outcomes of each shown."""
    clips = collect(counted(), advance)
    assert clips["episode"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert clips["first"].tolist() == [0, 4, 8] * 3
    assert clips["transitions"].tolist() == [4, 4, 2] * 3
    assert clips["render_state"][:3, :, 0].tolist() == [[2, 4], [6, 8], [9, 10]]
    assert clips["events"][:3].tolist() == [[False, True], [False, False], [True, False]]
    # Step 3 comes after the first frame, which shows step 2; step 10 comes after step 9.
    assert torch.equal(clips["shown"], clips["events"])


def test_what_happens_no_later_than_in_the_first_frame_is_not_shown() -> None:
    """One frame a clip shows the last outcome alone: no change can be seen in it."""
    clips = collect(counted(frames_per_clip=1), advance)
    assert clips["events"].any()
    assert not clips["shown"].any()


def test_overlapping_clips_start_where_their_transitions_do() -> None:
    clips = collect(counted(stride=2), advance)
    assert clips["first"][:4].tolist() == [0, 2, 4, 6]
    assert clips["render_state"][:4, 0, 0].tolist() == [2, 4, 6, 8]


def test_same_seed_same_clips() -> None:
    first, again, other = (collect(doorkey(seed=seed, clips=24), advance) for seed in (5, 5, 6))
    assert (first == again).all()
    assert not torch.equal(first["render_state"], other["render_state"])


def test_mixed_games_are_demonstrated_and_random_by_turns() -> None:
    """Eight games, episodes numbered as they begin; none succeeds by chance in 60 steps."""
    clips = collect(doorkey(random_share=0.0, clip_transitions=60, frames_per_clip=60), advance)
    succeeded = clips["events"][:, 0]
    first = [bool(succeeded[clips["episode"] == k].any()) for k in range(8)]
    assert first == [True, False] * 4


def test_a_policy_of_ones_own_plays() -> None:
    class Always(TensorDictModule):
        def __init__(self) -> None:
            super().__init__(
                lambda state: torch.full(state.shape[:1], 1), ["render_state"], ["action"]
            )

    clips = collect(doorkey(policy=Always(), random_share=0.0, clips=16), advance)
    here = clips["render_state"][..., 3].amax((-1, -2))  # it turns on the spot
    assert ((here.diff(dim=1) % 4).abs() == 2).all()


def test_noisy_judges_rates_lie_within_their_intervals() -> None:
    """Seed 0, not chosen; of a hundred such intervals five would miss."""
    noisy = NoisyScorer(PrivilegedScorer(DOORKEY), 0.7, 0.2, seed=0)
    (verdict,) = examined(doorkey(scorers=[noisy], clips=300)).verdicts
    for name, rate in (("recall", 0.7), ("false_positive_rate", 0.2)):
        assert verdict.estimates[name].low <= rate <= verdict.estimates[name].high


def test_privileged_judge_is_perfect() -> None:
    result = examined(doorkey())
    (verdict,) = result.verdicts
    assert 0 < verdict.positives < 60
    values = {name: estimate.value for name, estimate in verdict.estimates.items()}
    for name in ("precision", "recall", "auc"):
        assert values[name] == 1
        assert verdict.estimates[name].low < 1
    assert values["brier"] == values["ece"] == values["false_positive_rate"] == 0


def test_each_prompt_is_judged_against_the_event_that_it_asks_about() -> None:
    env = Counter(prompts={"end": "Is it over?", "third": "Is it the third?"})
    settings = counted(env=env, scorers=[Grey()], prompts=["third", "end"])
    third, end = examined(settings).verdicts
    assert (third.question.asked, end.question.asked) == ("third", "end")
    assert (third.positives, end.positives) == (3, 3)
    np.testing.assert_allclose(third.answers.score + end.answers.score, 1, atol=1e-6)


def test_a_question_of_ones_own_is_judged_against_the_event_named() -> None:
    settings = counted(scorers=[Grey()], prompts=["Is it dark out there?"], event="third")
    (verdict,) = examined(settings).verdicts
    assert verdict.question.events == ("third",)
    assert verdict.question.asked == "Is it dark out there?"


def test_a_scorer_of_several_prompts_is_judged_as_it_scores() -> None:
    """Left to its own prompts it is one judge, and any of their events makes a positive."""
    env = Counter(prompts={"end": "Is it over?", "third": "Is it the third?"})
    settings = counted(env=env, scorers=[Grey(("Is it over?", "Is it the third?"))])
    (verdict,) = examined(settings).verdicts
    assert verdict.question.asked == "end or third"
    assert verdict.positives == 6


class Named(ConstantScorer):
    model: str = "run"

    @property
    def config(self):
        return (("model", self.model),)


def test_models_whose_folders_look_numbered_keep_names_of_their_own() -> None:
    scorers = [Named() for _ in range(4)]
    scorers[0].model = scorers[3].model = "run #2"
    asked = asked_scorers(counted(scorers=[*scorers, NoisyScorer(Named())]))
    assert [judge.name for judge in asked] == [
        *("Named run #2", "Named run", "Named run #3", "Named run #2 #2"),
        "NoisyScorer run",
    ]


def test_a_judge_within_another_is_held_against_what_it_is_asked() -> None:
    env = Counter(prompts={"end": "Is it over?", "third": "Is it the third?"})
    scorers = [NoisyScorer(Grey(("Is it the third?",))), NoisyScorer(ConstantScorer())]
    third, end = examined(counted(env=env, scorers=scorers)).verdicts
    assert (third.question.asked, third.question.events) == ("third", ("third",))
    assert end.question.events == ("end",)


def test_a_scorer_that_fails_is_told_of_in_one_line() -> None:
    with pytest.raises(ConfigError, match="Broken failed on 9 clips: RuntimeError: out of memory"):
        examined(counted(scorers=[Broken()]))
    with pytest.raises(ConfigError, match="Silent gave none of 9 clips a score"):
        examined(counted(scorers=[Silent()]))


def test_an_answer_that_is_no_score_is_counted_and_costs_the_others_nothing() -> None:
    """Of what it would say Yes to it says nothing: all positives are missed, no negative is."""
    result = examined(counted(scorers=[Shy(("end", "third"), ("end",))]))
    (verdict,), (cost,) = result.verdicts, result.costs
    assert cost.unanswered == verdict.positives > 0
    assert verdict.answers.score.tolist() == [0.0] * len(result.clips)


def test_a_policy_that_cannot_act_is_refused_before_anything_is_played() -> None:
    lost = TensorDictModule(lambda x: x, ["no_such_key"], ["action"])
    with pytest.raises(ConfigError, match="it cannot act in Counter"):
        examined(counted(policy=lost))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept") / "clips"
    result = examined(doorkey(save=folder, policy="scripted"))
    arguments = {"env": {"class_path": "vlmrb_torchrl.envs.DoorKeyEnv"}, "policy": "scripted"}
    keep(result, folder, arguments)
    return result


def test_saved_clips_are_judged_again_as_they_were(saved) -> None:
    """The same clips, labels and figures, although nothing is played; and whose they are."""
    folder, (verdict,) = saved.settings.save, saved.verdicts
    assert sorted(file.name for file in folder.iterdir()) == ["clips.safetensors", "meta.json"]
    again = examined(doorkey(load=folder))
    assert (again.clips.exclude("scores", "labels") == saved.clips).all()
    assert again.verdicts[0].estimates == verdict.estimates
    np.testing.assert_array_equal(again.clips["scores"][:, 0], verdict.answers.score)
    np.testing.assert_array_equal(again.clips["labels"][:, 0], verdict.answers.label)
    (column,) = json.loads((folder / "meta.json").read_text())["columns"]
    assert column["fingerprint"] == PrivilegedScorer(DOORKEY).fingerprint
    assert column["events"] == ["goal"]


def test_saved_clips_are_drawn_anew_in_another_resolution(saved) -> None:
    seen = []

    class Looking(ConstantScorer):
        def __init__(self) -> None:
            super().__init__()
            self.in_keys = ["clip"]

        def score(self, tensordict):
            seen.append(tuple(tensordict["clip"].shape[-2:]))
            return super().score(tensordict)

    view = {"tile_size": 4, "window": None}
    examined(doorkey(load=saved.settings.save, scorers=[Looking()], renderer=view))
    assert set(seen) == {(24, 24)}
