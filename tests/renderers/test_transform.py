"""The drawing transform: in clips, in an environment, in a replay buffer, in another process."""

import pickle

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import TransformedEnv
from torchrl.envs.utils import check_env_specs

from vlmrb_torchrl.envs import DoorKeyEnv
from vlmrb_torchrl.renderers import ClipRenderTransform, MiniGridRenderer


def test_frames_of_clips_are_the_renderers():
    renderer = MiniGridRenderer(tile_size=4)
    states = DoorKeyEnv(5, 6, seed=0).reset()["render_state"].reshape(2, 3, 5, 5, 4)
    clips = ClipRenderTransform(renderer)(TensorDict({"render_state": states}, [2]))
    assert clips["clip"].dtype == torch.uint8
    assert clips["clip"].shape == (2, 3, 3, 20, 20)
    assert torch.equal(clips["clip"][1, 2], renderer(states[1, 2]))


def test_a_transformed_environment_keeps_its_specs():
    env = TransformedEnv(
        DoorKeyEnv(5, 2),
        ClipRenderTransform(MiniGridRenderer(tile_size=4), out_keys=[("picture", "now")]),
    )
    check_env_specs(env)
    rollout = env.rollout(3)
    assert rollout["next", "picture", "now"].shape == (2, 3, 3, 20, 20)
    drawn = MiniGridRenderer(tile_size=4)(rollout["next", "render_state"])
    assert torch.equal(rollout["next", "picture", "now"], drawn)


def test_a_replay_buffer_draws_what_it_samples():
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(10),
        transform=ClipRenderTransform(MiniGridRenderer(tile_size=4)),
        batch_size=5,
    )
    states = DoorKeyEnv(5, 10, seed=0).reset().select("render_state")
    buffer.extend(states)
    sample = buffer.sample()
    assert torch.equal(sample["clip"], MiniGridRenderer(tile_size=4)(sample["render_state"]))


def test_the_transform_pickles_and_checks_its_keys():
    transform = ClipRenderTransform(MiniGridRenderer(tile_size=4))
    state = TensorDict({"render_state": torch.zeros(1, 2, 5, 5, 4, dtype=torch.uint8)}, [1])
    again = pickle.loads(pickle.dumps(transform))
    assert torch.equal(transform(state.clone())["clip"], again(state.clone())["clip"])
    with pytest.raises(ValueError, match="name one output for each input"):
        ClipRenderTransform(MiniGridRenderer(), in_keys=["a", "b"])
