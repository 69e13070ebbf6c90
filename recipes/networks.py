"""Networks of the discrete recipes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.nn import functional
from torchrl.data import Categorical
from torchrl.envs import EnvBase
from torchrl.modules import MLP

from vlmrb_torchrl.checks import require
from vlmrb_torchrl.objectives import QuantileNetwork


def grid_sizes(env: EnvBase) -> tuple[int, int, int]:
    """Return cells, codes and actions of an environment, or refuse one that shows no grid.

    Raises:
        ConfigError: Unless it observes uint8 cell codes and a flag, and acts by number.
    """
    observation, action = env.observation_spec["observation"], env.action_spec_unbatched
    require(
        isinstance(action, Categorical) and observation.dtype == torch.uint8,
        "env's observation and action_spec",
        f"{observation.dtype} and {type(action).__name__}",
        "this algorithm's network reads uint8 grids and acts by number, choose another env or "
        "recipe",
    )
    return observation.shape[-1] - 1, int(observation.space.high.max()) + 1, action.space.n


class CellOneHot(nn.Module):
    """Symbolic grid window as one-hot channels, an empty cell as zeros.

    B: batch, C: cells of the window.

    Args:
        num_codes: Distinct cell codes, 0 (empty) included.
    """

    channels: Tensor

    def __init__(self, num_codes: int) -> None:
        super().__init__()
        self.register_buffer("channels", torch.eye(num_codes)[:, 1:].contiguous())

    def forward(self, observation: Tensor) -> Tensor:
        """Expand uint8 ``[B, C + 1]`` (cells, then a flag) to float32 ``[B, C (codes-1) + 1]``."""
        cells = functional.embedding(observation[..., :-1].int(), self.channels).flatten(-2)
        return torch.cat([cells, observation[..., -1:].to(cells.dtype)], dim=-1)


class GridQNetwork(TensorDictModuleBase):
    """MLP over the one-hot window: ``"observation"`` in, ``"action_value"`` out.

    A module of its own and not a ``TensorDictModule``, whose general way in and out is dear
    for networks of this size.

    Args:
        num_cells: Cells of the window.
        num_codes: Distinct cell codes, 0 (empty) included.
        num_actions: Actions.
        hidden_features: Width of each hidden layer.
    """

    in_keys = ("observation",)
    out_keys = ("action_value",)

    def __init__(
        self, num_cells: int, num_codes: int, num_actions: int, hidden_features: Sequence[int]
    ) -> None:
        super().__init__()
        self.one_hot = CellOneHot(num_codes)
        self.mlp = MLP(
            in_features=num_cells * (num_codes - 1) + 1,
            out_features=num_actions,
            num_cells=list(hidden_features),
            activation_class=nn.ReLU,
        )

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write float32 ``[B, num_actions]``."""
        value = self.mlp(self.one_hot(tensordict.get("observation")))
        return tensordict.set("action_value", value)


class GridQuantileNetwork(QuantileNetwork):
    """Implicit quantile network over the one-hot window.

    ψ is all the hidden layers and f is linear (as by default in Tianshou), so that what is done for
    each quantile anew is small; the paper's f has a hidden layer of its own.

    Args:
        num_cells: Cells of the window.
        num_codes: Distinct cell codes, 0 (empty) included.
        num_actions: Actions.
        hidden_features: Width of each hidden layer.
        policy_quantiles: Fractions that an action is chosen by.
    """

    def __init__(
        self,
        num_cells: int,
        num_codes: int,
        num_actions: int,
        hidden_features: Sequence[int],
        policy_quantiles: int,
    ) -> None:
        require(
            len(hidden_features) >= 1,
            "algorithm.hidden_features",
            hidden_features,
            "give one width or more",
        )
        *widths, num_features = hidden_features
        features = MLP(
            in_features=num_cells * (num_codes - 1) + 1,
            out_features=num_features,
            num_cells=widths,
            activation_class=nn.ReLU,
            activate_last_layer=True,
        )
        super().__init__(
            nn.Sequential(CellOneHot(num_codes), features),
            nn.Linear(num_features, num_actions),
            num_features=num_features,
            policy_quantiles=policy_quantiles,
        )
