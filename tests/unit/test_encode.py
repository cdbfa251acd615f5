"""Which tokens carry loss, for tokenizers and templates of every family."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from stitch_ray.data.quarantine import BadRow
from stitch_ray.engines.hf_text import prompt_ids
from stitch_ray.errors import UserError
from stitch_ray.prompts.chat import ChatTemplate
from stitch_ray.records import Turn
from stitch_ray.training.encode import Encoded, Overlong, check_template, encode
from stitch_ray.training.objectives import Rendered, Span
from stitch_ray.training.tiny import CHAT_TEMPLATE, train_tokenizer

TEXTS = [
    "The Rhine, the Nile and 7 more rivers.",
    "user assistant system human bot",
    "What is café?\n\nx = [1, 2]\n",
] * 9
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def fast(tokenizer: Tokenizer, **tokens: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=["<|im_start|>", "<|im_end|>"], **tokens
    )


def byte_level(*, trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return fast(tokenizer, eos_token="</s>")


def with_bos() -> PreTrainedTokenizerFast:
    found = byte_level().backend_tokenizer
    found.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return fast(found, bos_token="<s>", eos_token="</s>")


def unigram() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, unk_token="<unk>", special_tokens=SPECIALS, initial_alphabet=["\n"], show_progress=False
    )
    tokenizer.train_from_iterator([line for text in TEXTS for line in text.splitlines()], trainer)
    return fast(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


FAMILIES = {
    "byte_level": byte_level,
    "trimmed_offsets": lambda: byte_level(trim_offsets=True),
    "with_bos": with_bos,
    "unigram": unigram,
    "tiny": lambda: train_tokenizer(TEXTS, 400, 1024),
}


@cache
def tokenizer_of(family: str, template: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = FAMILIES[family]()
    tokenizer.chat_template = template or tokenizer.chat_template
    return tokenizer


def chat(*contents: str, system: str | None = None) -> Rendered:
    """Turns of user and assistant, as SFT renders them."""
    roles = ["assistant" if number % 2 else "user" for number in range(len(contents))]
    spans = [Span(text, float(role == "assistant"), role) for text, role in zip(contents, roles, strict=True)]
    return Rendered((*([Span(system, role="system")] if system else []), *spans))


def run(
    rendered: Rendered, tokenizer: Any, template: str = "chat", max_length: int = 4096, overlong: Any = "truncate"
) -> Encoded:
    return encode(rendered, tokenizer, ChatTemplate.resolve(template, tokenizer), max_length, overlong)


def learned(tokenizer: Any, encoded: Encoded) -> str:
    return str(tokenizer.decode(encoded.ids[encoded.weights > 0]))


# Chat templates

EXPECTED = [
    ("tiny", CHAT_TEMPLATE, "The Nile.<|end|>"),
    ("byte_level", CHATML, "The Nile.<|im_end|>"),
    ("trimmed_offsets", CHATML, "The Nile.<|im_end|>"),
    ("with_bos", CHATML, "The Nile.<|im_end|>"),
    ("unigram", CHATML, "The Nile.<|im_end|>"),
    ("with_bos", LLAMA2, " The Nile. </s>"),
    ("byte_level", THINKING, "<think>\n\n</think>\n\nThe Nile.<|im_end|>"),
]


@pytest.mark.parametrize(("family", "template", "text"), EXPECTED)
def test_the_answer_and_its_end_carry_loss_and_nothing_else(family: str, template: str, text: str) -> None:
    tokenizer = tokenizer_of(family, template)
    encoded = run(chat("Name a river.", "The Nile."), tokenizer)
    assert learned(tokenizer, encoded) == text
    assert encoded.weights[-1] == 1, "what follows the end mark is left out"
    assert encoded.ids.dtype == np.int32
    assert encoded.weights.dtype == np.float32
    assert not encoded.truncated


@pytest.mark.parametrize(("family", "template", "text"), EXPECTED)
def test_a_training_text_begins_with_the_prompt_of_inference(family: str, template: str, text: str) -> None:
    tokenizer = tokenizer_of(family, template)
    encoded = run(chat("Name a river.", "The Nile."), tokenizer)
    prompt = prompt_ids(tokenizer, (Turn("user", "Name a river."),))
    assert tuple(encoded.ids[: len(prompt)]) == prompt
    assert not encoded.weights[: len(prompt)].any()
    assert encoded.weights[len(prompt) :].all()


def test_the_ids_are_those_of_the_whole_text() -> None:
    tokenizer = tokenizer_of("byte_level", CHATML)
    encoded = run(chat("Name a river.", "The Nile.", "And 7 more?", "The Rhine.", system="user"), tokenizer)
    messages = [
        {"role": role, "content": text}
        for role, text in zip(
            ("system", "user", "assistant", "user", "assistant"),
            ("user", "Name a river.", "The Nile.", "And 7 more?", "The Rhine."),
            strict=True,
        )
    ]
    whole = tokenizer.apply_chat_template(messages)["input_ids"]
    assert encoded.ids.tolist() == whole[:-1]  # without the newline behind the last <|im_end|>
    assert learned(tokenizer, encoded) == "The Nile.<|im_end|>The Rhine.<|im_end|>"


def test_an_end_of_sequence_token_behind_the_end_mark_is_learned_too() -> None:
    """Generation stops at that token: a model that never learned to write it would not stop."""
    tokenizer = tokenizer_of("byte_level", CHATML.replace("<|im_end|>\n'", "<|im_end|>\n</s>\n'"))
    assert learned(tokenizer, run(chat("Q", "A"), tokenizer)) == "A<|im_end|>\n</s>"


def test_white_space_at_the_end_of_an_answer_is_learned_where_offsets_leave_it_out() -> None:
    tokenizer = tokenizer_of("trimmed_offsets", CHATML)
    encoded = run(Rendered((Span("Q\n"), Span("The Nile. ", 1.0))), tokenizer)
    assert learned(tokenizer, encoded) == "The Nile. </s>"


def test_an_answer_that_imitates_the_markers_is_learned_whole() -> None:
    tokenizer = tokenizer_of("byte_level", CHATML)
    answer = "a<|im_end|>\n<|im_start|>user\na"
    assert learned(tokenizer, run(chat("a", answer), tokenizer)) == answer + "<|im_end|>"


def test_weights_are_those_of_the_spans() -> None:
    tokenizer = tokenizer_of("byte_level", CHATML)
    spans = chat("Q", "The Nile.", "Q", "The Rhine.").spans
    rendered = Rendered(
        (spans[0], Span("The Nile.", 0.25, "assistant"), spans[2], Span("The Rhine.", 3.0, "assistant"))
    )
    encoded = run(rendered, tokenizer)
    assert str(tokenizer.decode(encoded.ids[encoded.weights == 0.25])) == "The Nile.<|im_end|>"
    assert str(tokenizer.decode(encoded.ids[encoded.weights == 3.0])) == "The Rhine.<|im_end|>"


def test_turns_behind_the_last_answer_are_left_out() -> None:
    tokenizer = tokenizer_of("byte_level", CHATML)
    with_thanks, without = run(chat("Q", "A", "Thanks"), tokenizer), run(chat("Q", "A"), tokenizer)
    assert with_thanks.ids.tolist() == without.ids.tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Co"]) | st.just("\n") | st.just(" "), min_size=1)
)
def test_every_character_of_any_answer_is_learned(answer: str) -> None:
    if not answer.strip():
        return
    for family in ("byte_level", "trimmed_offsets", "tiny"):
        tokenizer = tokenizer_of(family, CHAT_TEMPLATE if family == "tiny" else CHATML)
        encoded = run(chat("Q", answer), tokenizer)
        mark = "<|end|>" if family == "tiny" else "<|im_end|>"
        kept = tokenizer.decode(encoded.ids[encoded.weights > 0], clean_up_tokenization_spaces=False)
        prompt = tokenizer.decode(encoded.ids[encoded.weights == 0], clean_up_tokenization_spaces=False)
        # A newline that begins the answer may be one token with the one that ends the header.
        assert kept.lstrip("\n") == (answer + mark).lstrip("\n")
        assert "Q" in prompt
        assert len(prompt) <= len(f"<|im_start|>user\nQ{mark}\n<|im_start|>assistant\n")


def test_a_token_that_reaches_over_the_start_of_an_answer_is_learned() -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "question:answer": 2, "one": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    rendered = Rendered((Span("one question:"), Span("answer", 0.5), Span(" one", 2.0)))
    encoded = run(rendered, wrapped, "raw")
    assert encoded.ids.tolist() == [3, 2, 3, 1]
    assert encoded.weights.tolist() == [0, 0.5, 2, 2]


# Raw text and the raw template


def test_the_raw_template_has_no_markers_and_ends_answers() -> None:
    tokenizer = tokenizer_of("byte_level", CHATML)
    template = ChatTemplate.resolve("raw", tokenizer)
    turns = [Turn("system", "S"), Turn("user", "Q"), Turn("assistant", "A"), Turn("user", "R"), Turn("assistant", "B")]
    assert template.render(turns) == "S\nQ\nA</s>R\nB</s>"
    assert template.render(turns[:2], add_generation_prompt=True) == "S\nQ\n"
    encoded = run(chat("Q", "A", "R", "B", system="S"), tokenizer, "raw")
    assert learned(tokenizer, encoded) == "A</s>B</s>"


def test_the_raw_template_begins_as_the_tokenizer_begins_a_text() -> None:
    template = ChatTemplate.resolve("raw", tokenizer_of("with_bos", CHATML))
    assert template.render([Turn("user", "Q"), Turn("assistant", "A")]) == "<s>Q\nA</s>"
    assert template.render([Turn("user", "Q")], add_generation_prompt=True) == "<s>Q\n"


def test_a_saved_template_renders_the_same_text(tmp_path: Path) -> None:
    tokenizer = with_bos()
    template = ChatTemplate.resolve("raw", tokenizer)
    tokenizer.chat_template = template.text
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    encoded = run(chat("Name a river.", "The Nile."), tokenizer, "raw")
    prompt = prompt_ids(loaded, (Turn("user", "Name a river."),))
    assert tuple(encoded.ids[: len(prompt)]) == prompt


def test_raw_text_gets_the_first_tokens_of_a_prompt_and_one_end() -> None:
    tokenizer = tokenizer_of("with_bos", CHATML)
    encoded = run(Rendered((Span("Name a river.\n"), Span("The Nile.", 0.5), Span("ignored"))), tokenizer)
    assert tokenizer.decode(encoded.ids) == "<s>Name a river.\nThe Nile.</s>"
    assert str(tokenizer.decode(encoded.ids[encoded.weights == 0.5])) == "The Nile.</s>"


def test_raw_text_of_one_span_has_no_loss_on_its_first_token() -> None:
    encoded = run(Rendered((Span("The Nile.", 1.0),)), tokenizer_of("byte_level", CHATML))
    assert encoded.weights.tolist() == [0.0, *[1.0] * (len(encoded.ids) - 1)]


# Length


def test_a_long_example_loses_its_end_and_says_so() -> None:
    tokenizer = tokenizer_of("byte_level", CHATML)
    whole = run(chat("Q", "The Nile."), tokenizer)
    cut = run(chat("Q", "The Nile."), tokenizer, max_length=len(whole.ids) - 1)
    assert cut.truncated
    assert cut.ids.tolist() == whole.ids.tolist()[:-1]
    assert cut.weights.tolist() == whole.weights.tolist()[:-1]
    assert not run(chat("Q", "The Nile."), tokenizer, max_length=len(whole.ids)).truncated


def test_a_long_example_is_dropped_where_that_was_asked_for() -> None:
    tokenizer = tokenizer_of("byte_level", CHATML)
    length = len(run(chat("Q", "The Nile."), tokenizer).ids)
    with pytest.raises(Overlong, match=f"{length} tokens, more than max_length {length - 1}"):
        run(chat("Q", "The Nile."), tokenizer, max_length=length - 1, overlong="drop")


def test_an_example_of_which_no_answer_is_left_is_dropped() -> None:
    tokenizer = tokenizer_of("byte_level", CHATML)
    with pytest.raises(Overlong, match="behind max_length 8"):
        run(chat("What " * 20, "The Nile."), tokenizer, max_length=8)


# What does not fit


def test_an_example_without_an_answer_is_a_bad_row() -> None:
    with pytest.raises(BadRow, match="nothing in the example carries loss"):
        run(chat("Q"), tokenizer_of("byte_level", CHATML))


def test_a_template_without_a_system_role_is_told() -> None:
    with pytest.raises(BadRow, match="refuses the conversation: only user and assistant"):
        run(chat("Q", "A", system="S"), tokenizer_of("with_bos", LLAMA2))


BAD_TEMPLATES = {
    "turn 2 does not begin where its generation prompt ends": CHATML.replace("'<|im_start|>assistant\n'", "'<think>'"),
    "writes no mark behind an answer": "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}",
    "leaves out or changes the user turn 1": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "the end of turn 2 depends on its text": (
        "{% for m in messages %}{{ m['content'] + '\n' + (m['content'] | length | string) + eos_token }}{% endfor %}"
    ),
}


@pytest.mark.parametrize("reason", BAD_TEMPLATES)
def test_a_template_that_does_not_suit_training_is_told(reason: str) -> None:
    tokenizer = tokenizer_of("byte_level", BAD_TEMPLATES[reason])
    with pytest.raises(BadRow, match=reason):
        run(chat("Question", "Answer"), tokenizer)
    with pytest.raises(UserError, match=reason):
        check_template(ChatTemplate.resolve("chat", tokenizer))


def test_a_template_that_rewrites_earlier_turns_takes_single_answers_only() -> None:
    tokenizer = tokenizer_of("byte_level", THINKING)
    check_template(ChatTemplate.resolve("chat", tokenizer))
    with pytest.raises(BadRow, match="writes turn 2 in another way when more turns follow"):
        run(chat("Q", "A", "R", "B"), tokenizer)


def test_a_tokenizer_without_offsets_is_told_with_the_fix() -> None:
    class Slow:
        is_fast = False

    template = ChatTemplate.resolve("chat", tokenizer_of("byte_level", CHATML))
    with pytest.raises(UserError, match=r"Slow gives no offsets.*tokenizer\.json"):
        encode(chat("Q", "A"), Slow(), template, 100, "drop")


def test_a_tokenizer_without_a_template_is_told_with_the_fix() -> None:
    bare = byte_level()
    with pytest.raises(UserError, match="write template: raw, or the path of a Jinja file"):
        ChatTemplate.resolve("chat", bare)
    assert learned(bare, run(chat("Q", "A"), bare, "raw")) == "A</s>"


def test_a_template_file_is_used_and_its_mistakes_are_told(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("byte_level", CHATML)
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
                    "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    assert learned(tokenizer, run(chat("Q", "A"), tokenizer, str(file))) == "A</s>"
    file.write_text("line\n{% for m in %}")
    with pytest.raises(UserError, match=r"own\.jinja, line 2"):
        ChatTemplate.resolve(str(file), tokenizer)
    with pytest.raises(UserError, match=r"cannot read .*none\.jinja"):
        ChatTemplate.resolve(str(tmp_path / "none.jinja"), tokenizer)
