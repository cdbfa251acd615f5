import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from stitch_ray.config.finetune import AdapterConfig
from stitch_ray.engines.base import EngineError, RatingBatch, Request, Sampling
from stitch_ray.engines.hf import HfEngine
from stitch_ray.errors import UserError
from stitch_ray.records import Turn
from stitch_ray.training.adapters import add_adapter
from stitch_ray.training.export import export_model, merge_adapter
from tests.rounding import assert_same_greedy

pytestmark = pytest.mark.numeric

TEXT = "What is the sum of two and two?"
BATCH = RatingBatch(
    heads=((5, 6, 7), (8, 9)), bodies=((10, 11, 12), (13, 14), (20,)), tails=((15,),), rating_ids=(30, 31, 32)
)
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


LEARNED = {"blue": " blue sky", "red": " red sun"}
ROUNDING = 1e-3  # of a logit, which is 20 at most here


def make_adapter(base, out, answer, targets="all-linear", steps=40, **more):
    """An adapter that was trained to answer `TEXT` with `answer`, until it knows both by heart if `steps` allow it."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(TEXT + answer, return_tensors="pt")["input_ids"]
    config = AdapterConfig(rank=4, alpha=16, dropout=0.5, targets=targets)
    model = add_adapter(AutoModelForCausalLM.from_pretrained(base), config, seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-3)
    model.eval()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        if loss < 0.03:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    export_model(str(base), "lora", config, weights, out, tasks={}, card={}, **more)
    return str(out)


@pytest.fixture(scope="module")
def tiny_model(tiny_model, tmp_path_factory):
    """The tiny model with logits ten times as far apart: as it is, all words are alike to it whatever an adapter learns."""
    folder = tmp_path_factory.mktemp("sharp") / "model"
    shutil.copytree(tiny_model, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 10
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tiny_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {
        "blue": make_adapter(tiny_model, root / "blue", LEARNED["blue"], steps=500),
        "red": make_adapter(tiny_model, root / "red", LEARNED["red"], ["q_proj", "down_proj"], steps=500),
    }


@pytest.fixture(scope="module")
def merged(adapters, tmp_path_factory):
    """Every adapter as a model folder of its own: what the engine must answer."""
    root = tmp_path_factory.mktemp("merged")
    for name, path in adapters.items():
        merge_adapter(path, root / name)
    return {name: str(root / name) for name in adapters}


@pytest.fixture(scope="module")
def engine(tiny_model, adapters):
    return HfEngine(str(tiny_model), adapters=adapters, device="cpu")


def ask(*names, **more):
    sampling = Sampling(max_tokens=8, token_stats=True)
    return [
        Request(request_id=f"r{i}", prompt=TEXT, adapter=name, sampling=sampling, **more)
        for i, name in enumerate(names)
    ]


def plain(path):
    return HfEngine(str(path), device="cpu")


def test_adapters_on_one_base_answer_each_for_itself_in_one_call(engine, tiny_model, merged):
    names = ("red", None, "blue", "red", None)
    answers = engine.generate(ask(*names))
    alone = {name: plain(path).generate(ask(None))[0] for name, path in {**merged, None: tiny_model}.items()}
    for name, (found,) in zip(names, answers, strict=True):
        assert_same_greedy(found, alone[name][0], ROUNDING)
    assert [alone[name][0].text.startswith(text) for name, text in LEARNED.items()] == [True, True]
    assert not any(alone[None][0].text.startswith(text) for text in LEARNED.values())


def test_log_likelihoods_are_those_of_the_adapter(engine, tiny_model, merged):
    names = (None, "blue", "red", None, "blue")
    found = engine.loglikelihood(ask(*names, continuation=" blue sky"))
    alone = {
        name: plain(path).loglikelihood(ask(None, continuation=" blue sky"))[0]
        for name, path in {**merged, None: tiny_model}.items()
    }
    assert [greedy for _, greedy in found] == [alone[name][1] for name in names]
    np.testing.assert_allclose([total for total, _ in found], [alone[name][0] for name in names], atol=5 * ROUNDING)
    assert alone["blue"][0] > max(alone["red"][0], alone[None][0]) + 1


def test_an_unknown_adapter_fails_alone_and_names_the_known_ones(engine):
    for answers in (
        engine.generate(ask("green", "blue")),
        engine.loglikelihood(ask("green", "blue", continuation=" x")),
    ):
        assert isinstance(answers[0], EngineError)
        assert (answers[0].request_id, str(answers[0])) == ("r0", "r0: no adapter 'green'; known: blue, red")
        assert not isinstance(answers[1], EngineError)


def test_a_failed_request_keeps_its_place_among_adapters(engine):
    requests = [*ask("blue"), Request(request_id="bad", prompt="", adapter="red"), *ask(None)]
    answers = engine.generate(requests)
    assert [isinstance(answer, EngineError) for answer in answers] == [False, True, False]
    assert answers[1].request_id == "bad"
    assert answers[0] == engine.generate(ask("blue"))[0]


def test_an_engine_without_adapters_refuses_one(tiny_model):
    assert "has no adapters" in str(plain(tiny_model).generate(ask("blue"))[0])


def test_ratings_and_embeddings_are_those_of_the_base(engine, tiny_model):
    engine.generate(ask("blue"))
    base = plain(tiny_model)
    rated = engine.rate(BATCH)
    np.testing.assert_allclose(rated, base.rate(BATCH), atol=ROUNDING)
    assert engine.rating_path == base.rating_path == "documents"
    np.testing.assert_allclose(engine.embed([TEXT]), base.embed([TEXT]), atol=1e-5)
    engine.generate(ask("red"))
    np.testing.assert_array_equal(engine.rate(BATCH), rated)  # the same weights in the same batch


def test_info_names_the_adapters_and_depends_on_their_weights(engine, tiny_model, adapters):
    base = plain(tiny_model).info
    assert (base.adapters, engine.info.adapters) == ((), ("blue", "red"))
    assert engine.info.num_parameters == base.num_parameters
    fingerprints = {base.fingerprint, engine.info.fingerprint}
    for some in ({"blue": adapters["red"]}, {"red": adapters["red"]}):
        fingerprints.add(HfEngine(str(tiny_model), adapters=some, device="cpu").info.fingerprint)
    assert len(fingerprints) == 4


# Adapters that come and go


def test_adapters_come_and_go_and_leave_the_base_as_it_was(tiny_model, adapters, merged):
    engine = plain(tiny_model)
    before, info, rating = engine.generate(ask(None)), engine.info, engine.rate(BATCH)
    for _ in range(2):
        engine.load_adapter("blue", adapters["blue"])
        assert engine.info.adapters == ("blue",)
        blue, base = engine.generate(ask("blue", None))
        assert_same_greedy(blue[0], plain(merged["blue"]).generate(ask(None))[0][0], ROUNDING)
        assert [base] == before
        engine.load_adapter("red", adapters["red"])
        assert engine.info == dataclasses.replace(info, adapters=("blue", "red"))
        engine.unload_adapter("blue")
        gone, red, base = engine.generate(ask("blue", "red", None))
        assert str(gone) == "r0: no adapter 'blue'; known: red"
        assert_same_greedy(red[0], plain(merged["red"]).generate(ask(None))[0][0], ROUNDING)
        assert [base] == before
        np.testing.assert_array_equal(engine.rate(BATCH), rating)
        engine.unload_adapter("red")
        assert engine.info == info
        assert engine.generate(ask(None)) == before
        assert not [name for name, _ in engine._model.named_modules() if "lora" in name]


def test_an_adapter_that_does_not_fit_leaves_a_running_engine_as_it_was(tiny_model, adapters, damaged):
    engine = plain(tiny_model)
    before = engine.generate(ask(None))
    embeddings = AutoModelForCausalLM.from_pretrained(tiny_model).get_input_embeddings().weight.detach() + 1
    broken = damaged(lambda weights: weights.update({"base_model.model.model.embed_tokens.weight": embeddings.clone()}))
    for names in ((), ("blue",)):
        with pytest.raises(UserError, match="does not fit"):
            engine.load_adapter("mine", broken["mine"])
        assert engine.info.adapters == names
        assert engine.generate(ask(None)) == before
        if not names:
            engine.load_adapter("blue", adapters["blue"])


def test_loading_twice_and_unloading_what_is_not_there_are_refused(engine, adapters):
    with pytest.raises(UserError, match="'blue' is loaded already"):
        engine.load_adapter("blue", adapters["blue"])
    with pytest.raises(UserError, match="no 'green' to unload; loaded: blue, red"):
        engine.unload_adapter("green")
    with pytest.raises(UserError, match="is an adapter itself"):
        plain(adapters["blue"]).load_adapter("red", adapters["red"])


# An adapter as the model


def test_an_adapter_folder_is_a_model_of_its_own(adapters, merged, tiny_model):
    own, one = plain(adapters["blue"]), plain(merged["blue"])
    assert_same_greedy(own.generate(ask(None))[0][0], one.generate(ask(None))[0][0], ROUNDING)
    np.testing.assert_allclose(own.rate(BATCH), one.rate(BATCH), atol=ROUNDING)
    assert own.rating_path == "documents"
    np.testing.assert_allclose(own.embed([TEXT]), one.embed([TEXT]), atol=1e-5)
    assert own.info.adapters == ()
    assert own.info.num_parameters == one.info.num_parameters
    assert own.info.fingerprint != plain(tiny_model).info.fingerprint
    assert "has no adapters" in str(own.generate(ask("blue"))[0])


def test_an_adapter_answers_through_the_template_of_its_training(tiny_model, tmp_path):
    path = make_adapter(tiny_model, tmp_path / "own", " blue", chat_template=TEMPLATE)
    request = Request(request_id="r", prompt=(Turn("user", TEXT),), sampling=Sampling(max_tokens=1))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    expected = len(tokenizer(f"<user>{TEXT}", add_special_tokens=False)["input_ids"])
    assert plain(path).generate([request])[0][0].prompt_tokens == expected


def test_an_adapter_cannot_carry_adapters(adapters):
    with pytest.raises(UserError, match="is an adapter itself"):
        HfEngine(adapters["blue"], adapters={"red": adapters["red"]}, device="cpu")


def test_a_missing_base_is_named(adapters, tmp_path):
    path = tmp_path / "moved"
    shutil.copytree(adapters["blue"], path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere/base"}))
    with pytest.raises(UserError, match=r"/nowhere/base.*correct base_model_name_or_path"):
        plain(path)


# Adapters that do not fit


@pytest.fixture
def damaged(adapters, tmp_path):
    """A copy of an adapter without its note, as other tools write it, and a way to change its weights."""
    path = tmp_path / "damaged"
    shutil.copytree(adapters["red"], path)
    (path / "stitch_ray.json").unlink()

    def change(edit):
        weights = load_file(path / "adapter_model.safetensors")
        edit(weights)
        save_file(weights, path / "adapter_model.safetensors")
        return {"mine": str(path)}

    return change


def test_an_adapter_of_another_base_is_refused(other_tiny_model, adapters, damaged):
    with pytest.raises(UserError, match="trained on a base model with fingerprint"):
        HfEngine(str(other_tiny_model), adapters=adapters, device="cpu")
    with pytest.raises(UserError, match="does not fit"):
        HfEngine(str(other_tiny_model), adapters=damaged(lambda weights: None), device="cpu")


@pytest.mark.parametrize("second", [False, True])
def test_missing_and_additional_weights_are_refused(tiny_model, adapters, damaged, second):
    first = {"blue": adapters["blue"]} if second else {}

    def load(edit):
        HfEngine(str(tiny_model), adapters=first | damaged(edit), device="cpu")

    load(lambda weights: None)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    with pytest.raises(UserError, match=r"too many or missing.*lora_X"):
        load(lambda weights: weights.update({name.replace("lora_A", "lora_X"): weights[name].clone()}))
    with pytest.raises(UserError, match="too many or missing"):
        load(lambda weights: weights.pop(name))


def test_an_adapter_that_replaces_weights_of_the_base_is_refused(tiny_model, damaged):
    """PEFT would write its embeddings over those that all other adapters use."""
    embeddings = AutoModelForCausalLM.from_pretrained(tiny_model).get_input_embeddings().weight.detach() + 1
    broken = damaged(lambda weights: weights.update({"base_model.model.model.embed_tokens.weight": embeddings.clone()}))
    with pytest.raises(UserError, match=r"too many or missing.*embed_tokens"):
        HfEngine(str(tiny_model), adapters=broken, device="cpu")


def test_what_is_no_adapter_is_refused(tiny_model, adapters):
    with pytest.raises(UserError, match="no adapter in this folder"):
        HfEngine(str(tiny_model), adapters={"mine": str(tiny_model)}, device="cpu")
    with pytest.raises(UserError, match="letters, digits"):
        HfEngine(str(tiny_model), adapters={"a.b": adapters["red"]}, device="cpu")
