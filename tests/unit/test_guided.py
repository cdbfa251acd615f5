import json
import sys

import jsonschema
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stitch_ray.engines import guided
from stitch_ray.engines.base import EngineError, Request, Sampling
from stitch_ray.engines.hf import HfEngine
from stitch_ray.errors import UserError
from tests.rounding import assert_same_greedy

pytestmark = pytest.mark.numeric

TURN = {
    "type": "object",
    "properties": {
        "agree": {"type": "boolean"},
        "answer": {"type": "string", "maxLength": 12},
        "score": {"enum": [1, 2, 30]},
        "reasons": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
    },
    "required": ["agree", "answer", "score"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def engine(tiny_model):
    return HfEngine(str(tiny_model), device="cpu")


def ask(schema, name="r", prompt="What is the sum of two and two?", **sampling):
    settings = {"max_tokens": 120, "temperature": 1.0, "seed": 1} | sampling
    written = schema if schema is None or isinstance(schema, str) else json.dumps(schema)
    return Request(request_id=name, prompt=prompt, sampling=Sampling(json_schema=written, **settings))


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_every_answer_is_json_of_the_schema_without_blanks(engine, temperature):
    requests = [
        ask(TURN, prompt=prompt, temperature=temperature, num_samples=8) for prompt in ("What is it?", "A", "{")
    ]
    for answers in engine.generate(requests):
        for answer in answers:
            value = json.loads(answer.text)
            jsonschema.validate(value, TURN)
            assert answer.finish_reason == "stop"
            assert list(value) == [key for key in TURN["properties"] if key in value]
            assert answer.text == json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def test_rows_without_schema_answer_as_alone_in_a_mixed_batch(engine):
    other = {"type": "array", "items": {"type": "integer", "maximum": 99, "minimum": 0}, "maxItems": 3}
    greedy = ask(None, temperature=0.0, max_tokens=8, token_stats=True)
    requests = [ask(None, seed=2, max_tokens=8), ask(TURN), greedy, ask(other)]
    alone = [engine.generate([request])[0] for request in requests]
    # one max_tokens, else rows with and without would not meet in a batch
    requests = [ask(None, seed=2, max_tokens=8), ask(TURN, max_tokens=8), greedy]
    together = engine.generate(requests)
    assert together[0] == alone[0]
    assert_same_greedy(together[2][0], alone[2][0])
    assert alone[1][0].text.startswith(together[1][0].text)
    jsonschema.validate(json.loads(alone[3][0].text), other)


def test_an_answer_that_does_not_fit_says_so_and_one_that_just_fits_ends(engine):
    whole = engine.generate([ask(TURN)])[0][0]
    just, short = engine.generate(
        [ask(TURN, max_tokens=len(whole.token_ids)), ask(TURN, max_tokens=len(whole.token_ids) - 1)]
    )
    assert (just[0].text, just[0].finish_reason) == (whole.text, "stop")
    assert short[0].finish_reason == "length"
    assert whole.text.startswith(short[0].text)


def test_no_forward_is_spent_on_an_end_that_is_certain(engine):
    forwards = []
    hook = engine._model.get_output_embeddings().register_forward_hook(lambda *_: forwards.append(1))
    (answer,) = engine.generate([ask(TURN)])[0]
    hook.remove()
    assert len(forwards) == len(answer.token_ids)


def test_statistics_are_those_among_the_allowed_tokens(engine):
    (answer,) = engine.generate([ask({"const": "x"}, token_stats=True)])[0]
    assert answer.text == '"x"'
    bare = {"enum": [True, False]}
    (truth,) = engine.generate([ask(bare, token_stats=True, temperature=0.0)])[0]
    assert truth.text in ("true", "false")
    for one in (answer, truth):
        assert len(one.logprobs) == len(one.entropies) == len(one.margins) == len(one.token_ids)
        assert all(value <= 1e-6 for value in one.logprobs)
        assert all(0 <= value < 3 for value in one.entropies)  # nats; the whole vocabulary has up to 6.9


def test_special_tokens_stay_out_of_strings(tiny_model):
    """Written out, they are letters that a string may hold; decoded, they would be gone."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["the"]})
    special, vocab_size = tokenizer.convert_tokens_to_ids("the"), model.config.vocab_size
    model.resize_token_embeddings(max(vocab_size, len(tokenizer)))
    guide = guided.Guide(tokenizer, model.config.vocab_size, frozenset({tokenizer.eos_token_id}), '{"type": "string"}')
    quote = tokenizer.convert_tokens_to_ids('"')
    guide.accept(quote)
    scores = torch.zeros(1, model.config.vocab_size)
    guided.mask_logits(scores, {0: guide})
    assert scores[0, special] == float("-inf")
    assert scores[0, tokenizer.convert_tokens_to_ids("t")] == 0
    assert scores[0, quote] == 0
    assert scores[0, tokenizer.eos_token_id] == float("-inf")


def test_a_schema_that_is_none_fails_its_request_only(engine):
    good = ask(TURN)
    outcomes = engine.generate([good, ask('{"type": "objekt"}', "a"), ask("{", "b"), ask("[]", "c")])
    assert outcomes[0] == engine.generate([good])[0]
    for outcome, name, reason in zip(outcomes[1:], "abc", ("objekt", "Expecting", "object or bool"), strict=True):
        assert isinstance(outcome, EngineError)
        assert (outcome.request_id, outcome.retryable) == (name, False)
        assert reason in outcome.reason
        assert ".cc" not in outcome.reason


def test_a_schema_is_compiled_once(engine, monkeypatch):
    engine.generate([ask(TURN)])
    compiler, _ = guided._compilers[engine._tokenizer][engine._model.config.vocab_size, frozenset({1})]
    before = compiler.get_cache_size_bytes()
    monkeypatch.setattr(guided, "_import_xgrammar", lambda: pytest.importorskip("xgrammar"))
    engine.generate([ask(TURN, num_samples=3)])
    assert compiler.get_cache_size_bytes() == before > 0


def test_without_xgrammar_the_package_is_named(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(UserError, match="pip install xgrammar"):
        engine.generate([ask(TURN)])
