import json

import pytest
import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from jobs.merge import merge
from stitch_ray.config.finetune import AdapterConfig
from stitch_ray.training import export
from stitch_ray.training.adapters import add_adapter
from stitch_ray.training.export import export_model, merge_adapter
from tests.rounding import assert_close

pytestmark = pytest.mark.numeric

IDS = torch.arange(3, 40)[None]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"

app = typer.Typer()
app.command()(merge)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(*arguments):
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    return result.exit_code, result.output


def logits(model):
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits.float()


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "rslora"])
def adapter(request, tiny_model, tmp_path_factory):
    config = AdapterConfig(rank=4, alpha=8, rslora=request.param)
    model = add_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), config, seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(5):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    out = tmp_path_factory.mktemp("adapter") / "model"
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    facts = {"tasks": {"sums": {"objective": "sft", "template": "chat"}}, "card": {"steps": 5}}
    export_model(str(tiny_model), "lora", config, weights, out, chat_template=TEMPLATE, **facts)
    return out


@pytest.fixture
def nothing_left(tmp_path):
    """Whatever happened, there is no trace of it."""
    yield
    assert list(tmp_path.iterdir()) == []


def test_merged_logits_are_the_adapters(tiny_model, adapter, tmp_path):
    code, output = run(adapter, "--out", tmp_path / "merged")
    assert code == 0, output
    assert f"{tmp_path / 'merged'}: " in output
    assert "parameters in float32" in output
    assert float(output.split("adapter's by ")[1].split()[0]) <= 1e-3
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = logits(base)
    expected = logits(PeftModel.from_pretrained(base, adapter))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert_close(found, expected)
    assert (found - before).abs().max() > 0.1
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_tokenizer_and_note_are_carried_over(tiny_model, adapter, tmp_path):
    merge_adapter(str(adapter), tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == TEMPLATE
    note = json.loads((tmp_path / "merged" / "stitch_ray.json").read_text())
    assert note == json.loads((adapter / "stitch_ray.json").read_text()) | {"merged_from": str(adapter)}
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert "library_name: transformers" in (tmp_path / "merged" / "README.md").read_text()


def test_the_number_format_is_the_bases_or_the_one_asked_for(tiny_model, adapter, tmp_path):
    LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    for name, dtype, written in (("a", "auto", torch.bfloat16), ("b", "float32", torch.float32)):
        code, output = run(adapter, "--base", tmp_path / "base", "--out", tmp_path / name, "--dtype", dtype)
        assert code == 0, output
        assert AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto").dtype == written


def test_a_folder_without_adapter_is_refused(tiny_model, tmp_path, nothing_left):
    assert run(tiny_model, "--out", tmp_path / "merged") == (
        2,
        f"error: {tiny_model}: no adapter in this folder (an adapter_config.json without a config.json)\n",
    )
    code, output = run(tmp_path / "nothing", "--out", tmp_path / "merged")
    assert (code, "no such model folder" in output) == (2, True)


def moved(adapter, folder, **change):
    folder.mkdir()
    for file in adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    return folder


@pytest.mark.parametrize("base", ["/nowhere/base", None])
def test_a_missing_base_is_refused_and_can_be_named(tiny_model, adapter, tmp_path, base):
    lost = moved(adapter, tmp_path / "lost", base_model_name_or_path=base)
    code, output = run(lost, "--out", tmp_path / "merged")
    assert (code, "--base" in output) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["lost"]
    assert run(lost, "--out", tmp_path / "merged", "--base", tiny_model)[0] == 0


def test_a_base_that_has_changed_is_refused_unless_it_is_named(tiny_model, adapter, tmp_path):
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    model.model.norm.weight.data += 1
    model.save_pretrained(tmp_path / "changed")
    changed = moved(adapter, tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "changed"))
    code, output = run(changed, "--out", tmp_path / "merged")
    assert (code, "fingerprint" in output) == (2, True)
    assert run(changed, "--out", tmp_path / "merged", "--base", tmp_path / "changed")[0] == 0


def test_a_base_of_another_shape_is_refused(other_tiny_model, adapter, tmp_path, nothing_left):
    code, output = run(adapter, "--out", tmp_path / "merged", "--base", other_tiny_model)
    assert (code, "does not fit" in output) == (2, True)


def test_a_taken_out_is_refused_and_replaced_only_on_request(tiny_model, adapter, tmp_path):
    out = tmp_path / "merged"
    out.mkdir()
    (out / "mine").touch()
    assert run(adapter, "--out", out)[0] == 2
    assert run(adapter, "--out", out, "--overwrite") == (
        2,
        f"error: {out} holds something else than a model (no config.json); remove it or choose another --out\n",
    )
    (out / "mine").rename(out / "config.json")
    assert run(adapter, "--out", out, "--overwrite")[0] == 0
    assert logits(AutoModelForCausalLM.from_pretrained(out)).isfinite().all()


def test_the_base_is_never_replaced(tiny_model, adapter):
    before = (tiny_model / "model.safetensors").read_bytes()
    code, output = run(adapter, "--out", tiny_model, "--overwrite")
    assert (code, "is the base model" in output) == (2, True)
    assert (tiny_model / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("off", [1e-2, float("nan")])
def test_a_merge_that_changes_the_answers_is_not_written(adapter, tmp_path, monkeypatch, nothing_left, off):
    probe, calls = export._probe, []

    def shifted(model):
        calls.append(model)
        return probe(model) + (off if len(calls) == 2 else 0)

    monkeypatch.setattr(export, "_probe", shifted)
    code, output = run(adapter, "--out", tmp_path / "merged")
    assert (code, "nothing was written" in output) == (2, True)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_on_a_tied_head_is_not_written(tiny_model, tmp_path):
    """Other tools train one; merged into the shared matrix it would change the embeddings too."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "base")
    made = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, base_model_name_or_path="x")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), made)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    code, output = run(tmp_path / "adapter", "--out", tmp_path / "merged")
    assert (code, "nothing was written" in output) == (2, True)
    assert not (tmp_path / "merged").exists()
