"""`exar label`: answers with their gold answers -> scores, labels, and how these agree with what the files say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stitch_ray.data.corpus import inputs_hash
from stitch_ray.engines.fingerprint import model_fingerprint
from stitch_ray.exclusion.agreement import agreement
from stitch_ray.exclusion.labels import CORRECT, Rule
from stitch_ray.exclusion.rows import Row, read_rows, sources_of
from stitch_ray.exclusion.scoring import Scored, bert_scores, check_bert, score
from stitch_ray.runs import RunFolder, Summary, atomic_path, check_writable, read_manifest, write_json

LABELLED = "labelled.parquet"
LABELLED_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("group_id", pa.string()),
        ("question", pa.string()),
        ("context", pa.string()),
        ("gold", pa.list_(pa.string())),
        ("prediction", pa.string()),
        ("temperature", pa.float64()),
        ("source", pa.string()),
        ("line", pa.int64()),
        ("exact", pa.bool_()),
        ("rouge_p", pa.float64()),
        ("rouge_r", pa.float64()),
        ("rouge_f", pa.float64()),
        ("standard_rouge_p", pa.float64()),
        ("standard_rouge_r", pa.float64()),
        ("standard_rouge_f", pa.float64()),
        ("bert_p", pa.float64()),
        ("bert_r", pa.float64()),
        ("bert_f", pa.float64()),
        ("label", pa.string()),
        ("given_label", pa.string()),
        ("human", pa.string()),
    ]
)
"""One row an answer; scores as in `scoring.Scored`. `label`: what the rule says; `given_label` and `human`: what the
file says, null: nothing."""


def label_files(
    paths: Sequence[str],
    out: Path,
    *,
    rule: Rule = Rule(),
    encoder: str | None = None,
    without_bert: bool = False,
    columns: Mapping[str, str] = {},
    sheet: str | None = None,
    overwrite: bool = False,
) -> Summary:
    """Label the answers in `paths` and write `labelled.parquet` and `agreement.json` to the run folder `out`.

    encoder: folder of the encoder that computes BERTScore; None: the files bring it. `without_bert`: the rule does
    without it, whether they bring it or not. For the rest see `read_rows`. Raises UserError for what only the caller can
    change.
    """
    settings = _settings(rule, encoder, without_bert, columns, sheet)
    work = label_work(paths, rule=rule, encoder=encoder, without_bert=without_bert, columns=columns, sheet=sheet)
    done = read_manifest(out)
    if done is not None and done.get("status") == "done" and done.get("work") == work and not overwrite:
        return _summary(out, done)
    read = read_rows(paths, columns, sheet)
    if without_bert:
        read = replace(read, rows=tuple(replace(row, bert_p=None, bert_r=None, bert_f=None) for row in read.rows))
    elif encoder is None:
        check_bert(read.rows)
    check_writable(out)
    folder = RunFolder.open(out, "exar-label", {"paths": list(paths), **settings}, work, overwrite=overwrite)
    try:
        scored = score(read.rows, rule, bert_scores(encoder) if encoder else None)
        _write(out / LABELLED, labelled_table(read.rows, scored))
        facts = _facts(read.rows, scored)
        write_json(out / "agreement.json", facts)
        folder.write_quarantine(read.quarantined)
        folder.manifest.update(
            rows_in=read.rows_in,
            rows_out=len(read.rows),
            rows_quarantined=len(read.quarantined),
            inputs={source: inputs_hash(_files(source)) for source in sources_of(paths)},
            **facts,
        )
        folder.finish()
    except BaseException as error:
        folder.fail(error)
        raise
    return _summary(out, folder.manifest)


def label_work(
    paths: Sequence[str],
    *,
    rule: Rule,
    encoder: str | None,
    without_bert: bool,
    columns: Mapping[str, str] = {},
    sheet: str | None = None,
) -> dict[str, Any]:
    """What the labels depend on: `work` of the run's manifest."""
    files = [file for source in sources_of(paths) for file in _files(source)]
    return {
        **_settings(rule, encoder, without_bert, columns, sheet),
        "inputs": inputs_hash(files),
        "encoder": model_fingerprint(encoder) if encoder else None,
    }


def _settings(
    rule: Rule, encoder: str | None, without_bert: bool, columns: Mapping[str, str], sheet: str | None
) -> dict[str, Any]:
    return {
        "rule": asdict(rule),
        "encoder": encoder,
        "without_bert": without_bert,
        "columns": dict(columns),
        "sheet": sheet,
    }


def _summary(out: Path, facts: Mapping[str, Any]) -> Summary:
    line = (
        f"exar label: {facts['correct']} of {facts['rows_out']} answers CORRECT ({facts['rows_quarantined']} rows "
        f"quarantined) -> {out / LABELLED}"
    )
    return Summary(out, facts, line, _text(facts))


def labelled_table(rows: Sequence[Row], scored: Sequence[Scored]) -> pa.Table:
    """Rows and their scores, in the order of the rows."""
    values = [
        {
            **{name: getattr(row, name) for name in ("example_id", "group_id", "question", "context", "prediction")},
            "gold": list(row.gold),
            **{name: getattr(row, name) for name in ("temperature", "source", "line", "human")},
            **asdict(found),
            "given_label": row.label,
        }
        for row, found in zip(rows, scored, strict=True)
    ]
    return pa.Table.from_pylist(values, LABELLED_SCHEMA)


def _facts(rows: Sequence[Row], scored: Sequence[Scored]) -> dict[str, Any]:
    ours, given = [one.label for one in scored], [row.label for row in rows]
    human = [row.human for row in rows]
    differences = [
        max(abs(a - b) for a, b in zip(row.rouge, (one.rouge_p, one.rouge_r, one.rouge_f), strict=True))
        for row, one in zip(rows, scored, strict=True)
        if row.rouge is not None
    ]
    return {
        "correct": ours.count(CORRECT),
        "exact": sum(one.exact for one in scored),
        "empty_predictions": sum(not row.prediction.strip() for row in rows),
        "rouge_compared": len(differences),
        "rouge_max_difference": max(differences, default=None),
        "rule_given": agreement(ours, given).to_dict(),
        "rule_human": agreement(ours, human).to_dict(),
        "given_human": agreement(given, human).to_dict(),
    }


def _text(facts: Mapping[str, Any]) -> str:
    lines = []
    for key, name in (
        ("rule_given", "rule / column"),
        ("rule_human", "rule / human"),
        ("given_human", "column / human"),
    ):
        one = facts[key]
        if one["num"]:
            kappa = "-" if one["kappa"] is None else f"{one['kappa']:.4f}"
            lines.append(
                f"{name:<15} {one['num']:>6} answers, {one['fp'] + one['fn']} differ: accuracy {one['accuracy']:.4f}, "
                f"kappa {kappa}; both CORRECT {one['tp']}, only the first {one['fp']}, only the second {one['fn']}, "
                f"both WRONG {one['tn']}"
            )
    if facts["rouge_compared"]:
        largest = facts["rouge_max_difference"]
        lines.append(f"ROUGE-L of {facts['rouge_compared']} rows differs from theirs by {largest:.1e} at most")
    return "\n".join(lines)


def _files(source: str) -> list[str]:
    path = Path(source)
    return [str(path / "answers.parquet"), str(path / "references.parquet")] if path.is_dir() else [source]


def _write(path: Path, table: pa.Table) -> None:
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)
