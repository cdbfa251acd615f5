"""A model's fingerprint changes with what the model does, and with nothing else."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from stitch_ray.engines import fingerprint
from stitch_ray.engines.fingerprint import model_fingerprint, num_parameters
from stitch_ray.errors import UserError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text('{"model": {}}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    tensors = {"a": np.zeros((64, 32), np.float32), "b": np.ones(10, np.float32)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def flip(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


def test_it_is_16_hex_digits_and_survives_a_copy(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "elsewhere" / "copy")
    assert model_fingerprint(str(model)) == model_fingerprint(str(tmp_path / "elsewhere" / "copy"))
    assert len(model_fingerprint(str(model))) == 16
    int(model_fingerprint(str(model)), 16)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"])
def test_a_changed_byte_changes_it(model: Path, name: str) -> None:
    before = model_fingerprint(str(model))
    flip(model / name, -3)
    assert model_fingerprint(str(model)) != before


@pytest.mark.parametrize("name", ["tokenizer_config.json", "adapter_config.json", "adapter_model.safetensors"])
def test_an_added_file_changes_it(model: Path, name: str) -> None:
    before = model_fingerprint(str(model))
    (model / name).write_text("{}")
    assert model_fingerprint(str(model)) != before


def test_what_a_training_run_leaves_beside_the_model_does_not_change_it(model: Path) -> None:
    before = model_fingerprint(str(model))
    for name in ("optimizer.pt", "training_args.bin", "README.md"):
        (model / name).write_text("x")
    assert model_fingerprint(str(model)) == before


@pytest.mark.parametrize("tensor", ["a", "b"])
@pytest.mark.parametrize("where", ["first", "middle"])
def test_every_tensor_of_a_large_file_is_sampled(
    model: Path, monkeypatch: pytest.MonkeyPatch, tensor: str, where: str
) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 0)
    monkeypatch.setattr(fingerprint, "TENSOR_CHUNK_BYTES", 4)
    file = model / "model.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    start, end = json.loads(file.read_bytes()[8 : 8 + length])[tensor]["data_offsets"]
    before = model_fingerprint(str(model))
    flip(file, 8 + length + (start if where == "first" else (start + end) // 2))
    assert model_fingerprint(str(model)) != before


def test_a_large_file_is_read_in_part_only(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 0)
    monkeypatch.setattr(fingerprint, "TENSOR_CHUNK_BYTES", 4)
    before = model_fingerprint(str(model))
    file = model / "model.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    flip(file, 8 + length + 100)  # inside `a`, between its start and its middle
    assert model_fingerprint(str(model)) == before


def test_a_large_file_of_another_format_is_sampled_to_its_end(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 0)
    monkeypatch.setattr(fingerprint, "FILE_CHUNK_BYTES", 4)
    (model / "pytorch_model.bin").write_bytes(bytes(10_000))
    before = model_fingerprint(str(model))
    flip(model / "pytorch_model.bin", 9_999)
    assert model_fingerprint(str(model)) != before


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "a/b/c", ""])
def test_a_path_that_is_neither_folder_nor_hub_id_is_named(path: str) -> None:
    with pytest.raises(UserError, match=r"no such model folder|no config\.json"):
        model_fingerprint(path)


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        model_fingerprint(str(tmp_path))


def cached(monkeypatch: pytest.MonkeyPatch, snapshot: Path | None) -> None:
    def snapshot_download(repo_id: str, *, local_files_only: bool) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        assert local_files_only
        if snapshot is None:
            raise LocalEntryNotFoundError(repo_id)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)


def test_a_hub_id_is_its_cached_snapshot(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(monkeypatch, model)
    assert model_fingerprint("org/name") == model_fingerprint(str(model))
    assert num_parameters("org/name") == 64 * 32 + 10


def test_a_hub_id_without_cached_weights_is_hashed_by_name(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(monkeypatch, None)
    assert model_fingerprint("org/name") != model_fingerprint("org/other")
    assert num_parameters("org/name") is None
    (model / "model.safetensors").unlink()
    cached(monkeypatch, model)
    by_commit = model_fingerprint("org/name")
    (model / "tokenizer.json").unlink()  # which configuration files were fetched so far says nothing
    assert model_fingerprint("org/name") == by_commit


def test_parameters_are_counted_over_the_shards_of_the_index(model: Path) -> None:
    assert num_parameters(str(model)) == 64 * 32 + 10
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    save_file({"c": np.zeros((3, 5), np.float16)}, model / "model-00002-of-00002.safetensors")
    save_file({"a": np.zeros((64, 32), np.float32)}, model / "consolidated.safetensors")
    shards = {name: f"model-0000{shard}-of-00002.safetensors" for name, shard in (("a", 1), ("b", 1), ("c", 2))}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert num_parameters(str(model)) == 64 * 32 + 10 + 15


def test_quantised_weights_are_not_counted(model: Path) -> None:
    (model / "config.json").write_text('{"quantization_config": {}}')
    assert num_parameters(str(model)) is None


def test_a_broken_safetensors_file_is_named(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(UserError, match=r"model\.safetensors: not a safetensors file"):
        num_parameters(str(model))
