"""Pictures of clips."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor


def clip_strip(frames: Tensor, title: str, columns: int = 8) -> Figure:
    """Lay the frames of a clip out in reading order.

    F: frames, H and W: pixels.

    Args:
        frames: uint8 ``[F, 3, H, W]``.
        title: Line above the picture.
        columns: Frames in a row.

    Returns:
        A figure that belongs to no window.
    """
    count, channels, height, width = frames.shape
    rows = -(-count // columns)
    padded = np.zeros((rows * columns, height, width, channels), np.uint8)
    padded[:count] = frames.permute(0, 2, 3, 1).cpu().numpy()
    grid = padded.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    figure = Figure(figsize=(columns, rows + 0.4), layout="tight")
    axes = figure.subplots()
    axes.imshow(grid.reshape(rows * height, columns * width, channels), interpolation="nearest")
    axes.set_xticks(np.arange(0, columns + 1) * width - 0.5, labels=[])
    axes.set_yticks(np.arange(0, rows + 1) * height - 0.5, labels=[])
    axes.grid(color="white", linewidth=1)
    axes.set_title(title, fontsize=9)
    return figure
