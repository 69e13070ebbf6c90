"""What an environment of this package offers beside being a TorchRL ``EnvBase``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from tensordict.nn import TensorDictModuleBase

from vlmrb_torchrl.renderers.base import Renderer


@runtime_checkable
class JudgedEnv(Protocol):
    """An environment whose clips a judge can be shown, and asked about.

    Beside what it observes, such an environment writes two entries (``vlmrb_torchrl.keys``):
    ``render_state``, from which its renderer redraws the state, and ``events``, bool
    ``[*B, E]``: what the simulator saw happen in the transition that led to this state, all
    False after a reset. The agent reads neither.

    Attributes:
        event_names: Names of the E events, in their order in ``events``.
        success_event: The event that is success, one of ``event_names``.
        prompts: What to ask a judge about each event, word for word; ``success_event`` at least.
    """

    event_names: tuple[str, ...]
    success_event: str
    prompts: Mapping[str, str]

    def renderer(self) -> Renderer:
        """A renderer of this environment's ``render_state``."""
        ...


@runtime_checkable
class DemonstratedEnv(JudgedEnv, Protocol):
    """A `JudgedEnv` that knows a way to success: chance alone would seldom show a judge one."""

    def demonstrator(self) -> TensorDictModuleBase:
        """A policy for this environment that succeeds; it has no memory."""
        ...


@runtime_checkable
class ResumableEnv(Protocol):
    """An environment that can be put back into the middle of its episodes.

    Its two methods are to hold everything that the next steps and resets depend on, but for the
    process's own random generators; what was observed last is kept by the collector.
    """

    def games_state_dict(self) -> dict[str, Any]:
        """The games as they stand, as tensors, numbers and containers of these."""
        ...

    def load_games_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``games_state_dict`` of an environment built alike: step by step the same."""
        ...
