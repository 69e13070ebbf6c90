"""Points on a line, pushed to its middle: a task of continuous actions that can be put back."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Composite, Unbounded

from recipes.tasks import Task
from vlmrb_torchrl.envs.base import SeededEpisodes


class LineEnv(SeededEpisodes):
    """N points; each episode has a start of its own and ends after 11 to 20 steps, or at 0."""

    def __init__(self, num_envs, seed, held_out):
        super().__init__(num_envs, seed=seed, held_out=held_out)
        N = num_envs
        self.observation_spec = Composite({"observation": Unbounded((N, 2))}, shape=(N,))
        self.action_spec = Bounded(-1, 1, (N, 1), dtype=torch.float32)
        self.at, self.left = torch.zeros(N, 2), torch.zeros(N, dtype=torch.int64)

    def _reset(self, tensordict=None, **_):
        for i in self._asked(tensordict, "_reset"):
            start = torch.Generator().manual_seed(self.episode_seed(i, self._episodes[i]))
            self._episodes[i] += 1
            self.at[i] = torch.rand(2, generator=start) / 10 - torch.tensor([1.0, 0.0])
            self.left[i] = torch.randint(11, 21, (), generator=start)
        return self._seen()

    def _step(self, tensordict):
        self.at[:, 1] = 0.9 * self.at[:, 1] + 0.1 * tensordict["action"][:, 0]
        self.at[:, 0] += self.at[:, 1]
        self.left -= 1
        return self._seen().set("reward", -self.at[:, :1].abs())

    def _seen(self):
        terminated, truncated = self.at[:, :1].abs() < 0.01, self.left.unsqueeze(-1) <= 0
        flags = {"terminated": terminated, "truncated": truncated, "done": terminated | truncated}
        return TensorDict({"observation": self.at.clone(), **flags}, self.batch_size)

    def games_state_dict(self):
        return {"stream": self.get_extra_state(), "at": self.at.clone(), "left": self.left.clone()}

    def load_games_state_dict(self, state):
        self.set_extra_state(state["stream"])
        self.at, self.left = state["at"], state["left"]


class Line(Task):
    name = "line"

    def make(self, num_envs, seed, *, held_out=False):
        return LineEnv(num_envs, seed, held_out)


class ForgetfulEnv(LineEnv):
    """The same, which nobody can put back."""

    games_state_dict = load_games_state_dict = None


class Forgetful(Task):
    name = "forgetful"

    def make(self, num_envs, seed, *, held_out=False):
        return ForgetfulEnv(num_envs, seed, held_out)
