"""`select`: corpus -> rating logits of every model -> scores -> the best part, on Ray Data."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from stitch_ray import ray_session
from stitch_ray.data.corpus import Corpus, build_corpus, example_ids
from stitch_ray.data.quarantine import Quarantined
from stitch_ray.errors import UserError
from stitch_ray.report.selection import write_report
from stitch_ray.runs import Progress, RunFolder, Step, Summary, atomic_path, fresh_folder
from stitch_ray.selection.agreement import spearman
from stitch_ray.selection.bodies import build_bodies
from stitch_ray.selection.choose import rank_random
from stitch_ray.selection.layout import LayoutName
from stitch_ray.selection.plan import Batch, corpus_items, plan_batches, plan_table, restore_batches
from stitch_ray.selection.preflight import Ready, ReadyModel
from stitch_ray.selection.prompt_sets import PromptSet, prompt_sets
from stitch_ray.selection.rater import Rater, RatingJob, pack_items
from stitch_ray.selection.results import write_results
from stitch_ray.selection.table import Ratings, Scores, load_ratings, score
from stitch_ray.selection.usage import Usage, usage

CALL_LOG_VARIABLE = "STITCH_RAY_CALL_LOG"
"""Names a file outside the run to which every call of a model appends `model, batch, rows`: an audit of the work."""

_MOST_BLOCKS = 1000
_LAYOUT_SAMPLE = 200


def run(ready: Ready, folder: RunFolder, progress: Progress = lambda step: None) -> Summary:
    """Rate what is not rated yet, then make scores, selection and report anew. Needs a Ray session.

    Raises UserError if the cluster is too small or does not share the folder, or the corpus holds nothing usable.
    """
    check_cluster(ready, folder.path)
    corpus = _read_corpus(ready, folder.path, progress)
    ids = example_ids(corpus)
    folder.disposable = False
    jobs = [_rating_jobs(ready, model, folder.path, corpus) for model in ready.models]
    batches = _plan(folder.path, corpus, ids, jobs[0][0], progress)
    used = [_rate(of_model, corpus, batches, progress) for of_model in jobs]
    files = [[job.rating_file(batch.batch_id) for job in of_model for batch in batches] for of_model in jobs]

    ratings = load_ratings(files, ready.prompt_hashes, ready.config.rating.num_ratings)
    quarantined = [*corpus.quarantined, *_unrated(corpus, ids, ratings.bad)]
    if not ratings.example_ids:
        folder.write_quarantine(quarantined)
        raise UserError(f"no row has finite logits from every model; first: {next(iter(ratings.bad.values()))}")
    scores = score(ratings, ready.config, [model.parameters for model in ready.models])
    agreement = None
    if ready.config.report.compare_layouts:
        agreement = _compare_layouts(ready, folder.path, corpus, batches, ratings, scores, progress)
        folder.manifest["layout_agreement"] = agreement
    tokens_of = {name: item.tokens for batch in batches for item in batch.items for name in item.example_ids}
    outcome = write_results(ready, folder.path, corpus, ids, ratings, scores, tokens_of)
    folder.write_quarantine(quarantined)
    seconds, tokens = sum(usage.seconds for usage in used), sum(usage.tokens for usage in used)
    folder.manifest.update(
        rows_in=corpus.rows_in,
        rows_out=len(ratings.example_ids),
        rows_quarantined=len(quarantined),
        rows_dropped={},
        records_written=len(outcome.chosen),
        inputs=dict.fromkeys(ready.sources, ready.work["data"]["inputs"]),
        tokens=tokens,
        tokens_per_second=round(tokens / seconds, 1) if seconds else None,
        contents=sum(len(batch.items) for batch in batches),
        truncated=int(ratings.truncated.sum()),
        rating=[asdict(usage) for usage in used],
        seed=ready.config.seed,
    )
    write_report(ready, folder, ratings, scores, outcome, quarantined, corpus, agreement)
    folder.finish()
    line = (
        f"select: kept {len(outcome.chosen)} of {len(ratings.example_ids)} rated rows "
        f"({corpus.rows_in} read, {len(quarantined)} quarantined) -> {folder.path / 'selected.jsonl'}"
    )
    return Summary(folder.path, folder.manifest, line)


def check_cluster(ready: Ready, path: Path) -> None:
    """Refuse, with the numbers, a plan that does not fit the cluster or a folder that its nodes do not share."""
    for model in ready.models:
        config = model.config
        needed = {"CPU": float(config.replicas * config.num_threads)}
        if config.num_gpus:
            needed["GPU"] = config.replicas * config.num_gpus
        what = f"model {config.name} with replicas: {config.replicas}"
        ray_session.require(needed, what, hint="Lower replicas, num_threads or num_gpus")
    ray_session.require_shared(path, [*ready.sources, *(model.config.path for model in ready.models)])


def _read_corpus(ready: Ready, path: Path, progress: Progress) -> Corpus:
    progress(Step(stage="reading", done=0, total=None))
    corpus = build_corpus(path / "work" / "corpus", ready.config.data, ready.sources)
    progress(Step(stage="reading", done=corpus.rows_in, total=corpus.rows_in))
    return corpus


def _rating_jobs(ready: Ready, model: ReadyModel, path: Path, corpus: Corpus) -> list[RatingJob]:
    """One job for every set of prompts that the ratings of `model` are, or will be, made of."""
    sets = prompt_sets(path, model.config.name, ready.prompts)
    return [_job(model, prompts, path, corpus, path / "ratings", model.encoder.layout) for prompts in sets]


def _job(
    model: ReadyModel, prompts: PromptSet, path: Path, corpus: Corpus, ratings: Path, layout: LayoutName
) -> RatingJob:
    encoder = replace(model.encoder, prompts=prompts.texts, layout=layout)
    return RatingJob(
        model=model.config,
        encoder=encoder,
        prompts=prompts,
        corpus_files=tuple(str(file) for file in corpus.files),
        bodies=path / "work" / f"bodies-{encoder.key}",
        ratings=ratings,
        attempts=fresh_folder(path / "work" / "attempts"),
        call_log=os.environ.get(CALL_LOG_VARIABLE),
    )


def _compare_layouts(
    ready: Ready,
    path: Path,
    corpus: Corpus,
    batches: Sequence[Batch],
    ratings: Ratings,
    scores: Scores,
    progress: Progress,
) -> dict[str, float]:
    """Spearman's rank correlation, model by model, of sentence scores in both layouts on a seeded sample of contents."""
    config = ready.config
    other: LayoutName = "content_first" if config.rating.layout == "prompt_first" else "prompt_first"
    items = [item for batch in batches for item in batch.items]
    order = rank_random([item.content_id for item in items], config.seed)[:_LAYOUT_SAMPLE]
    sample = plan_batches([items[position] for position in sorted(order)])
    found = {}
    for number, model in enumerate(ready.models):
        prompts = PromptSet(ready.prompts, tuple(range(len(ready.prompts))))
        job = _job(model, prompts, path, corpus, path / "work" / f"{other}-{config.seed}-{prompts.name}", other)
        _rate([job], corpus, sample, progress)
        files = [job.rating_file(batch.batch_id) for batch in sample]
        again = load_ratings([files], ready.prompt_hashes, config.rating.num_ratings)
        rating = config.rating.model_copy(update={"weights": "parameters"})  # those of the config are for all models
        alone = config.model_copy(update={"models": [model.config], "rating": rating})
        sentence = score(again, alone, [1.0]).sentence[:, 0]
        first = dict(zip(ratings.example_ids, scores.sentence[:, number], strict=True))
        both = [(first[name], value) for name, value in zip(again.example_ids, sentence, strict=True) if name in first]
        found[model.config.name] = spearman(*np.array(both).T)
    return found


def _plan(path: Path, corpus: Corpus, ids: Sequence[str], job: RatingJob, progress: Progress) -> list[Batch]:
    """The batches of the corpus: those in `plan.parquet` if it is there, else planned and written now.

    Token lengths are those of the first model's tokenizer.
    """
    file = path / "plan.parquet"
    if not file.exists():
        _tokenise(job, corpus, progress)
    planned = pq.read_table(file) if file.exists() else None
    items = corpus_items(corpus, ids, job.bodies if planned is None else None)
    if planned is not None:
        return restore_batches(planned, items)
    batches = plan_batches(items)
    with atomic_path(file) as temporary:
        pq.write_table(plan_table(batches), temporary)
    return batches


def _tokenise(job: RatingJob, corpus: Corpus, progress: Progress) -> None:
    stage = f"tokenising for {job.model.name}"
    progress(Step(stage=stage, done=0, total=corpus.num_rows))
    build_bodies(job.bodies, corpus, job.encoder)
    progress(Step(stage=stage, done=corpus.num_rows, total=corpus.num_rows))


def _rate(jobs: Sequence[RatingJob], corpus: Corpus, batches: Sequence[Batch], progress: Progress) -> Usage:
    """Rate every batch that has no file yet; return what that cost."""
    total = sum(batch.rows for batch in batches)
    stats: list[dict[str, Any]] = []
    seconds = 0.0
    for job in jobs:
        pending = [batch for batch in batches if not job.is_rated(batch.batch_id)]
        if pending:
            _tokenise(job, corpus, progress)
            started = time.monotonic()
            stats += _rate_pending(job, pending, total, progress)
            seconds += time.monotonic() - started
    return usage(jobs[0].model.name, stats, seconds)


def _rate_pending(job: RatingJob, pending: Sequence[Batch], total: int, progress: Progress) -> list[dict[str, Any]]:
    import ray.data

    model = job.model
    stage = f"rating with {model.name}"
    done = total - sum(batch.rows for batch in pending)
    progress(Step(stage=stage, done=done, total=total))
    items = [{"batch_id": batch.batch_id, "items": pack_items(batch.items)} for batch in pending]
    dataset = ray.data.from_items(items, override_num_blocks=min(len(items), _MOST_BLOCKS)).map_batches(
        Rater,
        batch_size=1,
        fn_constructor_args=(job,),
        compute=ray.data.ActorPoolStrategy(size=min(model.replicas, len(items))),
        num_cpus=model.num_threads,
        num_gpus=model.num_gpus or None,
    )
    stats: list[dict[str, Any]] = []
    for row in dataset.iter_rows():
        if row["error"]:
            raise RuntimeError(row["error"])
        stats.append(row)
        done += int(row["rows"])
        progress(Step(stage=stage, done=done, total=total, tokens=sum(int(stat["tokens"]) for stat in stats)))
    return stats


def _unrated(corpus: Corpus, ids: Sequence[str], bad: dict[str, str]) -> list[Quarantined]:
    """Quarantine entries of the examples that a model gave no finite logits for."""
    if not bad:
        return []
    table = corpus.column_table(["source", "line", "raw"])
    return [
        Quarantined.of(
            table["source"][row].as_py(), table["line"][row].as_py(), bad[name], table["raw"][row].as_py(), name
        )
        for row, name in enumerate(ids)
        if name in bad
    ]
