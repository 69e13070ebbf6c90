"""Networks of the discrete recipes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrl.modules import MLP


class CellOneHot(nn.Module):
    """Symbolic grid window as one-hot channels, an empty cell as zeros.

    B: batch, C: cells of the window.

    Args:
        num_codes: Distinct cell codes, 0 (empty) included.
    """

    def __init__(self, num_codes: int) -> None:
        super().__init__()
        self.register_buffer("channels", torch.eye(num_codes)[:, 1:].contiguous())

    def forward(self, observation: Tensor) -> Tensor:
        """Expand uint8 ``[B, C + 1]`` (cells, then a flag) to float32 ``[B, C (codes-1) + 1]``."""
        cells = self.channels[observation[..., :-1].int()].flatten(-2)
        return torch.cat([cells, observation[..., -1:].to(cells.dtype)], dim=-1)


def grid_mlp(
    num_cells: int, num_codes: int, num_outputs: int, hidden: Sequence[int]
) -> nn.Sequential:
    """Build an MLP over the one-hot window.

    The first layer sees a sparse input: about one channel in ``num_codes - 1`` is on, so its
    weights start larger than a dense layer's would, for activations of unit scale.
    """
    in_features = num_cells * (num_codes - 1) + 1
    mlp = MLP(
        in_features=in_features,
        out_features=num_outputs,
        num_cells=list(hidden),
        activation_class=nn.ReLU,
    )
    return nn.Sequential(CellOneHot(num_codes), mlp)
