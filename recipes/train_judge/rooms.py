"""Worlds that the embedded judge is trained on: MiniGrid tasks other than DoorKey.

About half are random rooms of our own making (clutter, wall segments with doors, goal
anywhere); the rest are MiniGrid's built-in tasks. MiniGrid's DoorKey is held out: its class is
never constructed here, and a random room that DoorKey's generator could have drawn is refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from minigrid import envs
from minigrid.core.constants import COLOR_NAMES, OBJECT_TO_IDX
from minigrid.core.grid import Grid
from minigrid.core.mission import MissionSpace
from minigrid.core.world_object import Ball, Box, Door, Floor, Goal, Key, Lava, Wall
from minigrid.minigrid_env import MiniGridEnv

ENDLESS = 10**6
"""Step limit of every world: the policies decide when an episode ends."""


class RandomRoom(MiniGridEnv):
    """A room of wall segments with gaps and doors, cluttered, its goal anywhere.

    Args:
        width: Cells from border to border, border included.
        height: The same, downwards.
    """

    def __init__(self, width: int, height: int) -> None:
        mission = MissionSpace(mission_func=lambda: "")
        super().__init__(mission_space=mission, width=width, height=height, max_steps=ENDLESS)

    def _gen_grid(self, width: int, height: int) -> None:
        self.mission = ""
        while True:
            self._draw(width, height)
            if not could_be_doorkey(self.grid.encode()):
                return

    def _draw(self, width: int, height: int) -> None:
        random = self.np_random
        self.grid = Grid(width, height)
        self.grid.wall_rect(0, 0, width, height)
        door_colors: list[str] = []
        for _ in range(int(random.integers(0, 2 + min(3, width // 5)))):
            door_colors += self._draw_segment(width, height)
        for color in door_colors:  # a locked door is of use only where its key lies about
            if random.random() < 0.7:
                self._put(Key(color))
        for _ in range(int(random.integers(0, 2 + width * height // 30))):
            self._put(self._clutter())
        for _ in range(1 + int(random.random() < 0.15)):
            self._put(Goal())
        free = self._free_cells()
        self.agent_pos = free[int(random.integers(len(free)))]
        self.agent_dir = int(random.integers(4))

    def _draw_segment(self, width: int, height: int) -> list[str]:
        """Draw one straight wall with one or two openings; return the colours of its locks."""
        random = self.np_random
        vertical = bool(random.random() < 0.5)
        across, along = (width, height) if vertical else (height, width)
        line = int(random.integers(2, max(3, across - 2)))
        first, last = 1, along - 1
        if random.random() < 0.4:
            first, last = sorted(int(v) for v in random.integers(1, along, 2))
        openings = {int(v) for v in random.integers(first, max(first + 1, last), 2)}
        locks = []
        for k in range(first, last):
            cell = (line, k) if vertical else (k, line)
            if k not in openings:
                self.grid.set(*cell, Wall())
                continue
            kind, color = random.random(), str(random.choice(COLOR_NAMES))
            locked = bool(0.25 <= kind < 0.55)
            door = Door(color, is_open=bool(kind > 0.85), is_locked=locked)
            self.grid.set(*cell, None if kind < 0.25 else door)
            locks += [color] if locked else []
        return locks

    def _clutter(self) -> Any:
        random = self.np_random
        kind, color = random.random(), str(random.choice(COLOR_NAMES))
        if kind < 0.4:
            return Key(color)
        if kind < 0.55:
            return Ball(color)
        if kind < 0.7:
            return Box(color)
        if kind < 0.78:
            return Lava()
        # A green floor is too near the goal's green to be told apart by anyone.
        return Floor(color) if kind < 0.88 and color != "green" else Wall()

    def _free_cells(self) -> list[tuple[int, int]]:
        cells = [(x, y) for x in range(1, self.width - 1) for y in range(1, self.height - 1)]
        return [cell for cell in cells if self.grid.get(*cell) is None]

    def _put(self, item: Any) -> None:
        free = self._free_cells()
        if len(free) > 2:  # one is kept for the goal, one for the agent
            self.grid.set(*free[int(self.np_random.integers(len(free)))], item)


def could_be_doorkey(grid: np.ndarray) -> bool:
    """Whether DoorKey's generator could have drawn this grid.

    Its mark: a square room cut by one full vertical wall with one locked yellow door in it, a
    yellow key left of the wall, the goal in the bottom right corner, and nothing else.

    Args:
        grid: ``Grid.encode()``, uint8 ``[W, H, 3]``.
    """
    width, height = grid.shape[:2]
    inside = grid[1:-1, 1:-1, 0]
    expected = {"door": 1, "key": 1, "goal": 1, "ball": 0, "box": 0, "lava": 0, "floor": 0}
    counts = {name: int((inside == OBJECT_TO_IDX[name]).sum()) for name in expected}
    if width != height or counts != expected or grid[-2, -2, 0] != OBJECT_TO_IDX["goal"]:
        return False
    walls = int((inside == OBJECT_TO_IDX["wall"]).sum())
    door_x = int(np.argwhere(inside == OBJECT_TO_IDX["door"])[0, 0])
    return walls == height - 3 and bool((inside[door_x] != OBJECT_TO_IDX["empty"]).all())


def random_world(random: np.random.Generator) -> tuple[str, MiniGridEnv]:
    """Draw one training world.

    Returns:
        Its family's name, and the environment, not yet reset.
    """
    side = int(np.clip(round(5 + random.exponential(5)), 5, 25))
    if random.random() < 0.55:
        other = side if random.random() < 0.7 else side + int(random.integers(-4, 5))
        return "RandomRoom", RandomRoom(side, int(np.clip(other, 5, 25)))
    family = str(random.choice(list(_BUILT_IN)))
    return family, _built_in(family, side, random)


_BUILT_IN = (
    "Empty", "FourRooms", "Crossing", "LavaGap", "DistShift", "DynamicObstacles", "MultiRoom",
    "LockedRoom", "Unlock", "UnlockPickup", "BlockedUnlockPickup", "KeyCorridor", "GoToDoor",
    "Fetch", "RedBlueDoors", "Playground", "ObstructedMaze",
)  # fmt: skip


def _built_in(family: str, side: int, random: np.random.Generator) -> MiniGridEnv:
    """Construct a built-in task with a drawn size; the step limit is lifted everywhere."""
    draw = random.integers
    limit: dict[str, Any] = {"max_steps": ENDLESS}
    makers = {
        "Empty": lambda: envs.EmptyEnv(size=side, agent_start_pos=None, **limit),
        "FourRooms": lambda: envs.FourRoomsEnv(**limit),
        "Crossing": lambda: envs.CrossingEnv(
            size=int(draw(4, 8)) * 2 + 1,
            num_crossings=int(draw(1, 4)),
            obstacle_type=Wall if random.random() < 0.6 else Lava,
            **limit,
        ),
        "LavaGap": lambda: envs.LavaGapEnv(size=int(draw(5, 12)), **limit),
        "DistShift": lambda: envs.DistShiftEnv(strip2_row=int(random.choice([2, 5])), **limit),
        "DynamicObstacles": lambda: envs.DynamicObstaclesEnv(
            size=min(side, 14), agent_start_pos=None, n_obstacles=max(1, side // 4), **limit
        ),
        "MultiRoom": lambda: envs.MultiRoomEnv(
            minNumRooms=2, maxNumRooms=5, maxRoomSize=int(draw(5, 9)), **limit
        ),
        "LockedRoom": lambda: envs.LockedRoomEnv(**limit),
        "Unlock": lambda: envs.UnlockEnv(**limit),
        "UnlockPickup": lambda: envs.UnlockPickupEnv(**limit),
        "BlockedUnlockPickup": lambda: envs.BlockedUnlockPickupEnv(**limit),
        "KeyCorridor": lambda: envs.KeyCorridorEnv(
            room_size=int(draw(3, 7)), num_rows=int(draw(1, 4)), **limit
        ),
        "GoToDoor": lambda: envs.GoToDoorEnv(size=int(draw(5, 12)), **limit),
        "Fetch": lambda: envs.FetchEnv(size=int(draw(5, 12)), numObjs=int(draw(2, 6)), **limit),
        "RedBlueDoors": lambda: envs.RedBlueDoorEnv(size=int(draw(5, 12)), **limit),
        "Playground": lambda: envs.PlaygroundEnv(**limit),
        "ObstructedMaze": lambda: envs.ObstructedMaze_1Dlhb(**limit),
    }
    return makers[family]()
