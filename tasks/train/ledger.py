"""The billing ledger: seconds of the core loop per step and phase, carried inside each checkpoint.

What is billed is the ledger of the newest retained checkpoint and nothing else ("captured forward
progress"): steps lost to a crash were never in a checkpoint, and repeated steps enter once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

FILE = "ledger.json"
PHASES = ("sampling", "grading", "update", "validation")
_MICROSECOND = Decimal("0.000001")


@dataclass
class Ledger:
    """Entries by step, oldest first. Seconds are Decimal, to the microsecond, so sums are exact."""

    entries: dict[int, dict[str, Decimal]] = field(default_factory=dict)

    def add(self, step: int, phase: str, seconds: float) -> None:
        """Add seconds of a monotonic clock to one phase of one step."""
        if phase not in PHASES:
            raise ValueError(f"unknown phase {phase!r}; expected one of {', '.join(PHASES)}")
        if not 0 <= seconds < float("inf"):
            raise ValueError(f"seconds must be finite and not negative, found {seconds}")
        entry = self.entries.setdefault(step, {})
        entry[phase] = entry.get(phase, Decimal(0)) + Decimal(seconds).quantize(_MICROSECOND)

    @property
    def seconds(self) -> Decimal:
        return sum((s for entry in self.entries.values() for s in entry.values()), Decimal(0))

    def by_phase(self) -> dict[str, Decimal]:
        return {p: sum((e.get(p, Decimal(0)) for e in self.entries.values()), Decimal(0)) for p in PHASES}

    def dumps(self) -> str:
        steps = [
            {"step": step, **{phase: str(seconds) for phase, seconds in entry.items()}}
            for step, entry in sorted(self.entries.items())
        ]
        return json.dumps({"version": 1, "seconds": str(self.seconds), "steps": steps}, indent=1)

    @classmethod
    def load(cls, checkpoint: Path) -> Ledger:
        return cls.loads((checkpoint / FILE).read_bytes())

    @classmethod
    def loads(cls, text: bytes) -> Ledger:
        document = json.loads(text)
        return cls(
            {
                entry["step"]: {phase: Decimal(entry[phase]) for phase in PHASES if phase in entry}
                for entry in document["steps"]
            }
        )
