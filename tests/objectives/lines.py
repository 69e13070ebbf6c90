"""A value network whose quantile functions are straight lines: expectations in closed form."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.data import Categorical
from torchrl.modules import QValueActor


class Lines(TensorDictModuleBase):
    """Z_τ(s, a) = base[s, a] + slope[s, a] τ for numbered states s, observed as float ``[B, 1]``.

    ``seen`` keeps the fractions that were handed in, call by call.
    """

    def __init__(self, base, slope=None, keys=("observation", "tau", "quantiles")):
        super().__init__()
        self.state_key, self.tau_key, self.quantiles_key = keys
        self.in_keys, self.out_keys = [self.state_key], ["action_value"]
        self.base = nn.Parameter(torch.tensor(base))
        self.slope = nn.Parameter(
            torch.zeros_like(self.base) if slope is None else torch.tensor(slope)
        )
        self.seen = []

    def forward(self, tensordict):
        state = tensordict.get(self.state_key).squeeze(-1).long()
        base, slope = self.base[state], self.slope[state]
        tau = tensordict.get(self.tau_key, None)
        if tau is not None:
            self.seen.append(tau)
            values = base.unsqueeze(-2) + slope.unsqueeze(-2) * tau.unsqueeze(-1)
            tensordict.set(self.quantiles_key, values)
        return tensordict.set("action_value", base + slope / 2)


def actor(*args, **kwargs):
    """The greedy policy over ``Lines``, actions numbered."""
    network = Lines(*args, **kwargs)
    return QValueActor(network, spec=Categorical(network.base.shape[-1]))


def transitions(state, action, reward, following, terminated, truncated=None):
    """A batch of transitions from plain lists."""
    column = {
        "observation": torch.tensor(state, dtype=torch.float32).unsqueeze(-1),
        "next": {
            "observation": torch.tensor(following, dtype=torch.float32).unsqueeze(-1),
            "reward": torch.tensor(reward, dtype=torch.float32).unsqueeze(-1),
            "terminated": torch.tensor(terminated).unsqueeze(-1),
        },
    }
    truncated = [False] * len(state) if truncated is None else truncated
    column["next"]["done"] = column["next"]["terminated"] | torch.tensor(truncated).unsqueeze(-1)
    return TensorDict({"action": torch.tensor(action), **column}, [len(state)])
