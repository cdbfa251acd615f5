"""What the scorer reads of an answer: the tokenizer's own pair, with the context cut and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stitch_ray.errors import UserError
from stitch_ray.reliability.scorer.inputs import InputTooLong, PairIds, ScoreInput, encode_pair, encode_pairs
from tests.encoders import FAMILIES, make_tokenizer

TOKENIZERS = {family: make_tokenizer(family) for family in FAMILIES}
ENCODERS = [family for family in FAMILIES if family != "decoder"]

question, context, answer = "who wrote the book?", "the book was born in Paris on the river.", "Homer"


def plain(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("shown", [ScoreInput(question, answer), ScoreInput(question, answer, context)])
def test_ids_are_those_of_the_tokenizers_own_pair(family: str, shown: ScoreInput) -> None:
    tokenizer = TOKENIZERS[family]
    found = encode_pair(tokenizer, shown, 512)
    first = question if shown.context is None else f"{question}\n\n{context}"
    assert list(found.ids) == tokenizer(first, answer)["input_ids"]
    assert not found.truncated


def test_the_second_segment_begins_where_the_tokenizer_says() -> None:
    tokenizer = TOKENIZERS["bert"]
    found = encode_pair(tokenizer, ScoreInput(question, answer, context), 512)
    types = [int(position >= found.second) for position in range(len(found.ids))]
    assert types == tokenizer(f"{question}\n\n{context}", answer, return_token_type_ids=True)["token_type_ids"]


def test_roberta_has_two_separators_between_the_texts() -> None:
    tokenizer = TOKENIZERS["roberta"]
    separator, (a, b) = tokenizer.sep_token_id, (plain(tokenizer, text) for text in (question, answer))
    expected = (tokenizer.cls_token_id, *a, separator, separator, *b, separator)
    assert encode_pair(tokenizer, ScoreInput(question, answer), 512) == PairIds(expected, len(a) + 3)


def test_a_decoder_gets_its_end_token_between_the_texts() -> None:
    tokenizer = TOKENIZERS["decoder"]
    a, b = plain(tokenizer, question), plain(tokenizer, answer)
    found = encode_pair(tokenizer, ScoreInput(question, answer), 512)
    assert found.ids == (*a, tokenizer.eos_token_id, *b)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_answer_keeps_its_place(family: str) -> None:
    """Tokenizers take an empty second text for none; then it would look like a question without answer."""
    tokenizer = TOKENIZERS[family]
    whole, empty = (encode_pair(tokenizer, ScoreInput(question, text), 512) for text in (answer, ""))
    assert empty.second == whole.second
    assert empty.ids == (*whole.ids[: whole.second], *whole.ids[whole.second + len(plain(tokenizer, answer)) :])


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_end_of_the_context_is_cut(family: str) -> None:
    tokenizer = TOKENIZERS[family]
    shown = ScoreInput(question, answer, context)
    whole = encode_pair(tokenizer, shown, 512)
    bare = encode_pair(tokenizer, ScoreInput(question, answer), 512)
    behind = len(whole.ids) - whole.second
    for length in range(len(bare.ids), len(whole.ids)):
        cut = encode_pair(tokenizer, shown, length)
        assert cut.truncated
        assert len(cut.ids) <= length
        assert cut.ids[-behind:] == whole.ids[-behind:]
        head = cut.ids[: cut.second]
        kept = len(head) - (whole.second - len(plain(tokenizer, shown.first)))
        text = tokenizer.decode(plain(tokenizer, shown.first)[:kept])
        assert text.replace(" ", "").lower().startswith("whowrotethebook?") or head == bare.ids[: bare.second]


def test_a_question_whose_last_token_reaches_into_the_context_is_never_cut() -> None:
    tokenizer = TOKENIZERS["modernbert"]
    assert len(plain(tokenizer, "who?\n\nin")) < len(plain(tokenizer, "who?")) + len(plain(tokenizer, "\n\nin"))
    shown = ScoreInput("who?", "Bach", "in Rome")
    room = len(encode_pair(tokenizer, ScoreInput("who?", "Bach"), 512).ids)
    for length in range(room, room + 6):
        found = encode_pair(tokenizer, shown, length)
        assert tokenizer.decode(found.ids[1 : found.second - 1]).startswith("who?")


def test_a_question_that_takes_more_tokens_before_a_context_is_never_cut() -> None:
    """Alone "a?" is one token; before a blank line "?" joins the line's end, and "a" stands alone."""
    vocabulary = {name: i for i, name in enumerate(["</s>", "a", "b", "?", "Ċ", "?Ċ", "a?"])}
    core = Tokenizer(models.BPE(vocabulary, [("?", "Ċ"), ("a", "?")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    shown = ScoreInput("a?", "b", "b")
    assert encode_pair(tokenizer, shown, 8).ids == (1, 5, 4, 2, 0, 2)
    assert encode_pair(tokenizer, shown, 3) == PairIds((6, 0, 2), 2, truncated=True)
    assert encode_pair(tokenizer, shown, 4) == PairIds((1, 5, 0, 2), 3, truncated=True)


@pytest.mark.parametrize("shown", [ScoreInput(question, answer), ScoreInput(question, answer, context)])
def test_a_question_and_answer_that_do_not_fit_are_refused_with_the_numbers(shown: ScoreInput) -> None:
    tokenizer = TOKENIZERS["bert"]
    needed = len(encode_pair(tokenizer, ScoreInput(question, answer), 512).ids)
    assert len(encode_pair(tokenizer, shown, needed).ids) == needed
    with pytest.raises(InputTooLong, match=f"take {needed} tokens of {needed - 1}"):
        encode_pair(tokenizer, shown, needed - 1)


def test_an_input_that_is_too_long_leaves_the_others_alone() -> None:
    tokenizer = TOKENIZERS["bert"]
    shown = [ScoreInput(question, answer), ScoreInput("who " * 60, answer), ScoreInput("", "")]
    found = encode_pairs(tokenizer, shown, 24)
    assert isinstance(found[1], InputTooLong)
    assert [found[0], found[2]] == [encode_pair(tokenizer, shown[i], 24) for i in (0, 2)]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(FAMILIES),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.integers(4, 60),
)
def test_any_text_is_encoded_whole_or_refused(family: str, asked: str, context: str, said: str, length: int) -> None:
    tokenizer = TOKENIZERS[family]
    shown = ScoreInput(asked, said, context)
    try:
        found = encode_pair(tokenizer, shown, length)
    except InputTooLong:
        bare = encode_pair(tokenizer, ScoreInput(asked, said), 1000)
        assert len(bare.ids) > length
    else:
        ids = plain(tokenizer, said)
        assert len(found.ids) <= length
        assert found.ids[found.second : found.second + len(ids)] == ids
        assert found.truncated == (len(encode_pair(tokenizer, shown, 1000).ids) > length)


def test_a_tokenizer_that_cannot_separate_texts_is_refused() -> None:
    tokenizer = make_tokenizer("decoder")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither a separator nor an end"):
        encode_pair(tokenizer, ScoreInput(question, answer), 512)
