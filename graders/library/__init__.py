"""The shelf: graders ready to use, one JSON file each; README.md beside them says when to use which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from graders.errors import GraderError, nearest

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The graders on the shelf, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def ready(name: str) -> dict[str, Any]:
    """One grader's JSON, to load as it is or to change first. Raises `GraderError` for an unknown name."""
    if name not in names():
        raise GraderError(f"no grader {name!r} on the shelf: {', '.join(names())}{nearest(name, names())}")
    return dict(json.loads((FOLDER / f"{name}.json").read_text("utf-8")))
