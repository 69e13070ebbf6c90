"""Networks of the continuous recipes: vectors in, actions in [-1, 1] and values out.

Modules of their own and not ``TensorDictModule``s, whose general way in and out is dear for
networks of this size.  B: batch, O: numbers of an observation, A: numbers of an action.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.envs import EnvBase
from torchrl.modules import MLP, NormalParamExtractor
from torchrl.objectives import LossModule

from vlmrb_torchrl.checks import require


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


def mlp(
    in_features: int, out_features: int, hidden_features: Sequence[int], layer_norm: bool = False
) -> MLP:
    """Build layers with ReLU between them, behind a layer norm each if asked."""
    norms = {
        "norm_class": nn.LayerNorm,
        "norm_kwargs": [{"normalized_shape": width} for width in hidden_features],
    }
    return MLP(
        in_features=in_features,
        out_features=out_features,
        num_cells=list(hidden_features),
        activation_class=nn.ReLU,
        **(norms if layer_norm else {}),
    )


class GaussianPolicy(TensorDictModuleBase):
    """``"observation"`` float32 ``[B, O]`` in, ``"loc"`` and ``"scale"`` ``[B, A]`` out.

    They are those of a Gaussian whose tanh is the action; the scale starts near 1.

    Args:
        observation_features: O.
        action_features: A.
        hidden_features: Width of each hidden layer.
    """

    in_keys = ("observation",)
    out_keys = ("loc", "scale")

    def __init__(
        self, observation_features: int, action_features: int, hidden_features: Sequence[int]
    ) -> None:
        super().__init__()
        self.mlp = mlp(observation_features, 2 * action_features, hidden_features)
        self.split = NormalParamExtractor()

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write location and scale."""
        loc, scale = self.split(self.mlp(tensordict.get("observation")))
        return tensordict.set("loc", loc).set("scale", scale)


class DeterministicPolicy(TensorDictModuleBase):
    """``"observation"`` float32 ``[B, O]`` in, ``"action"`` ``[B, A]`` in (-1, 1) out.

    Args:
        observation_features: O.
        action_features: A.
        hidden_features: Width of each hidden layer.
    """

    in_keys = ("observation",)
    out_keys = ("action",)

    def __init__(
        self, observation_features: int, action_features: int, hidden_features: Sequence[int]
    ) -> None:
        super().__init__()
        self.mlp = mlp(observation_features, action_features, hidden_features)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action."""
        return tensordict.set("action", self.mlp(tensordict.get("observation")).tanh())


class ActionValue(TensorDictModuleBase):
    """``"observation"`` and ``"action"`` in, ``"state_action_value"`` float32 ``[B, 1]`` out.

    Args:
        observation_features: O.
        action_features: A.
        hidden_features: Width of each hidden layer.
        layer_norm: Normalise each hidden layer; it keeps values of actions that the replay does
            not hold from growing.
    """

    in_keys = ("observation", "action")
    out_keys = ("state_action_value",)

    def __init__(
        self,
        observation_features: int,
        action_features: int,
        hidden_features: Sequence[int],
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.mlp = mlp(observation_features + action_features, 1, hidden_features, layer_norm)

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
