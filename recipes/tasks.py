"""What a recipe is trained on: one class per task, chosen by name on the command line.

A task of one's own is a subclass in any importable module: ``--env my_module.MyTask``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase

from recipes.arguments import PositiveInt
from vlmrb_torchrl import keys
from vlmrb_torchrl.envs import DoorKeyEnv, OGBenchEnv
from vlmrb_torchrl.envs.ogbench import event_names, ogbench_renderer
from vlmrb_torchrl.renderers import MiniGridRenderer, MuJoCoRenderer, Renderer
from vlmrb_torchrl.renderers.minigrid import Game


class Task(ABC):
    """An environment's factory; for a judge, with the camera that it looks through.

    Uniform and prioritized replay need no more than ``make``.

    Attributes:
        name: Short name, used for folders; empty: the name of the class.
        event_names: What the simulator reports, in the order of ``("next", "events")``.
        success_event: The one of them that is success; None: only returns are measured.
        configs: Folder in ``recipes/configs`` whose settings suit the task; empty: none is known.
    """

    name: str = ""
    configs: str = ""
    event_names: tuple[str, ...] = ()
    success_event: str | None = None

    @abstractmethod
    def make(self, num_envs: int, seed: int, *, held_out: bool = False) -> EnvBase:
        """Build a batched environment ``[num_envs]``.

        Args:
            num_envs: Environments stepped together.
            seed: Of its stream of episodes.
            held_out: Play episodes that training never draws.
        """

    def renderer(self) -> Renderer | None:
        """Build the renderer of the judge's frames; None: only events can be judged."""
        return None

    def success(self, outcome: TensorDictBase) -> Tensor | None:
        """Read from the ``"next"`` of steps ``[*B]`` which succeeded, bool ``[*B]``, if known."""
        if self.success_event is None:
            return None
        events: Tensor = outcome.get(keys.EVENTS)
        return events[..., self.event_names.index(self.success_event)]


class DoorKey(Task):
    """MiniGrid DoorKey: fetch the key, open the door, reach the green goal.

    Args:
        size: Cells along an edge, walls included; at least 5.
        max_steps: Steps until an episode is truncated; null: MiniGrid's 10 size².
        tile_size: Pixels along the edge of a cell in the judge's frames.
        window: Cells along the edge of the judge's frames, a window that holds the agent;
            null: the whole grid. The embedded judge knows 8 pixels a cell and 8 cells.
        sprites: What the judge's frames show, and nothing else changes: MiniGrid's own pictures,
            or those of a modified game. misleading: the goal as a yellow key, the key as a green
            goal, the door as wall; abstract: each cell's content as a random texture.
    """

    event_names = DoorKeyEnv.event_names
    success_event = DoorKeyEnv.success_event

    def __init__(
        self,
        size: PositiveInt = 6,
        max_steps: PositiveInt | None = None,
        tile_size: PositiveInt = 8,
        window: PositiveInt | None = 8,
        sprites: Game = "standard",
    ) -> None:
        self.size, self.max_steps = size, max_steps
        self.tile_size, self.window, self.sprites = tile_size, window, sprites
        self.name = f"doorkey_{size}x{size}"
        self.configs = "doorkey_6x6" if size <= 6 else "doorkey_8x8"

    def make(self, num_envs: int, seed: int, *, held_out: bool = False) -> DoorKeyEnv:
        """Build ``num_envs`` games."""
        return DoorKeyEnv(
            self.size, num_envs, max_steps=self.max_steps, seed=seed, held_out=held_out
        )

    def renderer(self) -> MiniGridRenderer:
        """Build the tile renderer."""
        return MiniGridRenderer(self.tile_size, self.window, self.sprites)


class Scene(Task):
    """OGBench's scene: a robot arm, a cube, a drawer, a window and the buttons that lock them.

    Args:
        task: 1 open, 2 unlock and lock, 3 rearrange (medium), 4 put in drawer, 5 rearrange (hard);
            of the cube 1 horizontal, 2 and 3 vertical, 4 and 5 diagonal.
        max_steps: Steps until an episode is truncated; null: OGBench's own 750, of the cube 200.
        workers: Processes that the physics is spread over, at most one for each environment.
            Evaluations, which build their environments anew, are played in one.
        width: Of the judge's frames, in pixels.
        height: Of the judge's frames, in pixels.
    """

    success_event = OGBenchEnv.success_event
    configs = "scene_task1"
    _family = "scene"

    def __init__(
        self,
        task: Literal[1, 2, 3, 4, 5] = 1,
        max_steps: PositiveInt | None = None,
        workers: PositiveInt = 1,
        width: PositiveInt = 200,
        height: PositiveInt = 200,
    ) -> None:
        self.env_id = f"{self._family}-singletask-task{task}-v0"
        self.max_steps, self.workers = max_steps, workers
        self.width, self.height = width, height
        self.event_names = event_names(self.env_id)
        self.name = f"{type(self).__name__.lower()}_task{task}"

    def make(self, num_envs: int, seed: int, *, held_out: bool = False) -> OGBenchEnv:
        """Build ``num_envs`` games."""
        return OGBenchEnv(
            self.env_id,
            num_envs,
            max_steps=self.max_steps,
            seed=seed,
            held_out=held_out,
            workers=1 if held_out else min(self.workers, num_envs),
        )

    def renderer(self) -> MuJoCoRenderer:
        """Build the renderer of the front camera, without shadows."""
        return ogbench_renderer(self.env_id, self.width, self.height)


class Cube(Scene):
    """OGBench's single cube: a robot arm brings a cube to its place."""

    configs = "cube_task1"
    _family = "cube-single"
