"""The store's copy of a model's aliases: what is served, readable without MLflow."""

from __future__ import annotations

import json

from tasks.home import Home


def read(home: Home, name: str) -> dict[str, int]:
    """{alias: version}; empty for a model that has none."""
    try:
        found: dict[str, int] = json.loads(home.store.read(f"models/{name}/aliases.json"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return found


def write(home: Home, name: str, aliases: dict[str, int]) -> None:
    home.store.write(f"models/{name}/aliases.json", json.dumps(aliases).encode())
