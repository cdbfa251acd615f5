"""Two adapters as one: the update of every layer is the weighted sum, as PEFT's own `cat` has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from stitch_ray.errors import UserError
from stitch_ray.exclusion.combining import concatenate

IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path, seed: int, **options: Any) -> str:
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(**settings))
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.3)  # new adapters change nothing
    model.save_pretrained(folder)
    return str(folder)


def logits(base: Path, path: str) -> torch.Tensor:
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), path).eval()
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


def test_it_is_what_peft_makes_of_them(base: Path, tmp_path: Path) -> None:
    first = adapter(base, tmp_path / "first", 1)
    second = adapter(base, tmp_path / "second", 2, r=6, lora_alpha=3, use_rslora=True)
    concatenate([first, second], [0.5, 0.2], tmp_path / "both")
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), first, adapter_name="first")
    model.load_adapter(second, adapter_name="second")
    model.add_weighted_adapter(["first", "second"], [0.5, 0.2], "both", combination_type="cat")
    model.set_adapter("both")
    with torch.inference_mode():
        expected = model.eval()(IDS).logits
    found = logits(base, str(tmp_path / "both"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - logits(base, first)).abs().max() > 0.01
    assert json.loads((tmp_path / "both" / "adapter_config.json").read_text())["r"] == 10


def test_what_cannot_be_concatenated_is_refused(base: Path, tmp_path: Path) -> None:
    first = adapter(base, tmp_path / "first", 1)
    other = adapter(base, tmp_path / "other", 2, target_modules=["q_proj"])
    with pytest.raises(UserError, match="change different layers"):
        concatenate([first, other], [1, 1], tmp_path / "both")
    dora = adapter(base, tmp_path / "dora", 3, use_dora=True)
    with pytest.raises(UserError, match="only plain LoRA"):
        concatenate([first, dora], [1, 1], tmp_path / "both")
    assert not (tmp_path / "both").exists()
