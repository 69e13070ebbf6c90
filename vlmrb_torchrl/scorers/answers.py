"""What a generated answer says: Yes or No, and how surely.

The paper's prompt asks for "Answer: Yes" or "Answer: No"; models also write "Yes", " yes." or
"**Answer:** No". An answer is a Yes or a No at the start, after "Answer" or after the end of the
model's thoughts, with nothing but punctuation between.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

_PLACE = r"(?:^|answer|</think>)\W*"
_LEAD = re.compile(_PLACE + "$", re.IGNORECASE)
_ANSWER = re.compile(_PLACE + r"\b(yes|no)\b", re.IGNORECASE)
_SPACES = " \t\r\n▁Ġ"
"""Around the word of a token; the last two are the spaces of SentencePiece and byte-level BPE."""


class Token(NamedTuple):
    """A generated token, and the likeliest candidates for its place with log-probabilities."""

    text: str
    candidates: Sequence[tuple[str, float]]


class Answer(NamedTuple):
    """A generated text, and its tokens where the server tells them."""

    text: str
    tokens: Sequence[Token] | None

    @classmethod
    def of_completion(cls, completion: Any) -> Self:
        """Read a chat completion of OpenAI's protocol; what is none raises one error or another."""
        choice = completion.choices[0]
        text = choice.message.content or ""
        if choice.logprobs is None:
            return cls(text, None)
        return cls(text, [_token(position) for position in choice.logprobs.content or ()])

    def score(self) -> float | None:
        """By the tokens, else by the words; None if neither says Yes or No."""
        score = None if self.tokens is None else score_of_tokens(self.tokens)
        return score_of_text(self.text) if score is None else score


def score_of_tokens(tokens: Sequence[Token]) -> float | None:
    """P(Yes) / (P(Yes) + P(No)) at the answer's token, each summed over its spellings.

    Spellings differ in case and in the space before. The answer's token is the first generated one
    that says Yes or No where an answer may stand. If none does, it is the last one, of those that
    stand there, that had Yes or No among its candidates.

    Often one of the two is too unlikely to be listed. It counts with what it can have at most: the
    smallest listed probability, or what the list leaves of 1 if that is less.

    Returns:
        The score in [0, 1]; None if there is no such token.

    Example:
        >>> score_of_tokens([Token("Yes", [("Yes", math.log(0.6)), (" no", math.log(0.2))])])
        0.75
    """
    lead, score = "", None
    for token in tokens:
        if _LEAD.search(lead):
            here = _share_of_yes(token.candidates)
            if _says_yes(token.text) is not None:
                return here
            score = score if here is None else here
        lead += token.text
    return score


def score_of_text(text: str) -> float | None:
    """1.0 for a text that answers Yes, 0.0 for No, None for any other.

    Example:
        >>> score_of_text("**Answer:** No."), score_of_text("Not sure.")
        (0.0, None)
    """
    match = _ANSWER.search(text)
    return None if match is None else float(match[1].lower() == "yes")


def _token(position: Any) -> Token:
    listed = [(c.token, float(c.logprob)) for c in position.top_logprobs or ()]
    if all(text != position.token for text, _ in listed):
        listed.append((position.token, float(position.logprob)))
    return Token(position.token, listed)


def _says_yes(token: str) -> bool | None:
    return {"yes": True, "no": False}.get(token.strip(_SPACES).lower())


def _share_of_yes(candidates: Sequence[tuple[str, float]]) -> float | None:
    listed = [(_says_yes(text), math.exp(min(logprob, 0.0))) for text, logprob in candidates]
    yes, no = (sum(p for says, p in listed if says is side) for side in (True, False))
    if not yes + no:
        return None
    unlisted = min(*(p for _, p in listed), 1.0, max(0.0, 1.0 - sum(p for _, p in listed)))
    return (yes or unlisted) / ((yes or unlisted) + (no or unlisted))
