"""The network of IQN: quantiles of the return at any fraction, from a cosine embedding of it.

Source: Dabney et al. 2018, Implicit Quantile Networks, arXiv 1806.06923.

B: batch, N: quantiles, D: features, A: actions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from vlmrb_torchrl.checks import is_key, is_positive, is_whole, require, shown

_MOST = 1 << 20  # features, cosines, fractions: beyond, they would not fit a memory


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
    ``quantiles_key``, ``[B, N, A]``.  Given none, it acts: it takes the distorted midpoints
    β((k + ½)/K).  Either way their mean is ``"action_value"``, ``[B, A]``, so that TorchRL's
    ``QValueActor`` makes it a policy, π_β. The paper draws K fractions to act; the midpoints
    approximate the same mean without noise, the policy is deterministic, and φ is computed once
    for the whole batch.

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

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``"action_value"``, and the quantiles where fractions are given."""
        tau = tensordict.get(self.tau_key, None)
        fractions = self.policy_tau if tau is None else tau
        phi = torch.relu(self.embedding(torch.cos(fractions.unsqueeze(-1) * self.frequencies)))
        if tau is None and isinstance(self.head, nn.Linear):
            # The mean over quantiles commutes with a linear f: one pass instead of K.
            phi = phi.mean(-2, keepdim=True)
        psi = self.features(tensordict.get(self.in_keys[0])).unsqueeze(-2)
        quantiles = self.head(psi * phi)
        if tau is not None:
            tensordict.set(self.quantiles_key, quantiles)
        return tensordict.set("action_value", quantiles.mean(-2))
