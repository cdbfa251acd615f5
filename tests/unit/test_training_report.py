"""The report of `finetune`, on records made here: no Ray, no model."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stitch_ray.config.finetune import FinetuneConfig
from stitch_ray.report import curves
from stitch_ray.report.training import write_report
from tests.page import Page

EVIL = "</title><title></div><script>alert(1)</script>"
COUNTS = {
    "rows_in": 1000,
    "quarantined": 0,
    "dropped": 0,
    "truncated": 0,
    "train": 900,
    "validation": 100,
    "test": 0,
    "tokens": 200_000,
    "loss_tokens": 100_000,
}


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time, and many tests are about words."""
    monkeypatch.setattr(curves, "svg", lambda draw, height, title: "<svg></svg>")


def config(tasks: int = 2, **changes: Any) -> FinetuneConfig:
    given = {"model": {"path": "models/tiny"}, "tasks": [{"name": f"task{k}", "data": "d.jsonl"} for k in range(tasks)]}
    return FinetuneConfig.model_validate({**given, **changes})


def course(steps: int, tasks: int = 2, *, start: float = 3.0, end: float = 1.0, seed: int = 0) -> list[dict[str, Any]]:
    """Step records with a falling, noisy loss."""
    rng = np.random.default_rng(seed)
    records: list[dict[str, Any]] = [{"kind": "start", "step": 0, "workers": 2, "resumed_from": None}]
    for step in range(1, steps + 1):
        loss = end + (start - end) * math.exp(-4 * step / steps) + 0.1 * rng.normal()
        records.append(
            {
                "kind": "step",
                "step": step,
                "epoch": step / steps,
                "loss": loss,
                "tasks": {f"task{k}": loss + 0.2 * k for k in range(tasks) if rng.random() < 0.9},
                "task_weights": {f"task{k}": 1 / tasks for k in range(tasks)},
                "lr": 1e-4 * (1 - step / steps),
                "grad_norm": 0.5 + rng.random(),
                "tokens": 4000,
                "loss_tokens": 2000,
                "tokens_per_second": 900 + 50 * rng.normal(),
                "seconds": 4.4,
                "peak_memory_mb": 1500.0,
                "workers": 2,
                "padding": 0.0,
            }
        )
    return records


def validation(step: int, loss: float, tasks: int = 2, best: bool = True) -> dict[str, Any]:
    return {
        "kind": "validation",
        "step": step,
        "loss": loss,
        "tasks": {f"task{k}": loss for k in range(tasks)},
        "perplexity": math.exp(loss),
        "examples": 100 * tasks,
        "best": best,
    }


def build(
    path: Path,
    records: list[dict[str, Any]],
    settings: FinetuneConfig | None = None,
    *,
    live: bool = False,
    counts: dict[str, dict[str, Any]] | None = None,
    **facts: Any,
) -> str:
    settings = settings or config()
    tasks = {task.name: {**COUNTS, **(counts or {}).get(task.name, {})} for task in settings.tasks}
    write_report(path / "report.html", settings, {"tasks": tasks, **facts}, records, live=live)
    return (path / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("steps", "tasks", "validations"), [(0, 1, 0), (1, 1, 0), (3, 2, 1), (3, 12, 0), (2000, 12, 9), (61, 1, 1)]
)
def test_every_size_of_run_makes_a_page_on_its_own(tmp_path: Path, steps: int, tasks: int, validations: int) -> None:
    places = np.linspace(1, steps, validations).astype(int) if validations else []
    records = course(steps, tasks) + [validation(int(step), 2.0, tasks) for step in places]
    page = Page(build(tmp_path, records, config(tasks)))
    assert all(not value.startswith("http") for _, attrs in page.tags for k, value in attrs.items() if k in ("src", "href") and value)  # fmt: skip
    assert sum(tag == "figure" for tag, _ in page.tags) == (0 if not steps else 3 if tasks == 1 else 4)
    done = f"{steps:,} step{'s' if steps > 1 else ''}" if steps else "No step yet"
    assert f"{done} on {tasks} task{'s' if tasks > 1 else ''}" in page.text


def test_a_long_run_is_drawn_with_few_points(tmp_path: Path) -> None:
    steps = np.arange(100_000, dtype=np.float64)
    values = np.random.default_rng(0).normal(size=100_000)
    values[54_321] = 99.0
    x, y = curves.thinned((steps, values))
    assert len(x) <= 1000
    assert (np.diff(x) > 0).all()
    assert (x[0] < 200, x[-1] > 99_800, y.max()) == (True, True, 99.0)
    svg = curves.loss_curve((steps, values), (steps[::1000], values[::1000]), [], "Loss")
    assert len(svg) < 120_000


def test_thinning_keeps_gaps_and_short_curves() -> None:
    values = np.ones(5000)
    values[2000:3000] = np.nan
    x, y = curves.thinned((np.arange(5000.0), values))
    assert np.isnan(y[(x >= 2000) & (x < 3000)]).any()
    short = (np.arange(3.0), np.array([1.0, 5.0, 2.0]))
    assert curves.thinned(short) is short


def test_smoothing_is_a_centred_mean_that_skips_what_is_not_a_number() -> None:
    line = np.arange(300.0)
    assert curves.smoothed(line)[1:-1] == pytest.approx(line[1:-1])
    assert curves.smoothed(line)[0] == pytest.approx(0.5)
    values = np.where(np.arange(120) % 2, 1.0, 3.0)
    assert curves.smoothed(values)[60] == pytest.approx((3 * 3 + 2 * 1) / 5)
    values[61] = np.nan
    assert curves.smoothed(values)[60] == pytest.approx((3 * 3 + 1) / 4)
    assert np.isnan(curves.smoothed(np.full(3, np.nan))).all()


@pytest.mark.usefixtures("no_figures")
def test_only_a_live_page_loads_itself_again(tmp_path: Path) -> None:
    def refreshes(html: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in Page(html).tags if tag == "meta" and attrs.get("http-equiv") == "refresh"]

    live = build(tmp_path, course(5), live=True, status="running")
    assert refreshes(live) == [{"http-equiv": "refresh", "content": "10"}]
    assert live.index('http-equiv="refresh"') < live.index("</head>")
    done = build(tmp_path, course(5), status="done")
    assert refreshes(done) == []
    assert ">running<" in live
    assert ">done<" in done


@pytest.mark.usefixtures("no_figures")
def test_texts_of_records_are_escaped(tmp_path: Path) -> None:
    sample = {"task": "task0", "question": EVIL, "reference": EVIL, "answer": EVIL, "correct": False}
    html = build(tmp_path, course(5), config(model={"path": EVIL}), live=True, samples=[sample], run=EVIL, error=EVIL)
    page = Page(html)
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert html.count('http-equiv="refresh"') == 1
    assert page.text.count("alert(1)") >= 5


@pytest.mark.usefixtures("no_figures")
def test_numbers_of_tiles_and_tables(tmp_path: Path) -> None:
    records = [*course(40), validation(20, 1.5), validation(40, 1.25)]
    records.append({"kind": "checkpoint", "step": 40, "seconds": 2.5, "bytes": 3_400_000})
    records.append({"kind": "answers", "step": 40, "tasks": {"task0": {"exact_match": 0.25, "examples": 8}}})
    counts = {"task0": {"loss_tokens": 300_000, "rows_in": 1234}}
    page = Page(
        build(
            tmp_path,
            records,
            counts=counts,
            status="done",
            total_steps=40,
            seconds=4000,
            utilisation=0.5,
            checkpoints=[{"step": 40, "path": "checkpoints/step-000040"}],
            versions={"torch": "2.13"},
        )
    )
    for expected in (
        "40 of 40 steps, 1.00 epochs",
        "160,000 tokens trained on",
        "909 tokens a second",
        "1.250 lowest validation loss, step 40",
        "1.5 GB peak memory",
        "50% of the time in steps",
        "1:06:40 time",
        "task0 1,234 0 0 0 900 100 0 200,000 300,000 75% 0.50",
        "40 1.250 3.4 MB 2.5 checkpoints/step-000040 best",
        "1.250 1.250 40 25%",
        "torch 2.13",
        "learning_rate: 2.0e-05",
    ):
        assert expected in page.text


def notes(html: str) -> str:
    return html[html.index("Worth a look") : html.index("<nav>")] if "Worth a look" in html else ""


@pytest.mark.usefixtures("no_figures")
def test_a_good_run_has_no_notes(tmp_path: Path) -> None:
    records = [*course(200), *(validation(step, 3 - step / 100) for step in (50, 100, 150, 200))]
    assert notes(build(tmp_path, records, status="done")) == ""


@pytest.mark.usefixtures("no_figures")
def test_overfitting_is_named_with_the_step_to_go_back_to(tmp_path: Path) -> None:
    losses = {50: 2.0, 100: 1.5, 150: 1.6, 200: 1.7}
    records = [*course(200), *(validation(step, loss) for step, loss in losses.items())]
    assert "lowest at step 100 (1.500)" in notes(build(tmp_path, records))
    one_bad_pass = [*course(200), validation(50, 2.0), validation(100, 1.5), validation(150, 1.6)]
    assert "Overfitting" not in notes(build(tmp_path, one_bad_pass))


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("records", "settings", "counts", "facts", "expected"),
    [
        (course(200, start=1.0), config(), {}, {}, "hardly fallen"),
        (course(20), config(split={"validation": 0}), {}, {}, "Nothing is held out"),
        (course(20), config(), {"task1": {"validation": 0}}, {}, "No validation example of task1"),
        (course(20), config(), {"task1": {"loss_tokens": 900_000}}, {}, "task1 has 90% of all tokens"),
        (course(20), config(), {"task0": {"truncated": 300}}, {}, "30% of the examples of task0 were truncated"),
        (course(20), config(), {"task0": {"quarantined": 100}}, {}, "10% of the rows of task0 are in quarantine"),
        (course(20), config(), {"task0": {"dropped": 100}}, {}, "10% of the rows of task0 were dropped"),
        (course(20), config(), {}, {"status": "failed", "error": "node lost"}, "The run failed: node lost"),
        (course(20), config(), {}, {"stopped": "No new best.", "total_steps": 90}, "20 of 90 steps. No new best."),
        (
            [*course(20), {"kind": "start", "step": 12, "workers": 1, "resumed_from": "c"}],
            config(),
            {},
            {},
            "went on from a checkpoint at step 12",
        ),
        ([{**r, "padding": 0.4} for r in course(20)], config(packing=False), {}, {}, "40% of the computed positions"),
        ([{**r, "grad_norm": 5.0} for r in course(20)], config(), {}, {}, "clipped to 1 in 100% of the steps"),
        ([{**r, "loss": math.nan} for r in course(3)], config(), {}, {}, "in 3 steps, first in step 1"),
    ],
)
def test_what_a_reader_must_not_miss_is_said(
    tmp_path: Path,
    records: list[dict[str, Any]],
    settings: FinetuneConfig,
    counts: dict[str, Any],
    facts: dict[str, Any],
    expected: str,
) -> None:
    assert expected in Page(build(tmp_path, records, settings, counts=counts, **facts)).text


@pytest.mark.usefixtures("no_figures")
def test_a_start_tells_where_it_went_on_from(tmp_path: Path) -> None:
    records = course(5)
    records += [{"kind": "start", "step": 3, "workers": 1, "resumed_from": 3}]
    text = Page(build(tmp_path, records)).text
    assert "1 0 2 the beginning 2 3 1 the checkpoint of step 3" in text


def test_weights_are_drawn_only_when_they_change(tmp_path: Path) -> None:
    records = course(30)
    assert "Task weights" not in build(tmp_path, records)
    changing = [{**r, "task_weights": {"task0": r["step"] / 30, "task1": 1 - r["step"] / 30}} for r in records]
    assert 'aria-label="Task weights"' in build(tmp_path, changing)
