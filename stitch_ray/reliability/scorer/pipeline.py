"""`train-scorer`: answers -> encoder on Ray Train -> stack with signals -> isotonic -> scorer.json, and how good it is."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stitch_ray import ray_session
from stitch_ray.config.reliability import ANSWER_SPLITS
from stitch_ray.data.quarantine import Quarantined
from stitch_ray.data.trained_on import read_trained_on, write_trained_on
from stitch_ray.engines.pretrained import load_tokenizer
from stitch_ray.errors import UserError
from stitch_ray.reliability.baselines import baseline_confidences
from stitch_ray.reliability.evaluation import Evaluation, evaluate, paired_difference
from stitch_ray.reliability.scorer.file import MODEL, ScorerFile
from stitch_ray.reliability.scorer.inputs import InputTooLong, encode_pairs
from stitch_ray.reliability.scorer.preflight import Ready
from stitch_ray.reliability.scorer.scoring import encoder_logits, inputs_of, score_answers
from stitch_ray.reliability.scorer.stack import fit_scorer
from stitch_ray.reliability.scorer.training import EncoderOutcome, TrainingRow, train_encoder
from stitch_ray.reliability.tables import Answers, read_answers, served
from stitch_ray.report.reliability import ExampleFacts
from stitch_ray.report.scorer import telling, write_report
from stitch_ray.runs import Progress, RunFolder, Step, Summary, atomic_path, write_json

SCORES, METRICS = "scores.parquet", "metrics.json"
SCORER = "scorer"
"""Name of the finished scorer among the rows of an evaluation."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Usable:
    """The labelled answers of a run: those to train on, those of the other splits, and what became of the rest."""

    train: Answers
    held: Answers
    rows: tuple[TrainingRow, ...]
    quarantined: tuple[Quarantined, ...]
    dropped: dict[str, int]


def run(ready: Ready, folder: RunFolder, progress: Progress = lambda step: None) -> Summary:
    """Train the encoder if there is one and it is not trained yet, then make everything after it anew. Needs Ray.

    Raises UserError for answers that no scorer can be made of: none labelled, or of one class in a split.
    """
    config, path = ready.config, folder.path
    check_cluster(ready, path)
    progress(Step(stage="reading", done=0, total=None, unit="answers"))
    answers = read_answers(config.answers, config.split)
    usable = _usable(answers, ready)
    folder.write_quarantine(usable.quarantined)
    outcome = None
    if config.encoder:
        folder.disposable = False
        outcome = train_encoder(config, usable.rows, path, progress=progress)
    scorer = _fit(ready, path, usable, progress)
    folder.disposable = False
    write_trained_on(path, [*_learned_from(usable), *read_trained_on(path / MODEL)])

    tested = _of_splits(usable.held, "test")
    held = score_answers(path, usable.held, progress=progress, **_where(ready))
    _write_scores(path / SCORES, usable.held, held)
    on_test = _measure(ready, usable.held.take(tested), {name: values[tested] for name, values in held.items()})
    further = [_further(ready, path, test.name, test.answers, progress) for test in config.tests]

    folder.manifest.update(
        rows_in=answers.rows_in,
        rows_out=len(usable.train) + len(usable.held),
        rows_quarantined=len(usable.quarantined),
        rows_dropped=usable.dropped,
        inputs=dict.fromkeys(ready.sources, ready.work["answers"]),
        splits={name: _counts(usable, name) for name in ANSWER_SPLITS},
        scorer=scorer.fingerprint,
        answers_from=answers.answers_from,
        encoder=None if outcome is None else outcome.facts(),
        notes=[*scorer.notes, *(outcome.notes if outcome else ())],
        seed=config.seed,
    )
    write_json(path / METRICS, {"test": on_test.as_dict(), **{one["name"]: one["metrics"] for one in further}})
    folder.manifest.update(status="done", seconds=round(time.monotonic() - folder.started, 3))
    _report(ready, folder, usable, held, on_test, further, scorer, outcome)
    folder.finish()
    return Summary(path, folder.manifest, _line(on_test, folder), _tables(on_test, further))


def check_cluster(ready: Ready, path: Path) -> None:
    """Refuse, with the numbers, workers that do not fit the cluster or a folder that its nodes do not share."""
    config, training = ready.config, ready.config.training
    needed = {"CPU": float(config.replicas)}
    if config.encoder:
        needed["CPU"] = float(max(config.replicas, training.workers * training.resources.num_threads))
        if training.resources.num_gpus:
            needed["GPU"] = training.workers * training.resources.num_gpus
    ray_session.require(needed, f"training with workers: {training.workers}", hint="Lower training.workers or replicas")
    ray_session.require_shared(path, [*ready.sources, *([config.encoder.path] if config.encoder else [])])


def _usable(answers: Answers, ready: Ready) -> _Usable:
    """Labelled answers: of all kinds to train on, of the served kind elsewhere. Encoded where there is an encoder."""
    config = ready.config
    labels, splits, kinds = answers.column("label"), answers.column("split"), served(answers, config.serve_kind)
    labelled = ~np.isnan(labels)
    training = splits == "train"
    if not labelled.any():
        raise UserError("answers: none has a label or says whether it is correct, so there is nothing to learn from")
    dropped = {
        "not labelled": int((~labelled).sum()),
        "of another kind than is served": int((labelled & ~training & ~kinds).sum()),
        "exact repeats": answers.rows_in - len(answers) - len(answers.quarantined),
    }
    rows: list[TrainingRow] = []
    bad = list(answers.quarantined)
    keep = labelled & (training | kinds)
    if config.encoder:
        tokenizer = load_tokenizer(config.encoder.path, trust_remote_code=config.encoder.trust_remote_code)
        chosen = np.flatnonzero(keep)
        ids, groups = answers.column("answer_id"), answers.column("group_id")
        pairs = encode_pairs(tokenizer, inputs_of(answers.take(chosen)), config.encoder.max_length)
        for row, pair in zip(chosen, pairs, strict=True):
            if isinstance(pair, InputTooLong):
                keep[row] = False
                text = answers.table["answer"][int(row)].as_py()
                bad.append(Quarantined.of("answers", int(row) + 1, str(pair), text, ids[row]))
            elif training[row]:
                rows.append(TrainingRow(ids[row], groups[row], pair.ids, pair.second, float(labels[row])))
        if not rows:
            raise UserError("answers: the train split holds no labelled answer; raise split.train or give more answers")
    return _Usable(
        train=answers.take(keep & training),
        held=answers.take(keep & ~training),
        rows=tuple(rows),
        quarantined=tuple(bad),
        dropped={reason: count for reason, count in dropped.items() if count},
    )


def _fit(ready: Ready, path: Path, usable: _Usable, progress: Progress) -> ScorerFile:
    """Stack and isotonic step, each on its own split, into `scorer.json`."""
    config = ready.config
    both = usable.held.take(_of_splits(usable.held, "stack", "isotonic"))
    logits = None
    if config.encoder:
        length = config.encoder.max_length
        logits = encoder_logits(path / MODEL, both, max_length=length, progress=progress, **_where(ready))
    scorer = fit_scorer(
        path,
        both,
        logits,
        signals=config.signals,
        loss=config.training.loss,
        max_length=config.encoder.max_length if config.encoder else None,
        seed=config.seed,
    )
    scorer.save(path)
    return scorer


def _where(ready: Ready) -> dict[str, Any]:
    """What the encoder scores on."""
    config = ready.config
    gpus = config.training.resources.num_gpus if config.encoder else 0.0
    return {"batch_tokens": config.batch_tokens, "replicas": config.replicas, "num_gpus": gpus}


def _learned_from(usable: _Usable) -> list[str]:
    """Questions that shaped the scorer, and which no threshold may be chosen on."""
    held = usable.held.take(_of_splits(usable.held, "stack", "isotonic"))
    return sorted({*usable.train.column("group_id"), *held.column("group_id")})


def _of_splits(answers: Answers, *names: str) -> NDArray[np.bool_]:
    return np.isin(answers.column("split").astype(str), names)


def _confidences(answers: Answers, scores: dict[str, Floats], seed: int) -> dict[str, Floats]:
    """The scorer and its steps beside what it has to beat. `stack` ranks more finely than the probability made of it."""
    own = {SCORER: scores["confidence"], "stack": scores["stack"], "encoder": scores["encoder"]}
    return {
        **{name: values for name, values in own.items() if not np.isnan(values).all()},
        **baseline_confidences(answers, seed),
    }


def _measure(ready: Ready, answers: Answers, scores: dict[str, Floats]) -> Evaluation:
    config = ready.config.evaluation
    if not len(answers):
        raise UserError("answers: the test split holds no labelled answer; raise split.test or give more answers")
    return evaluate(
        _confidences(answers, scores, ready.config.seed),
        1.0 - answers.column("correct").astype(np.float64),
        groups=answers.column("group_id"),
        probabilities=(SCORER,),
        bootstrap=config.bootstrap,
        risks=config.risks,
        ece_bins=config.ece_bins,
        seed=ready.config.seed,
    )


def _further(ready: Ready, path: Path, name: str, paths: Sequence[str], progress: Progress) -> dict[str, Any]:
    """The finished scorer on another set, without questions that shaped it."""
    answers = read_answers(paths, None)
    labelled = ~np.isnan(answers.column("label"))
    seen = np.isin(answers.column("group_id").astype(str), sorted(read_trained_on(path)))
    usable = answers.take(labelled & ~seen)
    if not len(usable):
        raise UserError(f"tests.{name}: of {len(answers)} answers none is labelled and of a question not learned from")
    scores = score_answers(path, usable, progress=progress, check=False, **_where(ready))
    found = _measure(ready, usable, scores)
    facts = {
        "name": name,
        "answers": len(usable),
        "questions": len(set(usable.column("group_id"))),
        "correct": float(usable.column("correct").astype(bool).mean()),
        "majority": _majority(usable),
        "learned_from": int((labelled & seen).sum()),
        "not_labelled": int((~labelled).sum()),
    }
    return {**facts, "metrics": {**facts, **found.as_dict()}, "evaluation": found, "test": _test(ready, usable, scores)}


def _majority(answers: Answers) -> float:
    """Accuracy of always giving the more frequent verdict."""
    share = float(answers.column("correct").astype(bool).mean())
    return max(share, 1 - share)


def _test(ready: Ready, answers: Answers, scores: dict[str, Floats]) -> dict[str, Any]:
    """Arrays behind the figures of a test set."""
    return {
        "residual": 1.0 - answers.column("correct").astype(np.float64),
        "confidences": _confidences(answers, scores, ready.config.seed),
        "probability": scores["confidence"],
        "before": 1 / (1 + np.exp(-scores["stack"])),
        "groups": answers.column("group_id"),
    }


def _counts(usable: _Usable, split: str) -> dict[str, Any]:
    answers = usable.train if split == "train" else usable.held.take(_of_splits(usable.held, split))
    correct = answers.column("correct").astype(bool)
    return {
        "answers": len(answers),
        "questions": len(set(answers.column("group_id"))),
        "correct": round(float(correct.mean()), 4) if len(answers) else None,
        "kinds": dict(Counter(answers.column("kind"))),
    }


def _write_scores(file: Path, answers: Answers, scores: dict[str, Floats]) -> None:
    """Scores of everything the encoder was not trained on, by answer id."""
    columns = {
        name: answers.table[name] for name in ("answer_id", "example_id", "group_id", "split", "label", "correct")
    }
    columns |= {name: pa.array(values, pa.float64(), from_pandas=True) for name, values in scores.items()}
    with atomic_path(file) as temporary:
        pq.write_table(pa.table(columns), temporary)


def _report(
    ready: Ready,
    folder: RunFolder,
    usable: _Usable,
    held: dict[str, Floats],
    on_test: Evaluation,
    further: Sequence[dict[str, Any]],
    scorer: ScorerFile,
    outcome: EncoderOutcome | None,
) -> None:
    tested = _of_splits(usable.held, "test")
    answers, scores = usable.held.take(tested), {name: values[tested] for name, values in held.items()}
    facts: Any = {
        "manifest": folder.manifest,
        "config": ready.config.model_dump(mode="json"),
        "quarantined": usable.quarantined,
        "notes": folder.manifest["notes"],
        "scorer": SCORER,
        "splits": folder.manifest["splits"],
        "evaluation": on_test.as_dict(),
        "differences": _differences(ready, answers, scores),
        "majority": _majority(answers),
        "test": _test(ready, answers, scores),
        "weights": scorer.weights(),
        "intercept": scorer.intercept,
        "fingerprint": scorer.fingerprint,
        "answers_from": scorer.answers_from,
        "tests": [
            {**{key: one[key] for key in ("name", "answers", "questions", "correct", "majority", "test")},
             "evaluation": one["evaluation"].as_dict()}
            for one in further
        ],
        "examples": telling(_examples(answers, scores["confidence"])),
    }  # fmt: skip
    if outcome is not None:
        facts["encoder"] = outcome.report_facts(folder.path)
    write_report(folder.path / "report.html", facts)


def _differences(ready: Ready, answers: Answers, scores: dict[str, Floats]) -> list[dict[str, Any]]:
    """How much better the stack ranks than the encoder and every baseline, on the same resamples."""
    residual, config = 1.0 - answers.column("correct").astype(np.float64), ready.config
    own = scores["stack"]
    found = []
    for name, values in _confidences(answers, scores, config.seed).items():
        if name not in (SCORER, "stack") and (np.isfinite(values) & np.isfinite(own)).any():
            difference = paired_difference(
                own,
                values,
                residual,
                "auroc",
                groups=answers.column("group_id"),
                bootstrap=config.evaluation.bootstrap,
                seed=config.seed,
            )
            found.append({"first": "stack", "second": name, "metric": "auroc", "difference": asdict(difference)})
    return found


def _examples(answers: Answers, confidence: Floats) -> list[ExampleFacts]:
    names = ("question", "context", "answer", "label", "correct", "task", "answer_id")
    return [
        {**row, "confidence": None if np.isnan(value) else float(value)}
        for row, value in zip(answers.table.select(names).to_pylist(), confidence, strict=True)
    ]


def _tables(on_test: Evaluation, further: Sequence[dict[str, Any]]) -> str:
    texts = [f"test split\n{on_test.table()}"]
    for one in further:
        texts.append(
            f"\n{one['name']}: {one['answers']} answers to {one['questions']} questions, majority accuracy "
            f"{one['majority']:.3f}\n{one['evaluation'].table()}"
        )
    return "\n".join(texts)


def _line(on_test: Evaluation, folder: RunFolder) -> str:
    auroc = on_test.row(SCORER).metrics["auroc"]
    splits = folder.manifest["splits"]
    return (
        f"train-scorer: AUROC {auroc.value:.3f} ({auroc.low:.3f} to {auroc.high:.3f}) on {splits['test']['answers']} "
        f"unseen test answers, trained on {splits['train']['answers']} -> {folder.path / 'scorer.json'}"
    )
