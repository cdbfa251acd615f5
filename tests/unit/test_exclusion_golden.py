"""The published EXAR files: labels without one difference, ROUGE-L to 1e-12, agreement with people, DATASET+ counts."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from stitch_ray.exclusion.datasets import merge
from stitch_ray.exclusion.labelling import label_files
from stitch_ray.exclusion.merging.preflight import answered
from tests import needs

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "exar.json").read_text())


def file(kind: str, name: str) -> str:
    part = "preds" if kind == "predictions" else "merged"
    return str(needs.real_data("exar", name, f"{name}_{part}_metrics_deberta.xlsx"))


@pytest.mark.parametrize("name", ["dolly", "squad"])
@pytest.mark.parametrize("kind", ["predictions", "merged"])
def test_published_labels_come_out_again(tmp_path: Path, kind: str, name: str) -> None:
    golden = GOLDEN[kind][name]
    facts = label_files([file(kind, name)], tmp_path / "run").facts
    assert (facts["rows_in"], facts["rows_quarantined"], facts["correct"]) == (golden["rows"], 0, golden["correct"])
    assert (facts["rule_given"]["num"], facts["rule_given"]["accuracy"]) == (golden["rows"], 1.0)
    assert facts["rouge_compared"] == golden["rows"]
    assert facts["rouge_max_difference"] <= 1e-12
    human = {key: value if isinstance(value, int) else round(value, 4) for key, value in facts["rule_human"].items()}
    assert human == golden["human"]


@pytest.mark.parametrize("name", ["dolly", "squad"])
def test_bert_score_adds_nothing_on_these_files(tmp_path: Path, name: str) -> None:
    human = label_files([file("predictions", name)], tmp_path / "run", without_bert=True).facts["rule_human"]
    assert [round(human["accuracy"], 4), round(human["kappa"], 4)] == GOLDEN["predictions"][name]["without_bert"]


@cache
def predictions(name: str) -> list[Any]:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        label_files([file("predictions", name)], Path(folder) / "run")
        return [answered(row) for row in pq.read_table(Path(folder) / "run" / "labelled.parquet").to_pylist()]


@pytest.mark.parametrize("name", ["dolly", "squad"])
def test_merging_loses_no_pair_and_the_published_way_loses_what_it_lost(name: str) -> None:
    rows = predictions(name)
    whole = merge(rows)
    assert len(whole) == GOLDEN["predictions"][name]["distinct"]
    assert {(one.answer.group_id, one.answer.prediction) for one in whole} == {
        (row.group_id, row.prediction) for row in rows
    }
    assert sum(one.num for one in whole) == len(rows)
    published = merge(rows, "answer")
    golden = GOLDEN["merged"][name]
    assert (len(published), sum(one.answer.label == "CORRECT" for one in published)) == (
        golden["rows"],
        golden["correct"],
    )
