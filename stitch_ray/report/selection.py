"""`report.html` of a `select` run: what was kept, how that differs from the rest, and how far the scores agree."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stitch_ray.data.corpus import Corpus, messages_of
from stitch_ray.data.quarantine import Quarantined
from stitch_ray.report import figures
from stitch_ray.report.html import number, percent, render
from stitch_ray.runs import RunFolder, write_text
from stitch_ray.selection.agreement import rank_correlations
from stitch_ray.selection.choose import overlap, rank_by
from stitch_ray.selection.layout import contents
from stitch_ray.selection.preflight import Ready
from stitch_ray.selection.results import Outcome
from stitch_ray.selection.table import Ratings, Scores

Floats = NDArray[np.float64]

_MOST_TASKS = 20
_MOST_PROMPTS = 12
_MOST_REASONS = 20
_MOST_QUARANTINED = 20
_SHORT = 600
_LONG = 20_000


def write_report(
    ready: Ready,
    folder: RunFolder,
    ratings: Ratings,
    scores: Scores,
    outcome: Outcome,
    quarantined: Sequence[Quarantined],
    corpus: Corpus,
    layout_agreement: Mapping[str, float] | None = None,
) -> None:
    """Write `report.html`. `folder.manifest` must hold the counts already.

    layout_agreement: rank correlation of the two layouts, by model or whatever else it was computed for.
    """
    config, manifest = ready.config, folder.manifest
    names = [model.config.name for model in ready.models]
    kept = np.zeros(len(ratings.example_ids), np.bool_)
    kept[outcome.chosen] = True
    shares = _favourites(ratings.logits)
    agreement = [rank_correlations(scores.token[:, index]) for index in range(len(names))]
    page = render(
        "selection.html.jinja",
        config=config,
        manifest=manifest,
        ready=ready,
        run=folder.path.resolve().name,
        names=names,
        num_rated=len(kept),
        num_kept=len(outcome.chosen),
        tiles=_tiles(manifest),
        notes=_notes(names, manifest, outcome, kept, ratings, shares, agreement),
        distributions=_distributions(ready, names, scores, kept),
        most_prompts=_MOST_PROMPTS,
        lengths=figures.lengths(outcome.tokens, kept, "Length of kept and dropped examples, and share kept"),
        length_means=[float(outcome.tokens[mask].mean()) if mask.any() else None for mask in (kept, ~kept)],
        tasks=_tasks(corpus, outcome, kept),
        kept_share=float(kept.mean()),
        agreement=_agreement(ready, names, scores, outcome, agreement),
        between_models=_between_models(names, scores),
        layout_agreement=layout_agreement,
        favourites=_favourite_figures(names, shares),
        baselines=_baselines(config.select.method, outcome, len(kept)),
        examples=_examples(config.report.examples, corpus, ratings, outcome, kept),
        reasons=Counter(re.sub(r"\d+(?:[.,]\d+)*", "N", row.reason) for row in quarantined).most_common(_MOST_REASONS),
        quarantined=quarantined[:_MOST_QUARANTINED],
        num_quarantined=len(quarantined),
        config_text=(folder.path / "config.yaml").read_text("utf-8"),
    )
    write_text(folder.path / "report.html", page)


def _favourites(logits: NDArray[np.float32]) -> Floats:
    """How often each rating is the favourite, the lowest winning ties. (models, turns, prompts, ratings) -> no turns."""
    best = logits.argmax(axis=-1)
    return np.stack([(best == rating).mean(axis=1) for rating in range(logits.shape[-1])], axis=-1)


def _tiles(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("rows read", number(manifest["rows_in"])),
        ("rated", number(manifest["rows_out"])),
        ("kept", number(manifest["records_written"])),
        ("quarantined", number(manifest["rows_quarantined"])),
        ("distinct contents", number(manifest["contents"])),
        ("truncated turns", number(manifest["truncated"])),
        ("tokens rated in this run", number(manifest["tokens"])),
        ("tokens a second", number(manifest["tokens_per_second"])),
    ]


def _notes(
    names: Sequence[str],
    manifest: Mapping[str, Any],
    outcome: Outcome,
    kept: NDArray[np.bool_],
    ratings: Ratings,
    shares: Floats,
    agreement: Sequence[Floats],
) -> list[str]:
    """What a reader must not miss, as sentences."""
    notes = []
    if len(kept) > 1 and np.ptp(outcome.decisive) < 1e-12:
        notes.append("All deciding scores are equal: by score, the order is that of the ids and says nothing.")
    for name, share, between in zip(names, shares, agreement, strict=True):
        stuck = np.argwhere(share >= 0.9)
        if len(kept) > 1 and len(stuck):
            found = ", ".join(
                f"{rating + 1} (prompt {prompt}, {share[prompt, rating]:.0%})" for prompt, rating in stuck
            )
            notes.append(f"{name} nearly always favours one rating: {found}.")
        pairs = between[np.triu_indices(len(between), 1)]
        if len(pairs) and np.isfinite(pairs).any() and np.nanmean(pairs) < 0.3:
            notes.append(f"The prompts hardly agree for {name}: mean rank correlation {np.nanmean(pairs):.2f}.")
    ratio = outcome.tokens[kept].mean() / max(1.0, outcome.tokens.mean())
    if not 0.67 <= ratio <= 1.5:
        notes.append(f"Kept examples are {ratio:.2f} times as long as the average: see the longest-rows baseline.")
    truncated, turns = int(ratings.truncated.sum()), len(ratings.truncated)
    if truncated > 0.05 * turns:
        notes.append(f"{percent(truncated / turns)} of the turns were truncated to fit the model.")
    unusable, read = manifest["rows_quarantined"], manifest["rows_in"]
    if unusable > 0.05 * read:
        notes.append(f"{percent(unusable / read)} of the rows read are in quarantine.")
    return notes


def _distributions(
    ready: Ready, names: Sequence[str], scores: Scores, kept: NDArray[np.bool_]
) -> list[tuple[str, str, str]]:
    """(title, caption, figure) for every level."""
    decisive, token_prompt = ready.config.level, ready.config.rating.token_prompt

    def mark(level: str) -> str:
        return "This score decided. " if level == decisive else ""

    shown = range(min(_MOST_PROMPTS, scores.token.shape[2]))
    found = []
    for index, name in enumerate(names):
        series = {f"prompt {prompt}": scores.token[:, index, prompt] for prompt in shown}
        caption = f"{mark('token')}The token level is prompt {token_prompt}." if index == 0 else ""
        title = f"Token level: {name}"
        found.append((title, caption, figures.histograms(series, kept, "token score", title)))
    for index, name in enumerate(names):
        title = f"Sentence level: {name}"
        figure = figures.histograms({name: scores.sentence[:, index]}, kept, "sentence score", title)
        found.append((title, mark("sentence"), figure))
    if len(names) > 1:
        title = "Model level: all models together"
        figure = figures.histograms({"model": scores.model}, kept, "model score", title)
        found.append((title, mark("model"), figure))
    return found


def _tasks(corpus: Corpus, outcome: Outcome, kept: NDArray[np.bool_]) -> dict[str, Any] | None:
    """The most frequent tasks with (name, rows, kept, share); None when no row names its task."""
    column = corpus.column_table(["task"])["task"].to_pylist()
    tasks = [column[row] for row in outcome.corpus_rows]
    if not any(tasks):
        return None
    total, chosen = Counter(tasks), Counter(task for task, good in zip(tasks, kept, strict=True) if good)
    order = sorted(total, key=lambda task: (-total[task], task or ""))
    return {
        "rows": [(t or "(no task)", total[t], chosen[t], chosen[t] / total[t]) for t in order[:_MOST_TASKS]],
        "more": len(order[_MOST_TASKS:]),
        "rows_in_more": sum(total[task] for task in order[_MOST_TASKS:]),
    }


def _agreement(
    ready: Ready, names: Sequence[str], scores: Scores, outcome: Outcome, between_prompts: Sequence[Floats]
) -> list[tuple[str, str, str]]:
    """(title, caption, heat map): prompts of each model, then levels and length."""
    found = []
    if scores.token.shape[2] > 1:
        for name, matrix in zip(names, between_prompts, strict=True):
            shown = matrix[:_MOST_PROMPTS, :_MOST_PROMPTS]
            labels = [f"prompt {prompt}" if len(shown) <= 5 else str(prompt) for prompt in range(len(shown))]
            title = f"Between prompts: {name}"
            found.append((title, "", figures.correlations(shown, labels, title)))
    columns = {"token level": scores.token[:, 0, ready.config.rating.token_prompt]}
    for index, name in enumerate(names):
        columns["sentence level" if len(names) == 1 else name] = scores.sentence[:, index]
    if len(names) > 1:
        columns["model level"] = scores.model
    columns["length in tokens"] = outcome.tokens.astype(np.float64)
    title = "Between levels, and with length"
    matrix = rank_correlations(np.stack(list(columns.values()), axis=1))
    caption = "A strong colour in the row of the length: that score mostly measures length."
    if len(names) > 1:
        caption += f" Token level: {names[0]}. Rows with the name of a model: its sentence level."
    found.append((title, caption, figures.correlations(matrix, list(columns), title)))
    return found


def _between_models(names: Sequence[str], scores: Scores) -> list[tuple[str, str, float]]:
    matrix = rank_correlations(scores.sentence)
    return [(names[a], names[b], float(matrix[a, b])) for a in range(len(names)) for b in range(a + 1, len(names))]


def _favourite_figures(names: Sequence[str], shares: Floats) -> list[tuple[str, str]]:
    ratings = [str(rating + 1) for rating in range(shares.shape[-1])]
    found = []
    for name, share in zip(names, shares, strict=True):
        prompts = [f"prompt {prompt}" for prompt in range(min(_MOST_PROMPTS, len(share)))]
        title = f"Favourite rating: {name}"
        found.append((name, figures.shares(share[:_MOST_PROMPTS], prompts, ratings, title, "rating")))
    return found


def _baselines(method: str, outcome: Outcome, rated: int) -> list[dict[str, Any]]:
    """One row a way to choose; what was chosen first, all rated rows last."""

    def row(name: str, rows: Sequence[int], compared: bool = True) -> dict[str, Any]:
        return {
            "name": name,
            "count": len(rows),
            "overlap": overlap(outcome.chosen, rows) if compared else None,
            "chance": len(rows) / rated if compared else None,
            "score": float(outcome.decisive[list(rows)].mean()),
            "tokens": float(outcome.tokens[list(rows)].mean()),
        }

    what = {"score": "best score", "random": "random", "longest": "longest"}
    return [
        row(f"this selection ({what.get(method, method)})", outcome.chosen, compared=False),
        *[row(what[name], rows) for name, rows in outcome.baselines.items() if name != method],
        row("all rated rows", range(rated), compared=False),
    ]


def _examples(
    count: int, corpus: Corpus, ratings: Ratings, outcome: Outcome, kept: NDArray[np.bool_]
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Up to `count` examples from each of top, middle and bottom of the ranking by score, none of them twice."""
    order = rank_by(outcome.decisive, ratings.example_ids).tolist()
    top = min(count, len(order))
    bottom = max(top, len(order) - count)
    start = max(top, (top + bottom - count) // 2)
    places = {
        "Top": range(top),
        "Middle": range(start, min(start + count, bottom)),
        "Bottom": range(bottom, len(order)),
    }
    ranks = [rank for ranks in places.values() for rank in ranks]
    if not ranks:
        return []
    columns = ["messages", "context", "source", "line", "task"]
    rows = corpus.take(outcome.corpus_rows[[order[rank] for rank in ranks]], columns)
    shown = {}
    for rank, row in zip(ranks, rows, strict=True):
        position = order[rank]
        last = contents(messages_of(row), row["context"])[-1]
        shown[rank] = {
            "id": ratings.example_ids[position],
            "rank": rank + 1,
            "score": float(outcome.decisive[position]),
            "tokens": int(outcome.tokens[position]),
            "kept": bool(kept[position]),
            "place": f"{row['source']}:{row['line']}",
            "task": row["task"],
            "texts": [("Instruction", _text(last.instruction)), ("Response", _text(last.response))],
        }
    return [(name, [shown[rank] for rank in of_place]) for name, of_place in places.items() if len(of_place)]


def _text(text: str) -> dict[str, Any]:
    """A text for showing: the first part, and the whole (within reason) if that is more."""
    # Splitting between a letter and its accent is of no consequence for an excerpt; 20% more is not worth a click.
    short = text if len(text) <= _SHORT * 1.2 else text[:_SHORT].rstrip() + " …"
    return {
        "short": short,
        "whole": None if short is text else text[:_LONG],
        "characters": len(text),
        "cut": len(text) > _LONG,
    }
