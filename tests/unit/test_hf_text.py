import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TopPLogitsWarper,
)

from stitch_ray.engines import hf_decoding, hf_statistics, hf_text
from stitch_ray.engines.base import EngineError, Request, Sampling
from stitch_ray.records import Turn

pytestmark = pytest.mark.numeric

TEXTS = ["the cat sat on the mat", "a dog and the cat ran", "what is the sum of two and two", "name a colour: blue"]
PROMPTS = ["the cat", "what is the sum of two and two and the", "a", "name a colour: the dog and", "dog", "two and two"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
CONTEXT = 64
LIMITS = {"token_budget": 300, "max_context": CONTEXT}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    """No padding token, no first token, template without special tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[AddedToken("<|end|>")], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXTS, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", chat_template=TEMPLATE)
    assert made.pad_token is None
    return made


def make(shape, vocab_size):
    """Large weights, so that the distributions are far from flat and no two logits nearly tie."""
    torch.manual_seed(0)
    if shape == "llama":
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=0,
        )
        return LlamaForCausalLM(config).eval()
    config = GPT2Config(
        vocab_size=vocab_size,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, tokenizer):
    return make(request.param, len(tokenizer))


def ask(prompts, **sampling):
    sampling.setdefault("max_tokens", 12)
    return [Request(request_id=f"r{i}", prompt=p, sampling=Sampling(**sampling)) for i, p in enumerate(prompts)]


def naive_logprobs(model, ids):
    """Log-probabilities of the token behind every position, shape (tokens, vocabulary)."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


# Prompts


def test_turns_go_through_the_template_and_text_and_ids_do_not(tokenizer):
    turns = (Turn("user", "the cat"),)
    assert tokenizer.decode(hf_text.prompt_ids(tokenizer, turns)) == "[user] the cat\n[assistant] "
    assert tokenizer.decode(hf_text.prompt_ids(tokenizer, "the cat")) == "the cat"
    assert hf_text.prompt_ids(tokenizer, (5, 6)) == (5, 6)


def test_a_tokenizer_without_template_takes_no_turns(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>")
    with pytest.raises(ValueError, match="no chat template"):
        hf_text.prompt_ids(bare, (Turn("user", "the cat"),))


# Generating


def test_greedy_equals_model_generate_one_by_one(model, tokenizer):
    answers = hf_text.generate(model, tokenizer, ask(PROMPTS), **LIMITS)
    for prompt, (answer,) in zip(PROMPTS, answers, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        whole = model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0].tolist()
        new = whole[ids["input_ids"].shape[1] :]
        assert answer.token_ids == tuple(new[: new.index(0)] if 0 in new else new)
        assert answer.text == tokenizer.decode(new, skip_special_tokens=True)
        assert answer.finish_reason == ("stop" if 0 in new else "length")
        assert answer.prompt_tokens == ids["input_ids"].shape[1]
        assert answer.logprobs is None
        assert answer.entropies is None


def test_a_model_with_inputs_of_its_own_answers_the_same_through_its_generate(model, tokenizer, monkeypatch):
    requests = ask(PROMPTS, token_stats=True) + ask(PROMPTS, temperature=1.3, top_p=0.9, num_samples=2, seed=5)
    assert hf_decoding._has_common_inputs(model)
    plain = hf_text.generate(model, tokenizer, requests, **LIMITS)

    calls = []

    def prepare(self, input_ids, **kwargs):
        calls.append(1)
        return GenerationMixin.prepare_inputs_for_generation(self, input_ids, **kwargs)

    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", prepare)
    found = hf_text.generate(model, tokenizer, requests, **LIMITS)
    assert calls
    for some, others in zip(found, plain, strict=True):
        assert [(a.text, a.token_ids, a.finish_reason) for a in some] == [
            (a.text, a.token_ids, a.finish_reason) for a in others
        ]


@pytest.mark.parametrize("through_generate", [False, True])
def test_defaults_of_the_model_do_not_change_the_answer(model, tokenizer, through_generate, monkeypatch):
    monkeypatch.setattr(hf_decoding, "_has_common_inputs", lambda _: not through_generate)
    plain = hf_text.generate(model, tokenizer, ask(PROMPTS), **LIMITS)
    before = model.generation_config
    model.generation_config = type(before)(eos_token_id=0, repetition_penalty=5.0, do_sample=True, top_k=1)
    try:
        assert hf_text.generate(model, tokenizer, ask(PROMPTS), **LIMITS) == plain
        assert model.generation_config.repetition_penalty == 5.0
    finally:
        model.generation_config = before


def test_every_eos_id_of_the_model_ends_the_answer(model, tokenizer):
    (free,) = hf_text.generate(model, tokenizer, ask(["the cat"]), **LIMITS)[0]
    second = free.token_ids[next(i for i in range(1, 12) if free.token_ids[i] not in free.token_ids[:i])]
    before = model.generation_config
    model.generation_config = type(before)(eos_token_id=[0, second])
    try:
        (answer,) = hf_text.generate(model, tokenizer, ask(["the cat"], token_stats=True), **LIMITS)[0]
    finally:
        model.generation_config = before
    assert answer.finish_reason == "stop"
    assert answer.token_ids == free.token_ids[: free.token_ids.index(second)]
    assert len(answer.logprobs) == len(answer.token_ids)


def test_a_seeded_sample_is_the_same_alone_and_in_any_batch(model, tokenizer):
    settings = {"temperature": 1.3, "top_p": 0.9, "num_samples": 3, "token_stats": True}
    requests = [dataclasses.replace(r, sampling=Sampling(**settings, seed=i, max_tokens=12)) for i, r in
                enumerate(ask(PROMPTS))]  # fmt: skip
    alone = [hf_text.generate(model, tokenizer, [one], **LIMITS)[0] for one in requests]
    others = ask([*PROMPTS, "the mat"], temperature=0.8) + ask(PROMPTS)
    together = hf_text.generate(model, tokenizer, [*others, *requests], token_budget=10_000, max_context=CONTEXT)
    for first, second in zip(alone, together[len(others) :], strict=True):
        assert [a.token_ids for a in first] == [a.token_ids for a in second]
        assert [a.text for a in first] == [a.text for a in second]
        for a, b in zip(first, second, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        assert len({a.token_ids for a in first}) == 3


def test_seeds_differ_and_no_seed_draws_afresh(model, tokenizer):
    def texts(seed):
        requests = ask(["the cat"] * 2, temperature=2.0, seed=seed)
        return [answers[0].token_ids for answers in hf_text.generate(model, tokenizer, requests, **LIMITS)]

    assert texts(1) == texts(1)
    assert texts(1)[0] == texts(1)[1]
    assert texts(1) != texts(2)
    fresh = [*texts(None), *texts(None)]
    assert len(set(fresh)) == 4


def test_greedy_answers_are_repeated_num_samples_times(model, tokenizer):
    answers = hf_text.generate(model, tokenizer, ask(["the cat"], num_samples=3), **LIMITS)[0]
    assert len(answers) == 3
    assert len(set(answers)) == 1


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (1.5, 0.8)])
def test_samples_follow_the_warped_distribution(tokenizer, temperature, top_p):
    small, num_samples, prompt = make("llama", 12), 4000, (3, 7, 5)
    logits = naive_logprobs(small, prompt)[-1:] / temperature
    expected = (TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits).softmax(-1)[0].numpy()
    settings = Sampling(max_tokens=1, temperature=temperature, top_p=top_p, num_samples=num_samples, seed=11)
    request = Request(request_id="r", prompt=prompt, sampling=settings)
    answers = hf_text.generate(small, tokenizer, [request], token_budget=20_000, max_context=CONTEXT)[0]
    counts = Counter(answer.token_ids[0] if answer.token_ids else 0 for answer in answers)  # 0 is the eos
    observed = np.array([counts[token] for token in range(12)])
    assert observed[expected == 0].sum() == 0
    frequent = expected * num_samples >= 5
    assert frequent.sum() >= 4
    wanted = np.append(expected[frequent], expected[~frequent].sum() + 1e-12) * num_samples
    seen = np.append(observed[frequent], observed[~frequent].sum())
    # 31.3 is the 0.1 % quantile of chi-square with 11 degrees of freedom, the most there can be
    assert ((seen - wanted) ** 2 / np.maximum(wanted, 1)).sum() < 31.3


def speak_ascii(model, tokenizer):
    """The model with every token suppressed that is not printable ASCII; also counts its forwards."""
    plain = [ids for ids in range(1, len(tokenizer)) if tokenizer.decode([ids]).isascii()]
    head = torch.nn.Linear(32, len(tokenizer))
    head.weight = model.get_output_embeddings().weight
    with torch.no_grad():
        head.bias.fill_(-1e4)
        head.bias[[ids for ids in plain if tokenizer.decode([ids]).isprintable()]] = 0.0
    model.set_output_embeddings(head)
    forwards = []
    head.register_forward_hook(lambda *_: forwards.append(1))
    return forwards


@pytest.mark.parametrize(("shape", "begin"), [("llama", 3), ("llama", -9), ("gpt2", 0), ("gpt2", -9)])
def test_a_stop_string_is_cut_from_text_and_tokens_and_ends_the_decoding(tokenizer, shape, begin):
    model = make(shape, len(tokenizer))
    forwards = speak_ascii(model, tokenizer)
    settings = {"temperature": 2.0, "seed": 4, "max_tokens": 40}
    (free,) = hf_text.generate(model, tokenizer, ask(["the cat"], **settings), **LIMITS)[0]
    begin %= len(free.text)
    stop = free.text[begin : begin + 5]
    assert free.text.index(stop) == begin
    needed = next(n for n in range(41) if stop in tokenizer.decode(free.token_ids[:n]))
    forwards.clear()
    requests = ask(["the cat"], **settings, stop=("never", stop, stop[2:]), token_stats=True)
    (cut,) = hf_text.generate(model, tokenizer, requests, **LIMITS)[0]
    assert len(forwards) <= needed < 40
    assert cut.text == free.text[: free.text.index(stop[2:]) if stop[2:] in free.text[:begin] else begin]
    assert cut.finish_reason == "stop"
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    assert tokenizer.decode(cut.token_ids).startswith(cut.text)
    assert not cut.token_ids or len(tokenizer.decode(cut.token_ids[:-1])) < len(cut.text)
    assert len(cut.logprobs) == len(cut.entropies) == len(cut.token_ids)


def test_logprobs_and_entropies_are_those_of_a_full_forward(model, tokenizer):
    hot = ask(PROMPTS, temperature=1.7, top_p=0.5, seed=2, token_stats=True)
    answers = hf_text.generate(model, tokenizer, hot + ask(PROMPTS, token_stats=True), **LIMITS)
    for prompt, (answer,) in zip(PROMPTS * 2, answers, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        logprobs = naive_logprobs(model, [*ids, *answer.token_ids])[len(ids) - 1 : -1]
        wanted = logprobs.gather(-1, torch.tensor(answer.token_ids, dtype=torch.long)[:, None])[:, 0]
        np.testing.assert_allclose(answer.logprobs, wanted, atol=1e-4)
        np.testing.assert_allclose(answer.entropies, -(logprobs.exp() * logprobs).sum(-1), atol=1e-4)


def test_an_answer_ends_where_the_context_does(model, tokenizer):
    requests = [Request(request_id="r", prompt=(5,) * (CONTEXT - 3), sampling=Sampling(max_tokens=50))]
    (answer,) = hf_text.generate(model, tokenizer, requests, **LIMITS)[0]
    assert len(answer.token_ids) == 3
    assert answer.finish_reason == "length"


def test_a_bad_request_is_an_error_in_its_slot_and_leaves_the_others_alone(model, tokenizer):
    good = ask(PROMPTS[:2], temperature=1.0, seed=3)

    def bad(**changes):
        sampling = {name: changes.pop(name) for name in list(changes) if name not in ("prompt", "adapter")}
        return Request(**{"request_id": "bad", "prompt": "the", "sampling": Sampling(**sampling)} | changes)

    cases = {
        'Unsupported type "objekt"': bad(json_schema='{"type": "objekt"}'),
        "Expecting": bad(json_schema="{"),
        "has no adapters": bad(adapter="mine"),
        f"takes 1 to {CONTEXT - 1}": bad(prompt=(5,) * CONTEXT),
        "0 prompt tokens": bad(prompt=""),
        "not among": bad(prompt=(5, len(tokenizer))),
        "max_tokens 0": bad(max_tokens=0),
        "top_p 0": bad(top_p=0.0),
        "no tools": bad(prompt=(Turn("tool", "x"),)),
        "surrogates": bad(prompt="\ud800"),
    }
    answers = hf_text.generate(model, tokenizer, [good[0], *cases.values(), good[1]], **LIMITS)
    for reason, error in zip(cases, answers[1:-1], strict=True):
        assert isinstance(error, EngineError)
        assert reason in error.reason
        assert error.request_id == "bad"
    assert [answers[0], answers[-1]] == hf_text.generate(model, tokenizer, good, **LIMITS)
    assert hf_text.generate(model, tokenizer, [], **LIMITS) == []


def test_a_prompt_that_makes_the_model_compute_nan_fails_alone(tokenizer):
    broken = make("llama", len(tokenizer))
    with torch.no_grad():
        broken.get_input_embeddings().weight[9] = math.nan
    requests = ask([(5, 6, 7), (5, 9, 7), (8, 5)], temperature=1.0, top_p=0.5, seed=1)
    scored = [dataclasses.replace(one, continuation=(5, 6)) for one in requests]
    for answers in (
        hf_text.generate(broken, tokenizer, requests, **LIMITS),
        hf_statistics.loglikelihood(broken, tokenizer, scored, **LIMITS),
    ):
        assert [isinstance(answer, EngineError) for answer in answers] == [False, True, False]
        assert "NaN" in answers[1].reason


# Log-likelihood


def score(model, tokenizer, pairs, **limits):
    requests = [Request(request_id=f"r{i}", prompt=p, continuation=c) for i, (p, c) in enumerate(pairs)]
    return hf_statistics.loglikelihood(model, tokenizer, requests, **LIMITS | limits)


def test_loglikelihood_equals_a_full_forward_and_knows_the_greedy_continuation(model, tokenizer):
    pairs = [(p, c) for p in PROMPTS for c in (" and the dog", " cat")]
    greedy = [a[0].token_ids for a in hf_text.generate(model, tokenizer, ask(PROMPTS, max_tokens=4), **LIMITS)]
    pairs += [(tuple(tokenizer(p)["input_ids"]), ids) for p, ids in zip(PROMPTS, greedy, strict=True) if ids]
    pairs += [((Turn("user", "the cat"),), "sat on")]
    answers = score(model, tokenizer, pairs)
    for (prompt, continuation), (total, is_greedy) in zip(pairs, answers, strict=True):
        ids = list(hf_text.prompt_ids(tokenizer, prompt))
        new = tokenizer(continuation)["input_ids"] if isinstance(continuation, str) else continuation
        logprobs = naive_logprobs(model, [*ids, *new])[len(ids) - 1 : -1]
        wanted = logprobs.gather(-1, torch.tensor(new)[:, None]).sum().item()
        assert total == pytest.approx(wanted, abs=1e-4)
        assert is_greedy == (logprobs.argmax(-1).tolist() == list(new))
    assert any(greedy for _, greedy in answers)
    assert not all(greedy for _, greedy in answers)


def test_loglikelihood_does_not_depend_on_how_batches_are_cut(model, tokenizer, monkeypatch):
    pairs = [(p, c) for p in PROMPTS for c in (" and the dog ran on the mat", " cat")]
    together = score(model, tokenizer, pairs)
    alone = score(model, tokenizer, pairs, token_budget=1)
    monkeypatch.setattr(hf_statistics, "_MAX_LOGITS", 2 * len(tokenizer))
    monkeypatch.setattr(hf_statistics, "_LOG_SOFTMAX_ROWS", 3)
    narrow = score(model, tokenizer, pairs)
    for other in (alone, narrow):
        np.testing.assert_allclose([t for t, _ in other], [t for t, _ in together], atol=1e-4)


def test_text_is_tokenised_as_one_unless_a_token_spans_the_border(model, tokenizer):
    def ids(text):
        return tuple(tokenizer(text)["input_ids"])

    assert len(ids(" the")) == 1
    (split,) = score(model, tokenizer, [("a", " the")])
    (whole,) = score(model, tokenizer, [(ids("a"), ids("a the")[1:])])
    assert split == pytest.approx(whole)
    (spanning,) = score(model, tokenizer, [("a ", "the")])
    (apart,) = score(model, tokenizer, [(ids("a "), ids("the"))])
    assert ids("a the")[: len(ids("a "))] != ids("a ")
    assert spanning == pytest.approx(apart)


def test_a_bad_continuation_is_an_error_in_its_slot(model, tokenizer):
    pairs = [
        ("the", " cat"),
        ("the", ""),
        ("the", None),
        ("the", ()),
        ("", " cat"),
        ((5,) * 60, (5,) * 5),
        ("a", " dog"),
    ]
    answers = score(model, tokenizer, pairs)
    assert [isinstance(answer, EngineError) for answer in answers] == [False, True, True, True, True, True, False]
    assert "continuation" in answers[1].reason
    assert "exceed the context of 64" in answers[5].reason
    alone = score(model, tokenizer, [pairs[0], pairs[-1]])
    assert [answers[0][0], answers[-1][0]] == pytest.approx([total for total, _ in alone], abs=1e-4)


# Embeddings


def test_embeddings_are_unit_means_that_ignore_padding(model, tokenizer):
    together = hf_text.embed(model, tokenizer, PROMPTS, **LIMITS)
    assert together.dtype == np.float32
    assert together.shape == (len(PROMPTS), 32)
    for row, text in zip(together, PROMPTS, strict=True):
        with torch.inference_mode():
            hidden = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[-1]
        mean = hidden[0].mean(0)
        np.testing.assert_allclose(row, mean / mean.norm(), atol=1e-5)
    assert hf_text.embed(model, tokenizer, [], **LIMITS).shape == (0, 32)


def test_a_text_that_cannot_be_embedded_is_named(model, tokenizer):
    with pytest.raises(ValueError, match="text 1 is empty"):
        hf_text.embed(model, tokenizer, ["a", ""], **LIMITS)
    with pytest.raises(ValueError, match=r"text 0 has \d+ tokens; the model takes 64"):
        hf_text.embed(model, tokenizer, ["the cat " * 50], **LIMITS)
