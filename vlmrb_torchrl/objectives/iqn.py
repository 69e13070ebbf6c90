"""Implicit quantile networks as a TorchRL loss.

Source: Dabney et al. 2018, Implicit Quantile Networks, arXiv 1806.06923.

B: batch, N: online quantiles, M: target quantiles, A: actions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor
from torch.nn import functional
from torchrl.data import TensorSpec
from torchrl.data.utils import _find_action_space
from torchrl.modules import QValueActor
from torchrl.objectives import LossModule, ValueEstimators
from torchrl.objectives.utils import dispatch_value_estimator
from torchrl.objectives.value import ValueEstimatorBase

from vlmrb_torchrl.checks import is_positive, is_whole, require, shown

_AT_LEAST_1 = "use a whole number >= 1"
_TINY = 1e-6  # of one fraction there is no slope


def quantile_huber(prediction: Tensor, tau: Tensor, target: Tensor, kappa: float = 1.0) -> Tensor:
    """Quantile Huber loss between two sets of return quantiles.

    B: batch (any number of dimensions), N: online quantiles, M: target quantiles.

    Args:
        prediction: Online quantile values, float32 ``[B, N]``, in units of discounted return.
        tau: Fractions of ``prediction``, float32 ``[B, N]`` in (0, 1).
        target: Target quantile values, float32 ``[B, M]``. No gradient flows into it.
        kappa: Huber threshold, in units of return.

    Returns:
        Loss per transition, float32 ``[B]``: summed over N, averaged over M.

    Raises:
        ValueError: Other shapes or dtypes, or κ is not positive.

    Source:
        Dabney et al. 2018, arXiv 1806.06923, eq. 3.

    Example:
        >>> quantile_huber(torch.zeros(1, 1), torch.full((1, 1), 0.5), torch.ones(1, 1))
        tensor([0.2500])
    """
    given = {"prediction": prediction, "tau": tau, "target": target}
    for name, quantiles in given.items():
        floats = isinstance(quantiles, Tensor) and quantiles.is_floating_point()
        fits = floats and quantiles.ndim == prediction.ndim >= 1 <= quantiles.shape[-1]
        require(
            fits and quantiles.shape[:-1] == prediction.shape[:-1],
            name,
            shown(quantiles),
            "pass floats, [B, N] for prediction and tau, [B, M] for target",
        )
    require(tau.shape == prediction.shape, "tau", shown(tau), "pass one for each prediction")
    require(is_positive(kappa), "kappa", kappa, "use more than 0")
    prediction, target = torch.broadcast_tensors(
        prediction.unsqueeze(-1), target.detach().unsqueeze(-2)
    )
    # δ = target − prediction; an overestimate (δ < 0) weighs 1 − τ, an underestimate τ.
    weight = (tau.unsqueeze(-1) - (target < prediction).to(tau.dtype)).abs()
    huber = functional.huber_loss(prediction, target, reduction="none", delta=kappa)
    return (weight * huber / kappa).mean(-1).sum(-1)


def _of_action(quantiles: Tensor, action: Tensor) -> Tensor:
    """Pick the quantiles ``[B, N]`` of one action ``[B]`` each out of ``[B, N, A]``."""
    index = action[..., None, None].expand(*quantiles.shape[:-1], 1)
    return quantiles.gather(-1, index).squeeze(-1)


def _mean(quantiles: Tensor, tau: Tensor) -> Tensor:
    """Estimate the mean ``[B]`` of a return from quantiles ``[B, N]``: their line's value at τ = ½.

    The line is the least-squares one. Their plain mean moves with the fractions that were drawn, of
    8 by a third of the return's spread, where the line of a straight quantile function is exact.
    """
    level, middle = quantiles.mean(-1, keepdim=True), tau.mean(-1, keepdim=True)
    away = tau - middle
    slope = ((quantiles - level) * away).sum(-1) / (away.square().sum(-1) + _TINY)
    return level.squeeze(-1) + slope * (0.5 - middle.squeeze(-1))


class IQNLoss(LossModule):
    """The loss of implicit quantile networks.

    For each transition, N fractions τ and M fractions τ′ are drawn from U(0, 1), and

    δ_ij = r + γ Z_τ′j(x′, π_β(x′)) − Z_τi(x, a),  loss = Σ_i (1/M) Σ_j ρ_τi(δ_ij),

    with ρ the quantile Huber loss. An episode that was truncated bootstraps, one that terminated
    does not. |δ|, ``[B, 1]`` in units of return, is written to ``"td_error"``, for replay.

    Args:
        value_network: The greedy policy, such as a ``QValueActor`` around a ``QuantileNetwork``.
            Given fractions under ``"tau"`` ``[B, N]`` it writes ``"quantiles"`` ``[B, N, A]``, and
            it always writes its ``"action"``. Any risk distortion β is its own affair.

    Keyword Args:
        online_quantiles: N, fractions drawn for the prediction.
        target_quantiles: M (the paper's N′), fractions drawn for the target.
        kappa: Huber threshold κ > 0, in units of return.
        priority: What |δ| is. ``"mean"``: |mean of the target − mean of the prediction|, which is
            DQN's |δ|, since actions are chosen by means, and falls to 0 once the return is learnt.
            ``"pairwise"``: the mean of |δ_ij|, which never falls below the return's own spread.
        delay_value: Have a target network, which ``SoftUpdate`` or ``HardUpdate`` moves.
        double_dqn: Let the online network choose the next action.
        action_space: ``"categorical"``, ``"one-hot"`` or a spec; None: the network's own.
        reduction: ``"mean"`` (None), ``"sum"`` or ``"none"``.
        use_prioritized_weights: Weight the loss by ``"priority_weight"``, ``[B]``, where it is
            there (True and ``"auto"``), or never.

    Raises:
        ValueError: An argument is outside its range.

    Source:
        Dabney et al. 2018, arXiv 1806.06923, eq. 3; double_dqn: van Hasselt et al. 2016,
        arXiv 1509.06461.

    Example:
        >>> from torch import nn
        >>> from torchrl.data import Categorical
        >>> from torchrl.objectives import SoftUpdate
        >>> from vlmrb_torchrl.objectives import QuantileNetwork
        >>> network = QuantileNetwork(nn.Linear(3, 8), nn.Linear(8, 2), num_features=8)
        >>> loss = IQNLoss(QValueActor(network, spec=Categorical(2)))
        >>> _ = loss.make_value_estimator(gamma=0.95)
        >>> target = SoftUpdate(loss, tau=0.01)
        >>> ended = torch.tensor([[False], [True]])
        >>> following = {"observation": torch.rand(2, 3), "reward": torch.ones(2, 1)}
        >>> following |= {"terminated": ended, "done": ended}
        >>> action = torch.tensor([0, 1])
        >>> batch = {"observation": torch.rand(2, 3), "action": action, "next": following}
        >>> batch = TensorDict(batch, [2])
        >>> loss(batch)["loss"].shape, batch["td_error"].shape
        (torch.Size([]), torch.Size([2, 1]))
    """

    @dataclass
    class _AcceptedKeys:
        """Keys that ``set_keys`` can rename; ``DQNLoss`` has all but ``tau`` and ``quantiles``.

        Attributes:
            action: Taken action, int64 ``[B]`` or ``[B, 1]``, or one-hot ``[B, A]``.
            tau: Fractions, handed to the network.
            quantiles: Quantiles at them, written by the network.
            priority: |δ|, written to the input.
            reward: Reward, below ``"next"``, ``[B, 1]``.
            done: End of the episode, below ``"next"``, bool ``[B, 1]``.
            terminated: End without a future, below ``"next"``, bool ``[B, 1]``.
            priority_weight: Importance weight, ``[B]``.
        """

        action: NestedKey = "action"
        tau: NestedKey = "tau"
        quantiles: NestedKey = "quantiles"
        priority: NestedKey = "td_error"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        priority_weight: NestedKey = "priority_weight"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    default_value_estimator = ValueEstimators.TD0
    out_keys = ["loss"]  # noqa: RUF012

    value_network: TensorDictModule
    value_network_params: TensorDictParams
    target_value_network_params: TensorDictParams

    def __init__(
        self,
        value_network: QValueActor,
        *,
        online_quantiles: int = 8,
        target_quantiles: int = 8,
        kappa: float = 1.0,
        priority: Literal["mean", "pairwise"] = "mean",
        delay_value: bool = True,
        double_dqn: bool = False,
        action_space: str | TensorSpec | None = None,
        reduction: Literal["mean", "sum", "none"] | None = None,
        use_prioritized_weights: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        reduction = "mean" if reduction is None else reduction
        require(
            isinstance(value_network, QValueActor),
            "value_network",
            value_network,
            "pass a QValueActor around a network",
        )
        require(is_whole(online_quantiles, 1), "online_quantiles", online_quantiles, _AT_LEAST_1)
        require(is_whole(target_quantiles, 1), "target_quantiles", target_quantiles, _AT_LEAST_1)
        require(is_positive(kappa), "kappa", kappa, "use more than 0")
        for name, value, choices in (
            ("priority", priority, ("mean", "pairwise")),
            ("delay_value", delay_value, (True, False)),
            ("double_dqn", double_dqn, (True, False)),
            ("reduction", reduction, ("mean", "sum", "none")),
            ("use_prioritized_weights", use_prioritized_weights, (True, False, "auto")),
        ):
            one = isinstance(value, (bool, str)) and value in choices
            require(one, name, value, f"use one of {choices}")
        require(
            delay_value or not double_dqn, "double_dqn", double_dqn, "it needs delay_value=True"
        )
        given = value_network.action_space if action_space is None else action_space
        try:
            space = _find_action_space(given)
        except (ValueError, TypeError, AttributeError):
            space = None
        known = ("categorical", "one_hot")
        require(space in known, "action_space", given, "use categorical or one-hot")
        self.action_space = space
        self.convert_to_functional(value_network, "value_network", create_target_params=delay_value)
        self.online_quantiles, self.target_quantiles = online_quantiles, target_quantiles
        self.kappa, self.priority = kappa, priority
        self.delay_value, self.double_dqn = delay_value, double_dqn
        self.reduction = reduction
        self.use_prioritized_weights = use_prioritized_weights
        self._set_in_keys()

    def _set_in_keys(self) -> None:
        observed = self.value_network.in_keys
        ends = (self.tensor_keys.reward, self.tensor_keys.done, self.tensor_keys.terminated)
        following = [("next", key) for key in (*ends, *observed)]
        self.in_keys = [self.tensor_keys.action, *observed, *following]

    def make_value_estimator(
        self,
        value_type: ValueEstimators | ValueEstimatorBase | type[ValueEstimatorBase] | None = None,
        **hyperparams: Any,
    ) -> Any:
        """Choose how targets are built; only TD(0) is known, with ``gamma`` 0.99 by default.

        Of transitions that span several steps (``MultiStepTransform``) γ is raised to the power of
        ``"steps_to_next_obs"``.
        """
        value_type = self.default_value_estimator if value_type is None else value_type
        if isinstance(value_type, (ValueEstimatorBase, type)):
            return super().make_value_estimator(value_type, **hyperparams)
        dispatch_value_estimator(self, value_type, supported=(ValueEstimators.TD0,), **hyperparams)
        self._forward_value_estimator_keys()
        return self

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Compute the loss of a batch and write |δ| into it.

        Args:
            tensordict: Transitions with ``in_keys``.

        Returns:
            ``"loss"``: float32, a scalar unless ``reduction`` is ``"none"``.
        """
        online, tau = self._quantiles(
            self._state(tensordict), self.value_network_params, self.online_quantiles
        )
        action = self._index(tensordict.get(self.tensor_keys.action), tensordict.shape)
        prediction = _of_action(online, action)
        target, target_tau = self._target(tensordict)
        loss = quantile_huber(prediction, tau, target, self.kappa)
        with torch.no_grad():
            if self.priority == "mean":
                td_error = (_mean(target, target_tau) - _mean(prediction, tau)).abs()
            else:
                pairs = target.unsqueeze(-2) - prediction.unsqueeze(-1)
                td_error = pairs.abs().mean((-2, -1))
        tensordict.set(self.tensor_keys.priority, td_error.unsqueeze(-1), inplace=True)
        weights = self._maybe_get_priority_weight(tensordict)
        output = TensorDict(loss=self._reduce_loss(loss, tensordict=tensordict, weights=weights))
        self._clear_weakrefs(
            tensordict, output, "value_network_params", "target_value_network_params"
        )
        return output

    def _state(self, tensordict: TensorDictBase, *below: str) -> TensorDictBase:
        """Copy what the network reads, from ``below`` a key."""
        state = tensordict.empty()
        for key in self.value_network.in_keys:
            if (value := tensordict.get((*below, key), None)) is not None:
                state.set(key, value)
        return state

    def _quantiles(
        self, state: TensorDictBase, params: TensorDictParams, number: int
    ) -> tuple[Tensor, Tensor]:
        """Draw fractions ``[B, number]``; return the quantiles at them and themselves."""
        device = state.get(self.value_network.in_keys[0]).device
        tau = torch.rand(*state.shape, number, device=device)
        state.set(self.tensor_keys.tau, tau)
        with params.to_module(self.value_network, preserve_module_state=False):
            self.value_network(state)
        asked, written = self.tensor_keys.tau, self.tensor_keys.quantiles
        if (quantiles := state.get(written, None)) is None:
            raise KeyError(
                f"value_network, given fractions under {asked!r}, wrote no {written!r}: name its "
                "keys as the loss does (QuantileNetwork's tau_key and quantiles_key)"
            )
        return quantiles, tau

    @torch.no_grad()
    def _target(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Bootstrap target quantiles ``[B, M]``; return them and their fractions."""
        target_params = self.target_value_network_params
        state = self._state(tensordict, "next")
        chooser = self.value_network_params if self.double_dqn else target_params
        with chooser.to_module(self.value_network, preserve_module_state=False):
            choice = self.value_network(state.clone(False)).get(self.tensor_keys.action)
        quantiles, tau = self._quantiles(state, target_params, self.target_quantiles)
        value = _of_action(quantiles, self._index(choice, tensordict.shape))
        # TorchRL's estimators want rewards and ends in the shape of the values.
        transitions = tensordict.empty()
        steps = self.value_estimator.tensor_keys.steps_to_next_obs
        ends = (self.tensor_keys.reward, self.tensor_keys.done, self.tensor_keys.terminated)
        for key in (steps, *(("next", end) for end in ends)):
            if (known := tensordict.get(key, None)) is not None:
                # A span is [B], as TorchRL's n-step transforms write it, or [B, 1].
                column = known.reshape(*tensordict.shape, 1)
                transitions.set(key, column.expand_as(value))
        target: Tensor = self.value_estimator.value_estimate(transitions, next_value=value)
        return target, tau

    def _index(self, action: Tensor, batch: torch.Size) -> Tensor:
        """Number actions, int64 ``[B]``."""
        if self.action_space == "one_hot":
            return action.long().argmax(-1)
        return action.reshape(batch)
