"""The ledger: exact sums, one entry per step and phase, the same after a round trip."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.train.ledger import FILE, PHASES, Ledger

SECONDS = st.floats(0, 1e6, allow_nan=False)
ENTRIES = st.lists(st.tuples(st.integers(0, 50), st.sampled_from(PHASES), SECONDS), max_size=40)


def filled(entries) -> Ledger:
    ledger = Ledger()
    for step, phase, seconds in entries:
        ledger.add(step, phase, seconds)
    return ledger


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoint")


@given(ENTRIES)
def test_total_is_the_exact_sum_whatever_the_order(entries):
    exact = sum(round(Decimal(seconds), 6) for _, _, seconds in entries)
    assert filled(entries).seconds == exact
    assert filled(reversed(entries)).seconds == exact
    assert sum(filled(entries).by_phase().values()) == exact


@given(entries=ENTRIES)
def test_round_trip(folder, entries):
    ledger = filled(entries)
    (folder / FILE).write_text(ledger.dumps(), "utf-8")
    again = Ledger.load(folder)
    assert again.entries == ledger.entries
    assert again.seconds == ledger.seconds


def test_ten_tenths_are_one():
    assert filled([(1, "update", 0.1)] * 10).seconds == Decimal(1)


def test_adding_to_a_phase_twice_sums_and_keeps_phases_apart():
    ledger = filled([(3, "sampling", 1.5), (3, "sampling", 0.25), (3, "grading", 2.0), (4, "sampling", 1.0)])
    assert ledger.entries[3] == {"sampling": Decimal("1.75"), "grading": Decimal(2)}
    assert ledger.by_phase() == {
        "sampling": Decimal("2.75"),
        "grading": Decimal(2),
        "update": Decimal(0),
        "validation": Decimal(0),
    }


def test_what_was_not_in_the_checkpoint_is_not_billed(tmp_path):
    """A crash after step 3 with a checkpoint of step 2: the repeated step enters once."""
    ledger = filled([(1, "update", 1.0), (2, "update", 1.0)])
    (tmp_path / FILE).write_text(ledger.dumps(), "utf-8")
    ledger.add(3, "update", 100.0)
    resumed = Ledger.load(tmp_path)
    resumed.add(3, "update", 1.5)
    assert resumed.seconds == Decimal("3.5")


def test_the_file_is_readable_json_with_steps_in_order():
    document = json.loads(filled([(2, "update", 1.0), (0, "validation", 0.5)]).dumps())
    assert document["seconds"] == "1.500000"
    assert [entry["step"] for entry in document["steps"]] == [0, 2]
    assert document["steps"][0] == {"step": 0, "validation": "0.500000"}


@pytest.mark.parametrize("seconds", [-1e-9, float("nan"), float("inf"), -float("inf")])
def test_a_broken_clock_is_an_error(seconds):
    ledger = Ledger()
    with pytest.raises(ValueError, match="finite and not negative"):
        ledger.add(1, "update", seconds)
    assert ledger.seconds == 0


def test_unknown_phase():
    with pytest.raises(ValueError, match="unknown phase 'queue'"):
        Ledger().add(1, "queue", 1.0)
