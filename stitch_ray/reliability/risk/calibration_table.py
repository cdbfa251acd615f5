"""`calibration.parquet`: the confidences and losses that a policy was made of, to show what another threshold would do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import ArrayLike

from stitch_ray.reliability.calibration import quantile_grid
from stitch_ray.reliability.cascade import replay
from stitch_ray.reliability.risk.questions import Floats, Material, Questions
from stitch_ray.runs import atomic_path

CALIBRATION = "calibration.parquet"
CALIBRATION_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("task", pa.string()),
        ("draft_confidence", pa.float64()),
        ("draft_loss", pa.float64()),
        ("final_confidence", pa.float64()),
        ("final_loss", pa.float64()),
    ]
)
"""One row a question of the splits isotonic, calibrate and test. A confidence is null where the answer is unscored, a
loss where it is not labelled; `final_*` are null throughout for a policy of one stage."""

_GRID = 200


@dataclass(frozen=True, slots=True)
class OperatingPoints:
    """What thresholds did with the `num` calibration questions, strictest first; all of one length.

    coverage: share answered; risk: mean loss of the answers given, None where none is.
    """

    num: int
    thresholds: tuple[float, ...]
    coverage: tuple[float, ...]
    risk: tuple[float | None, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def write(path: Path, material: Material) -> None:
    """Write the questions of `material` to the file `path`."""
    parts: Mapping[str, Questions] = {
        "isotonic": material.isotonic,
        "calibrate": material.calibrate,
        "test": material.test,
    }
    tables = [_table(name, questions) for name, questions in parts.items()]
    with atomic_path(path) as temporary:
        pq.write_table(pa.concat_tables(tables), temporary)


def read(policy_path: Path | str) -> pa.Table | None:
    """The table beside a policy.json, or in the run folder that holds it; None if there is none."""
    path = Path(policy_path)
    file = (path if path.is_dir() else path.parent) / CALIBRATION
    return pq.read_table(file, schema=CALIBRATION_SCHEMA) if file.is_file() else None


def operating_points(
    table: pa.Table, *, task: str | None = None, thresholds: ArrayLike | None = None
) -> OperatingPoints:
    """Coverage and risk on the labelled questions of the calibrate split; `task`: only its own.

    thresholds: (m,), by default quantiles of the confidences. What was best on these labels promises nothing for others;
    the policy does. Raises ValueError if no question is left.
    """
    rows = table.filter(pc.and_(pc.equal(table["split"], "calibrate"), pc.is_valid(table["draft_loss"])))
    if task is not None:
        rows = rows.filter(pc.equal(rows["task"], task))
    if not rows.num_rows:
        raise ValueError("no labelled calibration question" + ("" if task is None else f" of task {task!r}"))
    draft, draft_loss, final, final_loss = (_column(rows, name) for name in CALIBRATION_SCHEMA.names[2:])
    if thresholds is None:
        highest = np.fmax(draft, final)
        thresholds = quantile_grid(highest, _GRID) if not np.isnan(highest).all() else np.empty(0)
    tau = np.sort(np.unique(np.asarray(thresholds, np.float64)))[::-1]
    accepted, losses = replay(draft, draft_loss, final, np.nan_to_num(final_loss), tau)
    given = accepted.sum(1)
    risks: Sequence[float | None] = [
        float(total / count) if count else None for total, count in zip(losses.sum(1), given, strict=True)
    ]
    return OperatingPoints(
        num=rows.num_rows,
        thresholds=tuple(tau.tolist()),
        coverage=tuple((given / rows.num_rows).tolist()),
        risk=tuple(risks),
    )


def _table(split: str, questions: Questions) -> pa.Table:
    rows = len(questions)
    columns: dict[str, Any] = {
        "split": pa.array([split] * rows, pa.string()),
        "task": pa.array(questions.tasks.tolist(), pa.string()),
    }
    for name in ("draft", "final"):
        for of_questions, column in ((name, f"{name}_confidence"), (f"{name}_loss", f"{name}_loss")):
            values = getattr(questions, of_questions)
            columns[column] = pa.nulls(rows, pa.float64()) if values is None else pa.array(values, from_pandas=True)
    return pa.table(columns).cast(CALIBRATION_SCHEMA)


def _column(rows: pa.Table, name: str) -> Floats:
    return np.asarray(rows[name].to_numpy(zero_copy_only=False), np.float64)
