"""Scripted policies that fill a MiniGrid world with events and with near misses.

An episode is a run of phases: wander, fetch a key, work a door, loiter beside the goal, go for
the goal. What happened in each transition is read off the simulator, never off the script.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from minigrid.core.constants import DIR_TO_VEC
from minigrid.minigrid_env import MiniGridEnv

from recipes.train_judge.data import EVENT_NAMES, Episode

LEFT, RIGHT, FORWARD, PICKUP, DROP, TOGGLE = range(6)
STEPS = [(int(x), int(y)) for x, y in DIR_TO_VEC]
Cell = tuple[int, int]


@dataclass
class Phase:
    """One stretch of an episode: what is sought, for how many steps at most."""

    aim: str
    steps: int


def draw_phases(random: np.random.Generator) -> tuple[str, list[Phase]]:
    """Draw an episode's script; returns its name (for the statistics) and its phases."""
    wander = Phase("wander", int(random.integers(0, 90)))
    solve = Phase("goal", 250)
    kind = str(
        random.choice(["random", "solver", "late", "near", "mixed"], p=[0.12, 0.13, 0.15, 0.2, 0.4])
    )
    if kind == "random":
        return kind, [Phase("random", int(random.integers(20, 260)))]
    if kind == "solver":
        return kind, [solve]
    if kind == "late":
        return kind, [wander, solve]
    if kind == "near":
        near = Phase("near", 120)
        last = [solve] if random.random() < 0.5 else []
        return kind, [near, Phase("wander", int(random.integers(5, 120))), *last]
    aims = random.choice(["key", "door", "door", "key", "near"], size=int(random.integers(1, 5)))
    phases = []
    for aim in aims:
        phases += [Phase("wander", int(random.exponential(25))), Phase(str(aim), 100)]
    phases.append(Phase("wander", int(random.integers(0, 60))))
    return kind, phases + ([solve] if random.random() < 0.4 else [])


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
                if thing is None or thing.type == "floor":
                    passable = True
                else:
                    passable = thing.type == "door" and not locked(thing)
                if passable:
                    found[cell] = found[(x, y)] + 1
                    queue.append(cell)
        return found


def play(
    family: str,
    world: MiniGridEnv,
    random: np.random.Generator,
    seed: int,
    script: tuple[str, list[Phase]] | None = None,
) -> Episode:
    """Run one scripted episode from a reset.

    Args:
        family: Name that the episode carries.
        world: The environment; its observations are switched off (nobody reads them).
        random: Draws the script and its noise.
        seed: Seed of the reset.
        script: Name and phases, else drawn.
    """
    any_world: Any = world
    any_world.gen_obs = dict
    world.reset(seed=seed)
    policy, phases = script or draw_phases(random)
    mind = Script(world, phases, random)
    grid = world.grid.encode()
    states, events = [_state(grid, world)], []
    moving_world = family == "DynamicObstacles"
    while (action := mind.action()) is not None:
        if moving_world:
            action %= 3  # that task knows turns and steps only
        cell, thing = mind.front()
        was_open = bool(getattr(thing, "is_open", True))
        had_key = _holds_key(world)
        terminated = bool(world.step(action)[2])
        if moving_world or action in (PICKUP, DROP, TOGGLE):
            now = world.grid.get(*cell)
            grid = world.grid.encode() if moving_world else grid.copy()
            if not moving_world:
                grid[cell] = (1, 0, 0) if now is None else now.encode()
            mind.replan = True
        opened = not was_open and bool(getattr(thing, "is_open", False))
        under = world.grid.get(*world.agent_pos)
        on_goal = under is not None and under.type == "goal"
        events.append((on_goal, opened, _holds_key(world) and not had_key))
        states.append(_state(grid, world))
        if terminated:
            break
    flags = np.array(events, dtype=bool).reshape(-1, len(EVENT_NAMES))
    return Episode(family=family, policy=policy, states=np.stack(states), events=flags)


def _holds_key(world: Any) -> bool:
    return world.carrying is not None and world.carrying.type == "key"


def _state(grid: np.ndarray, world: Any) -> np.ndarray:
    """Render state: the encoded grid, and direction + 1 in a fourth channel where the agent is."""
    agent = np.zeros((*grid.shape[:2], 1), dtype=np.uint8)
    agent[world.agent_pos[0], world.agent_pos[1]] = world.agent_dir + 1
    return np.concatenate([grid, agent], axis=-1)
