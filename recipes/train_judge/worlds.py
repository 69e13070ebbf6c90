"""What the embedded judge is trained on: MiniGrid worlds other than DoorKey, and who acts in them.

About half of the worlds are random rooms of our own making (clutter, wall segments with doors,
goal anywhere); the rest are MiniGrid's built-in tasks. MiniGrid's DoorKey is held out: its class
is never constructed here, and a random room that DoorKey's generator could have drawn is refused.

Scripts fill them with events and with near misses. An episode is a run of phases: wander, fetch a
key, work a door, loiter beside the goal, go for the goal. What happened in each transition is read
off the simulator, never off the script.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from minigrid import envs
from minigrid.core.constants import COLOR_NAMES, DIR_TO_VEC, OBJECT_TO_IDX
from minigrid.core.grid import Grid
from minigrid.core.mission import MissionSpace
from minigrid.core.world_object import Ball, Box, Door, Floor, Goal, Key, Lava, Wall
from minigrid.minigrid_env import MiniGridEnv

from recipes.train_judge.data import EVENT_NAMES, Episode

ENDLESS = 10**6
"""Step limit of every world: the scripts decide when an episode ends."""
LEFT, RIGHT, FORWARD, PICKUP, DROP, TOGGLE = range(6)
STEPS = [(int(x), int(y)) for x, y in DIR_TO_VEC]
Cell = tuple[int, int]


class RandomRoom(MiniGridEnv):
    """A room of wall segments with gaps and doors, cluttered, its goal anywhere."""

    def __init__(self, width: int, height: int) -> None:  # in cells, border included
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
    """Whether DoorKey's generator could have drawn a grid, encoded, uint8 ``[W, H, 3]``.

    Its mark: a square room cut by one full vertical wall with one locked yellow door in it, a
    yellow key left of the wall, the goal in the bottom right corner, and nothing else.
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


def random_world(random: np.random.Generator) -> MiniGridEnv:
    """Draw one training world, not yet reset."""
    side = int(np.clip(round(5 + random.exponential(5)), 5, 25))
    if random.random() < 0.55:
        other = side if random.random() < 0.7 else side + int(random.integers(-4, 5))
        return RandomRoom(side, int(np.clip(other, 5, 25)))
    name = str(random.choice(list(_BUILT_IN)))
    world: MiniGridEnv = getattr(envs, name)(**_BUILT_IN[name](side, random), max_steps=ENDLESS)
    return world


_BUILT_IN: dict[str, Callable[[int, np.random.Generator], dict[str, Any]]] = {
    "EmptyEnv": lambda side, random: {"size": side, "agent_start_pos": None},
    "FourRoomsEnv": lambda side, random: {},
    "CrossingEnv": lambda side, random: {
        "size": int(random.integers(4, 8)) * 2 + 1,
        "num_crossings": int(random.integers(1, 4)),
        "obstacle_type": Wall if random.random() < 0.6 else Lava,
    },
    "LavaGapEnv": lambda side, random: {"size": int(random.integers(5, 12))},
    "DistShiftEnv": lambda side, random: {"strip2_row": int(random.choice([2, 5]))},
    "DynamicObstaclesEnv": lambda side, random: {
        "size": min(side, 14),
        "agent_start_pos": None,
        "n_obstacles": max(1, side // 4),
    },
    "MultiRoomEnv": lambda side, random: {
        "minNumRooms": 2,
        "maxNumRooms": 5,
        "maxRoomSize": int(random.integers(5, 9)),
    },
    "LockedRoomEnv": lambda side, random: {},
    "UnlockEnv": lambda side, random: {},
    "UnlockPickupEnv": lambda side, random: {},
    "BlockedUnlockPickupEnv": lambda side, random: {},
    "KeyCorridorEnv": lambda side, random: {
        "room_size": int(random.integers(3, 7)),
        "num_rows": int(random.integers(1, 4)),
    },
    "GoToDoorEnv": lambda side, random: {"size": int(random.integers(5, 12))},
    "FetchEnv": lambda side, random: {
        "size": int(random.integers(5, 12)),
        "numObjs": int(random.integers(2, 6)),
    },
    "RedBlueDoorEnv": lambda side, random: {"size": int(random.integers(5, 12))},
    "PlaygroundEnv": lambda side, random: {},
    "ObstructedMaze_1Dlhb": lambda side, random: {},
}
"""MiniGrid's tasks and the arguments they are built with, drawn."""


@dataclass
class Phase:
    """One stretch of an episode: what is sought, for how many steps at most."""

    aim: str
    steps: int


def draw_phases(random: np.random.Generator) -> list[Phase]:
    """Draw an episode's script."""
    wander = Phase("wander", int(random.integers(0, 90)))
    solve = Phase("goal", 250)
    kind = random.choice(
        ["random", "solver", "late", "near", "mixed"], p=[0.12, 0.13, 0.15, 0.2, 0.4]
    )
    if kind == "random":
        return [Phase("random", int(random.integers(20, 260)))]
    if kind == "solver":
        return [solve]
    if kind == "late":
        return [wander, solve]
    if kind == "near":
        last = [solve] if random.random() < 0.5 else []
        return [Phase("near", 120), Phase("wander", int(random.integers(5, 120))), *last]
    aims = random.choice(["key", "door", "door", "key", "near"], size=int(random.integers(1, 5)))
    phases = []
    for aim in aims:
        phases += [Phase("wander", int(random.exponential(25))), Phase(str(aim), 100)]
    phases.append(Phase("wander", int(random.integers(0, 60))))
    return phases + ([solve] if random.random() < 0.4 else [])


class Script:
    """Chooses actions for one episode; plans by breadth-first search over the whole grid."""

    def __init__(
        self, world: MiniGridEnv, phases: list[Phase], random: np.random.Generator
    ) -> None:
        self.world: Any = world
        self.random = random
        self.phases = deque(phases)
        self.noise = float(random.choice([0.0, 0.05, 0.25]))
        self.fiddle = float(random.choice([0.0, 0.1, 0.3]))
        self.plan: dict[Cell, int] = {}
        self.replan = True

    def front(self) -> tuple[Cell, Any]:
        """The cell that the agent faces, and what lies there."""
        x, y = (int(v) for v in self.world.agent_pos)
        dx, dy = STEPS[self.world.agent_dir]
        cell = (x + dx, y + dy)
        return cell, self.world.grid.get(*cell)

    def action(self) -> int | None:
        """The next action, or None when the script has run out."""
        while self.phases and self.phases[0].steps <= 0:
            self.phases.popleft()
            self.replan = True
        if not self.phases:
            return None
        phase = self.phases[0]
        phase.steps -= 1
        if phase.aim == "random":
            return int(self.random.integers(7))
        if phase.aim == "wander" or self.random.random() < self.noise:
            return self._wander()
        return self._pursue(phase)

    def _wander(self) -> int:
        """A random walk that stays off goals and lava; now and then it handles what it faces."""
        _, thing = self.front()
        if thing is not None and self.random.random() < self.fiddle:
            return TOGGLE if thing.type in ("door", "box") else PICKUP
        if self.world.carrying and thing is None and self.random.random() < self.fiddle / 5:
            return DROP
        move = int(self.random.choice([LEFT, RIGHT, FORWARD, FORWARD, FORWARD]))
        deadly = thing is not None and thing.type in ("goal", "lava")
        return int(self.random.integers(2)) if move == FORWARD and deadly else move

    def _pursue(self, phase: Phase) -> int:
        """One step of the shortest way to what the phase seeks, and the deed once there."""
        if phase.aim == "key" and self.world.carrying is not None:
            _, thing = self.front()
            return DROP if thing is None else LEFT
        if self.replan:
            self.plan = self._distances(phase.aim)
            self.replan = False
        here = (int(self.world.agent_pos[0]), int(self.world.agent_pos[1]))
        if here not in self.plan:
            if phase.aim == "goal" and self.random.random() < 0.9:  # behind a lock: open it first
                aim = "key" if self.world.carrying is None else "door"
                if here in self._distances(aim):
                    self.phases.appendleft(Phase(aim, 80))
                    self.replan = True
                    return LEFT
            phase.steps -= 10  # nothing of the kind can be reached: give up soon
            return self._wander()
        return self._approach(phase, here)

    def _approach(self, phase: Phase, here: Cell) -> int:
        distance, facing = self.plan[here], int(self.world.agent_dir)
        ways = [
            k
            for k, (dx, dy) in enumerate(STEPS)
            if self.plan.get((here[0] + dx, here[1] + dy), 10**6) == distance - 1
        ]
        if phase.aim == "near" and distance == 1:
            phase.steps = 0
            return int(self.random.integers(2))
        if not ways:
            return self._wander()
        if facing not in ways:
            return RIGHT if (ways[0] - facing) % 4 in (1, 2) else LEFT
        _, thing = self.front()
        if distance == 1 and phase.aim in ("key", "door"):
            if self.random.random() < 0.7:
                phase.steps = 0
            return PICKUP if phase.aim == "key" else TOGGLE
        closed = thing is not None and thing.type == "door" and not thing.is_open
        return TOGGLE if closed else FORWARD

    def _distances(self, aim: str) -> dict[Cell, int]:
        """Steps from every cell to the nearest thing sought; doors that can be opened are ways."""
        kind = "goal" if aim == "near" else aim
        grid, carried = self.world.grid, self.world.carrying
        key = carried.color if carried is not None and carried.type == "key" else None

        def locked(thing: Any) -> bool:
            return bool(thing.type == "door" and thing.is_locked and thing.color != key)

        things = ((i % grid.width, i // grid.width, t) for i, t in enumerate(grid.grid))
        found = {(x, y): 0 for x, y, t in things if t and t.type == kind and not locked(t)}
        queue = deque(found)
        while queue:
            x, y = queue.popleft()
            for dx, dy in STEPS:
                cell = (x + dx, y + dy)
                inside = 0 <= cell[0] < grid.width and 0 <= cell[1] < grid.height
                if cell in found or not inside:
                    continue
                thing = grid.get(*cell)
                door = thing is not None and thing.type == "door" and not locked(thing)
                if door or thing is None or thing.type == "floor":
                    found[cell] = found[(x, y)] + 1
                    queue.append(cell)
        return found


def play(
    world: MiniGridEnv, random: np.random.Generator, seed: int, phases: list[Phase] | None = None
) -> Episode:
    """Run one episode from a reset by ``seed``, scripted by ``phases``; None: ``random`` ones."""
    any_world: Any = world
    any_world.gen_obs = dict  # nobody reads the observations
    world.reset(seed=seed)
    script = Script(world, phases or draw_phases(random), random)
    grid = world.grid.encode()
    states, events = [_state(grid, world)], []
    moving = isinstance(world, envs.DynamicObstaclesEnv)
    while (action := script.action()) is not None:
        if moving:
            action %= 3  # that task knows turns and steps only
        cell, thing = script.front()
        was_open = bool(getattr(thing, "is_open", True))
        had_key = _holds_key(world)
        terminated = bool(world.step(action)[2])
        if moving:
            grid = world.grid.encode()
        elif action in (PICKUP, DROP, TOGGLE):
            now = world.grid.get(*cell)
            grid = grid.copy()  # encoding all of it takes longer than the step
            grid[cell] = (1, 0, 0) if now is None else now.encode()
        if moving or action in (PICKUP, DROP, TOGGLE):
            script.replan = True
        opened = not was_open and bool(getattr(thing, "is_open", False))
        under = world.grid.get(*world.agent_pos)
        on_goal = under is not None and under.type == "goal"
        events.append((on_goal, opened, _holds_key(world) and not had_key))
        states.append(_state(grid, world))
        if terminated:
            break
    return Episode(np.stack(states), np.array(events, dtype=bool).reshape(-1, len(EVENT_NAMES)))


def _holds_key(world: Any) -> bool:
    return world.carrying is not None and world.carrying.type == "key"


def _state(grid: np.ndarray, world: Any) -> np.ndarray:
    """Render state: the encoded grid, and direction + 1 in a fourth channel where the agent is."""
    agent = np.zeros((*grid.shape[:2], 1), dtype=np.uint8)
    agent[world.agent_pos[0], world.agent_pos[1]] = world.agent_dir + 1
    return np.concatenate([grid, agent], axis=-1)
