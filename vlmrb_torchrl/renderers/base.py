"""What a renderer is: a function from stored render states to frames."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Renderer(Protocol):
    """Draws frames from the compact states that the replay buffer keeps.

    Any callable of this shape is a renderer; nothing needs to be inherited. Three promises
    are asked of it: the same state always gives the same bytes, a state of zeros can be drawn
    (specs are built from it), and it pickles, for it travels to the scorer's process. One that
    wants its states elsewhere than on the scorer's device names that place as ``device``; if it
    can draw on the scorer's all the same, ``on(device)`` returns the renderer that does.

    B: any number of leading dimensions, S: the shape that the environment gives a state.
    """

    def __call__(self, render_state: Tensor) -> Tensor:
        """Draw every state.

        Args:
            render_state: States as the environment wrote them, ``[*B, *S]``.

        Returns:
            RGB frames, uint8 ``[*B, 3, H, W]``, 0 to 255, on the device of ``render_state``.
        """
        ...
