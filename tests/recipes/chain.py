"""Two states in turn, A then B, whatever is done; leaving A pays 1, leaving B nothing.

Each episode is one step: even games start in A, odd ones in B. If a time limit cuts them there,
A's value is 1 + γ² + γ⁴ + … = 1 / (1 - γ²) and B's γ times that. If that is their end, the values
are 1 and 0. Took a learner the next episode's start for the outcome, A's were 1 / (1 - γ).
"""

from __future__ import annotations

import torch
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
