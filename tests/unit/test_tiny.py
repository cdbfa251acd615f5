import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from stitch_ray.data.synthetic import instruction_corpus
from stitch_ray.errors import UserError
from stitch_ray.records import Example, Turn
from stitch_ray.training import tiny
from stitch_ray.training.tiny import choose_geometry, default_vocab_size, make_tiny_model, parse_parameters

pytestmark = pytest.mark.numeric

DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Größe 42?\n\nπ ≈ 3.14 🙂 日本"},
    {"role": "assistant", "content": "3"},
]


def examples():
    return [
        Example(
            messages=(Turn("user", row["instruction"]), Turn("assistant", row["output"])),
            context=row["input"] or None,
            source="synthetic",
            line=line,
            raw=json.dumps(row),
        )
        for line, row in enumerate(instruction_corpus(400), start=1)
    ]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """So small a model is no faster on two threads, and far slower when something else uses the second core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny") / "model"
    seen = []
    summary = make_tiny_model(
        examples(), out, parameters="300k", steps=30, max_length=256, progress=lambda *step: seen.append(step)
    )
    return out, summary, seen


@pytest.fixture(scope="module")
def tokenizer(made):
    return AutoTokenizer.from_pretrained(made[0])


@pytest.mark.parametrize("text", ["200k", "300k", "500k", "1m", "2m", "5m", "10m", "30m", "100m"])
def test_geometry_is_within_a_quarter_of_the_wanted_count(text):
    wanted = parse_parameters(text)
    for vocab_size in {512, default_vocab_size(wanted)}:
        geometry = choose_geometry(wanted, vocab_size)
        assert abs(geometry.num_parameters / wanted - 1) <= 0.25
        assert geometry.hidden_size % 64 == 0
        assert geometry.head_dim in (32, 64)
        assert geometry.num_heads * geometry.head_dim == geometry.hidden_size
        assert geometry.num_heads % geometry.num_key_value_heads == 0


def test_geometry_counts_what_transformers_builds(tokenizer):
    geometry = choose_geometry(5_000_000, 2048)
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny._llama_config(geometry, tokenizer, 1024))
    assert model.num_parameters() == geometry.num_parameters


def test_parameters_may_be_written_short():
    assert [parse_parameters(text) for text in ("500k", "5M", "0.1b", 1234)] == [500_000, 5_000_000, 100_000_000, 1234]
    with pytest.raises(UserError, match="5 apples"):
        parse_parameters("5 apples")
    with pytest.raises(UserError, match="choose between"):
        choose_geometry(10_000, 512)


@pytest.mark.parametrize("before", ["\n", "text\n", "<|assistant|>\n", "rating:\n\n", "", "a ", "4"])
def test_a_digit_is_the_same_single_token_everywhere(tokenizer, before):
    for digit in "123456789":
        ids = tokenizer(before + digit, add_special_tokens=False)["input_ids"]
        assert ids[-1] == tokenizer.convert_tokens_to_ids(digit)
        assert ids[:-1] == tokenizer(before, add_special_tokens=False)["input_ids"]


def test_unicode_text_survives_the_tokenizer(tokenizer):
    for text in ("Größe 42", " two  spaces\n\n\ttab ", "日本語 🙂 é", "don't , stop !"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_nothing_is_added_in_front(tokenizer):
    assert tokenizer("word")["input_ids"] == tokenizer("word", add_special_tokens=False)["input_ids"]
    assert tokenizer.model_max_length == 256


def test_generation_prompt_is_a_prefix_of_the_dialogue(tokenizer):
    whole = tokenizer.apply_chat_template(DIALOGUE, tokenize=False)
    prompt = tokenizer.apply_chat_template(DIALOGUE[:-1], tokenize=False, add_generation_prompt=True)
    assert whole == prompt + "3<|end|>\n"
    whole_ids, prompt_ids = tokenizer([whole, prompt], add_special_tokens=False)["input_ids"]
    assert whole_ids[: len(prompt_ids)] == prompt_ids
    with pytest.raises(Exception, match="unknown role"):
        tokenizer.apply_chat_template([{"role": "judge", "content": "x"}])


def test_training_lowers_the_loss_and_reports_it(made):
    _, summary, seen = made
    assert summary["last_loss"] < summary["first_loss"] - 1
    assert [step for step, _, _ in seen] == list(range(1, 31))
    assert seen[-1][2] == summary["last_loss"]
    assert abs(summary["parameters"] / 300_000 - 1) <= 0.25
    assert summary["tokens"] == 30 * 1024


def test_saved_folder_loads_and_generates(made, tokenizer):
    out, summary, _ = made
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.num_parameters() == summary["parameters"]
    assert model.config.vocab_size == len(tokenizer) == summary["vocab_size"]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    prompt = tokenizer.apply_chat_template(
        DIALOGUE[:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert answer.shape[1] > prompt["input_ids"].shape[1]
    assert "toy" in (out / "README.md").read_text()
    assert [path.name for path in out.parent.iterdir()] == ["model"]


def test_same_seed_gives_identical_weights(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(1)
        make_tiny_model(examples()[:100], tmp_path / name, parameters="200k", steps=5, seed=seed, max_length=128)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_a_taken_folder_is_refused_and_replaced_only_on_request(tmp_path):
    def make(**more):
        make_tiny_model(examples()[:20], tmp_path / "out", parameters="200k", steps=1, max_length=64, **more)

    make()
    with pytest.raises(UserError, match="not empty"):
        make()
    make(overwrite=True, seed=1)
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(UserError, match="something else"):
        make(overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failing_save_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "GenerationConfig", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_tiny_model(examples()[:20], tmp_path / "out", parameters="200k", steps=1, max_length=64)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path, monkeypatch):
    def break_weights(parameters, _):
        for parameter in parameters:
            parameter.data.fill_(float("nan"))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", break_weights)
    with pytest.raises(FloatingPointError, match="step 2 of 5"):
        make_tiny_model(examples()[:20], tmp_path / "out", parameters="200k", steps=5, max_length=64)
    assert list(tmp_path.iterdir()) == []


def test_data_without_examples_is_refused(tmp_path):
    with pytest.raises(UserError, match="no usable example"):
        make_tiny_model([], tmp_path / "out")
