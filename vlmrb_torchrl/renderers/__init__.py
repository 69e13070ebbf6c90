"""Render state in, frames out. Add a renderer: one file here, and one import line below."""

from vlmrb_torchrl.renderers.base import Renderer
from vlmrb_torchrl.renderers.minigrid import (
    AbstractSprites,
    MiniGridRenderer,
    SwappedSprites,
    minigrid_render_state,
)
from vlmrb_torchrl.renderers.mujoco import MuJoCoRenderer
from vlmrb_torchrl.renderers.transform import ClipRenderTransform

__all__ = [
    "AbstractSprites",
    "ClipRenderTransform",
    "MiniGridRenderer",
    "MuJoCoRenderer",
    "Renderer",
    "SwappedSprites",
    "minigrid_render_state",
]
