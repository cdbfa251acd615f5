"""The rated texts, and that token ids always equal those of the whole text, whatever the tokenizer."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from stitch_ray.errors import UserError
from stitch_ray.records import Turn
from stitch_ray.selection.bodies import EncoderSpec
from stitch_ray.selection.encode import EncodedBody, RatingEncoder
from stitch_ray.selection.layout import CUE, Content, Layout, LayoutName, contents

PROMPTS = (
    "Give the answer below a grade from 1 to 5.",
    "How well does the response carry out its instruction? Grade it between 1 and 5.",
    "Mark from 1 (bad) to 5 (good):",
)
LAYOUTS: tuple[LayoutName, ...] = ("prompt_first", "content_first")
TEXTS = [
    *PROMPTS,
    *(f"Instruction: name {n} rivers.\nResponse: the Rhine, the Nile and {n * 7} more." for n in range(40)),
    *("Response: café über naïve\nThe rating is:\n", "x = [1, 2, 3]\n\nprint(x)\n", "The quick brown fox jumps."),
    "0 1 2 3 4 5 6 7 8 9",
] * 3

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# Tokenizers of every family, trained here


def byte_level(split: pre_tokenizers.PreTokenizer, texts: list[str] = TEXTS, size: int = 500) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def gpt2() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)))


def with_bos_and_eos() -> PreTrainedTokenizerFast:
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def llama3() -> PreTrainedTokenizerFast:
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = byte_level(split)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def without_split() -> PreTrainedTokenizerFast:
    texts = [line for text in TEXTS for line in text.splitlines()]
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), texts, 400)
    )


def sentencepiece_like() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        unk_token="<unk>",
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=[*"\n0123456789"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([word for text in TEXTS for word in text.splitlines()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def bert(texts: list[str] = TEXTS) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = ["[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", eos_token="[SEP]"
    )


FAMILIES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    f.__name__: f for f in (gpt2, with_bos_and_eos, llama3, without_split, sentencepiece_like, bert)
}
CLOSING = {"with_bos_and_eos", "sentencepiece_like", "bert"}
"""Families whose tokenizer appends a special token, behind which no rating can stand."""


@cache
def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    return FAMILIES[family]()


@cache
def encoder_of(family: str, name: LayoutName, max_tokens: int = 100_000) -> RatingEncoder:
    return RatingEncoder(tokenizer_of(family), Layout(name, PROMPTS), num_ratings=5, max_tokens=max_tokens, name=family)


def whole_ids(family: str, text: str) -> list[int]:
    """The naive tokenisation of a text, as far as the place of the rating."""
    ids = list(tokenizer_of(family)(text)["input_ids"])
    return ids[:-1] if family in CLOSING else ids


def sequences(encoder: RatingEncoder, body: EncodedBody) -> list[list[int]]:
    """What an engine is given for one body, a sequence a prompt."""
    if body.whole:
        batch = encoder.whole_batch(body)
        return [list(batch.sequence(k, 0)) for k in range(encoder.num_prompts)]
    batch = encoder.batch([body])
    return [list(batch.sequence(0, k)) for k in range(encoder.num_prompts)]


# Texts


def test_prompt_first_reads_prompt_content_cue() -> None:
    layout = Layout("prompt_first", ("Rate A.", "Rate B."))
    assert layout.whole(Content("Say hi.", "Hi.").text, 1) == (
        "Rate B.\n\nInstruction: Say hi.\nResponse: Hi.\nThe rating is:\n"
    )


def test_content_first_reads_content_prompt_cue() -> None:
    layout = Layout("content_first", ("Rate A.", "Rate B."))
    assert layout.whole(Content("Say hi.", "Hi.").text, 0) == (
        "Instruction: Say hi.\nResponse: Hi.\n\nRate A.\nThe rating is:\n"
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_side_is_the_same_for_every_prompt(name: LayoutName) -> None:
    layout = Layout(name, PROMPTS)
    heads, tails = ({side(k) for k in range(len(PROMPTS))} for side in (layout.head, layout.tail))
    assert {len(heads), len(tails)} == {1, len(PROMPTS)}
    assert all(tail.endswith(CUE) for tail in tails)


def test_a_single_turn_is_its_instruction_and_its_response_stripped() -> None:
    found = contents([Turn("user", " Say hi.\n"), Turn("assistant", "\n Hi. ")], None)
    assert found == [Content("Say hi.", "Hi.")]
    assert found[0].text == "Instruction: Say hi.\nResponse: Hi."


def test_the_context_stands_on_a_line_of_its_own_behind_the_first_question() -> None:
    assert contents([Turn("user", "Sum up."), Turn("assistant", "Ok.")], " A text. ") == [
        Content("Sum up.\nA text.", "Ok.")
    ]


def test_every_assistant_turn_is_rated_behind_all_that_was_said_before_with_the_context_once() -> None:
    turns = [
        Turn("system", "Be brief."),
        Turn("user", "Who?"),
        Turn("assistant", "Ada."),
        Turn("user", "Who?"),  # word for word the first question
        Turn("assistant", "Ada Lovelace."),
    ]
    assert contents(turns, "A list.") == [
        Content("System: Be brief.\nUser: Who?\nA list.", "Ada."),
        Content("System: Be brief.\nUser: Who?\nA list.\nAssistant: Ada.\nUser: Who?", "Ada Lovelace."),
    ]


def test_a_system_turn_is_marked_in_a_single_exchange_too() -> None:
    assert contents([Turn("system", "Be brief."), Turn("user", "Who?"), Turn("assistant", "Ada.")], None) == [
        Content("System: Be brief.\nWho?", "Ada.")
    ]


def test_a_question_without_an_answer_is_nothing_to_rate() -> None:
    assert contents([Turn("user", "Who?")], None) == []


# Token ids

PIECES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(
        [
            "ok.", "a", "Say", " word", "  ", "\n", "\n\n", "\r\n", "\t", ".", '"', ")", "...", "!?", ":", "1", "42", "5",
            "```py\nx = 1\n```", "if x:\n    return [1]", "{'k': \"v\"}", "👩‍👩‍👧", "🇩🇪", "é", "e\u0301", "你好。", "\u00a0", "\u200b",
            "İ", "ß", "Response: ", "Instruction:", "The rating is:\n", "</s>", "<s>", "[SEP]", "\x00", "\u2028",
        ]
    ),
)  # fmt: skip
BODY = st.lists(PIECES, max_size=8).map("".join)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
@given(instruction=BODY, response=BODY)
@settings(max_examples=60, deadline=None)
def test_token_ids_equal_those_of_the_whole_text_for_every_prompt(
    family: str, name: LayoutName, instruction: str, response: str
) -> None:
    encoder, layout = encoder_of(family, name), Layout(name, PROMPTS)
    turns = [Turn("user", instruction), Turn("assistant", response)]
    rows = [*contents(turns, None), Content(instruction, response)]
    for content, body in zip(rows, encoder.encode(rows), strict=True):
        expected = [whole_ids(family, layout.whole(content.text, k)) for k in range(len(PROMPTS))]
        assert sequences(encoder, body) == expected
        assert not body.truncated
        assert body.tokens <= max(map(len, expected))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("family", ["gpt2", "with_bos_and_eos", "llama3", "bert"])
def test_tokenizers_that_split_at_newlines_share_one_body_between_the_prompts(family: str, name: LayoutName) -> None:
    encoder = encoder_of(family, name)
    assert encoder.shares_bodies
    assert not encoder.encode([Content("Name a river.", "The Rhine.")])[0].whole


def joining(*joined: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE without a split whose only merges build these texts from left to right."""
    vocab = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for text in joined:
        symbols = text.replace("\n", "Ċ").replace(" ", "Ġ")
        for stop in range(1, len(symbols)):
            if symbols[: stop + 1] not in vocab:
                merges.append((symbols[:stop], symbols[stop]))
                vocab[symbols[: stop + 1]] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    "joined", ["ok.\n\nHow", "ok.\nThe", "?\n\nInstruction: ok", "5.\n\nInstruction: ok", "ok.\n\nM", "a\n\nG"]
)
def test_a_tokenizer_that_joins_text_and_prompt_for_some_rows_only_is_not_trusted(
    name: LayoutName, joined: str
) -> None:
    """No probe and no first prompt shows the join; only the row and the prompt that it belongs to do."""
    tokenizer = joining(joined)
    encoder = RatingEncoder(tokenizer, Layout(name, PROMPTS), num_ratings=5, max_tokens=1000, name="m")
    for content in (Content("ok", "ok."), Content("x", "a"), Content("ok", "ok. ")):
        (body,) = encoder.encode([content])
        expected = [list(tokenizer(Layout(name, PROMPTS).whole(content.text, k))["input_ids"]) for k in range(3)]
        assert sequences(encoder, body) == expected


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_rating_ids_are_what_the_tokenizer_writes_behind_the_cue(family: str, name: LayoutName) -> None:
    encoder = encoder_of(family, name)
    text = Layout(name, PROMPTS).whole(Content("Name a river.", "The Rhine.").text, 2)
    before = whole_ids(family, text)
    for rating in range(1, 6):
        assert whole_ids(family, f"{text}{rating}") == [*before, encoder.rating_ids[rating - 1]]
    assert encoder.batch([]).rating_ids == encoder.rating_ids


def test_a_slow_tokenizer_is_rated_with_whole_sequences() -> None:
    class Slow:
        """No offsets, as a tokenizer in Python has none."""

        is_fast, unk_token_id, eos_token_id = False, None, 1

        def __call__(self, text: str) -> dict[str, Any]:
            return {"input_ids": tokenizer_of("with_bos_and_eos")(text)["input_ids"]}

    encoder = RatingEncoder(Slow(), Layout("prompt_first", PROMPTS), num_ratings=5, max_tokens=300, name="slow")
    short, long = encoder.encode([Content("Name.", "Rhine."), Content("Name.", "Rhine. " * 500)])
    text = Layout("prompt_first", PROMPTS).whole(Content("Name.", "Rhine.").text, 1)
    assert sequences(encoder, short)[1] == whole_ids("with_bos_and_eos", text)
    assert long.truncated
    assert max(map(len, sequences(encoder, long))) <= 300


def test_no_contents_are_no_bodies() -> None:
    assert encoder_of("gpt2", "prompt_first").encode([]) == []


# Truncation


def longest(family: str, name: LayoutName) -> int:
    """Tokens that the longest prompt takes around an empty content."""
    layout = Layout(name, PROMPTS)
    return max(len(whole_ids(family, layout.whole(Content("", "").text, k))) for k in range(len(PROMPTS)))


LONG = st.one_of(
    st.sampled_from(["zz " * 400, "zebra. " * 400, "z👩‍👩‍👧" * 200, "z\n" * 500, "zé" * 300, "z" * 900]),
    st.lists(PIECES, min_size=20, max_size=60).map(lambda parts: f"z {''.join(parts)} z" * 30),
)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
@given(instruction=st.one_of(st.just("Name a river."), LONG), response=LONG, room=st.integers(20, 90))
@settings(max_examples=25, deadline=None)
def test_a_shortened_content_fits_and_keeps_prompt_cue_and_part_of_the_response(
    family: str, name: LayoutName, instruction: str, response: str, room: int
) -> None:
    layout, max_tokens = Layout(name, PROMPTS), longest(family, name) + room
    encoder = encoder_of(family, name, max_tokens)
    content = Content(instruction.replace("z", "s").strip(), response.strip())
    (body,) = encoder.encode([content])
    full = [whole_ids(family, layout.whole(content.text, k)) for k in range(len(PROMPTS))]
    if not body.truncated:
        assert sequences(encoder, body) == full
        return
    assert max(map(len, full)) > max_tokens - 2  # a token or two less than fits is the most that is given away
    empty = [whole_ids(family, layout.whole("", k)) for k in range(len(PROMPTS))]
    for k, sequence in enumerate(sequences(encoder, body)):
        assert len(sequence) <= max_tokens
        side = len(whole_ids(family, CUE)) - 2
        assert sequence[-side:] == full[k][-side:] == empty[k][-side:]
        text = tokenizer_of(family).decode(sequence)
        for words in (PROMPTS[k].split()[:2], ["The", "rating", "is"], ["Instruction"], ["Response"]):
            assert all(word.lower() in text.lower() for word in words)
        assert "z" in text or "<unk>" in text or "[UNK]" in text


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_instruction_leaves_half_the_room_to_the_response(family: str, name: LayoutName) -> None:
    encoder = encoder_of(family, name, longest(family, name) + 80)
    (body,) = encoder.encode([Content("fox jumps " * 300, "The quick brown rivers " * 300)])
    text = tokenizer_of(family).decode(sequences(encoder, body)[0]).lower()
    assert body.truncated
    assert text.count("fox") >= 2
    assert text.count("quick") >= 2


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_short_instruction_is_kept_whole_and_the_response_is_cut_at_its_end(family: str, name: LayoutName) -> None:
    encoder = encoder_of(family, name, longest(family, name) + 60)
    (body,) = encoder.encode([Content("name 3 rivers.", "The Rhine, " + "the Nile, " * 300 + "fox")])
    text = "".join(tokenizer_of(family).decode(sequences(encoder, body)[0]).lower().split())
    assert "instruction:name3rivers.response:therhine,thenile" in text
    assert "fox" not in text


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_fits_exactly_is_not_shortened(family: str, name: LayoutName) -> None:
    layout, content = Layout(name, PROMPTS), Content("Name a river.", "The Rhine. " * 20)
    needed = max(len(whole_ids(family, layout.whole(content.text, k))) for k in range(len(PROMPTS)))
    (body,) = encoder_of(family, name, needed).encode([content])
    assert not body.truncated
    (body,) = encoder_of(family, name, needed - 3).encode([content])
    assert body.truncated


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_smallest_max_tokens_that_is_accepted_rates_any_content_and_one_less_is_refused(
    family: str, name: LayoutName
) -> None:
    def make(max_tokens: int) -> RatingEncoder:
        layout = Layout(name, PROMPTS)
        return RatingEncoder(tokenizer_of(family), layout, num_ratings=5, max_tokens=max_tokens, name="small")

    def accepted(max_tokens: int) -> bool:
        try:
            make(max_tokens)
        except UserError:
            return False
        return True

    least = next(n for n in range(1, 1000) if accepted(n))
    with pytest.raises(UserError, match=rf"models: small: .* max_tokens {least - 1}; at least 16 tokens"):
        make(least - 1)
    encoder = make(least)
    long = [
        Content(i, r) for i in ("", "a", "fox " * 99, "👩‍👩‍👧" * 99) for r in ("quick " * 99, "🇩🇪é" * 99, "z" * 999)
    ]
    for body in encoder.encode(long):
        assert max(map(len, sequences(encoder, body))) <= least


# Tokenizers that cannot rate


def test_a_tokenizer_that_joins_a_rating_to_the_cue_is_refused_with_its_pieces() -> None:
    with pytest.raises(UserError, match=r"models: m: .* rating 3 as one token behind the cue .*Ċ3"):
        RatingEncoder(joining("\n3"), Layout("prompt_first", PROMPTS), num_ratings=5, max_tokens=1000, name="m")
    RatingEncoder(joining("\n3"), Layout("prompt_first", PROMPTS), num_ratings=2, max_tokens=1000, name="m")


@pytest.mark.parametrize("missing", ["12345", "3"])
def test_a_tokenizer_without_a_token_for_every_rating_is_refused(missing: str) -> None:
    texts = ["".join(c for c in text if c not in missing) for text in TEXTS]
    with pytest.raises(UserError, match=r"models: m: .*token"):
        RatingEncoder(bert(texts), Layout("prompt_first", PROMPTS), num_ratings=5, max_tokens=1000, name="m")


def test_what_was_tokenised_is_found_again_wherever_the_tokenizer_lies_and_never_for_another() -> None:
    spec = EncoderSpec("here", "hash", "prompt_first", ("Rate:",), 5, 128, "a")
    assert replace(spec, tokenizer="there", name="b").key == spec.key
    others: list[dict[str, Any]] = [{"tokenizer_hash": "other"}, {"layout": "content_first"}, {"prompts": ("Judge:",)}]
    others += [{"num_ratings": 4}, {"max_tokens": 64}]
    assert len({spec.key, *(replace(spec, **other).key for other in others)}) == 1 + len(others)
