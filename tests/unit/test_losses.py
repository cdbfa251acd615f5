"""Multi-task losses: MFTCoder's numbers on one batch, and one loss however a step is cut into parts."""

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from stitch_ray.config.finetune import LossMode
from stitch_ray.training.losses import LossTotals, multitask_loss, task_losses

pytestmark = pytest.mark.numeric

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "stitch.json").read_text())["loss"]
MODES = get_args(LossMode)
MASK = torch.tensor(GOLDEN["loss_mask"])
TASKS = torch.tensor(GOLDEN["task_id"])


def golden_token_losses(labels_of_masked: int | None = None) -> Tensor:
    b, t, v = torch.meshgrid(torch.arange(4), torch.arange(4), torch.arange(3), indexing="ij")
    logits = ((7 * b + 3 * t + 5 * v) % 11) / 5 - 1
    labels = (b + t)[..., 0] % 3
    if labels_of_masked is not None:
        labels = torch.where(MASK == 1, labels, labels_of_masked)
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(4, 4)


@pytest.mark.parametrize(
    ("mode", "weights", "key"),
    [
        ("token_mean", None, "case1"),
        ("sample_mean", None, "case2"),
        ("task_token_mean", None, "case3_uniform"),
        ("task_token_mean", [2, 1, 1], "case3_w2_1_1"),
        ("coba", None, "case3_uniform"),
        ("coba", np.array([0.5, 0.25, 0.25]), "case3_w2_1_1"),
        ("task_sample_mean", None, "case4_uniform"),
        ("task_sample_mean", torch.tensor([2.0, 1.0, 1.0]), "case4_w2_1_1"),
        ("token_mean", [2, 1, 1], "case1"),
        ("sample_mean", [2, 1, 1], "case2"),
    ],
)
@pytest.mark.parametrize("ignored_label", [None, -100])
def test_golden_losses(mode: LossMode, weights: object, key: str, ignored_label: int | None) -> None:
    losses = golden_token_losses(ignored_label)
    assert multitask_loss(losses, MASK, TASKS, weights, mode).item() == pytest.approx(GOLDEN[key], abs=1e-6)


def test_golden_loss_of_every_task() -> None:
    sums, weights = task_losses(golden_token_losses(), MASK, TASKS, 4)
    assert (sums[:3] / weights[:3]).tolist() == pytest.approx(GOLDEN["task_loss"], abs=1e-6)
    assert (sums[3], weights[3]) == (0, 0)
    parts = [task_losses(golden_token_losses()[rows], MASK[rows], TASKS[rows], 4) for rows in ([0, 3], [1, 2])]
    torch.testing.assert_close(parts[0][0] + parts[1][0], sums)
    torch.testing.assert_close(parts[0][1] + parts[1][1], weights)


def test_averaging_two_ranks_changes_the_published_loss_and_shared_totals_do_not() -> None:
    losses, ranks = golden_token_losses(), ([0, 1], [2, 3])
    alone = [multitask_loss(losses[rows], MASK[rows], TASKS[rows]) for rows in ranks]
    assert (sum(alone) / 2).item() == pytest.approx(GOLDEN["case3_mean_of_two_ranks_rows01_rows23"], abs=1e-6)
    totals = LossTotals.of(MASK[:2], TASKS[:2], 3) + LossTotals.of(MASK[2:], TASKS[2:], 3)
    shares = [multitask_loss(losses[rows], MASK[rows], TASKS[rows], totals=totals) for rows in ranks]
    assert sum(shares).item() == pytest.approx(GOLDEN["case3_uniform"], abs=1e-6)


# Eight examples of a tiny linear model: (task, features, targets, token weights). Task 2 is only in example 5, so it is
# absent from most parts; example 6 carries no weight at all.
WEIGHTS = [[1, 1, 1], [0, 1, 0.5, 1, 1], [2, 0], [1], [0, 0, 0.25, 1], [1, 0, 1], [0, 0], [1, 1, 1, 1, 1, 1]]
EXAMPLE_TASKS = [0, 1, 0, 1, 0, 2, 1, 0]
TASK_WEIGHTS = [1.0, 3.0, 0.5]
GENERATOR = torch.Generator().manual_seed(1)
FEATURES = [torch.randn(len(w), 5, generator=GENERATOR, dtype=torch.float64) for w in WEIGHTS]
TARGETS = [torch.randint(0, 7, (len(w),), generator=GENERATOR) for w in WEIGHTS]
Part = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]  # features, targets, weights, task ids, example ids


def packed(rows: range) -> Part:
    """One row, documents one after another."""
    lengths = torch.tensor([len(WEIGHTS[row]) for row in rows])
    return (
        torch.cat([FEATURES[row] for row in rows])[None],
        torch.cat([TARGETS[row] for row in rows])[None],
        torch.cat([torch.tensor(WEIGHTS[row], dtype=torch.float32) for row in rows])[None],
        torch.tensor([EXAMPLE_TASKS[row] for row in rows]).repeat_interleave(lengths)[None],
        torch.arange(len(rows)).repeat_interleave(lengths)[None],
    )


def padded(rows: range) -> Part:
    """A rectangle; every row is an example."""
    pad = torch.nn.utils.rnn.pad_sequence
    return (
        pad([FEATURES[row] for row in rows], batch_first=True),
        pad([TARGETS[row] for row in rows], batch_first=True),
        pad([torch.tensor(WEIGHTS[row], dtype=torch.float32) for row in rows], batch_first=True),
        torch.tensor([EXAMPLE_TASKS[row] for row in rows]),
        None,
    )


def loss_and_gradient(parts: list[Part], mode: LossMode) -> tuple[Tensor, Tensor]:
    """As a worker group runs them: DeepSpeed averages over parts, so the loss of each is multiplied by their number."""
    weight = torch.linspace(-1, 1, 35, dtype=torch.float64).view(7, 5).requires_grad_()
    totals = LossTotals(torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    for _, _, mask, tasks, examples in parts:
        totals += LossTotals.of(mask, tasks, 3, examples)
    loss = torch.zeros((), dtype=torch.float64)
    for features, targets, mask, tasks, examples in parts:
        tokens = cross_entropy((features @ weight.T).flatten(0, 1), targets.flatten(), reduction="none").view_as(mask)
        part = multitask_loss(tokens, mask, tasks, TASK_WEIGHTS, mode, example_ids=examples, totals=totals)
        (part * len(parts)).backward()
        loss += part.detach()
    assert weight.grad is not None
    return loss, weight.grad / len(parts)


def by_definition(mode: LossMode) -> tuple[Tensor, Tensor]:
    """The formulas of the docstring, example by example."""
    weight = torch.linspace(-1, 1, 35, dtype=torch.float64).view(7, 5).requires_grad_()
    sums: dict[int, list[tuple[Tensor, float]]] = defaultdict(list)
    for features, targets, weights, task in zip(FEATURES, TARGETS, WEIGHTS, EXAMPLE_TASKS, strict=True):
        if sum(weights):
            tokens = cross_entropy(features @ weight.T, targets, reduction="none")
            sums[task].append(((tokens * torch.tensor(weights)).sum(), sum(weights)))
    every = [pair for pairs in sums.values() for pair in pairs]

    def mean(pairs: list[tuple[Tensor, float]]) -> Tensor:
        if mode.endswith("sample_mean"):
            return torch.stack([total / count for total, count in pairs]).mean()
        return torch.stack([total for total, _ in pairs]).sum() / sum(count for _, count in pairs)

    if mode in ("token_mean", "sample_mean"):
        loss = mean(every)
    else:
        loss = torch.stack([TASK_WEIGHTS[task] * mean(sums[task]) for task in sums]).sum() / sum(TASK_WEIGHTS)
    loss.backward()
    assert weight.grad is not None
    return loss.detach(), weight.grad


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_parts", [1, 2, 4, 8])
@pytest.mark.parametrize("layout", [packed, padded])
def test_gradient_does_not_depend_on_the_parts_or_the_packing(mode: LossMode, num_parts: int, layout: object) -> None:
    size = 8 // num_parts
    loss, gradient = loss_and_gradient([layout(range(i, i + size)) for i in range(0, 8, size)], mode)  # type: ignore[operator]
    expected_loss, expected_gradient = by_definition(mode)
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-9)


EXAMPLE = st.tuples(
    st.integers(0, 2),
    st.lists(st.tuples(st.floats(0, 20), st.sampled_from([0.0, 0.5, 1.0, 3.0])), min_size=1, max_size=4),
)


@settings(deadline=None)
@given(
    st.lists(EXAMPLE, min_size=1, max_size=8),
    st.lists(st.integers(0, 8), max_size=4),
    st.lists(st.floats(0.01, 10), min_size=3, max_size=3),
    st.sampled_from(MODES),
)
def test_shares_of_any_cut_add_up(examples: list, cuts: list[int], task_weights: list[float], mode: LossMode) -> None:
    def part(chosen: list) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = [(loss, weight, task, i) for i, (task, tokens) in enumerate(chosen) for loss, weight in tokens]
        columns = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4).T[:, None]
        return columns[0], columns[1], columns[2].long(), columns[3].long()

    def loss(chosen: list, totals: LossTotals | None) -> float:
        tokens, mask, tasks, ids = part(chosen)
        return multitask_loss(tokens, mask, tasks, task_weights, mode, example_ids=ids, totals=totals).item()

    bounds = [0, *sorted(min(cut, len(examples)) for cut in cuts), len(examples)]
    parts = [examples[low:high] for low, high in pairwise(bounds)]
    totals = LossTotals(torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    for chosen in parts:
        _, mask, tasks, ids = part(chosen)
        totals += LossTotals.of(mask, tasks, 3, ids)
    assert sum(loss(chosen, totals) for chosen in parts) == pytest.approx(loss(examples, None), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_rows_and_tasks_without_weight_are_absent(mode: LossMode) -> None:
    losses = torch.cat([golden_token_losses(), torch.full((2, 4), 9.0)])
    mask = torch.cat([MASK, torch.zeros(2, 4, dtype=torch.long)])
    tasks = torch.tensor([0, 0, 1, 2, 0, 3])
    weights = [2, 1, 1, 50]
    expected = multitask_loss(losses[:4], MASK, TASKS, weights[:3], mode)
    assert multitask_loss(losses, mask, tasks, weights, mode).item() == pytest.approx(expected.item(), abs=1e-6)
    totals = LossTotals.of(mask, tasks, 4)
    assert totals.examples.tolist() == [2, 1, 1, 0]
    assert totals.weights.tolist() == [5, 1, 4, 0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(2, 3), (1, 0)])
def test_nothing_present_is_a_loss_of_zero_with_a_graph(mode: LossMode, shape: tuple[int, int]) -> None:
    losses = torch.full(shape, 3.0, requires_grad=True)
    loss = multitask_loss(losses, torch.zeros(shape), torch.zeros(shape, dtype=torch.long), None, mode)
    loss.backward()
    assert loss.item() == 0
    assert losses.grad is not None
    assert not losses.grad.any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_loss_shows_only_where_its_token_has_weight(mode: LossMode, bad: float) -> None:
    losses = golden_token_losses()
    clean = multitask_loss(losses, MASK, TASKS, None, mode)
    losses[0, 0] = losses[1, 1] = bad
    losses.requires_grad_()
    masked = multitask_loss(losses, MASK, TASKS, None, mode)
    assert masked.item() == clean.item()
    masked.backward()
    assert losses.grad is not None
    assert losses.grad.isfinite().all()
    assert task_losses(losses, MASK, TASKS, 3)[0].isfinite().all()
    with torch.no_grad():
        losses[3, 2] = bad
    assert not multitask_loss(losses, MASK, TASKS, None, mode).isfinite()


@pytest.mark.parametrize("mode", MODES)
def test_low_precision_losses_are_summed_in_float32(mode: LossMode) -> None:
    losses = torch.full((1, 4096), 1.25, dtype=torch.bfloat16)
    loss = multitask_loss(losses, torch.ones(1, 4096), torch.zeros(1, dtype=torch.long), None, mode)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1.25, abs=1e-6)
