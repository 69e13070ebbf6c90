"""Edges where a slip changes what is learnt and no run fails: a score of a half, who chooses."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage

from recipes.dqn import DQN
from recipes.iqn import IQN
from tests.recipes.chain import ChainEnv
from tests.streams import stream
from vlmrb_torchrl import AsyncScorer, VLMPrioritizedSampler, VLMReplayBuffer
from vlmrb_torchrl.scorers import ConstantScorer


def test_a_score_equal_to_the_threshold_is_a_yes() -> None:
    sampler = VLMPrioritizedSampler(4, threshold=0.5)
    sampler.extend(torch.arange(4))
    score = torch.tensor([0.5, 0.5 - 1e-9, 0.5 + 1e-9], dtype=torch.float64)
    sampler.update_score(torch.arange(3), score)
    assert sampler.positive.tolist() == [True, False, True, False]


def test_a_clip_of_score_one_half_is_counted_as_positive() -> None:
    buffer = VLMReplayBuffer(
        storage=LazyTensorStorage(16), sampler=VLMPrioritizedSampler(16), batch_size=4
    )
    with AsyncScorer(buffer, None, ConstantScorer(0.5), mode="sync", clip_transitions=4) as scoring:
        scoring.extend(stream([8]))
        counts = scoring.statistics()
    assert counts["clips_positive"] == counts["clips_scored"] == 2


@pytest.mark.parametrize("algorithm", [DQN, IQN])
def test_the_online_network_chooses_the_next_action_and_the_target_network_values_it(
    algorithm: type,
) -> None:
    """Online Q is (1, 0) and the target's (2, 6), γ is 0.5: δ = 0.5 + 0.5 x 2 - 1 = 0.5.

    Had the target network chosen, it would be 0.5 + 0.5 x 6 - 1 = 2.5.
    """
    module = algorithm(ChainEnv(3, discrete=True), hidden_features=(8,), gamma=0.5)
    for params, values in (
        (module.loss.value_network_params, [1.0, 0.0]),
        (module.loss.target_value_network_params, [2.0, 6.0]),
    ):
        params.apply(lambda leaf: leaf.data.zero_())
        (last,) = (each for each in params.values(True, True) if each.shape == (2,))
        last.data += torch.tensor(values)
    grid = torch.tensor([[1, 0]], dtype=torch.uint8)
    no = torch.zeros(1, 1, dtype=torch.bool)
    following = {"observation": grid, "reward": torch.full((1, 1), 0.5)}
    following |= {"done": no, "terminated": no}
    batch = TensorDict(
        {"observation": grid, "action": torch.zeros(1, dtype=torch.int64), "next": following}, [1]
    )
    module.training_step(batch, "value")
    assert batch["td_error"].item() == pytest.approx(0.5)
