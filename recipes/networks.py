"""Networks of the recipes, grids first, then vectors.

Policies read and write TensorDicts when they play; updates call the same networks with tensors, as
the way in and out of a TensorDict is dear for networks of this size. ``hidden_features`` is the
width of each hidden layer.

B: batch, C: cells of a grid, O: numbers of an observation, A: actions, or numbers of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional
from torchrl.data import Bounded, Categorical
from torchrl.envs import EnvBase
from torchrl.modules import MLP, NormalParamExtractor

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


_MANY_ROWS = 1_000  # from which on choosing is faster: at 727, of DoorKey-8x8, it is not


class GridLinear(nn.Module):
    """A linear layer over the one-hot codes of a grid's cells, an empty cell (0) as zeros.

    Most cells are empty. For a large grid on the CPU the layer adds up the rows of its weight that
    the others choose, 48 of 2,167 for DoorKey-12x12, instead of multiplying by ones and zeros.

    Args:
        num_cells: C.
        num_codes: Codes of a cell, the empty one among them.
        out_features: Width of what it returns.
    """

    codes: Tensor

    def __init__(self, num_cells: int, num_codes: int, out_features: int) -> None:
        super().__init__()
        self.register_buffer("codes", torch.eye(num_codes)[:, 1:].contiguous())
        layer = nn.Linear(num_cells * (num_codes - 1) + 1, out_features)
        self.weight, self.bias = nn.Parameter(layer.weight.detach().t().contiguous()), layer.bias

    def forward(self, observation: Tensor) -> Tensor:
        """Map uint8 ``[B, C + 1]`` (cells, then a flag) to float32 ``[B, out_features]``."""
        rows, codes = len(self.weight), self.codes.shape[1]
        # On a GPU the number of rows would have to be waited for.
        if rows >= _MANY_ROWS and observation.device.type == "cpu":
            cells = observation.flatten(0, -2)
            summed: Tensor = _sum_rows(cells, self.weight, codes) + self.bias
            return summed.view(*observation.shape[:-1], -1)
        one_hot = functional.embedding(observation[..., :-1].int(), self.codes).flatten(-2)
        one_hot = torch.cat([one_hot, observation[..., -1:].to(one_hot.dtype)], dim=-1)
        return one_hot @ self.weight + self.bias


def _rows_of(cells: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Which items ``[n]`` choose which rows ``[n]`` of the weight, by item."""
    item, cell = cells.nonzero(as_tuple=True)
    return item, cell * codes + (cells[item, cell] - 1)


def _sums(values: Tensor, index: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Sum ``values[index]`` by ``group``, which ascends: ``[num_groups, H]``."""
    first = torch.searchsorted(group, torch.arange(num_groups))
    return functional.embedding_bag(index, values, first, mode="sum")


# Operators of their own, for torch.compile: the number of rows depends on the cells.
@torch.library.custom_op("vlmrb_recipes::sum_rows", mutates_args=(), device_types="cpu")
def _sum_rows(cells: Tensor, weight: Tensor, codes: int) -> Tensor:
    """Sum for each item of ``[B, C + 1]`` the rows of ``[C codes + 1, H]``: ``[B, H]``."""
    item, row = _rows_of(cells, codes)
    return _sums(weight, row, item, len(cells))


@torch.library.custom_op("vlmrb_recipes::sum_items", mutates_args=(), device_types="cpu")
def _sum_items(gradient: Tensor, cells: Tensor, codes: int, rows: int) -> Tensor:
    """Sum for each row of the weight the gradients ``[B, H]`` of the items that chose it."""
    item, row = _rows_of(cells, codes)
    order = row.argsort()
    return _sums(gradient, item[order], row[order], rows)


@_sum_rows.register_fake
def _(cells: Tensor, weight: Tensor, codes: int) -> Tensor:
    return weight.new_empty(cells.shape[0], weight.shape[1])


@_sum_items.register_fake
def _(gradient: Tensor, cells: Tensor, codes: int, rows: int) -> Tensor:
    return gradient.new_empty(rows, gradient.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    cells, weight, ctx.codes = inputs
    ctx.rows = weight.shape[0]
    ctx.save_for_backward(cells)


def _gradient(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
    (cells,) = ctx.saved_tensors
    return None, _sum_items(gradient, cells, ctx.codes, ctx.rows), None


_sum_rows.register_autograd(_gradient, setup_context=_keep)


def grid_mlp(
    num_cells: int,
    num_codes: int,
    out_features: int,
    hidden_features: Sequence[int],
    *,
    activate_last_layer: bool = False,
) -> nn.Sequential:
    """Build layers with ReLU between them, the first over a grid."""
    first, *widths = *hidden_features, out_features
    layers: list[nn.Module] = [GridLinear(num_cells, num_codes, first)]
    if widths or activate_last_layer:
        layers.append(nn.ReLU())
    if widths:
        layers += mlp(first, out_features, widths[:-1], activate_last_layer=activate_last_layer)
    return nn.Sequential(*layers)


class GridQNetwork(TensorDictModuleBase):
    """``"observation"`` uint8 ``[B, C + 1]`` in, ``"action_value"`` float32 ``[B, A]`` out."""

    in_keys = ("observation",)
    out_keys = ("action_value",)

    def __init__(
        self, num_cells: int, num_codes: int, num_actions: int, hidden_features: Sequence[int]
    ) -> None:
        super().__init__()
        self.mlp = grid_mlp(num_cells, num_codes, num_actions, hidden_features)

    def values(self, observation: Tensor) -> Tensor:
        """Value every action, ``[B, A]``."""
        values: Tensor = self.mlp(observation)
        return values

    def value(self, observation: Tensor, action: Tensor) -> Tensor:
        """Value one action ``[B]`` each: ``[B]``."""
        return self.values(observation).gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the values."""
        return tensordict.set("action_value", self.values(tensordict.get("observation")))


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
        super().__init__(
            grid_mlp(num_cells, num_codes, last, widths, activate_last_layer=True),
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

    def draw(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Draw actions ``[B, A]``, by which gradients flow, and their log π, ``[B]``."""
        loc, scale = self.split(self.mlp(observation))
        gaussian = loc + scale * torch.randn_like(loc)
        # The density of tanh u is that of u over 1 - tanh² u = 4 / (e^u + e^-u)², here without
        # overflow and without the rounding of a tanh near 1 (Haarnoja et al. 2018, appendix C).
        slope = 2 * (math.log(2) - gaussian - functional.softplus(-2 * gaussian))
        density = Normal(loc, scale, validate_args=False).log_prob(gaussian)
        return gaussian.tanh(), (density - slope).sum(-1)

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

    def act(self, observation: Tensor) -> Tensor:
        """Choose actions, ``[B, A]``."""
        action: Tensor = self.mlp(observation).tanh()
        return action

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action."""
        return tensordict.set("action", self.act(tensordict.get("observation")))


class Critics(nn.ModuleList):
    """K networks that value actions each in its own way, which keeps their least from optimism.

    Layer norms keep values of actions that the replay does not hold from growing.
    """

    def __init__(
        self,
        number: int,
        observed: int,
        acted: int,
        hidden_features: Sequence[int],
        layer_norm: bool = False,
    ) -> None:
        sizes = observed + acted, 1, hidden_features
        super().__init__(mlp(*sizes, layer_norm=layer_norm) for _ in range(number))

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """Value actions ``[B, A]`` in what is observed ``[B, O]``: ``[B, K]``."""
        pair = torch.cat([observation, action], dim=-1)
        return torch.cat([critic(pair) for critic in self], dim=-1)
