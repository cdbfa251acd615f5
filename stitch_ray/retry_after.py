"""What a server asks for with `Retry-After`."""

from __future__ import annotations

import email.utils
import math
import time


def retry_after_s(value: str | None) -> float | None:
    """Seconds to wait; None for no header or one that cannot be read. A number or a date (RFC 9110, Sec. 10.2.3)."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
