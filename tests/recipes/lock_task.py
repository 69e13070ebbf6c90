"""A lock of N digits, of which a random policy opens one in 2^N: where replay decides."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from recipes.tasks import Task
from vlmrb_torchrl import keys


class LockEnv(EnvBase):
    """Shows how many digits are right; a wrong one ends the episode, as does the last, for 1."""

    def __init__(self, num_envs, digits):
        super().__init__(batch_size=[num_envs])
        N, self.digits = num_envs, digits
        observed = Bounded(0, digits + 1, (N, 2), dtype=torch.uint8)
        flag = Categorical(2, shape=(N, 1), dtype=torch.bool)
        self.observation_spec = Composite(
            {"observation": observed, keys.EVENTS: flag.clone()}, shape=(N,)
        )
        self.action_spec = Categorical(2, shape=(N,), dtype=torch.int64)
        self.reward_spec = Unbounded((N, 1))
        self.done_spec = Composite(
            {name: flag.clone() for name in ("done", "terminated", "truncated")}, shape=(N,)
        )
        self.right = torch.zeros(N, dtype=torch.int64)

    def _reset(self, tensordict=None, **_):
        asked = None if tensordict is None else tensordict.get("_reset", None)
        if asked is None:
            self.right.zero_()
        else:
            self.right[asked.reshape(-1)] = 0
        return self._seen(torch.zeros(*self.batch_size, 1, dtype=torch.bool))

    def _step(self, tensordict):
        fits = tensordict["action"] == self.right % 2
        self.right += fits
        opened = (self.right == self.digits).unsqueeze(-1)
        seen = self._seen(opened | ~fits.unsqueeze(-1))
        return seen.set("reward", opened.float()).set(keys.EVENTS, opened)

    def _seen(self, ended):
        shown = torch.stack([self.right + 1, torch.zeros_like(self.right)], -1)
        return TensorDict(
            {
                "observation": shown.to(torch.uint8),
                keys.EVENTS: torch.zeros_like(ended),
                "done": ended,
                "terminated": ended,
                "truncated": torch.zeros_like(ended),
            },
            self.batch_size,
        )

    def _set_seed(self, seed):
        return seed


class Lock(Task):
    name, event_names, success_event = "lock", ("opened",), "opened"

    def __init__(self, digits: int = 7) -> None:
        self.digits = digits

    def make(self, num_envs, seed, *, held_out=False):
        return LockEnv(num_envs, self.digits)
