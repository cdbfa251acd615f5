"""The report of `select`, on small objects made here: no Ray, no model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stitch_ray.config.select import SelectConfig
from stitch_ray.data.corpus import Corpus
from stitch_ray.data.quarantine import Quarantined
from stitch_ray.records import CORPUS_SCHEMA
from stitch_ray.report import figures
from stitch_ray.report.html import percent
from stitch_ray.report.selection import write_report
from stitch_ray.runs import RunFolder
from stitch_ray.selection.agreement import rank_correlations
from stitch_ray.selection.bodies import EncoderSpec
from stitch_ray.selection.preflight import Ready, ReadyModel
from stitch_ray.selection.results import write_results
from stitch_ray.selection.table import Ratings, score
from stitch_ray.selection.usage import Usage
from tests.page import Page

EVIL = '</div><script>alert("x")</script><img src=http://evil.example/x.png onerror=alert(1)> & \'"'
MODELS = ["alpha-0.5B", "beta-7B"]


def corpus_row(index: int, task: str | None, instruction: str, response: str) -> dict[str, Any]:
    return {
        "content_id": f"{index:016x}",
        "task": task,
        "messages": [{"role": "user", "content": instruction}, {"role": "assistant", "content": response}],
        "references": [],
        "source": "data/train.jsonl",
        "line": index + 1,
        "raw": json.dumps({"instruction": instruction, "output": response}),
    }


def build(
    path: Path,
    *,
    rows: list[dict[str, Any]] | None = None,
    num_rows: int = 60,
    models: list[str] = MODELS,
    prompts: int = 3,
    logits: np.ndarray | None = None,
    quarantined: list[Quarantined] | None = None,
    rated_before: bool = False,
    layout_agreement: dict[str, float] | None = None,
    tokens: np.ndarray | None = None,
    **select: Any,
) -> str:
    """Write a report from made-up ratings and return it. logits: (models, rows, prompts, 5)."""
    rng = np.random.default_rng(0)
    if rows is None:
        rows = [corpus_row(i, f"task {i % 3}", f"Question {i}?", f"Answer {i}.") for i in range(num_rows)]
    path.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=CORPUS_SCHEMA), path / "corpus.parquet")
    bad = quarantined or []
    corpus = Corpus(path, (path / "corpus.parquet",), len(rows) + len(bad), tuple(bad))
    given: dict[str, Any] = {
        "data": {"paths": ["data/train.jsonl"]},
        "models": [{"path": f"models/{name}"} for name in models],
        "rating": {"num_prompts": prompts},
        **select,
    }
    config = SelectConfig.model_validate(given)
    texts = tuple(f"Rate this, wording {k}." for k in range(prompts))
    ready = Ready(
        config,
        ("data/train.jsonl",),
        texts,
        tuple(
            ReadyModel(m, "feedc0de", 5e8 * (i + 1), EncoderSpec(m.path, "0", "prompt_first", texts, 5, 512, m.name))
            for i, m in enumerate(config.models)
        ),
        {"data": {}},
    )
    ids = [row["content_id"] for row in rows]
    ratings = Ratings(
        example_ids=ids,
        first_turn=np.arange(len(rows)),
        logits=(logits if logits is not None else rng.normal(size=(len(models), len(rows), prompts, 5))).astype("f4"),
        tokens=rng.integers(20, 900, len(rows)) if tokens is None else tokens,
        truncated=np.zeros(len(rows), np.bool_),
        bad={},
    )
    scores = score(ratings, config, [m.parameters for m in ready.models])
    folder = RunFolder.open(path / "run", "select", config.model_dump(mode="json"), {"data": {}})
    lengths = dict(zip(ratings.example_ids, np.add.reduceat(ratings.tokens, ratings.first_turn).tolist(), strict=True))
    outcome = write_results(ready, folder.path, corpus, ids, ratings, scores, lengths)
    used = [
        Usage(name)
        if rated_before
        else Usage(name, "cache", len(rows), len(rows) * prompts, 9000, 2, 12.5, 9.75, 0.875)
        for name in models
    ]
    folder.manifest.update(
        rows_in=corpus.rows_in,
        rows_out=len(rows),
        rows_quarantined=len(bad),
        records_written=len(outcome.chosen),
        contents=len(rows),
        truncated=0,
        tokens=sum(usage.tokens for usage in used),
        tokens_per_second=None if rated_before else 720.0,
        rating=[{name: getattr(usage, name) for name in usage.__slots__} for usage in used],
        seed=config.seed,
    )
    write_report(ready, folder, ratings, scores, outcome, bad, corpus, layout_agreement)
    return (folder.path / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    bad = [Quarantined("data/train.jsonl", 100 + i, f"field is {500 + i} characters long", EVIL) for i in range(25)]
    return build(tmp_path_factory.mktemp("full"), quarantined=bad, layout_agreement={"alpha-0.5B": 0.8125})


def test_all_sections_are_there_with_their_numbers(full: str) -> None:
    page = Page(full)
    ids = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    expected = [
        "scores",
        "who",
        "agreement",
        "ratings",
        "baselines",
        "examples",
        "throughput",
        "quarantine",
        "reproduce",
    ]
    assert ids == expected
    assert "12 of 60 rated examples kept (20%)" in page.text
    assert "The model-level score decided: the best were kept." in page.text
    for tile in ("85 rows read", "60 rated", "12 kept", "25 quarantined", "720 tokens a second"):
        assert tile in page.text
    assert "alpha-0.5B 0.81" in page.text
    assert "alpha-0.5B cache 60 180 9,000 720 12.5 9.8 2 88%" in page.text
    assert "25 field is N characters long" in page.text
    assert "data/train.jsonl:119 " in page.text
    assert "data/train.jsonl:120 " not in page.text
    assert "proportion: 0.2" in page.text
    figures_shown = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert len(figures_shown) == 5 + 1 + 3 + 2
    assert "Token level: beta-7B" in figures_shown
    assert "Between prompts: beta-7B" in figures_shown


def test_report_loads_nothing_from_elsewhere(full: str) -> None:
    page = Page(full)
    assert not {"script", "link", "iframe", "img", "object", "embed"} & {tag for tag, _ in page.tags}
    links = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in {"src", "href", "xlink:href", "srcset", "data", "action"}
    ]
    assert links
    assert all(value and value.startswith("#") for value in links)
    assert "@import" not in full
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {str(value)[1:] for value in links} <= set(ids)


def test_text_of_records_tasks_and_quarantine_is_escaped(tmp_path: Path) -> None:
    rows = [corpus_row(i, f"{EVIL}{i % 2}", f"{EVIL} {i}", EVIL * 20) for i in range(10)]
    bad = [Quarantined(EVIL, 3, EVIL, EVIL)]
    html = build(tmp_path, rows=rows, quarantined=bad)
    page = Page(html)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    assert EVIL in " ".join(page.words)
    assert f"Full text, {len(EVIL) * 20:,} characters" in page.text


def test_labels_in_figures_are_escaped_and_short() -> None:
    kept = np.array([True, False])
    svg = figures.histograms({EVIL: np.array([1.0, 2.0]), "a\x00b\n你好 $x_1$": np.array([1.0, 1.0])}, kept, "x", EVIL)
    page = Page(svg)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert "a b 你好 $x_1$" in page.text
    assert "…" in page.text


@pytest.mark.parametrize("level", ["token", "sentence"])
def test_one_row_one_model_one_prompt_one_task_nothing_quarantined(tmp_path: Path, level: str) -> None:
    row = corpus_row(0, "only", "你好 👩‍🚀 مرحبا", "Què és «això»?")
    page = Page(build(tmp_path, rows=[row], models=["m"], prompts=1, select={"level": level, "count": 1}))
    assert "1 of 1 rated examples kept (100%)" in page.text
    assert "Empty: every row that was read could be used." in page.text
    assert "你好 👩‍🚀 مرحبا" in page.text
    assert "Between models" not in page.text
    assert page.text.count("#1 kept") == 1


def test_equal_scores_and_a_model_that_always_gives_the_same_rating_are_pointed_out(tmp_path: Path) -> None:
    logits = np.tile([0.0, 0.0, 3.0, 0.0, 0.0], (1, 30, 3, 1))
    page = Page(build(tmp_path, num_rows=30, models=["m"], logits=logits, tokens=np.full(30, 50)))
    assert "All deciding scores are equal" in page.text
    assert "m nearly always favours one rating: 3 (prompt 0, 100%), 3 (prompt 1, 100%)" in page.text


def test_data_without_tasks_says_so(tmp_path: Path) -> None:
    assert "The data names no tasks." in Page(build(tmp_path, rows=[corpus_row(0, None, "q", "a")] * 5)).text


def test_more_than_twenty_tasks_are_summed_up(tmp_path: Path) -> None:
    rows = [corpus_row(i, f"t{i // 2}", "q", "a") for i in range(48)]
    assert "4 smaller tasks with 8 examples are not shown." in Page(build(tmp_path, rows=rows)).text


def test_report_says_when_everything_was_rated_before(tmp_path: Path) -> None:
    page = Page(build(tmp_path, rated_before=True))
    assert "Nothing was rated in this run: every rating was there already." in page.text
    assert "– tokens a second" in page.text


@pytest.mark.parametrize(("rows", "shown"), [(1, 1), (7, 7), (60, 15)])
def test_no_example_is_shown_twice(tmp_path: Path, rows: int, shown: int) -> None:
    html = build(tmp_path, num_rows=rows, select={"count": 1})
    ranks = [line.split("<b>#")[1].split("<")[0] for line in html.splitlines() if "<b>#" in line]
    assert len(ranks) == len(set(ranks)) == shown
    assert ranks[0] == "1"
    assert ranks[-1] == str(rows)


def test_examples_can_be_left_out(tmp_path: Path) -> None:
    page = Page(build(tmp_path, report={"examples": 0}, select={"method": "longest", "proportion": 0.5}))
    assert "None were asked for" in page.text
    assert "Length decided: the longest were kept." in page.text


def test_figures_of_a_hundred_thousand_rows_stay_small() -> None:
    rng = np.random.default_rng(0)
    values, kept = rng.normal(size=100_000), np.arange(100_000) < 20_000
    assert len(figures.histograms({"a": values, "b": values**2}, kept, "score", "t")) < 40_000
    assert len(figures.lengths(rng.integers(1, 30_000, 100_000), kept, "t")) < 40_000


@pytest.mark.parametrize("tokens", [[1], [7, 7, 7], [0, 1], [9, 10], [1, 1_000_000]])
def test_lengths_of_any_range_can_be_drawn(tokens: list[int]) -> None:
    drawn = figures.lengths(np.array(tokens), np.ones(len(tokens), np.bool_), "t")
    assert [attributes["aria-label"] for tag, attributes in Page(drawn).tags if tag == "svg"] == ["t"]
    assert "nan" not in drawn.lower()


def test_spearman_by_hand() -> None:
    """Ranks of x: 1, 2.5, 2.5, 4; of y: 1, 3, 2, 4. Covariance sum 4.5, norms sqrt(4.5) and sqrt(5)."""
    matrix = rank_correlations([[10, 1, 5], [20, 3, 5], [20, 2, 5], [30, 9, 5]])
    assert matrix[0, 1] == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert matrix[0, 0] == pytest.approx(1)
    assert np.isnan(matrix[2]).all()


def test_spearman_sees_order_only() -> None:
    x = np.arange(50.0)
    matrix = rank_correlations(np.stack([x, np.exp(x / 5), -(x**3)], axis=1))
    np.testing.assert_allclose(matrix, [[1, 1, -1], [1, 1, -1], [-1, -1, 1]])


@pytest.mark.parametrize(("value", "text"), [(0, "0%"), (0.013, "1.3%"), (0.0999, "10%"), (1, "100%"), (None, "–")])
def test_percent(value: float | None, text: str) -> None:
    assert percent(value) == text
