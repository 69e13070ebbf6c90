"""What an answer says, in closed form."""

from __future__ import annotations

import math

import pytest

from vlmrb_torchrl.scorers.answers import Answer, Token, score_of_text, score_of_tokens


def token(text: str, **others: float) -> Token:
    """A generated token with the probabilities of its candidates; "_" stands for a space."""
    candidates = {key.replace("_", " "): p for key, p in others.items()}
    return Token(text, [(key, math.log(p)) for key, p in candidates.items()])


def test_the_score_is_the_share_of_yes_over_its_spellings():
    """(0.3 + 0.1 + 0.1) / (0.5 + 0.2 + 0.05); "Maybe" counts on neither side."""
    answer = token("Yes", Yes=0.3, _yes=0.1, YES=0.1, No=0.2, _NO=0.05, Maybe=0.2)
    assert score_of_tokens([answer]) == pytest.approx(0.5 / 0.75)


@pytest.mark.parametrize("spelling", ["▁Yes", "ĠYes", " yes", "YES", "Yes\n"])
def test_spaces_of_any_tokenizer_belong_to_a_spelling(spelling):
    assert score_of_tokens([Token(spelling, [(spelling, -0.5), ("No", -0.5)])]) == 0.5


@pytest.mark.parametrize(
    "lead", [[], ["Answer", ":"], ["**", "Answer", ":**"], ["<think>", "so", "</think>", "\n"]]
)
def test_the_answers_token_is_found_behind_what_the_prompt_asks_for(lead):
    tokens = [*(Token(text, [(text, -0.1), ("No", -3.0)]) for text in lead)]
    assert score_of_tokens([*tokens, token(" Yes", _Yes=0.8, _No=0.2)]) == pytest.approx(0.8)


def test_the_first_answer_counts():
    tokens = [token("No", No=0.9, Yes=0.1), token(".", _=1.0), token(" Yes", _Yes=1.0)]
    assert score_of_tokens(tokens) == pytest.approx(0.1)


def test_a_no_within_a_sentence_is_no_answer():
    tokens = [Token("There", [("There", 0.0)]), Token(" is", [(" is", 0.0)]), Token(" no", [])]
    assert score_of_tokens(tokens) is None
    assert score_of_text("There is no goal") is None


def test_where_neither_was_said_the_candidates_for_the_answer_count():
    """The last place of an answer that lists one: behind "Answer:", not before it."""
    tokens = [
        token("Answer", Answer=0.9, Yes=0.05, No=0.05),
        Token(":", [(":", 0.0)]),
        token(" Unclear", _Unclear=0.5, _Yes=0.1, _No=0.3),
        token(" Yes", _Yes=0.9),
    ]
    assert score_of_tokens(tokens) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("listed", "score"),
    [
        ({"Yes": 0.5, "Well": 0.1}, 0.5 / 0.6),  # No has 0.1 at most: it is not listed
        ({"Yes": 0.9, "Well": 0.06, "So": 0.03}, 0.9 / 0.91),  # no more than 0.01 is left
        ({"No": 0.5, "Well": 0.1}, 0.1 / 0.6),
        ({"Yes": 1.0}, 1.0),
    ],
)
def test_a_side_that_is_not_listed_counts_with_the_most_it_can_have(listed, score):
    assert score_of_tokens([token(max(listed, key=listed.get), **listed)]) == pytest.approx(score)


def test_impossible_candidates_are_none():
    """vLLM writes -9999.0 for a probability of zero."""
    assert score_of_tokens([Token("Hm", [("Hm", 0.0), ("Yes", -9999.0)])]) is None
    assert score_of_tokens([]) is None


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Answer: Yes", 1.0),
        ("Answer: No.", 0.0),
        ("**Answer:** yes", 1.0),
        ("  no", 0.0),
        ("YES!", 1.0),
        ("The goal is not reached.\nAnswer: No", 0.0),
        ("<think>\n\n</think>\n\nYes", 1.0),
        ("Not sure", None),
        ("Yesterday", None),
        ("Nobody knows: yes", None),
        ("", None),
    ],
)
def test_words_are_read_strictly(text, score):
    assert score_of_text(text) == score
    assert Answer(text, None).score() == score


def test_words_count_where_the_tokens_say_nothing():
    assert Answer("Yes", [Token("Y", [("Y", 0.0)]), Token("es", [("es", 0.0)])]).score() == 1.0
    assert Answer("Yes", [token("Yes", Yes=0.7, No=0.3)]).score() == pytest.approx(0.7)
