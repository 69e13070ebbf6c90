"""Networks of the recipes, grids first, then vectors; and what the log says of their values.

They are modules of their own and not ``TensorDictModule``s, whose general way in and out is dear
for networks of this size. ``hidden_features`` is the width of each hidden layer.

B: batch, C: cells of a grid, O: numbers of an observation, A: actions, or numbers of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.nn import functional
from torchrl.data import Bounded, Categorical
from torchrl.envs import EnvBase
from torchrl.modules import MLP, NormalParamExtractor
from torchrl.objectives import LossModule

from vlmrb_torchrl.checks import require
from vlmrb_torchrl.objectives import QuantileNetwork


def mlp(
    in_features: int,
    out_features: int,
    hidden_features: Sequence[int],
    *,
    layer_norm: bool = False,
    **options: Any,
) -> MLP:
    """Build layers with ReLU between them, behind a layer norm each if asked."""
    if layer_norm:
        options["norm_class"] = nn.LayerNorm
        options["norm_kwargs"] = [{"normalized_shape": width} for width in hidden_features]
    return MLP(
        in_features=in_features,
        out_features=out_features,
        num_cells=list(hidden_features),
        activation_class=nn.ReLU,
        **options,
    )


def grid_sizes(env: EnvBase) -> tuple[int, int, int]:
    """Return C, the number of codes and A of an environment, or refuse one that shows no grid.

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
    """Cells of one of ``num_codes`` codes as one-hot channels, an empty cell (0) as zeros."""

    channels: Tensor

    def __init__(self, num_codes: int) -> None:
        super().__init__()
        self.register_buffer("channels", torch.eye(num_codes)[:, 1:].contiguous())

    def forward(self, observation: Tensor) -> Tensor:
        """Expand uint8 ``[B, C + 1]`` (cells, then a flag) to float32 ``[B, C (codes-1) + 1]``."""
        cells = functional.embedding(observation[..., :-1].int(), self.channels).flatten(-2)
        return torch.cat([cells, observation[..., -1:].to(cells.dtype)], dim=-1)


class GridQNetwork(TensorDictModuleBase):
    """``"observation"`` uint8 ``[B, C + 1]`` in, ``"action_value"`` float32 ``[B, A]`` out."""

    in_keys = ("observation",)
    out_keys = ("action_value",)

    def __init__(
        self, num_cells: int, num_codes: int, num_actions: int, hidden_features: Sequence[int]
    ) -> None:
        super().__init__()
        self.one_hot = CellOneHot(num_codes)
        self.mlp = mlp(num_cells * (num_codes - 1) + 1, num_actions, hidden_features)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the values."""
        value = self.mlp(self.one_hot(tensordict.get("observation")))
        return tensordict.set("action_value", value)


class GridQuantileNetwork(QuantileNetwork):
    """Implicit quantile network over the same observation.

    ψ is all the hidden layers and f is linear (as by default in Tianshou), so that what is done for
    each quantile anew is small; the paper's f has a hidden layer of its own.
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
        *widths, last = hidden_features
        inputs = num_cells * (num_codes - 1) + 1
        super().__init__(
            nn.Sequential(
                CellOneHot(num_codes), mlp(inputs, last, widths, activate_last_layer=True)
            ),
            nn.Linear(last, num_actions),
            num_features=last,
            policy_quantiles=policy_quantiles,
        )


def vector_sizes(env: EnvBase) -> tuple[int, int]:
    """Return O and A of an environment, or refuse one that these networks cannot play.

    Raises:
        ConfigError: Unless it observes float32 vectors and acts in [-1, 1].
    """
    observation, action = env.observation_spec["observation"], env.action_spec_unbatched
    require(
        isinstance(action, Bounded) and action.dtype.is_floating_point,
        "env's action_spec",
        f"{type(action).__name__} of {action.dtype}",
        "this algorithm needs continuous actions, choose another env or recipe",
    )
    low, high = action.space.low, action.space.high
    require(
        bool((low == -1).all() and (high == 1).all()),
        "env's action_spec",
        f"from {low.tolist()} to {high.tolist()}",
        "bring it to [-1, 1], by torchrl.envs.ActionScaling in the task's make()",
    )
    require(
        observation.dtype == torch.float32,
        "env's observation",
        observation.dtype,
        "bring it to float32, by torchrl.envs.DoubleToFloat in the task's make()",
    )
    return observation.shape[-1], action.shape[-1]


class GaussianPolicy(TensorDictModuleBase):
    """``"observation"`` float32 ``[B, O]`` in, ``"loc"`` and ``"scale"`` ``[B, A]`` out.

    They are those of a Gaussian whose tanh is the action; the scale starts near 1.
    """

    in_keys = ("observation",)
    out_keys = ("loc", "scale")

    def __init__(self, observed: int, acted: int, hidden_features: Sequence[int]) -> None:
        super().__init__()
        self.mlp = mlp(observed, 2 * acted, hidden_features)
        self.split = NormalParamExtractor()

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write location and scale."""
        loc, scale = self.split(self.mlp(tensordict.get("observation")))
        return tensordict.set("loc", loc).set("scale", scale)


class DeterministicPolicy(TensorDictModuleBase):
    """``"observation"`` float32 ``[B, O]`` in, ``"action"`` ``[B, A]`` in (-1, 1) out."""

    in_keys = ("observation",)
    out_keys = ("action",)

    def __init__(self, observed: int, acted: int, hidden_features: Sequence[int]) -> None:
        super().__init__()
        self.mlp = mlp(observed, acted, hidden_features)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action."""
        return tensordict.set("action", self.mlp(tensordict.get("observation")).tanh())


class ActionValue(TensorDictModuleBase):
    """``"observation"`` and ``"action"`` in, ``"state_action_value"`` float32 ``[B, 1]`` out.

    Layer norms keep values of actions that the replay does not hold from growing.
    """

    in_keys = ("observation", "action")
    out_keys = ("state_action_value",)

    def __init__(
        self, observed: int, acted: int, hidden_features: Sequence[int], layer_norm: bool = False
    ) -> None:
        super().__init__()
        self.mlp = mlp(observed + acted, 1, hidden_features, layer_norm=layer_norm)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the value."""
        pair = torch.cat([tensordict.get("observation"), tensordict.get("action")], dim=-1)
        return tensordict.set("state_action_value", self.mlp(pair))


def critics_values(loss: LossModule, batch: TensorDictBase) -> Tensor:
    """Ask each of the K critics of a loss for the values of a batch's actions, ``[B, K]``."""
    values = []
    for params in loss.qvalue_network_params.unbind(0):
        with params.to_module(loss.qvalue_network):
            values.append(loss.qvalue_network(batch.copy())["state_action_value"])
    return torch.cat(values, -1)


def keep_targets(loss: LossModule) -> None:
    """Have a loss keep the targets of its last batch, which TorchRL's losses do not all return."""
    estimator = loss.value_estimator
    estimate = estimator.value_estimate

    def kept(*arguments: Any, **options: Any) -> Tensor:
        target: Tensor = estimate(*arguments, **options)
        estimator.targets = target.detach()
        return target

    estimator.value_estimate = kept


def value_figures(loss: LossModule, values: Tensor) -> dict[str, Tensor]:
    """Mean value and target of the last batch; where each value is one of several, their spread.

    Args:
        loss: One that keeps its targets.
        values: Of the batch's actions, ``[B, K]``: K quantiles of the return, or K critics'.

    Returns:
        ``value/q``, ``value/target`` and, if K > 1, ``value/spread``: the standard deviation over
        K. All in units of the return that is learnt from.
    """
    figures = {"value/q": values.mean(), "value/target": loss.value_estimator.targets.mean()}
    if values.shape[-1] > 1:
        figures["value/spread"] = values.std(-1, correction=0).mean()
    return figures
