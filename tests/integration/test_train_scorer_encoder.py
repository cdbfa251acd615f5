"""The encoder of a scorer learns on Ray Train, the same for every number of workers, and survives the loss of one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sklearn.metrics import roc_auc_score
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from stitch_ray.config.train_scorer import TrainScorerConfig
from stitch_ray.errors import UserError
from stitch_ray.reliability.scorer import training
from stitch_ray.reliability.scorer.training import EncoderOutcome, TrainingRow, train_encoder
from stitch_ray.training.metrics import MetricsLog
from stitch_ray.training.state import read_weights
from tests import needs
from tests.faults.killing import kill, workers_below

pytestmark = [pytest.mark.ray]

WORDS = 40
RANK = "ray::RayTrainWorker"


def made_rows(count: int, seed: int) -> list[TrainingRow]:
    """Questions of three to six words and an answer of two, which is right if both are even. Labels are a little soft."""
    draw = Random(seed)
    rows = []
    for number in range(count):
        question, answer = (
            draw.choices(range(4, 4 + WORDS), k=draw.randint(3, 6)),
            draw.choices(range(4, 4 + WORDS), k=2),
        )
        right = not any(word % 2 for word in answer)
        ids = (2, *question, 3, *answer, 3)
        label = draw.uniform(0.8, 1) if right else draw.uniform(0, 0.2)
        rows.append(TrainingRow(f"a{seed}-{number:04d}", f"q{seed}-{number // 2}", ids, len(question) + 2, label))
    return rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "bert"
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, **{f"w{n}": n for n in range(4, 4 + WORDS)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def config(base: Path, encoder: Mapping[str, Any] = {}, **training: Any) -> TrainScorerConfig:
    return TrainScorerConfig.model_validate(
        {
            "answers": ["none"],
            "encoder": {"path": str(base), "max_length": 32, **encoder},
            "training": {"epochs": 3, "batch": 16, "learning_rate": 4e-3, "eval_every": 15, **training},
        }
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    return {name: one.detach() for name, one in model.named_parameters()}


def same(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def logits(folder: Path, rows: list[TrainingRow]) -> list[float]:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    scores = []
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([list(row.ids)])
            segments = (torch.arange(ids.shape[1]) >= row.second).long()[None]
            scores.append(model(input_ids=ids, token_type_ids=segments).logits.item())
    return scores


def auroc(folder: Path, rows: list[TrainingRow]) -> float:
    return float(roc_auc_score([row.label >= 0.5 for row in rows], logits(folder, rows)))


@pytest.fixture(scope="module")
def trained(ray_cluster: object, base: Path, tmp_path_factory: pytest.TempPathFactory) -> EncoderOutcome:
    """Two workers, to the end."""
    return train_encoder(config(base, workers=2), made_rows(400, 1), tmp_path_factory.mktemp("trained"))


def test_it_learns_to_tell_right_answers_to_other_questions(trained: EncoderOutcome) -> None:
    found = auroc(trained.model, made_rows(300, 2))
    print(f"AUROC {found:.3f} after {trained.steps} steps, {trained.seconds:.1f} s")
    assert found > 0.7, "chance is 0.5, give or take 0.04"
    assert trained.status in ("finished", "stopped_early")
    assert trained.step == trained.best_step
    assert trained.answers + trained.validation_answers == 400
    assert (trained.restarts, trained.notes) == (0, ())
    records = MetricsLog.read(trained.model.parent / "metrics.jsonl")
    validations = [record for record in records if record["kind"] == "validation"]
    assert trained.best_loss == min(record["loss"] for record in validations)
    assert all("perplexity" not in record for record in validations)
    assert all(record["workers"] == 2 and record["padding"] > 0 for record in records if record["kind"] == "step")


def test_the_model_folder_is_complete_and_its_facts_are_json(trained: EncoderOutcome) -> None:
    note = json.loads((trained.model / "stitch_ray.json").read_text())
    assert (note["head"], note["loss"], note["trained"]["step"]) == ("sequence_classification", "bce", trained.step)
    assert AutoTokenizer.from_pretrained(trained.model)("w7 w8")["input_ids"] == [7, 8]
    checkpoint = trained.model.parent / "checkpoints" / f"step-{trained.step:06d}"
    exported = weights(trained.model.parent)
    assert all(torch.equal(exported[name], weight) for name, weight in read_weights(checkpoint).items())
    assert json.loads(json.dumps(trained.facts()))["parameters"] == sum(one.numel() for one in exported.values())
    assert trained.report_facts(trained.model.parent)["records"]


def test_what_is_finished_is_not_trained_again(
    trained: EncoderOutcome, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STITCH_RAY_CALL_LOG", str(tmp_path / "log"))
    assert train_encoder(config(base, workers=2), made_rows(400, 1), trained.model.parent) == trained
    assert not (tmp_path / "log").exists()


@pytest.mark.slow
def test_one_worker_makes_the_same_weights_as_two_with_the_same_forwards(
    trained: EncoderOutcome, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever order the answers come, and with dropout, which is drawn for every forward by its place in the plan.

    But for rounding: the norm that gradients are clipped by is summed in another order. Seen were 9e-7 at most, apart
    from the biases of the attention keys: softmax takes no notice of them, so that their gradient is rounding alone,
    which AdamW scales up. The scores do not feel it either.
    """
    rows = made_rows(400, 1)
    Random(0).shuffle(rows)
    longest = max(len(row.ids) for row in rows)
    monkeypatch.setitem(training._TOKENS_IN_A_FORWARD, "cpu", 8 * longest)  # two workers have forwards of 8 answers
    alone = train_encoder(config(base, workers=1), rows, tmp_path)
    ours, theirs = weights(tmp_path), weights(trained.model.parent)
    difference = max(float((ours[name] - theirs[name]).abs().max()) for name in ours if "key.bias" not in name)
    unseen = made_rows(50, 2)
    apart = np.abs(np.subtract(logits(alone.model, unseen), logits(trained.model, unseen))).max()
    print(f"weights differ by {difference:.1e}, logits by {apart:.1e}")
    assert difference < 1e-5
    assert apart < 1e-4
    assert (alone.best_loss, alone.steps) == (pytest.approx(trained.best_loss, rel=1e-5), trained.steps)


@pytest.mark.slow
def test_early_stopping_exports_the_best_checkpoint(ray_cluster: object, base: Path, tmp_path: Path) -> None:
    """A learning rate that ruins what was learned. Regression, of the head alone."""
    ruinous = config(
        base,
        {"train": "head"},
        loss="mse",
        learning_rate=3.0,
        warmup=0.9,
        eval_every=1,
        early_stopping={"patience": 2},
    )
    outcome = train_encoder(ruinous, made_rows(200, 3), tmp_path)
    losses = [
        record["loss"] for record in MetricsLog.read(tmp_path / "metrics.jsonl") if record["kind"] == "validation"
    ]
    best = int(np.argmin(losses)) + 1
    assert (outcome.status, outcome.steps, outcome.step) == ("stopped_early", best + 2, best)
    assert outcome.best_loss == losses[best - 1]
    exported, before = weights(tmp_path), transformers.BertModel.from_pretrained(base)
    kept = read_weights(tmp_path / "checkpoints" / f"step-{best:06d}")
    assert {name.rpartition(".")[0] for name in kept} == {"bert.pooler.dense", "classifier"}
    assert all(torch.equal(exported[name], weight) for name, weight in kept.items())
    assert torch.equal(exported["bert.embeddings.word_embeddings.weight"], before.embeddings.word_embeddings.weight)


def test_inputs_that_the_encoder_cannot_take_are_refused_before_workers_start(base: Path, tmp_path: Path) -> None:
    rows = [*made_rows(20, 4), TrainingRow("long", "q", (5,) * 33, 0, 1.0)]
    with pytest.raises(UserError, match="an input of 33 tokens exceeds the 32"):
        train_encoder(config(base), rows, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_weights_are_the_same(
    trained: EncoderOutcome, base: Path, tmp_path: Path
) -> None:
    killed: list[int] = []

    def on_record(record: Mapping[str, Any]) -> None:
        if record["kind"] == "step" and record["step"] >= 35 and not killed:
            ranks = workers_below([os.getpid()], RANK)
            assert len(ranks) == 2
            killed.append(ranks[1])
            kill(ranks[1])

    outcome = train_encoder(config(base, workers=2), made_rows(400, 1), tmp_path, on_record=on_record)
    assert killed
    starts = [record for record in MetricsLog.read(tmp_path / "metrics.jsonl") if record["kind"] == "start"]
    assert [record["resumed_from"] for record in starts] in ([None, 30], [None, 45])
    assert outcome.restarts == 1
    assert same(tmp_path, trained.model.parent)


@pytest.mark.slow
def test_minilm_learns_from_texts(ray_cluster: object, tmp_path: Path) -> None:
    """The encoder of the package, with a new head, on pairs of texts: whether an answer names the place asked for."""
    base = needs.minilm()
    tokenizer = AutoTokenizer.from_pretrained(base)
    capitals = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo"}
    capitals |= {"Peru": "Lima", "Norway": "Oslo", "Greece": "Athens", "Cuba": "Havana", "Iran": "Tehran"}
    forms = ("What is the capital of {}?", "Name the capital of {}.", "{} has which capital?", "The capital of {} is?")
    rows: dict[bool, list[TrainingRow]] = {True: [], False: []}
    for number, form in enumerate(forms):
        for country, capital in capitals.items():
            for other in [capital] * 3 + [name for name in capitals.values() if name != capital][:3]:
                pair = tokenizer(form.format(country), f"It is {other}.", return_token_type_ids=True)
                second = pair["token_type_ids"].index(1)
                row = TrainingRow(
                    f"{form}{country}{other}{len(rows[True])}", f"{form}{country}", pair["input_ids"], second,
                    float(other == capital),
                )  # fmt: skip
                rows[number < 3].append(row)
    settings = config(base, {"max_length": 64}, epochs=6, learning_rate=3e-4, validation=0.1, eval_every=10)
    outcome = train_encoder(settings, rows[True], tmp_path)
    quality = auroc(outcome.model, rows[False])
    print(f"AUROC {quality:.3f} after {outcome.steps} steps, {outcome.seconds:.1f} s")
    assert quality > 0.8, "chance is 0.5, give or take 0.07"
