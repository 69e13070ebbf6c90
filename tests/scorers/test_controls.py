"""Scorers that need no model: what they answer is known in closed form."""

import math
import pickle

import pytest
import torch
from tensordict import TensorDict

from vlmrb_torchrl.scorers import (
    ClipScorer,
    ConstantScorer,
    NoisyScorer,
    PrivilegedScorer,
    RandomScorer,
)

NAMES = ("goal", "door", "key")


def clips(events):
    events = torch.tensor(events, dtype=torch.bool)
    return TensorDict({"events": events}, [len(events)])


def test_privileged_says_yes_where_a_wanted_event_happened():
    batch = clips([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 1, 1]])
    assert PrivilegedScorer(NAMES)(batch)["score"].tolist() == [1, 0, 0, 0, 1]
    either = PrivilegedScorer(NAMES, events=("goal", "key"))
    assert either(batch)["score"].tolist() == [1, 0, 1, 0, 1]


def test_privileged_refuses_events_that_do_not_exist():
    for wrong in (("lava",), ()):
        with pytest.raises(ValueError, match=r"events is .*choose one or more of \('goal'"):
            PrivilegedScorer(NAMES, events=wrong)
    with pytest.raises(ValueError, match=r"event_names is \('goal',\): the clips hold 3 events"):
        PrivilegedScorer(("goal",))(clips([[1, 0, 0]]))


@pytest.mark.parametrize(("rate_of_yes", "rate_of_no"), [(0.8, 0.05), (0.3, 0.6)])
def test_noisy_errs_at_its_rates(rate_of_yes, rate_of_no):
    """20,000 clips of each truth: the share of Yes lies within 4.5 standard errors (p < 1e-5)."""
    n, seed = 20_000, 11
    batch = clips([[1, 0, 0]] * n + [[0, 1, 1]] * n)
    scorer = NoisyScorer(PrivilegedScorer(NAMES), rate_of_yes, rate_of_no, seed=seed)
    yes = scorer(batch)["score"]
    assert set(yes.tolist()) == {0.0, 1.0}
    for part, rate in ((yes[:n], rate_of_yes), (yes[n:], rate_of_no)):
        error = 4.5 * math.sqrt(rate * (1 - rate) / n)
        assert abs(part.mean().item() - rate) < error, f"seed {seed}"


def test_noisy_without_noise_is_the_judge_thresholded():
    batch = clips([[1, 0, 0], [0, 1, 0]])
    exact = NoisyScorer(PrivilegedScorer(NAMES), 1.0, 0.0)
    assert exact(batch)["score"].tolist() == [1, 0]
    for value, verdict in ((0.5, 1.0), (0.49, 0.0)):
        assert (
            NoisyScorer(ConstantScorer(value), 1.0, 0.0)(batch)["score"].tolist() == [verdict] * 2
        )


def test_noisy_has_no_score_where_its_judge_has_none():
    class Half(ClipScorer):
        def score(self, tensordict):
            return torch.tensor([1.0, math.nan])

    answer = NoisyScorer(Half(in_keys=()), 1.0, 1.0)(TensorDict({}, [2]))["score"]
    assert answer[0] == 1
    assert answer[1].isnan()


def test_noisy_reads_and_costs_what_its_judge_does():
    class Dear(ClipScorer):
        score = None

    noisy = NoisyScorer(Dear())
    assert noisy.needs_frames
    assert not noisy.cheap
    assert NoisyScorer(PrivilegedScorer(NAMES)).cheap
    assert not NoisyScorer(PrivilegedScorer(NAMES)).needs_frames


def test_random_says_yes_at_its_rate_whatever_the_clip():
    n, rate, seed = 40_000, 0.05, 5
    yes = RandomScorer(rate, seed=seed)(TensorDict({}, [n]))["score"]
    assert abs(yes.mean().item() - rate) < 4.5 * math.sqrt(rate * (1 - rate) / n), f"seed {seed}"


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: RandomScorer(0.5, seed),
        lambda seed: NoisyScorer(ConstantScorer(), 0.5, 0.5, seed),
    ],
)
def test_seeded_scorers_repeat_themselves_and_go_on_where_their_state_was_saved(make):
    def answers(scorer, batches=3):
        return [scorer(TensorDict({}, [16]))["score"].tolist() for _ in range(batches)]

    torch.manual_seed(0)
    first = make(1)
    whole = answers(first, 6)
    torch.manual_seed(99)  # other draws of the program change nothing
    second = make(1)
    assert answers(second) == whole[:3]
    assert answers(make(2)) != whole[:3]
    resumed, copied = make(7), pickle.loads(pickle.dumps(second))
    resumed.load_state_dict(second.state_dict())
    assert answers(resumed) == answers(copied) == whole[3:]


def test_constant_reads_nothing():
    scorer = ConstantScorer(0.25)
    assert scorer.in_keys == []
    assert scorer(TensorDict({}, [3]))["score"].tolist() == [0.25] * 3


def test_answers_that_are_no_scores_are_refused_with_the_scorers_name():
    class Wrong(ClipScorer):
        def __init__(self, answer):
            super().__init__(in_keys=())
            self.answer = answer

        def score(self, tensordict):
            return torch.tensor(self.answer)

    for answer, message in (
        ([0.5], r"answered shape \(1,\) for 2 clips"),
        ([[0.5, 0.5]], r"answered shape \(1, 2\) for 2 clips"),
        ([0.5, math.inf], "answered inf"),
        ([math.nan, 1.5], "answered 1.5"),
        ([0.5, -1.0], "answered -1.0"),
    ):
        with pytest.raises(ValueError, match=rf"Wrong\(.*\) {message}"):
            Wrong(answer)(TensorDict({}, [2]))
    column = Wrong([[0.5], [math.nan]])(TensorDict({}, [2]))["score"]  # NaN: no score
    assert column.shape == (2,)
    assert column[0] == 0.5
    assert column[1].isnan()


def test_scores_are_computed_without_gradient():
    class Model(ClipScorer):
        def __init__(self):
            super().__init__(in_keys=())
            self.weight = torch.nn.Parameter(torch.tensor(0.5))

        def score(self, tensordict):
            return self.weight.expand(2)

    assert not Model()(TensorDict({}, [2]))["score"].requires_grad


def test_frames_of_another_size_than_a_scorer_knows_are_refused():
    class Small(ClipScorer):
        frame_size = (2, 2)

        def score(self, tensordict):
            return torch.ones(len(tensordict))

    clips = {size: torch.zeros(1, 1, 3, *size, dtype=torch.uint8) for size in ((2, 2), (2, 4))}
    for scorer in (Small(), NoisyScorer(Small())):
        with pytest.raises(ValueError, match=r"is \(2, 4\): \w+ knows \(2, 2\) only"):
            scorer(TensorDict({"clip": clips[2, 4]}, [1]))
        assert scorer(TensorDict({"clip": clips[2, 2]}, [1]))["score"].shape == (1,)
