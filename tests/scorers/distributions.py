"""Distributions over the answer's token, and the score that each means, by hand.

Whoever reads one gives P(Yes) / (P(Yes) + P(No)), each summed over its spellings with and without
the space before. Weights e^logit are small whole numbers, so that a score is a fraction.
"""

from __future__ import annotations

import math

_WEIGHTS: dict[str, tuple[dict[str, int], float]] = {
    "one spelling each": ({" Yes": 3, " No": 1}, 3 / 4),
    "the paper's answer": ({" Yes": 19, " No": 1}, 19 / 20),
    "no space before": ({"Yes": 1, "No": 4}, 1 / 5),
    "every spelling": (
        {"Yes": 1, " Yes": 2, "yes": 3, " yes": 4, "YES": 5, " YES": 6,
         "No": 7, " No": 6, "no": 5, " no": 4, "NO": 3, " NO": 2},
        21 / 48,
    ),
    "spellings of one side": ({" Yes": 2, " yes": 4, " No": 3}, 6 / 9),
    "a likelier other word": ({" Unclear": 90, " Yes": 1, " No": 3}, 1 / 4),
    "words that only begin so": ({" Yes": 1, " No": 1, " Yesterday": 9, " Not": 50}, 1 / 2),
    "an unlikely side": ({" Yes": 1, " No": 10**6}, 1 / (1 + 10**6)),
}  # fmt: skip

DISTRIBUTIONS: dict[str, tuple[dict[str, float], float]] = {
    name: ({token: math.log(weight) for token, weight in weights.items()}, score)
    for name, (weights, score) in _WEIGHTS.items()
}
"""Name: logit of each token where the answer stands (any other token has none), and the score."""
