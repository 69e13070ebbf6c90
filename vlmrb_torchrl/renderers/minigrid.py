"""MiniGrid frames from stored cell codes, with tiles that MiniGrid drew itself.

A MiniGrid picture is a mosaic: what a cell looks like depends only on the object in it, its
colour and state, and the agent's direction if it stands there. Each such tile is drawn once,
by MiniGrid's own ``Grid.render_tile``, the first time it occurs; a frame is then a gather. The
frames equal ``env.unwrapped.get_frame(highlight=False)`` byte for byte, and come over a
hundred times faster (``recipes/benchmarks/rendering.py``).
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmrb_torchrl.checks import is_whole, require, shown

_OUTSIDE = 0  # slot of the black tile, shown beyond the grid's border
# A cell is four bytes, read as one little-endian integer; these bits of them can be set.
_USED_BITS = np.frombuffer(bytes([0x0F, 0x07, 0x03, 0x07]), np.uint32)[0]
_CODES = 1 << 12
_MOST = 1024  # pixels of a tile's edge, cells of a window's
_CHUNK_BYTES = 1 << 19  # half of a usual second-level cache


class Cell(NamedTuple):
    """What a tile shows, in MiniGrid's own indices (``minigrid.core.constants``).

    ``agent`` is 0 where the agent is not, else its direction + 1 (right, down, left, up).
    """

    kind: int
    colour: int
    state: int
    agent: int


Sprites = Callable[[Cell, int], NDArray[np.uint8]]
"""Draws one tile: a cell and the tile's edge in pixels in, uint8 ``[edge, edge, 3]`` out."""


def minigrid_render_state(env: Any) -> Tensor:
    """Everything that a picture of a MiniGrid environment shows, in four bytes a cell.

    Args:
        env: Any MiniGrid or BabyAI environment, wrapped or not, after its reset.

    Returns:
        uint8 ``[W, H, 4]``: type, colour and state of cell [x, y] (what lies under the agent
        is kept), and 1 + the agent's direction in its cell, 0 in the others.

    Raises:
        TypeError: It is no such environment, or was not reset.
    """
    game: Any = getattr(env, "unwrapped", None)
    if getattr(game, "grid", None) is None:
        raise TypeError(f"env is {shown(env)}: pass a MiniGrid environment after its reset.")
    state = np.zeros((game.width, game.height, 4), np.uint8)
    state[..., :3] = game.grid.encode()
    state[game.agent_pos[0], game.agent_pos[1], 3] = game.agent_dir + 1
    return torch.from_numpy(state)


def stock_sprites(cell: Cell, tile_size: int) -> NDArray[np.uint8]:
    """Draw ``cell`` as MiniGrid does.

    Raises:
        ValueError: MiniGrid has no such object, colour or state.
    """
    from minigrid.core.constants import IDX_TO_COLOR, IDX_TO_OBJECT
    from minigrid.core.grid import Grid
    from minigrid.core.world_object import Goal, WorldObj

    kind, colour = IDX_TO_OBJECT.get(cell.kind), IDX_TO_COLOR.get(cell.colour)
    known = kind is not None and colour is not None and cell.state <= 2 and cell.agent <= 4
    require(known, "render_state", cell, "it is no MiniGrid cell, pass uint8 [*B, W, H, 4]")
    # WorldObj.decode forgets a goal's colour.
    thing = Goal(colour) if kind == "goal" else WorldObj.decode(cell.kind, cell.colour, cell.state)
    direction = cell.agent - 1 if cell.agent else None
    tile = Grid.render_tile(thing, agent_dir=direction, tile_size=tile_size)
    # Averages of sub-pixels, in floats: MiniGrid truncates them when it fills its frame.
    return np.asarray(tile, np.uint8)


@dataclass(frozen=True)
class SwappedSprites:
    """The "misleading" game: objects drawn as other objects, the dynamics untouched.

    Args:
        swaps: From the type of an object to what is drawn in its place: a type, with a colour
            if it is not to keep the object's. The agent stays the agent.

    Raises:
        TypeError: They are no dict.
        ValueError: A name that MiniGrid does not know.

    Source:
        VLM-RB, arXiv 2602.01915, ablation "modified game" (the sprites are not published).

    Example:
        >>> MiniGridRenderer(sprites=SwappedSprites({"goal": "yellow key", "key": "green goal"}))
    """

    swaps: Mapping[str, str] = field(
        default_factory=lambda: {"goal": "yellow key", "key": "green goal", "door": "wall"}
    )

    def __post_init__(self) -> None:
        from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX

        if not isinstance(self.swaps, Mapping):
            raise TypeError(f'swaps={shown(self.swaps)}: pass a dict such as {{"goal": "wall"}}.')
        objects, colours = ", ".join(OBJECT_TO_IDX), ", ".join(COLOR_TO_IDX)
        drawings = {*OBJECT_TO_IDX, *(f"{c} {o}" for c in COLOR_TO_IDX for o in OBJECT_TO_IDX)}
        for name, drawn in self.swaps.items():
            require(name in OBJECT_TO_IDX, "swaps", repr(name), f"swap one of {objects}")
            known = isinstance(drawn, str) and drawn in drawings
            remedy = f"draw one of {objects}, with one of {colours} before it"
            require(known, f"swaps[{name!r}]", repr(drawn), remedy)

    def __call__(self, cell: Cell, tile_size: int) -> NDArray[np.uint8]:
        """Draw the tile of what ``cell`` is swapped for."""
        from minigrid.core.constants import COLOR_TO_IDX, IDX_TO_OBJECT, OBJECT_TO_IDX

        if drawn := self.swaps.get(IDX_TO_OBJECT.get(cell.kind, "")):
            *colour, kind = drawn.split()
            cell = cell._replace(kind=OBJECT_TO_IDX[kind])
            if colour:
                cell = cell._replace(colour=COLOR_TO_IDX[colour[0]])
        return stock_sprites(cell, tile_size)


@dataclass(frozen=True)
class AbstractSprites:
    """The "abstract" game: every tile, the agent's too, is a random texture of its own.

    A texture depends on the seed and on its cell alone: frames stay consistent, only their
    meaning is gone.

    Args:
        seed: Chooses the textures, from 0 on.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        require(is_whole(self.seed, 0), "seed", self.seed, "take a whole number, 0 or more")

    def __call__(self, cell: Cell, tile_size: int) -> NDArray[np.uint8]:
        """Draw the texture of ``cell``."""
        rng = np.random.default_rng([self.seed, *cell])
        # Blots of a quarter tile: noise of single pixels would average to grey in a patch.
        blot = max(tile_size // 4, 1)
        edge = -(-tile_size // blot)
        blots = rng.integers(0, 256, (edge, edge, 3), dtype=np.uint8)
        texture: NDArray[np.uint8] = blots.repeat(blot, 0).repeat(blot, 1)[:tile_size, :tile_size]
        return texture


Game = Literal["standard", "misleading", "abstract"]
"""MiniGrid's own pictures, or those of a modified game."""
_GAMES = {
    "standard": lambda: stock_sprites,
    "misleading": SwappedSprites,
    "abstract": AbstractSprites,
}


class MiniGridRenderer:
    """Batched MiniGrid frames, equal to ``get_frame(highlight=False)`` byte for byte.

    B: any leading dimensions, W, H: cells across and down, t: ``tile_size``.

    Args:
        tile_size: Edge of a cell, in pixels.
        window: None shows the whole grid. k shows k x k cells that hold the agent: centred on
            it and clamped to the grid's borders. A grid smaller than that is centred on black.
        sprites: Draws the tiles: a function, or the name of a game: ``"standard"`` (MiniGrid's
            own), or a modified one, in which a judge sees other pictures of the same states:
            ``"misleading"`` (`SwappedSprites`) or ``"abstract"`` (`AbstractSprites`).

    Raises:
        ValueError: ``tile_size`` or ``window`` is not positive, or there is no such game.

    Example:
        >>> state = torch.zeros(5, 8, 8, 4, dtype=torch.uint8)  # 5 grids of 8 x 8 unseen cells
        >>> MiniGridRenderer(tile_size=4)(state).shape
        torch.Size([5, 3, 32, 32])
    """

    device = torch.device("cpu")
    """Where states are read: their codes are looked up on the host."""
    _on: torch.device | None = None

    def __init__(
        self, tile_size: int = 8, window: int | None = None, sprites: Sprites | Game = "standard"
    ) -> None:
        require(is_whole(tile_size, 1, _MOST), "tile_size", tile_size, f"take 1 to {_MOST} pixels")
        seen = window is None or is_whole(window, 1, _MOST)
        require(seen, "window", window, f"show 1 to {_MOST} cells, or None for all")
        if isinstance(sprites, str):
            remedy = f"name one of {', '.join(_GAMES)}, or pass a function that draws a tile"
            require(sprites in _GAMES, "sprites", sprites, remedy)
            sprites = _GAMES[sprites]()
        if not callable(sprites):
            raise TypeError(f"sprites={shown(sprites)}: pass a function that draws a tile.")
        self.tile_size, self.window, self.sprites = tile_size, window, sprites
        self._clear()

    def on(self, device: torch.device) -> Self:
        """A renderer alike that draws on ``device``, wherever its states lie."""
        alike = copy.copy(self)
        alike._on = device
        return alike

    def _clear(self) -> None:
        self._lock = threading.Lock()
        self._slot_of_code = np.full(_CODES, -1, np.intp)
        # A row of a tile's pixels is one element: numpy copies it at once, not pixel by pixel.
        self._tiles = np.zeros((1, 3, self.tile_size), np.dtype((np.void, self.tile_size)))

    def __call__(self, render_state: Tensor) -> Tensor:
        """Draw states, uint8 ``[*B, W, H, 4]``: see `minigrid_render_state`.

        Returns:
            RGB frames, uint8 ``[*B, 3, H t, W t]``, on the states' device, or that of `on`.

        Raises:
            ValueError: Another dtype or shape, or a cell that MiniGrid does not know.
        """
        fits = (
            isinstance(render_state, Tensor)
            and render_state.dtype == torch.uint8
            and render_state.ndim >= 3
            and render_state.shape[-1] == 4
        )
        require(fits, "render_state", render_state, "pass uint8 [*B, W, H, 4]")
        batch, (across, down) = render_state.shape[:-3], render_state.shape[-3:-1]
        cells = render_state.reshape(batch.numel(), across, down, 4).contiguous().cpu().numpy()
        slots = self._slots(cells.view(np.uint32)[..., 0]).swapaxes(1, 2)  # [N, H, W]
        if self.window is not None:
            slots = _crop(slots, cells[..., 3].swapaxes(1, 2), self.window)
        device = self._on or render_state.device
        if device.type == "cpu":
            frames = _mosaic(self._tiles, slots)
        else:
            frames = _mosaic_on(device, self._tiles, slots)
        return frames.view(*batch, *frames.shape[1:])

    def _slots(self, cells: NDArray[np.uint32]) -> NDArray[np.intp]:
        """Where the tile of each cell lies in the atlas; draws those that never occurred."""
        known = not (cells & ~_USED_BITS).any()
        remedy = "it holds a value that no MiniGrid cell has, was it cast?"
        require(known, "render_state", cells.view(np.uint8), remedy)
        codes = cells & 0xF | cells >> 4 & 0x70 | cells >> 9 & 0x180 | cells >> 15 & 0xE00
        slots = self._slot_of_code.take(codes)
        if slots.min(initial=0) < 0:
            self._draw(np.unique(codes[slots < 0]))
            slots = self._slot_of_code.take(codes)
        return slots

    def _draw(self, codes: NDArray[np.uint32]) -> None:
        with self._lock:
            new = [int(code) for code in codes if self._slot_of_code[code] < 0]
            if new:
                cells = [Cell(c & 0xF, c >> 4 & 7, c >> 7 & 3, c >> 9) for c in new]
                pixels = np.stack([self.sprites(cell, self.tile_size) for cell in cells])
                planes = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
                tiles = planes.view(self._tiles.dtype)[..., 0]
                first = len(self._tiles)
                # The tiles first: another thread that sees a slot finds its tile.
                self._tiles = np.concatenate([self._tiles, tiles])
                self._slot_of_code[new] = np.arange(first, first + len(new))

    def __getstate__(self) -> dict[str, Any]:
        kept = "tile_size", "window", "sprites", "_on"
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clear()


def _mosaic(tiles: NDArray[np.void], slots: NDArray[np.intp]) -> Tensor:
    """Lay tiles ``[K, 3, t]``, rows of t bytes, by slots ``[N, H, W]``: ``[N, 3, H t, W t]``."""
    N, H, W = slots.shape
    t = tiles.shape[2]
    frames = np.empty((N, 3, H, t, W), tiles.dtype)
    # numpy's take and transposing copy are faster than torch's here. A few frames at a time:
    # what was gathered stays in the cache, and no second batch of frames is allocated.
    few = max(_CHUNK_BYTES // (3 * t * t * H * W), 1)
    for i in range(0, N, few):
        frames[i : i + few] = tiles.take(slots[i : i + few], 0).transpose(0, 3, 1, 4, 2)
    return torch.from_numpy(frames.view(np.uint8).reshape(N, 3, H * t, W * t))


def _mosaic_on(device: torch.device, tiles: NDArray[np.void], slots: NDArray[np.intp]) -> Tensor:
    """``_mosaic`` by torch on ``device``: only tiles and slots travel there, not frames."""
    N, H, W = slots.shape
    t = tiles.shape[2]
    rows = tiles.view(f"i{math.gcd(t, 8)}").reshape(-1, 3, t, t // math.gcd(t, 8))
    atlas, where = torch.from_numpy(rows).to(device), torch.from_numpy(slots).to(device)
    laid = atlas[where].permute(0, 3, 1, 4, 2, 5).contiguous()
    return laid.view(torch.uint8).view(N, 3, H * t, W * t)


def _crop(slots: NDArray[np.intp], agent: NDArray[np.uint8], window: int) -> NDArray[np.intp]:
    """Cut slots ``[N, H, W]`` to the window that holds the agent, ``[N, window, window]``."""
    N, H, W = slots.shape
    flat = agent.reshape(N, H * W)
    # A state without an agent (a spec's zeros) is shown from its middle.
    at = np.where(flat.any(1), flat.argmax(1), H // 2 * W + W // 2)
    rows = _first(at // W, H, window)[:, None] + np.arange(window)
    columns = _first(at % W, W, window)[:, None] + np.arange(window)
    margin = max(window - H, window - W, 0)  # more than is ever shown beyond a border
    padded = np.pad(slots, ((0, 0), (margin, margin), (margin, margin)), constant_values=_OUTSIDE)
    where = np.arange(N)[:, None, None], margin + rows[:, :, None], margin + columns[:, None, :]
    cropped: NDArray[np.intp] = padded[where]
    return cropped


def _first(at: NDArray[np.intp], length: int, window: int) -> NDArray[np.intp]:
    """The first cell shown along one axis, ``[N]``; below 0 where the grid is the smaller one."""
    if length <= window:
        return np.full_like(at, -((window - length) // 2))
    first: NDArray[np.intp] = (at - window // 2).clip(0, length - window)
    return first
