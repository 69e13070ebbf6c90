"""Two states in turn, A then B, whatever is done; leaving A pays 1, leaving B nothing.

Each episode is one step: even games start in A, odd ones in B. If a time limit cuts them there,
A's value is 1 + γ² + γ⁴ + … = 1 / (1 - γ²) and B's γ times that. If that is their end, the values
are 1 and 0. Took a learner the next episode's start for the outcome, A's were 1 / (1 - γ).
"""

from __future__ import annotations

import torch
from lightning.fabric import Fabric
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from recipes.tasks import Task


class ChainEnv(EnvBase):
    def __init__(self, num_envs, discrete, terminates=False):
        super().__init__(batch_size=[num_envs])
        N, self.terminates = num_envs, terminates
        if discrete:  # what a grid shows: one cell with code 1 (A) or 2 (B), and a flag
            self.states = torch.tensor([[1, 0], [2, 0]], dtype=torch.uint8)
            observed = Bounded(0, 2, (N, 2), dtype=torch.uint8)
            self.action_spec = Categorical(2, shape=(N,), dtype=torch.int64)
        else:
            self.states = torch.eye(2)
            observed = Unbounded((N, 2))
            self.action_spec = Bounded(-1, 1, (N, 1), dtype=torch.float32)
        self.observation_spec = Composite({"observation": observed}, shape=(N,))
        self.reward_spec = Unbounded((N, 1))
        flag = Categorical(2, shape=(N, 1), dtype=torch.bool)
        self.done_spec = Composite(
            {name: flag.clone() for name in ("done", "terminated", "truncated")}, shape=(N,)
        )
        self.at_b = torch.arange(N) % 2

    def _reset(self, tensordict=None, **_):
        no = torch.zeros(*self.batch_size, 1, dtype=torch.bool)
        flags = {name: no.clone() for name in ("done", "terminated", "truncated")}
        return TensorDict({"observation": self.states[self.at_b], **flags}, self.batch_size)

    def _step(self, tensordict):
        flag = torch.ones(*self.batch_size, 1, dtype=torch.bool)
        return TensorDict(
            {
                "observation": self.states[1 - self.at_b],
                "reward": 1 - self.at_b.float().unsqueeze(-1),
                "done": flag,
                "terminated": flag & self.terminates,
                "truncated": flag & (not self.terminates),
            },
            self.batch_size,
        )

    def _set_seed(self, seed):
        return seed


class Chain(Task):
    name = "chain"

    def __init__(self, discrete: bool = False, terminates: bool = False) -> None:
        self.discrete, self.terminates = discrete, terminates

    def make(self, num_envs, seed, *, held_out=False):
        return ChainEnv(num_envs, self.discrete, self.terminates)


def learner(algorithm, num_envs=2, **arguments):
    """An algorithm for the chain, ready to learn."""
    env = ChainEnv(num_envs, discrete=algorithm.__name__ in ("DQN", "IQN"))
    module = algorithm(env, **{"hidden_features": (8,)} | arguments)
    module.prepare(Fabric(accelerator="cpu", devices=1))
    return module


def batch(discrete, size=5, seed=0):
    """Random transitions, weighted, some of several steps, some of them ends."""
    random = torch.Generator().manual_seed(seed)

    def observed():
        if discrete:
            states = torch.tensor([[1, 0], [2, 0]], dtype=torch.uint8)
            return states[torch.randint(2, (size,), generator=random)]
        return torch.randn(size, 2, generator=random)

    action = torch.rand(size, 1, generator=random) * 2 - 1
    drawn = {
        "priority_weight": torch.rand(size, generator=random) + 0.1,
        "observation": observed(),
        "action": (action > 0).long().squeeze(-1) if discrete else action,
        "steps_to_next_obs": torch.randint(1, 4, (size, 1), generator=random),
        "next": {
            "observation": observed(),
            "reward": torch.randn(size, 1, generator=random),
            "done": torch.arange(size).unsqueeze(-1) % 2 == 0,
            "terminated": torch.arange(size).unsqueeze(-1) % 4 == 0,
        },
    }
    return TensorDict(drawn, [size])
