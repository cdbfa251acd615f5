import json
import re
from collections.abc import Mapping

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, GPTNeoXConfig, LlamaConfig

from stitch_ray.config.finetune import AdapterConfig, BaseModelConfig
from stitch_ray.data.trained_on import read_trained_on
from stitch_ray.engines.fingerprint import model_fingerprint
from stitch_ray.errors import UserError
from stitch_ray.training import export
from stitch_ray.training.adapters import add_adapter, load_base
from stitch_ray.training.export import export_model, merge_adapter
from tests.rounding import assert_close

pytestmark = pytest.mark.numeric

IDS = torch.arange(3, 40)[None]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
FACTS = {"tasks": {"sums": {"objective": "sft", "template": "chat"}}, "card": {"steps": 3, "loss": 1.25}}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Lazy(Mapping):
    """Weights as a checkpoint gives them: made when they are asked for, float32."""

    def __init__(self, tensors):
        self.tensors = tensors

    def __getitem__(self, name):
        return self.tensors[name].detach().clone().float()

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


def trained(model):
    """A model a few steps later."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    model.train()
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def save_base(folder, model, tiny_model):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def full(base, out, model=None, **more):
    model = model or trained(AutoModelForCausalLM.from_pretrained(base))
    export_model(str(base), "full", None, Lazy(dict(model.named_parameters())), out, **FACTS | more)
    return model


def shapes(name):
    if name == "llama, tied":
        return transformers.LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True))
    if name == "gpt-neox":
        return transformers.GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL))
    mixture = {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    return transformers.DeepseekV3ForCausalLM(DeepseekV3Config(**SMALL, **mixture, **ranks, first_k_dense_replace=1))


# Full models


@pytest.mark.parametrize("shape", ["llama, tied", "gpt-neox", "a persistent buffer"])
def test_a_full_model_survives_with_its_names_ties_and_buffers(tiny_model, tmp_path, shape):
    torch.manual_seed(0)
    model = shapes(shape)
    buffers = [name for name, _ in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert bool(buffers) == (shape == "a persistent buffer")
    for name in buffers:
        torch.nn.init.normal_(model.get_buffer(name))
    base = save_base(tmp_path / "base", model, tiny_model)
    model = full(base, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert tied == (shape == "llama, tied")
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    assert_close(logits(loaded), logits(model))
    with (
        safe_open(tmp_path / "base" / "model.safetensors", "pt") as before,
        safe_open(tmp_path / "out" / "model.safetensors", "pt") as after,
    ):
        assert sorted(after.keys()) == sorted(before.keys())


def test_a_saved_model_generates_as_the_trained_one(tiny_model, tmp_path):
    model = full(tiny_model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    ask = {"input_ids": IDS, "max_new_tokens": 8, "do_sample": False}
    found, wanted = (one.generate(**ask, output_logits=True, return_dict_in_generate=True) for one in (loaded, model))
    for ours, theirs in zip(found.logits, wanted.logits, strict=False):
        assert_close(ours, theirs)
        if ours.argmax() != theirs.argmax():
            return  # a toss-up that rounding decides: from here on each reads its own token
    assert torch.equal(found.sequences, wanted.sequences)


def test_the_tokenizer_splits_as_before_and_has_the_template_of_the_training(tiny_model, tmp_path):
    full(tiny_model, tmp_path / "own")
    full(tiny_model, tmp_path / "given", chat_template=TEMPLATE)
    before, own, given = (AutoTokenizer.from_pretrained(p) for p in (tiny_model, tmp_path / "own", tmp_path / "given"))
    assert own.chat_template == before.chat_template
    assert given.chat_template == TEMPLATE
    assert own.backend_tokenizer.to_str() == before.backend_tokenizer.to_str()


def test_the_note_says_what_was_trained_on_what(tiny_model, tmp_path):
    full(tiny_model, tmp_path / "out", chat_template=TEMPLATE)
    assert json.loads((tmp_path / "out" / "stitch_ray.json").read_text()) == {
        "format": 1,
        "base": str(tiny_model),
        "base_fingerprint": model_fingerprint(str(tiny_model)),
        "method": "full",
        "tasks": FACTS["tasks"],
        "template": TEMPLATE,
        "trained": FACTS["card"],
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| loss | 1.25 |" in card
    assert "sums" in card


def test_the_number_format_is_the_one_asked_for(tiny_model, tmp_path):
    model = full(tiny_model, tmp_path / "out", dtype="bfloat16")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(p, model.get_parameter(name).bfloat16()) for name, p in loaded.named_parameters())


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_weights_of_another_model_are_refused(tiny_model, tmp_path, change):
    weights = dict(AutoModelForCausalLM.from_pretrained(tiny_model).named_parameters())
    name = "model.norm.weight"
    if change == "unknown":
        weights["model.norm.bias"] = weights[name]
    elif change == "missing":
        del weights[name]
    else:
        weights[name] = weights[name][:1]  # would be broadcast
    with pytest.raises(UserError, match=rf"not those of .*{re.escape('model.norm')}"):
        export_model(str(tiny_model), "full", None, weights, tmp_path / "out", **FACTS)
    assert list(tmp_path.iterdir()) == []


def test_a_generation_configuration_that_saving_refuses_is_kept(tiny_model, tmp_path):
    base = save_base(tmp_path / "base", AutoModelForCausalLM.from_pretrained(tiny_model), tiny_model)
    published = {"eos_token_id": [1, 2], "temperature": 0.6, "top_p": 0.9, "do_sample": False}
    (base / "generation_config.json").write_text(json.dumps(published))
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "plain")
    full(base, tmp_path / "out", model)
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert published | kept == kept


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_export_leaves_nothing_and_what_was_there(tiny_model, tmp_path, monkeypatch, error, there):
    out = tmp_path / "out"
    if there:
        full(tiny_model, out)
    before = {file.name: file.read_bytes() for file in out.glob("*")}

    def stop(*_):
        raise error

    monkeypatch.setattr(export, "write_json", stop)
    with pytest.raises(error):
        full(tiny_model, out)
    assert {file.name: file.read_bytes() for file in out.glob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * there


def test_a_folder_that_cannot_be_put_in_place_leaves_what_was_there(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(FileNotFoundError), export.new_folder(out) as folder:
        folder.rmdir()  # the second of the two renames fails
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


def test_a_finished_export_replaces_an_earlier_one(tiny_model, tmp_path):
    full(tiny_model, tmp_path / "out")
    (tmp_path / "out" / "old").touch()
    full(tiny_model, tmp_path / "out")
    assert not (tmp_path / "out" / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_questions_learned_from_are_noted_with_those_of_the_base(tiny_model, tmp_path):
    full(tiny_model, tmp_path / "first", trained_on=["b", "a", "b"])
    assert read_trained_on(tmp_path / "first") == {"a", "b"}
    full(tmp_path / "first", tmp_path / "second", trained_on=["c"])
    assert read_trained_on(tmp_path / "second") == {"a", "b", "c"}
    lora(tmp_path / "first", tmp_path / "adapter", trained_on=["d"])
    assert read_trained_on(tmp_path / "adapter") == {"a", "b", "d"}
    merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
    assert read_trained_on(tmp_path / "merged") == {"a", "b", "d"}
    assert read_trained_on(tiny_model) == frozenset()


# Adapters


def lora(tiny_model, out, targets="all-linear", **more):
    adapter = AdapterConfig(rank=4, alpha=8, targets=targets)
    model = trained(add_adapter(load_base(BaseModelConfig(path=str(tiny_model)), "lora", "cpu"), adapter, seed=0))
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    export_model(str(tiny_model), "lora", adapter, Lazy(weights), out, **FACTS | more)
    return model


def test_an_adapter_loads_with_peft_and_answers_as_trained(tiny_model, tmp_path):
    model = lora(tiny_model, tmp_path / "out", chat_template=TEMPLATE)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "out")
    assert_close(logits(loaded), logits(model))
    assert not torch.allclose(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(tiny_model)), atol=1e-2)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATE
    assert json.loads((tmp_path / "out" / "stitch_ray.json").read_text())["method"] == "lora"
    assert "stitch-ray merge" in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_adapter_names_its_base_and_layers_in_a_fixed_order(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_model.parent)
    lora(tiny_model.name, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model)
    assert config["target_modules"] == sorted(config["target_modules"])
    assert {name.rpartition(".")[2] for name in config["target_modules"]} >= {"q_proj", "down_proj"}
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 8, "CAUSAL_LM")
    assert config["inference_mode"] is True


def test_weights_of_another_adapter_are_refused(tiny_model, tmp_path):
    model = add_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), AdapterConfig(rank=2), seed=0)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def give(adapter):
        export_model(str(tiny_model), "lora", adapter, weights, tmp_path / "out", **FACTS)

    with pytest.raises(UserError, match=r"unknown, such as .*down_proj"):
        give(AdapterConfig(rank=2, targets=["q_proj"]))
    weights.pop(next(iter(weights)))
    with pytest.raises(UserError, match="missing, such as base_model"):
        give(AdapterConfig(rank=2))
    assert list(tmp_path.iterdir()) == []
