import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from stitch_ray.config.finetune import AdapterConfig, BaseModelConfig
from stitch_ray.errors import UserError
from stitch_ray.training import adapters
from stitch_ray.training.adapters import adapter_weights, add_adapter, check_qlora, load_base
from stitch_ray.training.export import export_model

pytestmark = pytest.mark.numeric

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def lora(**more):
    return AdapterConfig(**{"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]} | more)


def base(tiny_model, **more):
    return load_base(BaseModelConfig(path=str(tiny_model), **more), "lora", "cpu")


def adapted(tiny_model, seed=0, **more):
    return add_adapter(base(tiny_model), lora(**more), seed=seed)


def train(model, steps=3, learning_rate=1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], learning_rate)
    model.train()
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    """Folder of a trained adapter, and the weights in it."""
    model = train(adapted(tiny_model))
    out = tmp_path_factory.mktemp("adapter") / "model"
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    export_model(str(tiny_model), "lora", lora(), trained, out, tasks={}, card={})
    return out, trained


def test_the_base_is_loaded_as_float32_even_from_bfloat16(tiny_model, tmp_path):
    LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = load_base(BaseModelConfig(path=str(tmp_path), dtype="bfloat16"), "full", "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_missing_base_names_the_key(tmp_path):
    with pytest.raises(UserError, match=r"model\.path.*nothing"):
        load_base(BaseModelConfig(path=str(tmp_path / "nothing")), "full", "cpu")


def test_only_the_adapter_is_trained(tiny_model):
    model = adapted(tiny_model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".lora_" in name}
    assert all(("q_proj" in name) or ("v_proj" in name) for name in changed)


def test_a_new_adapter_changes_nothing_yet(tiny_model):
    with torch.inference_mode():
        assert torch.equal(adapted(tiny_model).eval()(IDS).logits, base(tiny_model).eval()(IDS).logits)


def test_new_weights_depend_on_the_seed_and_on_nothing_else(tiny_model):
    first = adapter_weights(adapted(tiny_model))
    torch.rand(3)
    state = torch.random.get_rng_state()
    again, other = adapter_weights(adapted(tiny_model)), adapter_weights(adapted(tiny_model, seed=1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_update_is_scaled_by_alpha_over_rank_or_its_root(tiny_model, rslora):
    model = adapted(tiny_model, rslora=rslora)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    torch.nn.init.ones_(layer.lora_B["default"].weight)
    x = torch.ones(1, layer.in_features)
    update = layer(x) - layer.base_layer(x)
    expected = layer.lora_B["default"](layer.lora_A["default"](x)) * (8 / 2 if rslora else 8 / 4)
    torch.testing.assert_close(update, expected)


def test_dropout_is_that_of_the_configuration(tiny_model):
    layer = adapted(tiny_model, dropout=0.25).base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_dropout["default"].p == 0.25


def test_all_linear_leaves_the_output_head_alone(tiny_model):
    names = {
        name.split(".lora_")[0].rpartition(".")[2]
        for name in adapter_weights(adapted(tiny_model, targets="all-linear"))
    }
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_one_name_is_a_name_and_no_regular_expression(tiny_model):
    names = adapter_weights(adapted(tiny_model, targets="q_proj"))
    assert names
    assert all("q_proj" in name for name in names)
    with pytest.raises(UserError, match="matches no linear layer"):
        adapted(tiny_model, targets=".*q_proj")


@pytest.mark.parametrize("targets", [["nope"], ["q_proj", "nope"], ["self_attn"], []])
def test_targets_that_match_nothing_list_the_layers_there_are(tiny_model, targets):
    with pytest.raises(UserError, match=r"adapter\.targets.*down_proj.*q_proj.*all-linear"):
        adapted(tiny_model, targets=targets)


def test_the_head_of_a_tied_model_is_refused():
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    with pytest.raises(UserError, match="lm_head shares"):
        add_adapter(LlamaForCausalLM(config), lora(targets=["lm_head"]), seed=0)


@pytest.mark.filterwarnings("error")
def test_transposed_layers_are_adapted(tiny_model):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=64))
    adapted_model = add_adapter(model, lora(targets="all-linear"), seed=0)
    train(adapted_model, steps=1)
    assert any("c_attn" in name for name in adapter_weights(adapted_model))


def test_gradients_reach_every_adapter_through_checkpointed_layers(tiny_model):
    def gradients(**more):
        model = add_adapter(base(tiny_model, **more), lora(), seed=0).train()
        assert model.base_model.model.is_gradient_checkpointing == bool(more)
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad for name, p in adapter_weights(model).items()}

    plain, checkpointed = gradients(), gradients(gradient_checkpointing=True)
    assert all(gradient is not None for gradient in checkpointed.values())
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-7) for name in plain)


# Going on with an adapter


def test_training_goes_on_from_a_saved_adapter(tiny_model, saved):
    out, trained = saved
    model = adapted(tiny_model, start_from=str(out), dropout=0.1)
    own = dict(model.named_parameters())
    assert {name for name, p in own.items() if p.requires_grad} == set(trained)
    assert all(torch.equal(own[name], weight) for name, weight in trained.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 8}, r"adapter\.rank is 8, and 4 in .*set adapter\.rank: 4"),
        ({"alpha": 16}, r"adapter\.alpha is 16"),
        ({"rslora": True}, r"adapter\.rslora is True"),
        ({"targets": ["q_proj", "k_proj"]}, r"only here k_proj; only there v_proj"),
    ],
)
def test_a_saved_adapter_of_another_kind_is_refused(tiny_model, saved, change, message):
    with pytest.raises(UserError, match=message):
        adapted(tiny_model, start_from=str(saved[0]), **change)


def test_a_saved_adapter_of_another_base_is_refused(tiny_model, other_tiny_model, saved, tmp_path):
    with pytest.raises(UserError, match="trained on a base model with fingerprint"):
        add_adapter(base(other_tiny_model), lora(start_from=str(saved[0])), seed=0)
    foreign = tmp_path / "foreign"  # as other tools write it
    shutil.copytree(saved[0], foreign)
    (foreign / "stitch_ray.json").unlink()
    weights = load_file(foreign / "adapter_model.safetensors")
    save_file({name: w[..., :-1].contiguous() for name, w in weights.items()}, foreign / "adapter_model.safetensors")
    with pytest.raises(UserError, match="does not fit the model"):
        adapted(tiny_model, start_from=str(foreign))


def test_start_from_needs_an_adapter(tiny_model, saved, tmp_path):
    with pytest.raises(UserError, match="no adapter in this folder"):
        adapted(tiny_model, start_from=str(tiny_model))
    with pytest.raises(UserError, match="no such model folder"):
        adapted(tiny_model, start_from=str(tmp_path / "nothing"))
    other = tmp_path / "ia3"
    shutil.copytree(saved[0], other)
    config = {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}
    (other / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="only LoRA"):
        adapted(tiny_model, start_from=str(other))


# QLoRA


def test_qlora_says_what_it_needs(monkeypatch):
    with pytest.raises(UserError, match="needs a GPU"):
        check_qlora(0)
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        check_qlora(1)
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda _name: object())
    check_qlora(0.5)


def test_qlora_asks_for_double_quantised_normal_float(tiny_model, monkeypatch):
    asked = {}
    monkeypatch.setattr(adapters, "check_qlora", lambda _num_gpus: None)
    monkeypatch.setattr(adapters, "load_model", lambda path, dtype, **options: asked.update(options, dtype=dtype))
    load_base(BaseModelConfig(path=str(tiny_model), dtype="bfloat16"), "qlora", "cuda:0")
    quantisation = asked["quantization_config"]
    assert (quantisation.load_in_4bit, quantisation.bnb_4bit_quant_type) == (True, "nf4")
    assert (quantisation.bnb_4bit_use_double_quant, quantisation.bnb_4bit_compute_dtype) == (True, torch.bfloat16)
    assert (asked["dtype"], asked["device_map"]) == ("bfloat16", {"": "cuda:0"})
