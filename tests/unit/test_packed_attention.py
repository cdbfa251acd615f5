"""Documents of a packed row do not see each other, and a packed row trains like its documents one by one."""

import functools

import pytest
import torch
import transformers
from torch.nn import functional as F

from stitch_ray.engines.documents import UnsupportedAttentionError
from stitch_ray.engines.hf import attend_as_defined
from stitch_ray.training import attention

pytestmark = pytest.mark.numeric

VOCAB, WINDOW = 61, 6
LENGTHS = (11, 1, 7, 7, 14)

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GQA = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "llama": (transformers.LlamaConfig, GQA),
    "qwen2": (transformers.Qwen2Config, SIZES | {"num_key_value_heads": 2}),
    "qwen3": (transformers.Qwen3Config, GQA),
    "mistral_window": (transformers.MistralConfig, GQA | {"sliding_window": WINDOW}),
    "gemma2": (
        transformers.Gemma2Config,
        GQA | {"sliding_window": WINDOW, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 12},
    ),
    "gpt_neox": (transformers.GPTNeoXConfig, SIZES | {"rotary_pct": 0.5}),
    "mixtral": (transformers.MixtralConfig, GQA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (
        transformers.GptOssConfig,
        GQA
        | {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
}
EXPERTS = ("mixtral", "gpt_oss")
DENSE = [family for family in FAMILIES if family not in EXPERTS]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def pristine(family):
    """Weights so large that attention, windows and caps change the logits far beyond rounding."""
    config_type, arguments = FAMILIES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_type(**arguments))
    attend_as_defined(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                scale = 0.5 if "embed" in name else 1.5 * parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape) * scale)
            elif "sinks" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.5)
    return model


@pytest.fixture
def make():
    """A model of a family, as it was made, with this attention if `packed`."""

    def made(family, packed=True):
        attention.register()
        source = pristine(family)
        model = type(source)(source.config)
        model.load_state_dict(source.state_dict())
        model.set_attn_implementation(attention.IMPLEMENTATION if packed else "eager")
        return model

    before = {family: pristine(family).config._attn_implementation for family in FAMILIES}
    yield made
    for family, implementation in before.items():
        pristine(family).set_attn_implementation(implementation)


def documents(seed=0, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator) for n in lengths]


def row(parts):
    lengths = [len(part) for part in parts]
    return {
        "input_ids": torch.cat(parts)[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        **attention.packed_arguments(lengths, "cpu"),
    }


def summed_loss(logits, parts):
    """Next-token losses of all documents; logits: (tokens, vocabulary) of the joined documents."""
    total = logits.new_zeros(())
    for z, ids in zip(logits.split([len(part) for part in parts]), parts, strict=True):
        total = total + F.cross_entropy(z[:-1], ids[1:], reduction="sum")
    return total


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", DENSE)
def test_a_token_changes_no_bit_of_another_document(make, family, training):
    """With use_cache at the model's default, which is on: decision "Packing"."""
    model = make(family).train(training)
    assert model.config.use_cache
    parts = documents()
    changed = [part.clone() for part in parts]
    changed[2][3] = 3 + (changed[2][3] + 20) % (VOCAB - 3)
    with torch.no_grad():
        before = model(**row(parts)).logits[0].split(LENGTHS)
        after = model(**row(changed)).logits[0].split(LENGTHS)
    for k in (0, 1, 3, 4):
        assert torch.equal(before[k], after[k])
    assert torch.equal(before[2][:3], after[2][:3])
    assert (before[2][3:] - after[2][3:]).abs().max() > 1e-2


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["stored", "recomputed", "reentrant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_documents_alone(make, family, checkpointing):
    parts = documents()
    alone = make(family, packed=False).train()
    expected = sum(summed_loss(alone(input_ids=part[None]).logits[0], [part]) for part in parts)
    expected.backward()
    model = make(family).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()  # what a reentrant checkpoint needs
    loss = summed_loss(model(**row(parts)).logits[0], parts)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    wanted = gradients(alone)
    assert wanted.keys() == gradients(model).keys()
    for name, gradient in gradients(model).items():
        scale = wanted[name].abs().max()
        torch.testing.assert_close(gradient / scale, wanted[name] / scale, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", DENSE)
def test_logits_only_where_they_are_kept(make, family):
    model, parts = make(family).eval(), documents()
    positions = torch.tensor([0, 11, 15, 25, 38])
    with torch.no_grad():
        kept = model(**row(parts), logits_to_keep=positions).logits
        torch.testing.assert_close(kept, model(**row(parts)).logits[:, positions], rtol=0, atol=1e-5)


def test_positions_alone_leak_without_an_error():
    """The trap this module exists for: same row, transformers' own attention, default use_cache."""
    model, parts = pristine("llama").eval(), documents()
    model.set_attn_implementation("sdpa")
    arguments = {name: value for name, value in row(parts).items() if not name.startswith("document")}
    with torch.no_grad():
        leaking = model(**arguments).logits[0]
        apart = model(**arguments, use_cache=False).logits[0]
        alone = torch.cat([model(input_ids=part[None]).logits[0] for part in parts])
    assert (leaking - alone).abs().max() > 0.5
    torch.testing.assert_close(apart, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", DENSE)
def test_check_finds_nothing_and_leaves_no_trace(make, family):
    model = make(family, packed=False).train()
    state = torch.random.get_rng_state()
    assert attention.check_isolation(model) is None
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert model.config._attn_implementation == "eager"
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", EXPERTS)
def test_check_passes_mixtures_of_experts(make, family):
    assert attention.check_isolation(make(family, packed=False)) is None


def test_check_passes_a_document_that_moves_by_rounding_only(make, monkeypatch):
    """Experts get batches of other sizes, and their rounding with it; here made certain."""
    model = make("llama", packed=False)
    head = model.get_output_embeddings()
    monkeypatch.setattr(head, "forward", lambda x: F.linear(x, head.weight) + x.detach()[:, :13].mean() * 1e-4)
    assert attention.check_isolation(model) is None
    monkeypatch.setattr(head, "forward", lambda x: F.linear(x, head.weight) + x[:, :13].mean() * 1e-4)
    assert "change with the document before" in attention.check_isolation(model)


@pytest.mark.parametrize(
    ("config_type", "arguments", "reason"),
    [
        (
            transformers.BloomConfig,
            {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": VOCAB},
            "AttentionInterface",
        ),
        (transformers.Lfm2Config, GQA | {"layer_types": ["conv", "full_attention"]}, "conv"),
        (transformers.LlamaConfig, GQA | {"attention_dropout": 0.1}, "attention dropout"),
    ],
)
def test_check_says_why_a_model_cannot_be_packed(config_type, arguments, reason):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_type(**arguments)).eval()
    implementation = model.config._attn_implementation
    assert reason in attention.check_isolation(model)
    assert not model.training
    assert model.config._attn_implementation == implementation


def test_check_finds_a_leak(make, monkeypatch):
    """An attention that takes the row for one document."""

    def leaks(module, query, key, value, mask, scaling=None, sliding_window=None, **_):
        seen = attention._attention_windows.get()
        if seen is not None:
            seen.add(sliding_window)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return y.transpose(1, 2), None

    monkeypatch.setattr(attention, "_attend_packed", leaks)
    model = make("llama", packed=False)
    assert "change with the document before" in attention.check_isolation(model)
    monkeypatch.undo()
    assert attention.check_isolation(model) is None


def test_check_finds_a_window_that_only_the_mask_has(make, monkeypatch):
    """As the chunks of Llama 4 would be: the check's documents are far shorter than a chunk."""
    model = make("mistral_window", packed=False)
    keep = attention._attend_packed

    def forgets(*arguments, sliding_window=None, **keywords):
        return keep(*arguments, **keywords)

    monkeypatch.setattr(attention, "_attend_packed", forgets)
    assert "windows {6}" in attention.check_isolation(model)


def test_attention_dropout_is_refused_in_training(make):
    model = make("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(UnsupportedAttentionError, match="packing: false"):
        model.train()(**row(documents()))
    model.eval()(**row(documents()))


def test_a_forward_without_the_lengths_is_refused(make):
    with pytest.raises(UnsupportedAttentionError, match="packed_arguments"):
        make("llama")(input_ids=documents()[0][None])
