"""The losses of a sequence classifier are those of its sequences one by one, and its model comes back as it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from stitch_ray.engines.pretrained import load_tokenizer
from stitch_ray.errors import UserError
from stitch_ray.training import dataset
from stitch_ray.training.classifier import check_classifier, export_classifier, head_names, load_classifier
from stitch_ray.training.dataset import LABELLED_SCHEMA, Labelled, TokenDataset
from stitch_ray.training.forward import ClassifierForward, tells_segments
from stitch_ray.training.job import ClassifierHead
from stitch_ray.training.losses import multitask_loss
from tests.rounding import assert_close

pytestmark = pytest.mark.numeric

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
PLACES = {"max_position_embeddings": 34}
KINDS: dict[str, Any] = {
    "bert": transformers.BertConfig(**SIZES, **PLACES),
    "roberta": transformers.RobertaConfig(**SIZES, **PLACES, type_vocab_size=1, pad_token_id=1),
    "modernbert": transformers.ModernBertConfig(
        **SIZES, **PLACES, pad_token_id=0, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3
    ),
    "deberta": transformers.DebertaV2Config(
        **SIZES, **PLACES, relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0
    ),
    "llama": transformers.LlamaConfig(**SIZES, **PLACES, pad_token_id=None, bos_token_id=2, eos_token_id=3),
}
LENGTHS = (5, 11, 2, 8)
LABELS = (1.0, 0.25, 0.0, 0.8)
WEIGHTS = (0.5, 2.0, 1.5, 0.25)
SECONDS = (3, 7, 0, 2)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model of every kind, without a head, and a tokenizer."""
    root = tmp_path_factory.mktemp("bases")
    words = {f"w{number}": number for number in range(4, 64)}
    special = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}
    core = Tokenizer(models.WordLevel({**special, **words}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", eos_token="[SEP]", unk_token="[UNK]")
    for name, config in KINDS.items():
        torch.manual_seed(1)
        transformers.AutoModel.from_config(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    path = tmp_path_factory.mktemp("rows") / "rows.arrow"
    draw = np.random.default_rng(0)
    found = [
        Labelled(draw.integers(4, 64, length).astype(np.int32), second, label, weight, f"answer-{number}")
        for number, (length, second, label, weight) in enumerate(zip(LENGTHS, SECONDS, LABELS, WEIGHTS, strict=True))
    ]
    dataset.write(path, [dataset.labelled_table(found)], LABELLED_SCHEMA)
    return TokenDataset.open(path)


def build(bases: Path, kind: str, loss: Any = "bce", train: Any = "all", seed: int = 0) -> Any:
    model, _ = load_classifier(str(bases / kind), ClassifierHead(loss, train), seed=seed)
    with torch.no_grad():  # scores that are not all next to 0, as those of a new head are
        for name in head_names(model):
            model.get_parameter(name).mul_(20)
    return model.eval()


def forward(model: Any, loss: Any = "bce") -> ClassifierForward:
    return ClassifierForward(model, loss=loss, device=torch.device("cpu"))


def alone(model: Any, rows: TokenDataset, row: int) -> torch.Tensor:
    """The logit of one row in a forward of its own, called as the model's own documentation says."""
    ids = torch.tensor(np.array(rows.tokens(row)[0]), dtype=torch.int64)[None]
    arguments = {"input_ids": ids}
    if tells_segments(model) and SECONDS[row]:
        arguments["token_type_ids"] = (torch.arange(ids.shape[1]) >= SECONDS[row]).long()[None]
    logit: torch.Tensor = model(**arguments).logits[0, 0]
    return logit


# Losses


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_every_row_alone_whatever_the_padding(bases: Path, rows: TokenDataset, kind: str) -> None:
    model = build(bases, kind)
    logits = torch.stack([alone(model, rows, row) for row in range(4)]).detach()
    assert logits.std() > 0.05, "the check would not see rows that are mixed up"
    labels = torch.tensor(LABELS)
    soft = -(labels * F.logsigmoid(logits) + (1 - labels) * F.logsigmoid(-logits))
    squared = (torch.tensor(LABELS) - logits) ** 2
    for loss, expected in (("bce", soft), ("mse", squared)):
        found = forward(model, loss)(model, rows, range(4))
        torch.testing.assert_close(found.losses[0].detach(), expected, rtol=1e-4, atol=1e-5)
        assert found.weights.tolist() == [list(WEIGHTS)]
        assert (found.tokens, found.positions) == (sum(LENGTHS), 4 * max(LENGTHS))


@pytest.mark.parametrize("loss", ["bce", "mse"])
def test_the_loss_of_a_step_is_the_weighted_mean_over_its_rows(bases: Path, rows: TokenDataset, loss: str) -> None:
    model = build(bases, "bert")
    found = forward(model, loss)(model, rows, range(4))
    total = multitask_loss(found.losses, found.weights, found.task_ids, mode="token_mean")
    each = found.losses[0].detach().double().numpy()
    assert total.item() == pytest.approx(np.average(each, weights=WEIGHTS), rel=1e-6)


def test_the_loss_of_labels_that_are_right_or_wrong_is_that_of_hugging_face(bases: Path, rows: TokenDataset) -> None:
    """Its own loss of the exported problem type is ours, so a folder of ours can be trained on elsewhere."""
    for loss in ("bce", "mse"):
        model = build(bases, "bert", loss)
        ids = torch.tensor(np.array(rows.tokens(1)[0]), dtype=torch.int64)[None]
        segments = (torch.arange(ids.shape[1]) >= SECONDS[1]).long()[None]
        theirs = model(input_ids=ids, token_type_ids=segments, labels=torch.tensor([[LABELS[1]]])).loss
        assert forward(model, loss)(model, rows, [1]).losses.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_where_the_second_text_begins_reaches_models_that_mark_it(
    bases: Path, rows: TokenDataset, tmp_path: Path
) -> None:
    one_text = [Labelled(rows.tokens(row)[0], 0, LABELS[row], 1.0, "x") for row in range(4)]
    dataset.write(tmp_path / "rows.arrow", [dataset.labelled_table(one_text)], LABELLED_SCHEMA)
    for kind, marked in (("bert", True), ("roberta", False), ("modernbert", False)):
        model = build(bases, kind)
        both = [forward(model)(model, data, range(4)).losses for data in (rows, TokenDataset(tmp_path / "rows.arrow"))]
        assert torch.equal(*both) is not marked, kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_without_rows_takes_part_with_no_loss_and_a_gradient_of_zero(
    bases: Path, rows: TokenDataset, kind: str
) -> None:
    model = build(bases, kind)
    found = forward(model)(model, rows, [])
    assert found.positions == found.tokens == 0
    assert not found.weights.any()
    multitask_loss(found.losses, found.weights, found.task_ids, [1.0], "token_mean").backward()
    used = [name for name, one in model.named_parameters() if one.grad is not None]
    model.zero_grad(set_to_none=True)
    found = forward(model)(model, rows, [0, 1])
    multitask_loss(found.losses, found.weights, found.task_ids, [1.0], "token_mean").backward()
    assert used == [name for name, one in model.named_parameters() if one.grad is not None]


# The data


def test_labelled_rows_come_back_as_they_were_written(rows: TokenDataset) -> None:
    assert rows.lengths.tolist() == list(LENGTHS)
    assert rows.labels.tolist() == np.float32(LABELS).tolist()
    assert rows.seconds.tolist() == list(SECONDS)
    assert rows.loss_weights.tolist() == list(WEIGHTS)
    assert rows.task_ids.tolist() == [0] * 4
    assert list(rows.example_ids) == [f"answer-{number}" for number in range(4)]
    assert [rows.tokens(row)[1][-1] for row in range(4)] == list(WEIGHTS)


def test_an_empty_split_of_labelled_rows_is_a_file_as_well(tmp_path: Path) -> None:
    dataset.write(tmp_path / "none.arrow", [dataset.labelled_table([])], LABELLED_SCHEMA)
    assert len(TokenDataset.open(tmp_path / "none.arrow")) == 0


# The model


def test_a_new_head_depends_on_the_seed_alone(bases: Path) -> None:
    torch.manual_seed(5)
    first = build(bases, "bert")
    torch.manual_seed(6)
    again, other = build(bases, "bert"), build(bases, "bert", seed=1)
    state = torch.get_rng_state()
    build(bases, "bert")
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)


@pytest.mark.parametrize(("outputs", "kept"), [(1, True), (3, False)])
def test_a_head_with_one_output_is_kept_and_any_other_replaced_and_named(
    bases: Path, tmp_path: Path, outputs: int, kept: bool
) -> None:
    before = AutoModelForSequenceClassification.from_pretrained(bases / "bert", num_labels=outputs)
    before.save_pretrained(tmp_path / "with-head")
    model, notes = load_classifier(str(tmp_path / "with-head"), ClassifierHead("bce"), seed=3)
    assert model.classifier.weight.shape == (1, 32)
    assert torch.equal(model.classifier.weight, before.classifier.weight) is kept
    assert [f"{tmp_path / 'with-head'} has another number of outputs" in note for note in notes] == [True] * (not kept)
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, before.bert.embeddings.word_embeddings.weight)


def test_training_the_head_leaves_the_encoder_alone(bases: Path) -> None:
    expected = {
        "bert": {"bert.pooler.dense", "classifier"},
        "roberta": {"classifier.dense", "classifier.out_proj"},
        "modernbert": {"head.dense", "head.norm", "classifier"},
        "deberta": {"pooler.dense", "classifier"},
        "llama": {"score"},
    }
    for kind, modules in expected.items():
        model = build(bases, kind, train="head")
        trained = {name.rpartition(".")[0] for name, one in model.named_parameters() if one.requires_grad}
        assert trained == modules
        assert all(one.requires_grad for one in build(bases, kind).parameters())


def test_a_folder_that_lacks_weights_of_the_encoder_is_refused(bases: Path, tmp_path: Path) -> None:
    model = transformers.AutoModel.from_pretrained(bases / "bert")
    kept = {name: value for name, value in model.state_dict().items() if "layer.1.attention.self.query" not in name}
    model.save_pretrained(tmp_path / "damaged", state_dict=kept)
    with pytest.raises(
        UserError, match=r"lacks 2 weights of BertForSequenceClassification, such as bert\.encoder\.lay"
    ):
        load_classifier(str(tmp_path / "damaged"), ClassifierHead("bce"), seed=0)


def test_what_is_no_classifier_is_refused_before_and_while_it_is_loaded(tmp_path: Path) -> None:
    vision = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    transformers.AutoModel.from_config(vision).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"encoder\.path: .* cannot be loaded as a classifier"):
        check_classifier(str(tmp_path), 8)
    with pytest.raises(UserError, match=r"encoder\.path: .* cannot be loaded as a classifier"):
        load_classifier(str(tmp_path), ClassifierHead("bce"), seed=0)


@pytest.mark.parametrize(("kind", "room"), [("bert", 34), ("roberta", 32)])
def test_inputs_beyond_the_table_of_positions_are_refused_with_its_room(bases: Path, kind: str, room: int) -> None:
    model = build(bases, kind)
    ids = torch.full((1, room), 7)
    model(input_ids=ids)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, room + 1), 7))
    parameters = check_classifier(str(bases / kind), room)
    assert parameters == sum(one.numel() for one in model.parameters())
    with pytest.raises(UserError, match=rf"encoder\.max_length: an input of {room + 1} tokens exceeds the {room} that"):
        check_classifier(str(bases / kind), room + 1)


def test_a_decoder_without_padding_token_gets_that_of_its_tokenizer(bases: Path) -> None:
    assert json.loads((bases / "llama" / "config.json").read_text())["pad_token_id"] is None
    assert build(bases, "llama").config.pad_token_id == 0


# The exported folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", ["all", "head"])
def test_the_exported_classifier_gives_the_logits_of_the_trained_one(
    bases: Path, rows: TokenDataset, tmp_path: Path, kind: str, train: str
) -> None:
    model = build(bases, kind, train=train)
    weights = {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}
    head = ClassifierHead("bce", train)  # type: ignore[arg-type]
    export_classifier(str(bases / kind), head, weights, tmp_path / "out", card={"step": 7}, trained_on=["q1"])
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    trained = model.state_dict()
    assert all(torch.equal(trained[name], weight) for name, weight in loaded.state_dict().items())
    found, wanted = (torch.stack([alone(one, rows, row) for row in range(4)]) for one in (loaded, model))
    assert_close(found, wanted)
    assert loaded.config.pad_token_id == model.config.pad_token_id
    text = "w5 w9 unknown"
    before, after = load_tokenizer(str(bases / kind)), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert before(text)["input_ids"] == after(text)["input_ids"]


@pytest.mark.parametrize(("loss", "score"), [("bce", torch.sigmoid), ("mse", lambda logit: logit)])
def test_the_folder_says_how_its_logit_is_read_to_us_and_to_hugging_face(
    bases: Path, tmp_path: Path, loss: Any, score: Any
) -> None:
    model = build(bases, "bert", loss)
    weights = dict(model.named_parameters())
    export_classifier(str(bases / "bert"), ClassifierHead(loss), weights, tmp_path / "out", card={"step": 7})
    note = json.loads((tmp_path / "out" / "stitch_ray.json").read_text())
    assert [note[key] for key in ("head", "loss", "train")] == ["sequence_classification", loss, "all"]
    assert note["trained"] == {"step": 7}
    classify = transformers.pipeline("text-classification", str(tmp_path / "out"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    logit = model(input_ids=torch.tensor([tokenizer("w5 w9")["input_ids"]])).logits[0, 0]
    (found,) = classify("w5 w9")
    assert found["label"] == "correct"
    assert found["score"] == pytest.approx(score(logit).item(), rel=1e-4, abs=1e-4)


def test_weights_of_another_training_are_not_exported(bases: Path, tmp_path: Path) -> None:
    model = build(bases, "bert")
    weights = {name: model.get_parameter(name) for name in head_names(model)}
    with pytest.raises(UserError, match="missing, such as bert"):
        export_classifier(str(bases / "bert"), ClassifierHead("bce"), weights, tmp_path / "out", card={})
    assert not list(tmp_path.iterdir())
