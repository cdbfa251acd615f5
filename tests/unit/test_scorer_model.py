"""The encoder at work: the same numbers however the answers are batched, and none made up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from stitch_ray.errors import UserError
from stitch_ray.reliability.scorer.inputs import PairIds, ScoreInput, encode_pair
from stitch_ray.reliability.scorer.model import SequenceClassificationScorer, batches
from tests.encoders import FAMILIES, LONGEST, WORDS, make_encoder, make_tokenizer

pytestmark = pytest.mark.numeric

TOLERANCE = 1e-5  # float32 rounds logits of 1 by 1e-6 when batches differ; those of two inputs are 1e-2 apart


def made_inputs(count: int, seed: int = 0) -> list[ScoreInput]:
    """Different lengths, with and without context, some answers empty."""
    rng = np.random.default_rng(seed)
    longest = np.array([10, 12, 5]) // 2  # byte-level pieces are short

    def words(most: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(0, most + 1)))

    return [
        ScoreInput(f"{words(longest[0])}?", words(longest[2]), words(longest[1]) if rng.random() < 0.5 else None)
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make_encoder(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def one_by_one(folder: Path, inputs: list[ScoreInput]) -> np.ndarray:
    """Each input alone through the model as transformers loads it: no padding, no batch."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    logits = []
    for shown in inputs:
        pair = encode_pair(tokenizer, shown, LONGEST)
        types = [[int(position >= pair.second) for position in range(len(pair.ids))]]
        more = {"token_type_ids": torch.tensor(types)} if getattr(model.config, "type_vocab_size", 0) > 1 else {}
        with torch.no_grad():
            logits.append(model(input_ids=torch.tensor([pair.ids]), **more).logits.item())
    return np.array(logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_do_not_depend_on_the_batch(family: str, folders: dict[str, Path]) -> None:
    inputs = made_inputs(40)
    alone = one_by_one(folders[family], inputs)
    assert np.ptp(alone) > 0.01
    for batch_tokens in (1, 64, 100_000):
        found = SequenceClassificationScorer(folders[family], batch_tokens=batch_tokens).read(inputs)
        assert np.abs(found.logits - alone).max() < TOLERANCE * max(1, np.abs(alone).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_the_answers_changes_no_bit(family: str, folders: dict[str, Path]) -> None:
    inputs = made_inputs(40)
    scorer = SequenceClassificationScorer(folders[family], batch_tokens=256)
    order = np.random.default_rng(1).permutation(len(inputs))
    assert (scorer.score([inputs[i] for i in order]) == scorer.score(inputs)[order]).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_answer_is_scored(family: str, folders: dict[str, Path]) -> None:
    inputs = [ScoreInput("who?", ""), ScoreInput("", "")]
    found = SequenceClassificationScorer(folders[family]).score(inputs)
    assert found == pytest.approx(1 / (1 + np.exp(-one_by_one(folders[family], inputs))), abs=1e-4)


def test_bce_gives_probabilities_and_mse_the_logits(tmp_path: Path) -> None:
    inputs = made_inputs(10)
    bce, mse = (
        SequenceClassificationScorer(make_encoder(tmp_path / loss, "bert", loss)).score(inputs)
        for loss in ("bce", "mse")
    )
    assert mse == pytest.approx(one_by_one(tmp_path / "mse", inputs), abs=1e-5)
    assert bce == pytest.approx(1 / (1 + np.exp(-mse)), abs=1e-12)


def test_what_does_not_fit_is_unscored_and_says_why(folders: dict[str, Path]) -> None:
    inputs = [ScoreInput("who?", "Bach"), ScoreInput("who " * 60, "Bach"), ScoreInput("who?", "Rome", "city " * 60)]
    found = SequenceClassificationScorer(folders["bert"]).read(inputs)
    assert np.isnan(found.logits).tolist() == [False, True, False]
    assert list(found.reasons) == [1]
    assert f"of {LONGEST}" in found.reasons[1]


def test_a_logit_that_is_not_finite_is_no_score(tmp_path: Path) -> None:
    scorer = SequenceClassificationScorer(make_encoder(tmp_path, "bert"))
    word = make_tokenizer("bert").convert_tokens_to_ids("oslo")
    with torch.no_grad():
        scorer._model.get_input_embeddings().weight[word] = torch.nan
    found = scorer.read([ScoreInput("who?", "Oslo"), ScoreInput("who?", "Rome")])
    assert np.isnan(found.logits).tolist() == [True, False]
    assert found.reasons == {0: "the encoder gave nan"}


def test_inputs_with_the_same_ids_are_read_once(folders: dict[str, Path]) -> None:
    scorer = SequenceClassificationScorer(folders["bert"])
    different = [ScoreInput("who?", "Homer"), ScoreInput("who?", "Bach")]
    once, often = scorer.read(different), scorer.read([*different * 20, ScoreInput("WHO ?", "homer")])
    assert often.tokens == once.tokens
    assert (often.logits == np.array([*once.logits.tolist() * 20, once.logits[0]])).all()


def test_batches_hold_every_row_once_within_the_budget() -> None:
    lengths = np.sort(np.random.default_rng(0).integers(3, 60, 200))
    pairs = [PairIds((0,) * n, 1) for n in lengths]
    found = list(batches(pairs, 128))
    assert [pair for batch in found for pair in batch] == pairs
    assert all(len(batch) * len(batch[-1].ids) <= 128 for batch in found)
    assert [len(batch) for batch in batches(pairs[-2:], 1)] == [1, 1]


def test_nothing_in_nothing_out(folders: dict[str, Path]) -> None:
    assert SequenceClassificationScorer(folders["bert"]).score([]).shape == (0,)


def test_the_fingerprint_changes_with_weights_and_use(folders: dict[str, Path], tmp_path: Path) -> None:
    bert = SequenceClassificationScorer(folders["bert"])
    assert SequenceClassificationScorer(folders["bert"], batch_tokens=16).fingerprint == bert.fingerprint
    assert SequenceClassificationScorer(folders["bert"], max_length=16).fingerprint != bert.fingerprint
    assert SequenceClassificationScorer(make_encoder(tmp_path, "bert", seed=1)).fingerprint != bert.fingerprint


def test_positions_behind_the_padding_id_count_for_roberta(folders: dict[str, Path]) -> None:
    assert SequenceClassificationScorer(folders["roberta"]).max_length == LONGEST
    with pytest.raises(UserError, match=f"max_length: {LONGEST + 1} exceeds the {LONGEST}"):
        SequenceClassificationScorer(folders["roberta"], max_length=LONGEST + 1)


def _without(name: str):
    return lambda folder: (folder / name).unlink()


def _two_outputs(folder: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    config.num_labels = 2
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)


def _no_head(folder: Path) -> None:
    transformers.AutoModel.from_pretrained(folder).save_pretrained(folder)


def _other_loss(folder: Path) -> None:
    (folder / "stitch_ray.json").write_text(json.dumps({"loss": "hinge"}))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (_without("stitch_ray.json"), "no classifier of train-scorer"),
        (_without("model.safetensors"), "cannot be loaded"),
        (_two_outputs, "2 outputs"),
        (_no_head, "lacks classifier"),
        (_other_loss, "expected bce or mse"),
    ],
)
def test_a_folder_that_is_no_scorer_is_refused(tmp_path: Path, damage, complaint: str) -> None:
    damage(make_encoder(tmp_path, "bert"))
    with pytest.raises(UserError, match=complaint):
        SequenceClassificationScorer(tmp_path)
