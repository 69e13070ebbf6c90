"""Drawing as a transform: wherever TorchRL takes one, render states become frames."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Composite
from torchrl.envs import Transform

from vlmrb_torchrl.checks import is_key, require, shown
from vlmrb_torchrl.keys import CLIP, RENDER_STATE
from vlmrb_torchrl.renderers.base import Renderer


class ClipRenderTransform(Transform):
    """Draws frames from render states: wherever TorchRL takes a transform.

    In a replay buffer or called on clips it draws on demand; in a `TransformedEnv` it draws at
    every step. Only the scorer's road needs the frames, so the former is the cheap place.

    B: batch, L: frames of a clip (or no such dimension at all), S: shape of one state.

    Args:
        renderer: Draws ``[*B, *S]`` into uint8 ``[*B, 3, H, W]`` on its input's device.
        in_keys: Where the render states are.
        out_keys: Where the frames go.

    Example:
        >>> transform = ClipRenderTransform(MiniGridRenderer(tile_size=4))
        >>> states = torch.zeros(2, 32, 6, 6, 4, dtype=torch.uint8)
        >>> transform(TensorDict({"render_state": states}, [2]))["clip"].shape
        torch.Size([2, 32, 3, 24, 24])
    """

    def __init__(
        self,
        renderer: Renderer,
        in_keys: Sequence[NestedKey] = (RENDER_STATE,),
        out_keys: Sequence[NestedKey] = (CLIP,),
    ) -> None:
        if not callable(renderer):
            raise TypeError(f"renderer={shown(renderer)}: pass one, such as env.renderer().")
        for name, keys in (("in_keys", in_keys), ("out_keys", out_keys)):
            named = isinstance(keys, (list, tuple)) and bool(keys)
            if not named or not all(map(is_key, keys)):
                raise TypeError(f"{name}={shown(keys)}: pass a list of keys.")
        remedy = f"name one output for each input of {list(in_keys)}"
        require(len(in_keys) == len(out_keys), "out_keys", list(out_keys), remedy)
        super().__init__(in_keys=list(in_keys), out_keys=list(out_keys))
        self.renderer = renderer

    def _apply_transform(self, obs: Tensor) -> Tensor:
        return self.renderer(obs)

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        return self._call(tensordict_reset)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Add the frames: uint8, 0 to 255, of the shape that the renderer draws."""
        observation_spec = observation_spec.clone()
        for in_key, out_key in zip(self.in_keys, self.out_keys, strict=True):
            state = observation_spec[in_key]
            frames = self.renderer(state.zero())
            observation_spec[out_key] = Bounded(
                0, 255, shape=frames.shape, dtype=torch.uint8, device=state.device
            )
        return observation_spec
