"""Every graded completion of training and validation, as Parquet files under rollouts/.

A file is written with the checkpoint that covers its steps, so that a resumed run neither loses nor
repeats a completion: `step-000021-000040.parquet`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tasks.rollout import Rollout
from tasks.store import sync_and_rename


class RolloutLog:
    """Completions since the last flush, in memory; earlier ones in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pending: list[dict[str, Any]] = []

    def add(self, split: str, step: int, rollouts: list[Rollout], rows: list[dict[str, Any]]) -> None:
        for rollout in rollouts:
            values = rollout.as_dict()
            for name in ("sub_rewards", "details"):
                values[name] = json.dumps(values[name])
            prompt = rows[rollout.row]["messages"][-1].get("content")
            self.pending.append({"split": split, "step": step, **values, "prompt": prompt})

    def ungraded_share(self, step: int) -> float:
        mine = [r for r in self.pending if r["step"] == step and r["split"] == "train"]
        return sum(r["reward"] is None for r in mine) / len(mine) if mine else 0.0

    def flush(self, step: int) -> None:
        """Write what is pending as one file that ends at `step`."""
        if not self.pending:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.folder.mkdir(parents=True, exist_ok=True)
        first = min(r["step"] for r in self.pending)
        target = self.folder / f"step-{first:06d}-{step:06d}.parquet"
        partial = target.with_suffix(".part")
        pq.write_table(pa.Table.from_pylist(self.pending), partial)
        sync_and_rename(partial, target)
        self.pending = []

    def truncate(self, step: int) -> None:
        """Drop files that reach past `step`: the resumed run writes those steps again."""
        for file in self.folder.glob("step-*.parquet"):
            if int(file.stem.rsplit("-", 1)[1]) > step:
                file.unlink()


def read_rollouts(folder: Path) -> list[dict[str, Any]]:
    """All rollouts written so far, in order of step."""
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = []
    for file in sorted(folder.glob("step-*.parquet")):
        rows += pq.read_table(file).to_pylist()
    return rows
