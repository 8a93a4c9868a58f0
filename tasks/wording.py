"""Numbers as a person reads them, with real minus signs and no "-0.00"."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

LONGEST_TEXT = 1500


def number(value: float | None, digits: int = 2) -> str:
    """Fixed decimals with a real minus sign; never "−0.00"."""
    if value is None or not math.isfinite(value):
        return "not graded"
    text = f"{value:,.{digits}f}"
    if not text.strip("-0.,"):
        text = text.lstrip("-")
    return text.replace("-", "\N{MINUS SIGN}")


def signed(value: float, digits: int = 2) -> str:
    return number(value, digits) if round(value, digits) <= 0 else f"+{number(value, digits)}"


def percent(value: float | None) -> str:
    return "not known" if value is None else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def duration(seconds: float | Decimal) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


def shorten(text: str) -> str:
    more = len(text) - LONGEST_TEXT
    return text if more <= 0 else f"{text[:LONGEST_TEXT]}… ({more:,} more characters)"


def finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
