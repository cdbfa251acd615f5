"""`finetune` on a real Ray, with real Ray Train workers and real DeepSpeed, on toy models."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from stitch_ray.api import as_config, run_job
from stitch_ray.cli import app
from stitch_ray.config import FinetuneConfig
from stitch_ray.config.finetune import AdapterConfig
from stitch_ray.data.synthetic import instruction_corpus
from stitch_ray.data.trained_on import read_trained_on
from stitch_ray.engines.base import Request, Sampling
from stitch_ray.engines.hf import HfEngine
from stitch_ray.errors import UserError
from stitch_ray.records import Turn, question_group
from stitch_ray.runs import Summary
from stitch_ray.training import checkpoints
from stitch_ray.training.adapters import add_adapter
from stitch_ray.training.metrics import MetricsLog
from stitch_ray.training.state import read_weights

pytestmark = pytest.mark.ray

Record = dict[str, Any]
_QUESTION = (Turn("user", "Name a river."),)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two files: 60 rows of which one is broken, and 30 other rows."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = instruction_corpus(89, seed=5)
    broken = {"id": "broken", "instruction": "Say nothing.", "output": " "}
    files = []
    for name, part in (("first", [*rows[:59], broken]), ("second", rows[59:])):
        files.append(folder / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return files[0], files[1]


def values(model: Path, tasks: tuple[Path, ...], **sections: Any) -> Record:
    return {
        "model": {"path": str(model)},
        "tasks": [{"name": f"task{number}", "data": str(path)} for number, path in enumerate(tasks)],
        "max_length": 256,
        "batch": {"tokens": 512},
        "optimizer": {"learning_rate": 1e-3},
        "workers": 2,
        "split": {"validation": 0.2},
        "eval": {"every": 4},
        "checkpoint": {"every": 4},
        **sections,
    }


def run(config: Mapping[str, Any], out: Path, **options: Any) -> Summary:
    return run_job("finetune", as_config(config, FinetuneConfig), out, **options)


def of_kind(folder: Path, kind: str) -> list[Record]:
    return [record for record in MetricsLog.read(folder / "metrics.jsonl") if record["kind"] == kind]


def last_weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").glob("step-*[0-9]"))
    return dict(read_weights(newest))


def largest_difference(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audit") / "steps"


@pytest.fixture(scope="module")
def reference(
    ray_cluster: object,
    tiny_model: Path,
    tasks: tuple[Path, Path],
    audit: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Summary:
    """Two tasks, two workers, ZeRO-2, one epoch; answers to validation questions beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STITCH_RAY_CALL_LOG", str(audit))
        config = values(tiny_model, tasks, eval={"every": 4, "generate": 2, "max_tokens": 8})
        return run(config, tmp_path_factory.mktemp("runs") / "reference")


def test_all_files_of_a_run_are_there_and_rows_add_up(reference: Summary) -> None:
    names = {path.name for path in reference.folder.iterdir()} - {".lock"}
    wanted = {
        "config.yaml",
        "manifest.json",
        "quarantine.jsonl",
        "report.html",
        "model",
        "checkpoints",
        "metrics.jsonl",
    }
    assert names == wanted | {"tensorboard", "answers.jsonl", "work"}
    facts = reference.facts
    assert facts["status"] == "done"
    assert (facts["rows_in"], facts["rows_out"], facts["rows_quarantined"]) == (90, 89, 1)
    counts = facts["tasks"]
    assert sum(counts[task][split] for task in counts for split in ("train", "validation", "test")) == 89
    assert facts["tasks"]["task0"]["quarantined"] == 1
    (bad,) = [json.loads(line) for line in (reference.folder / "quarantine.jsonl").open(encoding="utf-8")]
    assert (bad["line"], "empty response" in bad["reason"]) == (60, True)
    assert list((reference.folder / "tensorboard").glob("events.out.tfevents.*"))


def test_every_training_example_is_seen_exactly_once_an_epoch(reference: Summary, audit: Path) -> None:
    lines = [line.split("\t") for line in audit.read_text().splitlines()]
    seen = Counter(name for _, _, names in lines for name in names.split(","))
    assert set(seen.values()) == {1}
    assert len(seen) == sum(task["train"] for task in reference.facts["tasks"].values())
    assert {int(step) for step, _, _ in lines} == set(range(reference.facts["steps"]))


def test_metrics_say_what_happened_at_every_step(reference: Summary) -> None:
    steps = of_kind(reference.folder, "step")
    assert [record["step"] for record in steps] == list(range(1, reference.facts["total_steps"] + 1))
    assert sum(record["tokens"] for record in steps) == sum(t["tokens"] for t in reference.facts["tasks"].values())
    assert all(set(record["tasks"]) <= {"task0", "task1"} and math.isfinite(record["loss"]) for record in steps)
    assert all(record["padding"] == 0 and record["workers"] == 2 and record["grad_norm"] > 0 for record in steps)
    validations = of_kind(reference.folder, "validation")
    assert validations[-1]["step"] == reference.facts["steps"]
    assert validations[-1]["examples"] == sum(t["validation"] for t in reference.facts["tasks"].values())
    assert validations[-1]["loss"] == pytest.approx(sum(validations[-1]["tasks"].values()) / 2)
    assert len(of_kind(reference.folder, "start")) == 1


@pytest.mark.numeric
def test_the_model_is_a_hugging_face_folder_that_answers_with_the_template_of_training(reference: Summary) -> None:
    folder = reference.folder / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    trained = last_weights(reference.folder)
    assert largest_difference(trained, dict(model.named_parameters())) == 0
    note = json.loads((folder / "stitch_ray.json").read_text("utf-8"))
    assert set(note["tasks"]) == {"task0", "task1"}
    assert AutoTokenizer.from_pretrained(folder).chat_template == note["template"]
    request = Request(request_id="q", prompt=_QUESTION, sampling=Sampling(max_tokens=4))
    assert HfEngine(str(folder)).generate([request])[0][0].token_ids  # type: ignore[index]


def test_the_questions_it_learned_from_are_noted_beside_the_model(reference: Summary, tasks: tuple[Path, Path]) -> None:
    rows = [json.loads(line) for path in tasks for line in path.open(encoding="utf-8")]
    groups = {question_group(row["instruction"], row.get("input") or None) for row in rows if row["id"] != "broken"}
    assert read_trained_on(reference.folder / "model") == groups


def test_answers_to_validation_questions_are_in_file_and_report(reference: Summary) -> None:
    found = [json.loads(line) for line in (reference.folder / "answers.jsonl").open(encoding="utf-8")]
    assert found[-1]["step"] == reference.facts["steps"]
    assert {task: facts["examples"] for task, facts in found[-1]["tasks"].items()} == {"task0": 2, "task1": 2}
    page = (reference.folder / "report.html").read_text("utf-8")
    assert found[-1]["samples"][0]["question"][:20] in page
    assert "http-equiv" not in page


@pytest.mark.resume
def test_a_second_run_of_a_finished_job_trains_nothing(
    reference: Summary, tiny_model: Path, tasks: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STITCH_RAY_CALL_LOG", str(tmp_path / "log"))
    before = last_weights(reference.folder)
    config = values(
        tiny_model, tasks, eval={"every": 4, "generate": 2, "max_tokens": 8}, checkpoint={"every": 4, "keep": 1}
    )
    again = run(config, reference.folder)
    assert not (tmp_path / "log").exists()
    assert largest_difference(before, last_weights(again.folder)) == 0
    assert [again.facts[key] for key in ("steps", "tokens")] == [reference.facts[key] for key in ("steps", "tokens")]


def test_other_settings_in_the_same_folder_are_refused_with_their_key(
    reference: Summary, tiny_model: Path, tasks: tuple[Path, Path]
) -> None:
    config = values(tiny_model, tasks, optimizer={"learning_rate": 2e-3})
    with pytest.raises(UserError, match=r"optimizer\.learning_rate"):
        run(config, reference.folder)


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({"workers": 1, "zero": {"stage": 3}}, id="one-worker-zero-3"),
        pytest.param({"workers": 1, "zero": {"stage": 1}}, id="one-worker-zero-1", marks=pytest.mark.slow),
        pytest.param({"zero": {"stage": 3}}, id="zero-3", marks=pytest.mark.slow),
    ],
)
@pytest.mark.numeric
def test_neither_workers_nor_zero_stage_change_the_result(
    reference: Summary,
    tiny_model: Path,
    tasks: tuple[Path, Path],
    tmp_path: Path,
    sections: Record,
) -> None:
    """One worker accumulates what two share out; stage 3 shares out the weights too.

    To rounding: the gradient's norm is summed in another order, and so clips by a factor that is off by a rounding
    (norms 1e-7 apart, moments 2e-7 of the largest). AdamW divides by the gradient's size: of a weight whose gradient is
    next to zero that rounding becomes a part of the learning rate, here 1e-3. Seen were 5e-6 at most, and 4 weights of
    300,000 beyond 1e-6.
    """
    if sections.get("workers") == 1:
        sections = {**sections, "batch": {"tokens": 512, "accumulation": 2}}
    found = run(values(tiny_model, tasks, **sections), tmp_path / "run")
    expected, weights = last_weights(reference.folder), last_weights(found.folder)
    assert largest_difference(expected, weights) < 1e-4, "more than a tenth of what a step may change"
    assert sum(int(((weights[name] - expected[name]).abs() > 1e-6).sum()) for name in expected) < 50
    assert found.facts["final_loss"] == pytest.approx(reference.facts["final_loss"], rel=1e-5)
    # AdamW hardly sees a gradient that is wrong by a factor; its norm shows it.
    for key in ("loss", "grad_norm"):
        ours, theirs = ([record[key] for record in of_kind(one.folder, "step")] for one in (found, reference))
        assert ours == pytest.approx(theirs, rel=1e-5), key


@pytest.fixture(scope="module")
def adapted(
    ray_cluster: object,
    tiny_model: Path,
    tasks: tuple[Path, Path],
    template: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Summary, list[list[str]]]:
    """LoRA with CoBa, two epochs of four padded examples a micro-batch, a template file; and the audit of its steps."""
    folder = tmp_path_factory.mktemp("adapted")
    config = counted(
        tiny_model,
        tasks,
        template,
        method="lora",
        adapter={"rank": 4, "alpha": 8, "dropout": 0.1},
        loss="coba",
        coba={"warmup": 3, "history": 6, "examples": 2},
        packing=False,
        optimizer={"learning_rate": 1e-2},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STITCH_RAY_CALL_LOG", str(folder / "audit"))
        summary = run(config, folder / "run")
    return summary, [line.split("\t") for line in (folder / "audit").read_text().splitlines()]


def test_coba_weighs_the_tasks_and_a_padded_step_says_so(adapted: tuple[Summary, list[list[str]]]) -> None:
    folder = adapted[0].folder
    weights = [list(record["task_weights"].values()) for record in of_kind(folder, "step")]
    assert weights[0] == [0.5, 0.5]
    assert weights[-1] != [0.5, 0.5]
    assert all(sum(both) == pytest.approx(1) for both in weights)
    progress = json.loads((max((folder / "checkpoints").glob("step-*")) / "progress.json").read_text())
    assert progress["weigher"]
    assert any(record["padding"] > 0 for record in of_kind(folder, "step"))


@pytest.mark.numeric
def test_lora_then_merge_answers_like_the_adapter(
    adapted: tuple[Summary, list[list[str]]], tiny_model: Path, tmp_path: Path
) -> None:
    """To rounding: the merged weights are rounded once more, and sums of them are made in another order."""
    folder = adapted[0].folder / "model"
    result = CliRunner().invoke(app, ["merge", str(folder), "--out", str(tmp_path / "merged")])
    assert result.exit_code == 0, result.output
    continuation = tuple(AutoTokenizer.from_pretrained(tiny_model)("The Rhine is one.")["input_ids"])
    scored = [Request(request_id="q", prompt=_QUESTION, continuation=continuation)]
    adapter, merged, base = (
        HfEngine(str(path), dtype="float32").token_statistics(scored)[0].logprobs  # type: ignore[union-attr]
        for path in (folder, tmp_path / "merged", tiny_model)
    )
    assert merged == pytest.approx(adapter, abs=1e-4)
    assert max(abs(one - other) for one, other in zip(adapter, base, strict=True)) > 1e-2, "the adapter does nothing"


@pytest.fixture(scope="module")
def stopped(
    ray_cluster: object, tiny_model: Path, tasks: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Record, Summary, int]:
    """Stopped early by a learning rate that ruins the model; its configuration, and the step of its best validation."""
    config = values(
        tiny_model,
        tasks[:1],
        workers=1,
        max_steps=12,
        eval={"every": 1},
        checkpoint={"every": 1, "keep": 2},
        optimizer={"learning_rate": 0.5, "schedule": "constant", "warmup": 3},
        early_stopping={"patience": 2},
    )
    summary = run(config, tmp_path_factory.mktemp("stopped") / "run")
    losses = [record["loss"] for record in of_kind(summary.folder, "validation")]
    return config, summary, losses.index(min(losses)) + 1


def test_early_stopping_keeps_the_best_checkpoint_and_exports_it(stopped: tuple[Record, Summary, int]) -> None:
    _, summary, best = stopped
    assert summary.facts["outcome"] == "stopped_early"
    assert summary.facts["steps"] == best + 2 < 12
    assert summary.facts["model_step"] == summary.facts["best_step"] == best
    kept = {path.name for path in (summary.folder / "checkpoints").iterdir()}
    assert kept == {f"step-{step:06d}" for step in (best, best + 1, best + 2)}
    exported = dict(AutoModelForCausalLM.from_pretrained(summary.folder / "model").named_parameters())
    assert largest_difference(dict(read_weights(summary.folder / "checkpoints" / f"step-{best:06d}")), exported) == 0


@pytest.mark.resume
def test_a_resumed_run_has_as_little_patience_left_as_the_interrupted_one(
    stopped: tuple[Record, Summary, int], tmp_path: Path
) -> None:
    """As if it had been killed between the first and the second validation without a new best."""
    config, summary, best = stopped
    folder = Path(shutil.copytree(summary.folder, tmp_path / "run"))
    (folder / "work" / "outcome.json").unlink()
    shutil.rmtree(folder / "checkpoints" / f"step-{best + 2:06d}")
    shutil.rmtree(folder / "model")
    again = run(config, folder)
    assert [again.facts[key] for key in ("outcome", "steps", "model_step")] == ["stopped_early", best + 2, best]
    assert of_kind(folder, "start")[-1]["resumed_from"] == best + 1
    assert largest_difference(last_weights(summary.folder), last_weights(folder)) == 0


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_examples(
    ray_cluster: object, tiny_model: Path, tasks: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STITCH_RAY_CALL_LOG", str(tmp_path / "audit"))
    config = values(
        tiny_model,
        tasks[:1],
        workers=1,
        max_steps=10,
        eval={"every": 100},
        checkpoint={"every": 1},
        optimizer={"learning_rate": 1e30, "schedule": "constant", "warmup": 0, "max_grad_norm": None},
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    result = CliRunner().invoke(app, ["finetune", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run")])
    assert result.exit_code == 1
    assert "not finite" in result.stderr
    assert "synthetic-5-" in result.stderr
    assert not (tmp_path / "run" / "model").exists()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text("utf-8"))
    assert manifest["status"] == "failed"
    *_, (step, _, names) = (line.split("\t") for line in (tmp_path / "audit").read_text().splitlines())
    assert manifest["not_finite"] == {"step": int(step), "examples": names.split(",")}
    before = checkpoints.latest_valid(tmp_path / "run" / "checkpoints", pytest.fail)
    assert before is not None
    assert before.step == int(step) > 0
    assert all(bool(weight.isfinite().all()) for weight in read_weights(before.path).values())


# Refused before anything starts


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"path": "no/such/model"}}, "model.path: no/such/model: no such model folder"),
        ({"model": {"path": "such/model"}}, "(hf download such/model puts it there)"),
        ({"objective": "sfft"}, "sft"),
        ({"method": "qlora"}, "qlora needs a GPU"),
        ({"workers": 64}, "64 CPU (the cluster has 4)"),
        ({"max_length": 100_000, "batch": {"examples": 4}}, "exceeds the model's context"),
        ({"batch": {"tokens": 64}}, "cannot hold an example"),
        ({"tasks": [{"name": "a", "data": "gone.json"}]}, "gone.json"),
    ],
)
def test_what_cannot_work_is_exit_2_with_the_reason_and_no_folder(
    ray_cluster: object,
    tiny_model: Path,
    tasks: tuple[Path, Path],
    tmp_path: Path,
    sections: Record,
    message: str,
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values(tiny_model, tasks) | sections), encoding="utf-8")
    result = CliRunner().invoke(app, ["finetune", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run")])
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_only_a_worker_can_find_wrong_is_not_tried_again(
    ray_cluster: object, tiny_model: Path, tasks: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter to start from whose weights, which only workers read, belong to other layers."""
    monkeypatch.setenv("STITCH_RAY_CALL_LOG", str(tmp_path / "log"))
    adapter = AdapterConfig(rank=4, targets=["v_proj"])  # type: ignore[call-arg]
    add_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), adapter, seed=0).save_pretrained(tmp_path / "adapter")
    chosen = {"rank": 4, "targets": ["q_proj"], "start_from": str(tmp_path / "adapter")}
    config = values(tiny_model, tasks[1:], method="lora", adapter=chosen, workers=1)
    with pytest.raises(UserError, match=r"adapter\.targets differs .* only here q_proj; only there v_proj"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "log").exists()
    assert not (tmp_path / "run").exists()


def test_dry_run_and_validate_say_what_would_be_trained(
    tiny_model: Path, tasks: tuple[Path, Path], tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values(tiny_model, tasks)), encoding="utf-8")
    described = CliRunner().invoke(app, ["finetune", str(path), "--dry-run"])
    assert described.exit_code == 0, described.output
    assert "task0: 60 rows from 1 source(s), 1 unusable" in described.stdout
    assert "ZeRO-2, 2 workers" in described.stdout
    checked = CliRunner().invoke(app, ["validate", "finetune", str(path)])
    assert checked.exit_code == 0, checked.output
    assert "finetune work hash" in checked.stdout
    assert {entry.name for entry in tmp_path.iterdir()} == {"config.yaml"}


# Examples instead of tokens in a micro-batch, and a template file


_TEMPLATE = """\
{%- for message in messages -%}
<<{{ message.role }}>>{{ message.content }}{{ eos_token if message.role == "assistant" }}
{% endfor -%}
{%- if add_generation_prompt %}<<assistant>>{% endif -%}
"""


@pytest.fixture(scope="module")
def sharp_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with attention far from uniform, so that a fault in it shows in the loss."""
    folder = tmp_path_factory.mktemp("sharp") / "model"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 8
            layer.self_attn.k_proj.weight *= 8
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def counted(model: Path, tasks: tuple[Path, ...], template: Path, **sections: Any) -> Record:
    """Four examples in a micro-batch, two micro-batches a step, a template of our own."""
    config = values(model, tasks, **{"batch": {"examples": 4}, "epochs": 2, **sections})
    for task in config["tasks"]:
        task["template"] = str(template)
    return config


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "own.jinja"
    path.write_text(_TEMPLATE, encoding="utf-8")
    return path


def test_every_epoch_sees_every_example_once_in_an_order_of_its_own(
    adapted: tuple[Summary, list[list[str]]],
) -> None:
    summary, lines = adapted
    epochs = {record["step"] - 1: int(record["epoch"]) for record in of_kind(summary.folder, "step")}
    assert set(epochs.values()) == {0, 1}
    orders: dict[int, list[str]] = {0: [], 1: []}
    for step, _, names in sorted(lines, key=lambda line: (int(line[0]), int(line[1]))):
        orders[epochs[int(step)]] += names.split(",")
    examples = sum(task["train"] for task in summary.facts["tasks"].values())
    for order in orders.values():
        assert len(order) == len(set(order)) == examples
    assert set(orders[0]) == set(orders[1])
    assert orders[0] != orders[1]
    assert {int(slot) for _, slot, _ in lines} == {0, 1}  # both workers had a share


@pytest.mark.slow
def test_padded_micro_batches_of_the_same_examples_have_the_same_loss(
    ray_cluster: object,
    sharp_model: Path,
    tasks: tuple[Path, Path],
    template: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def first_step(name: str, **sections: Any) -> tuple[Record, list[str]]:
        monkeypatch.setenv("STITCH_RAY_CALL_LOG", str(tmp_path / f"{name}-audit"))
        config = counted(sharp_model, tasks, template, **sections)
        del config["epochs"]
        config |= {"max_steps": 1, "split": {"validation": 0.2}}
        step = of_kind(run(config, tmp_path / name).folder, "step")[0]
        lines = (tmp_path / f"{name}-audit").read_text().splitlines()
        return step, sorted(line for line in lines if line.startswith("0\t"))

    packed, of_packed = first_step("packed")
    padded, of_padded = first_step("padded", packing=False, workers=1, batch={"examples": 4, "accumulation": 2})
    assert of_packed == of_padded
    assert packed["padding"] == 0 < padded["padding"]
    assert (padded["tokens"], padded["loss_tokens"]) == (packed["tokens"], packed["loss_tokens"])
    print(f"packed - padded loss: {packed['loss'] - padded['loss']:.1e}")
    assert padded["loss"] == pytest.approx(packed["loss"], rel=1e-5)
    assert padded["tasks"] == pytest.approx(packed["tasks"], rel=1e-5)
    assert padded["grad_norm"] == pytest.approx(packed["grad_norm"], rel=1e-4)


@pytest.mark.numeric
def test_answers_are_asked_for_in_the_template_file_of_the_training(
    adapted: tuple[Summary, list[list[str]]], tiny_model: Path
) -> None:
    folder = str(adapted[0].folder / "model")
    sampling = Sampling(max_tokens=4, token_stats=True)
    by_hand = AutoTokenizer.from_pretrained(tiny_model)(
        "<<user>>Name a river.\n<<assistant>>", add_special_tokens=False
    )["input_ids"]
    prompts = (_QUESTION, tuple(by_hand))
    requests = [Request(request_id=str(n), prompt=prompt, sampling=sampling) for n, prompt in enumerate(prompts)]
    turns, ids = (found[0] for found in HfEngine(folder).generate(requests))  # type: ignore[index]
    assert turns.prompt_tokens == ids.prompt_tokens == len(by_hand)
    assert (turns.token_ids, turns.logprobs) == (ids.token_ids, pytest.approx(ids.logprobs, abs=1e-5))
    other = HfEngine(str(tiny_model)).generate(requests[:1])[0][0]  # type: ignore[index]
    assert other.prompt_tokens != len(by_hand), "the model's own template looks the same: nothing is tested"


# The same job by its other names


def test_the_command_and_the_python_function_find_the_finished_run(
    reference: Summary, tiny_model: Path, tasks: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stitch_ray import finetune

    monkeypatch.setenv("STITCH_RAY_CALL_LOG", str(tmp_path / "log"))
    config = values(tiny_model, tasks, eval={"every": 4, "generate": 2, "max_tokens": 8})
    stable = {*reference.facts} - {"created", "seconds", "config_hash"}

    def facts() -> Record:
        manifest = json.loads((reference.folder / "manifest.json").read_text("utf-8"))
        return {key: manifest[key] for key in stable & manifest.keys()}

    before = facts()
    metrics = (reference.folder / "metrics.jsonl").read_bytes()
    model = (reference.folder / "model" / "model.safetensors").stat()
    assert finetune(config, reference.folder) == reference.folder
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    result = CliRunner().invoke(app, ["finetune", str(tmp_path / "config.yaml"), "--out", str(reference.folder)])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"finetune: {before['steps']} steps, 89 of 90 rows, loss ")
    assert facts() == before
    assert (reference.folder / "metrics.jsonl").read_bytes() == metrics
    assert (reference.folder / "model" / "model.safetensors").stat().st_mtime_ns == model.st_mtime_ns
    assert not (tmp_path / "log").exists()


def test_the_command_refuses_another_learning_rate_in_the_folder(
    reference: Summary, tiny_model: Path, tasks: tuple[Path, Path], tmp_path: Path
) -> None:
    before = {file: file.read_bytes() for file in reference.folder.glob("*.*")}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values(tiny_model, tasks)), encoding="utf-8")
    options = ["--set", "optimizer.learning_rate=0.5", "--out", str(reference.folder)]
    result = CliRunner().invoke(app, ["finetune", str(path), *options])
    assert result.exit_code == 2
    assert "(optimizer.learning_rate)" in result.stderr
    assert "--overwrite" in result.stderr
    assert {file: file.read_bytes() for file in reference.folder.glob("*.*")} == before


def test_the_schema_names_every_key() -> None:
    result = CliRunner().invoke(app, ["schema", "finetune"])
    assert result.exit_code == 0
    assert set(json.loads(result.stdout)["properties"]) == set(FinetuneConfig.model_fields)


def missing_template(config: Record, folder: Path) -> str:
    config["tasks"][0]["template"] = str(folder / "gone.jinja")
    return "gone.jinja"


def broken_template(config: Record, folder: Path) -> str:
    (folder / "broken.jinja").write_text("one\n{% for message in messages %}{{ message.content }}")
    config["tasks"][0]["template"] = str(folder / "broken.jinja")
    return "broken.jinja, line 2"


def no_usable_row(config: Record, folder: Path) -> str:
    rows = [{"instruction": f"Say {n}.", "output": " "} for n in range(5)]
    (folder / "empty.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config["tasks"][1]["data"] = str(folder / "empty.jsonl")
    config["max_bad_fraction"] = 1.0
    return "tasks.task1: no usable row in"


def unknown_target(config: Record, folder: Path) -> str:
    config.update(method="lora", adapter={"targets": ["query_key_value"]})
    return "adapter.targets: query_key_value matches no linear layer of the model; it has down_proj,"


@pytest.mark.parametrize("spoil", [missing_template, broken_template, no_usable_row, unknown_target])
def test_mistake_is_exit_2_before_a_step_and_leaves_no_folder(
    ray_cluster: object,
    spoil: Callable[[Record, Path], str],
    tiny_model: Path,
    tasks: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STITCH_RAY_CALL_LOG", str(tmp_path / "log"))
    config = values(tiny_model, tasks)
    message = spoil(config, tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    result = CliRunner().invoke(app, ["finetune", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run")])
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert all(line.startswith("error: ") for line in result.stderr.splitlines())
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "log").exists()
