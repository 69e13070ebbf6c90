"""What a generated answer says: Yes or No, and how surely.

The paper's prompt asks for "Answer: Yes" or "Answer: No"; models also write "Yes", "**Answer:**
no", "Based on the clip, No." or a page of thoughts first. An answer is read by four rules:

1. Thoughts are no answer, in whichever delimiters; thoughts that do not end are followed by none.
2. The Yes and No behind "answer:" or "the answer is" count. Where there are none, those count that
   begin the text or end a phrase: "No clear instance is seen", "Based on the clip, no.", but not
   "there is no goal". "Maybe yes", "yes or no", "yes?" and "no doubt" never count.
3. Those that count must agree.
4. A text cut off at its last allowed token counts by its beginning alone. It may be a thought: some
   templates open the thoughts in the prompt.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Self

YES_WORDS = ("Yes", " Yes", "yes", " yes", "YES", " YES")
NO_WORDS = ("No", " No", "no", " no", "NO", " NO")
"""Spellings of either answer: those that are one token of a model's count."""

_THINKING = r"(?:think(?:ing)?|thoughts?|reasoning|analysis)"
_THOUGHTS_END = re.compile(
    rf"(?i:</(?:\w+:)?{_THINKING}(?::\w+)?>"  # Qwen3, DeepSeek-R1, GLM-4.5V; </seed:think>
    rf"|◁/{_THINKING}▷|\[/{_THINKING}\]"  # Kimi-VL; Magistral
    rf"|<\|end_(?:of_)?{_THINKING}\|>"  # Command A
    r"|<channel\|>"  # Gemma 4
    r"|<\|channel\|>\s*final[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>"  # gpt-oss
    r"|here is my response:)"  # Granite
    r"|assistantfinal"  # gpt-oss without its special tokens
)
_THOUGHTS_BEGIN = re.compile(
    rf"(?i:<(?:\w+:)?{_THINKING}(?::\w+)?>|◁{_THINKING}▷|\[{_THINKING}\]"
    rf"|<\|(?:start|begin)_(?:of_)?{_THINKING}\|>|<\|channel\|?>|here is my thought process:)"
    r"|\Aanalysis(?=[A-Z])"
)
_NO_ANSWER = re.compile(
    r"""
      \b(?:yes|no)\b\W*(?:or|nor|and|/)\W*(?:answer\W*)?\b(?:yes|no)\b
    | \b(?:maybe|perhaps|possibly|probably|likely)[\s,"'*]+(?:an?\s+)?["'*]*(?:yes|no)\b
    | \b(?:not|cannot|can['’]t)[\s"'*]+(?:(?:say|answer|confirm|an?)[\s"'*]+)*(?:yes|no)\b
    | \b(?:yes|no)\b["'*]*\?
    | \bno\s+(?:doubt|idea|longer|question|way)\b
    """,
    re.IGNORECASE | re.VERBOSE,
)
_LEAD = r"answer\b[^\w:=>]*(?:[:=>]|(?:is|would\sbe)\b)(?:[\W_]|boxed|text)*"
_BEGINNING = r"\A(?:[\W_]|(?:the|my|final)\b)*"
_SAID = re.compile(
    rf"""
    (?P<first>{_BEGINNING})? (?P<lead>{_LEAD})?
    (?<![^\W_]) (?P<word>yes|no) (?![^\W_]|-\w)
    (?P<end>(?=[^\S\n]*(?:[^\w\s]|_|\n|\Z)))?
    """,
    re.IGNORECASE | re.VERBOSE,
)
_BEFORE = re.compile(_BEGINNING + _LEAD, re.IGNORECASE)
_SPACES = " \t\r\n▁Ġ"
"""Around the word of a token; the last two are the spaces of SentencePiece and byte-level BPE."""
_UNSEEN = re.compile(r"[^!-~]")
"""What tokens and text may write differently: spaces, and letters split over tokens."""
_CLOSING_TAGS = re.compile(r"(?:<[^<>]*>|\[/?[A-Z_]+\])+\Z")
"""Special tokens after an answer, which the text may leave out."""


class Token(NamedTuple):
    """A generated token, and the likeliest candidates for its place with log-probabilities."""

    text: str
    candidates: Sequence[tuple[str, float]]


class Answer(NamedTuple):
    """A generated text without what a server holds to be thoughts, and all tokens that it tells.

    Attributes:
        text: The text.
        tokens: None or empty if the server tells none. They may include the thoughts.
        cut: Whether the text ends because no further token was allowed.
    """

    text: str
    tokens: Sequence[Token] | None = None
    cut: bool = False

    @classmethod
    def of_completion(cls, completion: Any, words: Mapping[int, str] | None = None) -> Self:
        """Read a chat completion of OpenAI's protocol; what is none raises one error or another.

        Args:
            completion: What a server sent.
            words: Words by the ids of their tokens, for a server that names tokens by their ids.
        """
        choice = completion.choices[0]
        text = choice.message.content or ""
        if not isinstance(text, str):  # Mistral: a list of parts, of which some are thoughts
            text = "".join(part["text"] for part in text if part["type"] == "text")
        positions = getattr(getattr(choice, "logprobs", None), "content", None) or ()
        tokens = [_token(position, words or {}) for position in positions]
        return cls(text, tokens, getattr(choice, "finish_reason", None) == "length")

    def by_words(self) -> float | None:
        """1.0 for Yes, 0.0 for No, None if the text says neither.

        Example:
            >>> Answer("**Answer:** No.").by_words(), Answer("Not sure.").by_words()
            (0.0, None)
        """
        place = self._place()
        return None if place is None or place.says is None else float(place.says)

    def by_tokens(self) -> float | None:
        """P(Yes) / (P(Yes) + P(No)) where the answer stands, each summed over its spellings.

        Spellings differ in case and in the space before. In a text that says neither, the answer
        stands behind "Answer:" at the beginning. Its token is found from the end of the text, since
        tokens of thoughts may come before.

        Often one of the two is too unlikely to be listed. It counts with what it can have at most:
        the smallest listed probability, or what the list leaves of 1 if that is less.

        Returns:
            The score in [0, 1]; None if there is no such token, or Yes and No are no candidates.

        Example:
            >>> candidates = [("Yes", math.log(0.6)), (" no", math.log(0.2))]
            >>> round(Answer("Yes", [Token("Yes", candidates)]).by_tokens(), 2)
            0.75
        """
        place = self._place()
        token = None if place is None else _first_token(self.tokens or (), place.rest)
        return None if token is None else _share_of_yes(token.candidates)

    def _place(self) -> _Place | None:
        """Where the answer stands; None in thoughts, in a contradiction, or cut off before it."""
        *_, text = _THOUGHTS_END.split(self.text)
        if _THOUGHTS_BEGIN.search(text):
            return None
        plain = _NO_ANSWER.sub(lambda match: " " * len(match[0]), text)
        found = [
            match
            for match in _SAID.finditer(plain)
            if (match["first"], match["lead"], match["end"]) != (None, None, None)
        ]
        if self.cut:
            found = [match for match in found if match["first"] is not None]
        found = [match for match in found if match["lead"] is not None] or found
        says = {match["word"].lower() == "yes" for match in found}
        if found:
            return _Place(says.pop(), text[found[0].start("word") :]) if len(says) == 1 else None
        before = _BEFORE.match(plain)
        return None if before is None else _Place(None, text[before.end() :])


class _Place(NamedTuple):
    """Where an answer stands: whether it says Yes (None: neither), and the text from there on."""

    says: bool | None
    rest: str


def _first_token(tokens: Sequence[Token], rest: str) -> Token | None:
    """The token with which the text's end ``rest`` begins; None if the tokens do not end so."""
    pieces = [_UNSEEN.sub("", token.text) for token in tokens]
    whole = _CLOSING_TAGS.sub("", "".join(pieces))
    rest = _CLOSING_TAGS.sub("", _UNSEEN.sub("", rest))
    if not rest or not whole.endswith(rest):
        return None
    start = len(whole) - len(rest)
    ends = accumulate(map(len, pieces))
    return next(token for token, end in zip(tokens, ends, strict=True) if end > start)


def _token(position: Any, words: Mapping[int, str]) -> Token:
    named = position.token
    listed = [(_name(c.token, words), float(c.logprob)) for c in position.top_logprobs or ()]
    if all(c.token != named for c in position.top_logprobs or ()):
        listed.append((_name(named, words), float(position.logprob)))
    spelt = bytes(getattr(position, "bytes", None) or ()).decode(errors="replace")
    return Token(_name(named, words) or spelt, listed)


def _name(token: str, words: Mapping[int, str]) -> str:
    """The token's text, "" if only its id is known."""
    prefix, _, number = token.partition(":")
    return words.get(int(number), "") if prefix == "token_id" and number.isdecimal() else token


def _says_yes(token: str) -> bool | None:
    return {"yes": True, "no": False}.get(token.strip(_SPACES).lower())


def _share_of_yes(candidates: Sequence[tuple[str, float]]) -> float | None:
    listed = [(_says_yes(text), math.exp(min(logprob, 0.0))) for text, logprob in candidates]
    yes, no = (sum(p for says, p in listed if says is side) for side in (True, False))
    if not yes + no:
        return None
    unlisted = min(*(p for _, p in listed), 1.0, max(0.0, 1.0 - sum(p for _, p in listed)))
    return (yes or unlisted) / ((yes or unlisted) + (no or unlisted))
