"""Implicit quantile networks: the network, its loss, and TorchRL's loss module around it.

Source: Dabney et al. 2018, Implicit Quantile Networks, arXiv 1806.06923.

B: batch, N: online quantiles, M: target quantiles, D: features, A: actions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor, nn
from torch.nn import functional
from torchrl.data import TensorSpec
from torchrl.data.utils import _find_action_space
from torchrl.modules import QValueActor
from torchrl.objectives import DQNLoss, ValueEstimators

from vlmrb_torchrl.checks import is_key, is_positive, is_whole, require, shown

_MOST = 1 << 20  # features, cosines, fractions: beyond, they would not fit a memory
_TINY = 1e-6  # of one fraction there is no slope


def cvar(tau: Tensor, risk_level: float) -> Tensor:
    """Distort fractions so that actions are chosen by the mean of the worst returns alone.

    Args:
        tau: Fractions, float32, any shape, in [0, 1].
        risk_level: η in (0, 1], the share of the worst returns that counts; 1 is risk-neutral.

    Returns:
        β(τ) = η τ, in the shape of ``tau``.

    Raises:
        ValueError: ``risk_level`` is outside (0, 1], or ``tau`` is no tensor of floats.

    Source:
        Dabney et al. 2018, arXiv 1806.06923, CVaR.

    Example:
        >>> cvar(torch.tensor([0.0, 0.5, 1.0]), 0.1)
        tensor([0.0000, 0.0500, 0.1000])
    """
    require(is_positive(risk_level, 1), "risk_level", risk_level, "use a share above 0, up to 1")
    require(
        isinstance(tau, Tensor) and tau.is_floating_point(), "tau", shown(tau), "pass fractions"
    )
    return risk_level * tau


class QuantileNetwork(TensorDictModuleBase):
    """Implicit quantile network: Z_τ(x, a) = f(ψ(x) ⊙ φ(τ))_a.

    φ_j(τ) = ReLU(Σ_i cos(π i τ) w_ij + b_j), i from 0 to ``num_cosines`` − 1.

    Given fractions under ``tau_key``, float32 ``[B, N]``, it writes the quantiles at them to
    ``quantiles_key``, ``[B, N, A]``.  Given none, it acts: by the distorted midpoints β((k + ½)/K),
    where the paper draws K fractions, so that the policy has no noise and φ is computed once for a
    batch.  Either way their mean is ``"action_value"``, ``[B, A]``, and TorchRL's ``QValueActor``
    makes it a policy, π_β.

    Args:
        features: ψ, from the observation to ``[B, num_features]``.
        head: f, from ``[B, N, num_features]`` to ``[B, N, A]``.
        num_features: D.
        in_key: Key of the observation.
        tau_key: Key of the fractions.
        quantiles_key: Key of the quantiles at them.
        num_cosines: Cosines of the embedding, 64 in the paper.
        policy_quantiles: K, fractions that an action is chosen by, 32 in the paper.
        distortion: β, from fractions to fractions, such as ``cvar``; None is risk-neutral.

    Raises:
        ValueError: An argument is outside its range.

    Source:
        Dabney et al. 2018, arXiv 1806.06923, eq. 4.

    Example:
        >>> from tensordict import TensorDict
        >>> network = QuantileNetwork(nn.Linear(3, 8), nn.Linear(8, 2), num_features=8)
        >>> state = TensorDict({"observation": torch.rand(5, 3), "tau": torch.rand(5, 7)}, [5])
        >>> network(state)["quantiles"].shape
        torch.Size([5, 7, 2])
    """

    frequencies: Tensor
    policy_tau: Tensor

    def __init__(
        self,
        features: nn.Module,
        head: nn.Module,
        *,
        num_features: int,
        in_key: NestedKey = "observation",
        tau_key: NestedKey = "tau",
        quantiles_key: NestedKey = "quantiles",
        num_cosines: int = 64,
        policy_quantiles: int = 32,
        distortion: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("num_features", num_features),
            ("num_cosines", num_cosines),
            ("policy_quantiles", policy_quantiles),
        ):
            require(is_whole(value, 1, _MOST), name, value, f"use a whole number, 1 to {_MOST}")
        for name, module in (("features", features), ("head", head)):
            require(isinstance(module, nn.Module), name, module, "pass a module of torch")
        require(distortion is None or callable(distortion), "distortion", distortion, "use cvar")
        require(is_key(in_key), "in_key", in_key, "name an entry")
        self.in_keys, self.out_keys = [in_key], ["action_value"]
        self.tau_key, self.quantiles_key = tau_key, quantiles_key
        self.features, self.head = features, head
        self.embedding = nn.Linear(num_cosines, num_features)
        midpoints = (torch.arange(policy_quantiles) + 0.5) / policy_quantiles
        policy_tau = midpoints if distortion is None else distortion(midpoints)
        require(
            bool(((policy_tau >= 0) & (policy_tau <= 1)).all()),
            "distortion(tau)",
            policy_tau.tolist(),
            "use a function from [0, 1] to [0, 1]",
        )
        self.register_buffer("frequencies", torch.pi * torch.arange(num_cosines))
        self.register_buffer("policy_tau", policy_tau)

    def quantiles(self, observation: Tensor, tau: Tensor) -> Tensor:
        """Quantiles ``[B, N, A]`` of every action's return at fractions ``[B, N]``."""
        quantiles: Tensor = self.head(self._psi(observation) * self._phi(tau))
        return quantiles

    def values(self, observation: Tensor) -> Tensor:
        """Mean ``[B, A]`` over the quantiles that actions are chosen by."""
        phi = self._phi(self.policy_tau)
        if isinstance(self.head, nn.Linear):
            # The mean over quantiles commutes with a linear f: one pass instead of K.
            phi = phi.mean(-2, keepdim=True)
        quantiles: Tensor = self.head(self._psi(observation) * phi)
        return quantiles.mean(-2)

    def _psi(self, observation: Tensor) -> Tensor:
        psi: Tensor = self.features(observation)
        return psi.unsqueeze(-2)

    def _phi(self, tau: Tensor) -> Tensor:
        return torch.relu(self.embedding(torch.cos(tau.unsqueeze(-1) * self.frequencies)))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``"action_value"``, and the quantiles where fractions are given."""
        observation = tensordict.get(self.in_keys[0])
        tau = tensordict.get(self.tau_key, None)
        if tau is None:
            return tensordict.set("action_value", self.values(observation))
        quantiles = self.quantiles(observation, tau)
        tensordict.set(self.quantiles_key, quantiles)
        return tensordict.set("action_value", quantiles.mean(-2))


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
    for name, quantiles in (("prediction", prediction), ("tau", tau), ("target", target)):
        require(
            quantiles.is_floating_point()
            and quantiles.ndim == prediction.ndim >= 1 <= quantiles.shape[-1]
            and quantiles.shape[:-1] == prediction.shape[:-1],
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


def quantiles_of(quantiles: Tensor, action: Tensor) -> Tensor:
    """Pick the quantiles ``[B, N]`` of one action ``[B]`` each out of ``[B, N, A]``."""
    index = action[..., None, None].expand(*quantiles.shape[:-1], 1)
    return quantiles.gather(-1, index).squeeze(-1)


def quantile_distance(
    prediction: Tensor,
    tau: Tensor,
    target: Tensor,
    target_tau: Tensor,
    kind: Literal["mean", "pairwise"] = "mean",
) -> Tensor:
    """Distance of two returns, for replay, from their quantiles at fractions.

    Args:
        prediction: Online quantile values, float32 ``[B, N]``, in units of return.
        tau: Fractions of ``prediction``, ``[B, N]``.
        target: Target quantile values, ``[B, M]``.
        target_tau: Fractions of ``target``, ``[B, M]``.
        kind: The distance of their ``"mean"``s, or ``"pairwise"``: the mean of |δ_ij|.

    Returns:
        |δ|, ``[B]``, in units of return, without a gradient.
    """
    prediction = prediction.detach()
    if kind == "mean":
        return (_mean(target, target_tau) - _mean(prediction, tau)).abs()
    return (target.unsqueeze(-2) - prediction.unsqueeze(-1)).abs().mean((-2, -1))


def _mean(quantiles: Tensor, tau: Tensor) -> Tensor:
    """Estimate the mean ``[B]`` of a return from quantiles ``[B, N]``: their line's value at τ = ½.

    The line is the least-squares one. Their plain mean moves with the fractions that were drawn, of
    8 by a third of the return's spread, where the line of a straight quantile function is exact.
    """
    level, middle = quantiles.mean(-1, keepdim=True), tau.mean(-1, keepdim=True)
    away = tau - middle
    slope = ((quantiles - level) * away).sum(-1) / (away.square().sum(-1) + _TINY)
    return level.squeeze(-1) + slope * (0.5 - middle.squeeze(-1))


class IQNLoss(DQNLoss):
    """`DQNLoss` with the loss of implicit quantile networks.

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
        ValueError: An argument is outside its range, or double_dqn lacks a target network.

    Source:
        Dabney et al. 2018, arXiv 1806.06923, eq. 3; double_dqn: van Hasselt et al. 2016,
        arXiv 1509.06461.

    Example:
        >>> from torch import nn
        >>> from torchrl.data import Categorical
        >>> network = QuantileNetwork(nn.Linear(3, 8), nn.Linear(8, 2), num_features=8)
        >>> loss = IQNLoss(QValueActor(network, spec=Categorical(2)))
        >>> _ = loss.make_value_estimator(gamma=0.95)
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
    class _AcceptedKeys(DQNLoss._AcceptedKeys):
        """Keys that ``set_keys`` can rename: ``DQNLoss``'s, and two more.

        Attributes:
            tau: Fractions, handed to the network.
            quantiles: Quantiles at them, written by the network.
        """

        tau: NestedKey = "tau"
        quantiles: NestedKey = "quantiles"

    default_keys = _AcceptedKeys
    # Of n-step transitions γ is raised to the power of "steps_to_next_obs".
    SUPPORTED_VALUE_ESTIMATORS = (ValueEstimators.TD0,)

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
        require(
            isinstance(value_network, QValueActor),
            "value_network",
            value_network,
            "pass a QValueActor around a network",
        )
        for name, count in (
            ("online_quantiles", online_quantiles),
            ("target_quantiles", target_quantiles),
        ):
            require(is_whole(count, 1), name, count, "use a whole number >= 1")
        require(is_positive(kappa), "kappa", kappa, "use more than 0")
        reduction = "mean" if reduction is None else reduction
        for name, value, choices in (
            ("priority", priority, ("mean", "pairwise")),
            ("delay_value", delay_value, (True, False)),
            ("double_dqn", double_dqn, (True, False)),
            ("reduction", reduction, ("mean", "sum", "none")),
            ("use_prioritized_weights", use_prioritized_weights, (True, False, "auto")),
        ):
            one = isinstance(value, (bool, str)) and value in choices
            require(one, name, value, f"use one of {choices}")
        given = value_network.action_space if action_space is None else action_space
        try:
            space = _find_action_space(given)
        except (ValueError, TypeError, AttributeError):
            space = None
        known = space in ("categorical", "one_hot")
        require(known, "action_space", given, "use categorical or one-hot")
        super().__init__(
            value_network,
            delay_value=delay_value,
            double_dqn=double_dqn,
            action_space=space,
            reduction=reduction,
            use_prioritized_weights=use_prioritized_weights,
        )
        self.online_quantiles, self.target_quantiles = online_quantiles, target_quantiles
        self.kappa, self.priority = kappa, priority

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Compute the loss of a batch and write |δ| into it.

        Args:
            tensordict: Transitions with ``in_keys``.

        Returns:
            ``"loss"``: float32, a scalar unless ``reduction`` is ``"none"``.
        """
        state = self._state(tensordict)
        online, tau = self._quantiles(state, self.value_network_params, self.online_quantiles)
        action = self._index(tensordict.get(self.tensor_keys.action), tensordict.shape)
        prediction = quantiles_of(online, action)
        target, target_tau = self._target(tensordict)
        loss = quantile_huber(prediction, tau, target, self.kappa)
        td_error = quantile_distance(prediction, tau, target, target_tau, self.priority)
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
        value = quantiles_of(quantiles, self._index(choice, tensordict.shape))
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
