"""How the embedded judge's three questions are put to it in training."""

from __future__ import annotations

from vlmrb_torchrl.prompts import DOOR, GOAL, KEY

PARAPHRASES: dict[str, tuple[str, ...]] = {
    "goal": (
        GOAL,
        "Does this clip contain a clear instance of goal satisfaction? Answer Yes or No.",
        "Does the agent reach the green goal square in this video?",
        "Is the task completed in this clip? Answer Yes or No.",
        "Is there any frame in which the agent stands on the goal?",
    ),
    "door": (
        DOOR,
        "Does this clip contain a clear instance of a door being opened? Answer Yes or No.",
        "Does the agent open a door in this video?",
        "Is a door opened in this clip? Answer Yes or No.",
        "Is there any moment at which the agent unlocks or opens a door?",
    ),
    "key": (
        KEY,
        "Does this clip contain a clear instance of a key being picked up? Answer Yes or No.",
        "Does the agent pick up a key in this video?",
        "Is a key picked up in this clip? Answer Yes or No.",
        "Is there any moment at which the agent takes a key?",
    ),
}
"""Per event the canonical prompt first, then other ways to ask the same."""
