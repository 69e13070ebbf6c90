"""What an answer says, in closed form."""

from __future__ import annotations

import math

import pytest

from tests.scorers.distributions import DISTRIBUTIONS
from vlmrb_torchrl.scorers.answers import Answer, Token


def token(text: str, **others: float) -> Token:
    """A generated token with the probabilities of its candidates; "_" stands for a space."""
    candidates = {key.replace("_", " "): p for key, p in (others or {text: 1.0}).items()}
    return Token(text, [(key, math.log(p)) for key, p in candidates.items()])


def answer(*tokens: str | Token, text: str | None = None, cut: bool = False) -> Answer:
    """An answer of these tokens; its text is theirs unless it is given."""
    spoken = [each if isinstance(each, Token) else token(each) for each in tokens]
    written = "".join(each.text for each in spoken).replace("▁", " ").replace("Ġ", " ")
    return Answer(written if text is None else text, spoken, cut)


# ---------------------------------------------------------------- by words


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Answer: Yes", 1.0),
        ("Answer: No.", 0.0),
        ("**Answer:** yes", 1.0),
        ("  no", 0.0),
        ("YES!", 1.0),
        ("_No_", 0.0),
        ("'no'", 0.0),
        ("### Answer\n\nNo", 0.0),
        ("Answer: \\boxed{\\text{Yes}}", 1.0),
        ("<answer>No</answer>", 0.0),
        ("<|begin_of_box|>Yes<|end_of_box|>", 1.0),
        ('{"answer": "No"}', 0.0),
        ('{"final_answer": "Yes", "reason": "no key"}', 1.0),
        # Prose.
        ("The answer is Yes.", 1.0),
        ("The answer is: **No**", 0.0),
        ("The answer to the question is no.", 0.0),
        ("Based on the clip, No.", 0.0),
        ("The goal is not reached.\nAnswer: No", 0.0),
        ("Yes, the agent reaches it.", 1.0),
        ("No\nThe agent stays where it is.", 0.0),
        ("The goal? No. It is never reached.", 0.0),
        ("Well, yes: it stands on the goal.", 1.0),
        # A "no" that belongs to what follows.
        ("There is no clear instance, so the answer is No", 0.0),
        ("There is no goal", None),
        ("No clear instance of goal satisfaction is seen.", 0.0),
        ("Answer: No clear instance.", 0.0),
        ("No doubt: Yes", 1.0),
        ("The answer is no longer clear.", None),
        ("No-one is there", None),
        # Neither, both, perhaps.
        ("It does not. No.", 0.0),
        ("Yes? No.", 0.0),
        ("Yes. No.", None),
        ("Answer: Yes\nAnswer: No", None),
        ("Yes or No?", None),
        ("Neither yes nor no.", None),
        ("Yes/No", None),
        ("Maybe yes.", None),
        ("Most likely, no.", None),
        ("I can't say yes.", None),
        ("It is not a yes.", None),
        ("Not sure", None),
        ("Yesterday", None),
        ("NoNoNo", None),
        ("", None),
        # The prompt's own words.
        ("Output exactly Answer: Yes or Answer: No.", None),
        ("Output exactly Answer: Yes or Answer: No. I see it. Answer: Yes", 1.0),
        ("If no success occurs, answer No. It occurs. Answer: Yes", 1.0),
    ],
)
def test_words_are_read_by_rules(text, score):
    assert Answer(text).by_words() == score


ENDED = [
    "<think>{}</think>\n\n",  # Qwen3, DeepSeek-R1, MiniMax
    "{}</think>\n\n",  # the same, where the template opens the thoughts
    "<think>{}</think><answer>",  # GLM-4.5V, and models trained as R1 was
    "<seed:think>{}</seed:think>",
    "<thinking>{}</thinking>\n",
    "<REASONING>{}</REASONING>\n\n<CONCLUSION>",
    "◁think▷{}◁/think▷",  # Kimi-VL-Thinking
    "[THINK]{}[/THINK]",  # Magistral
    "<|START_THINKING|>{}<|END_THINKING|><|START_RESPONSE|>",  # Command A
    "<|channel>thought\n{}<channel|>",  # Gemma 4
    "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>",
    "analysisWe see. {}assistantfinal",  # the same without special tokens
    "Here is my thought process: {} Here is my response: ",  # Granite
]
DOUBT = 'The prompt wants "Answer: Yes" or "Answer: No". Perhaps the answer is Yes. Yes.'


@pytest.mark.parametrize("form", ENDED)
def test_thoughts_are_no_answer(form):
    """Ended they are left out; not ended, no answer has come."""
    assert Answer(form.format(DOUBT) + "Answer: No").by_words() == 0.0
    if not form.startswith("{"):
        begun = form.partition("{}")[0] + DOUBT
        assert Answer(begun).by_words() is None
        assert answer(*begun.split(" "), text=begun).by_tokens() is None


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Yes", 1.0),  # one token was allowed
        ("Answer: No, the agent", 0.0),
        ("The answer is No. In the", 0.0),
        ("No\nYes\nNo\nYes", 0.0),  # a model that does not know where to stop
        ("Okay, the prompt wants Answer: Yes", None),
        ("Let me see. If not visible, answer No.", None),
    ],
)
def test_a_text_that_is_cut_off_counts_by_its_beginning(text, score):
    """The rest may be thoughts that the template opened."""
    assert Answer(text, None, cut=True).by_words() == score


# ---------------------------------------------------------------- by tokens


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_distribution_over_the_answers_token_means_one_score(name):
    """The likeliest token is the generated one."""
    logits, score = DISTRIBUTIONS[name]
    total = math.log(sum(map(math.exp, logits.values())))
    listed = [(text, logit - total) for text, logit in logits.items()]
    last = Token(max(logits, key=logits.__getitem__), listed)
    assert answer("Answer", ":", last).by_tokens() == pytest.approx(score)


@pytest.mark.parametrize("spelling", ["▁Yes", "ĠYes", " yes", "YES", "Yes\n"])
def test_spaces_of_any_tokenizer_belong_to_a_spelling(spelling):
    assert answer(Token(spelling, [(spelling, -0.5), ("No", -0.5)])).by_tokens() == 0.5


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], []),
        (["Answer", ":"], ["<|im_end|>"]),
        (["**", "Answer", ":**"], [".", "</s>"]),
        (["<think>", "Answer", ":", " Yes", "</think>", "\n\n"], ["<|im_end|>"]),
        (["◁think▷", "No", ".", "◁/think▷"], [" the", " agent", " did", ".", "[EOS]"]),
        (["<|channel|>", "analysis", "<|message|>", "No", "<|end|>", "<|start|>", "assistant",
          "<|channel|>", "final", "<|message|>"], ["<|return|>"]),
        (["The", " goal", ",", " no", " doubt", ":"], ["<｜end▁of▁sentence｜>"]),
    ],
)  # fmt: skip
def test_the_answers_token_is_found_from_the_end_of_the_text(before, after):
    """Also where the text leaves out the thoughts, or the special tokens after the answer."""
    yes = token(" Yes", _Yes=0.8, _No=0.2)
    assert answer(*before, yes, *after).by_tokens() == pytest.approx(0.8)
    said = "".join(["Yes", *after[:-1]])
    assert answer(*before, yes, *after, text=said).by_tokens() == pytest.approx(0.8)


def test_letters_that_are_split_over_tokens_hinder_nothing():
    """Tokenizers of bytes break up what is not ASCII."""
    last = [token("Yes", Yes=0.8, No=0.2), "。", "�", "�"]
    assert answer(*last, text="Yes。目").by_tokens() == pytest.approx(0.8)


def test_tokens_that_are_not_those_of_the_text_say_nothing():
    yes = token("Yes", Yes=0.8, No=0.2)
    assert answer("No", yes, "!", text="No").by_tokens() is None
    assert answer(text="Yes").by_tokens() is None
    assert Answer("Yes").by_tokens() is None
    assert answer("Y", "es").by_tokens() is None


def test_where_neither_was_said_the_candidates_for_the_answer_count():
    """At its place, which only "Answer:" makes sure: elsewhere a text that says neither began."""
    unclear = token(" Unclear", _Unclear=0.5, _Yes=0.1, _No=0.3)
    before = token("Answer", Answer=0.9, Yes=0.05, No=0.05)
    assert answer(before, ":", unclear, ".").by_tokens() == pytest.approx(0.25)
    assert answer(before, ":", unclear, cut=True).by_tokens() == pytest.approx(0.25)
    assert answer(unclear, ".").by_tokens() is None
    assert answer("There", " is", unclear, " no", " goal").by_tokens() is None


def test_a_contradiction_has_no_token():
    no, yes = token("No", No=0.9, Yes=0.1), token(" Yes", _Yes=1.0)
    assert answer(no, ".", yes, ".").by_tokens() is None
    assert answer(no, ".", yes, ".", cut=True).by_tokens() == pytest.approx(0.1)


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
    assert answer(token(max(listed, key=listed.get), **listed)).by_tokens() == pytest.approx(score)


def test_impossible_candidates_are_none():
    """vLLM writes -9999.0 for a probability of zero."""
    hm = Token(" Hm", [(" Hm", 0.0), (" Yes", -9999.0)])
    assert answer("Answer", ":", hm).by_tokens() is None
