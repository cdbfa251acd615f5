"""What is read of a `Retry-After` header."""

from __future__ import annotations

import email.utils
from types import SimpleNamespace

import pytest

from stitch_ray.retry_after import retry_after_s

NOW = 1_700_000_000.0


@pytest.fixture(autouse=True)
def _now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stitch_ray.retry_after.time", SimpleNamespace(time=lambda: NOW))


@pytest.mark.parametrize(("value", "seconds"), [("0", 0.0), ("3", 3.0), ("0.5", 0.5), (" 2 ", 2.0), ("-4", 0.0)])
def test_a_number_is_seconds_and_never_less_than_none(value: str, seconds: float) -> None:
    assert retry_after_s(value) == seconds


@pytest.mark.parametrize(("ahead", "seconds"), [(90, 90.0), (0, 0.0), (-3600, 0.0)])
def test_a_date_is_the_time_until_then_and_one_that_is_over_is_now(ahead: float, seconds: float) -> None:
    assert retry_after_s(email.utils.formatdate(NOW + ahead, usegmt=True)) == seconds


@pytest.mark.parametrize("value", [None, "", "soon", "nan", "inf", "-inf", "Wed, 99 Foo 2026"])
def test_what_cannot_be_read_asks_for_nothing(value: str | None) -> None:
    assert retry_after_s(value) is None
