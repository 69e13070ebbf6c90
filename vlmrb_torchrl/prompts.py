"""What the judge is asked, word for word, and the events of the simulator that answer it.

The keys are the names that environments give to their events (``event_names``) and that
scorers take as ``questions``, so that a judge, its ground truth and its prompt share one name.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

_ENDING = "Do not guess. Output exactly Answer: Yes or Answer: No."

# VLM-RB, arXiv 2602.01915: its MiniGrid prompt, verbatim.
GOAL: Final = (
    "Does this clip contain a clear instance of goal satisfaction anywhere in it? "
    f"If no visible success occurs, answer No. {_ENDING}"
)
# Not of the paper: the same form for the two steps on the way.
DOOR: Final = (
    "Does this clip show the agent opening a door anywhere in it? "
    f"If no door is visibly opened, answer No. {_ENDING}"
)
KEY: Final = (
    "Does this clip show the agent picking up a key anywhere in it? "
    f"If no key is visibly picked up, answer No. {_ENDING}"
)

MINIGRID: Final = MappingProxyType({"goal": GOAL, "door": DOOR, "key": KEY})
"""Prompts of the MiniGrid events: goal reached, door opened, key picked up."""

# VLM-RB, arXiv 2602.01915: its OGBench prompt, verbatim. It names no task.
OGBENCH_SUCCESS: Final = (
    "Is there at least one clear instance of goal satisfaction in these frames? "
    "Look for contact + displacement consistent with the goal (lift off surface, place into "
    "receptacle, open/close articulation, move to target zone). Do not guess. "
    "If not visible, answer No. Output exactly Answer: Yes or Answer: No."
)

OGBENCH: Final = MappingProxyType({"success": OGBENCH_SUCCESS})
"""Prompts of the OGBench events: success of the task."""

# Not of the paper: what contrastive judges compare a frame with. They match a picture to a caption
# and answer no question; the baseline is the same caption without the success, as in VLM-RM
# (arXiv 2310.12921), so that what both say cancels.
GOAL_CAPTION: Final = "a red triangle on a green square in a grid world"
BASELINE_CAPTION: Final = "a red triangle in a grid world"
