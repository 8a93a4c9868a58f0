"""Encounter notes to code: seeded data for the icd10 example, standard library only.

    python data.py --seed 11 --out data

writes `train`, `validation`, `test` and `demonstrations` as JSONL, byte for byte the same on every machine.

A note is a list of clauses; a clause puts one or two conditions under one status (present, denied, ruled
out, ...). The text and the codes to bill are both computed from that list, so the truth is never typed.
Two rules make the held-out rows ask for more than memory:

- No two notes of any split state the same facts (the same set of condition and status). The one exception
  is inside the demonstrations, where notes of a single clause may repeat a fact in other words.
- Validation and test also use names that the training prompts never use (the demonstrations do, since a
  model that starts from nothing can learn them nowhere else) and phrasings that neither of them uses.

The demonstrations are a junior coder's: right form, and systematic mistakes (`JUNIOR_CODES`).
The rule is the outpatient one: bill what the patient has now, and nothing that is merely suspected.
Left out: Z codes for family and personal history, sequencing, and pairs of conditions that ICD-10-CM
merges into one code (no two conditions below are such a pair).
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

INSTRUCTION = "List the ICD-10-CM codes to bill, or none."
SIZES = {"test": 300, "validation": 100, "train": 800, "demonstrations": 3000}
HELD_OUT_NAMES = 0.3  # of mentions in validation and test whose condition has a held-out name
HELD_OUT_PHRASES = 0.12  # of clauses in validation and test
PAIR_SHARE = 0.2  # clauses that name two conditions: "denies gout or asthma"


@dataclass(frozen=True)
class Condition:
    """One billable condition: its code, official title, and what notes call it."""

    code: str
    title: str
    names: tuple[str, ...]
    held_out_name: str = ""  # never in the training prompts
    familial: bool = False  # a family history of it is worth noting
    resolves: bool = False  # it can lie in the past


CONDITIONS = (
    Condition(
        "E11.9",
        "Type 2 diabetes mellitus without complications",
        ("type 2 diabetes", "T2DM"),
        "adult-onset diabetes",
        familial=True,
    ),
    Condition(
        "I10", "Essential (primary) hypertension", ("hypertension", "high blood pressure"), familial=True
    ),
    Condition("E78.5", "Hyperlipidemia, unspecified", ("hyperlipidemia",), "raised lipids", familial=True),
    Condition(
        "E03.9", "Hypothyroidism, unspecified", ("hypothyroidism", "underactive thyroid"), familial=True
    ),
    Condition(
        "J45.909",
        "Unspecified asthma, uncomplicated",
        ("asthma",),
        "bronchial asthma",
        familial=True,
        resolves=True,
    ),
    Condition("M54.50", "Low back pain, unspecified", ("low back pain", "lumbago"), resolves=True),
    Condition(
        "K21.9",
        "Gastro-esophageal reflux disease without esophagitis",
        ("GERD",),
        "acid reflux",
        resolves=True,
    ),
    Condition("M10.9", "Gout, unspecified", ("gout",), "gouty arthritis", familial=True, resolves=True),
    Condition(
        "G43.909",
        "Migraine, unspecified, not intractable, without status migrainosus",
        ("migraine",),
        familial=True,
        resolves=True,
    ),
    Condition("F32.A", "Depression, unspecified", ("depression",), familial=True, resolves=True),
    Condition("F41.9", "Anxiety disorder, unspecified", ("anxiety",), "anxiety disorder", resolves=True),
    Condition(
        "N39.0",
        "Urinary tract infection, site not specified",
        ("urinary tract infection",),
        "UTI",
        resolves=True,
    ),
    Condition("I48.91", "Unspecified atrial fibrillation", ("atrial fibrillation", "AFib"), familial=True),
    Condition(
        "K58.9",
        "Irritable bowel syndrome without diarrhea",
        ("irritable bowel syndrome",),
        "IBS",
        familial=True,
    ),
    Condition("E55.9", "Vitamin D deficiency, unspecified", ("vitamin D deficiency",), resolves=True),
    Condition("D50.9", "Iron deficiency anemia, unspecified", ("iron deficiency anemia",), resolves=True),
    Condition(
        "M81.0",
        "Age-related osteoporosis without current pathological fracture",
        ("osteoporosis",),
        familial=True,
    ),
    Condition(
        "G47.33",
        "Obstructive sleep apnea (adult) (pediatric)",
        ("obstructive sleep apnea",),
        "OSA",
        resolves=True,
    ),
    Condition("L40.9", "Psoriasis, unspecified", ("psoriasis",), familial=True),
    Condition("J18.9", "Pneumonia, unspecified organism", ("pneumonia",), resolves=True),
    Condition(
        "K80.20",
        "Calculus of gallbladder without cholecystitis without obstruction",
        ("gallstones",),
        "cholelithiasis",
        familial=True,
        resolves=True,
    ),
    Condition("N20.0", "Calculus of kidney", ("kidney stones", "renal stones"), familial=True, resolves=True),
    Condition("J02.9", "Acute pharyngitis, unspecified", ("pharyngitis",), "sore throat", resolves=True),
    Condition("B02.9", "Zoster without complications", ("shingles", "herpes zoster"), resolves=True),
    Condition(
        "G40.909",
        "Epilepsy, unspecified, not intractable, without status epilepticus",
        ("epilepsy",),
        "seizure disorder",
        familial=True,
    ),
    Condition("M06.9", "Rheumatoid arthritis, unspecified", ("rheumatoid arthritis",), familial=True),
)


@dataclass(frozen=True)
class Status:
    """How a note can mention a condition, and whether that is billed."""

    name: str
    billed: bool
    weight: int
    phrases: tuple[str, ...]
    held_out_phrases: tuple[str, ...]


# Many billed phrasings hold a word that elsewhere negates ("not well controlled"), so counting such words
# does not help: what matters is which condition the cue governs.
STATUSES = (
    Status(
        "present",
        billed=True,
        weight=32,
        phrases=("has {x}", "active {x}", "ongoing {x}", "confirmed {x}", "treated for {x}"),
        held_out_phrases=("has active {x}", "treated for ongoing {x}"),
    ),
    Status(
        "qualified",
        billed=True,
        weight=16,
        phrases=(
            "uncontrolled {x}",
            "worsening {x}",
            "no change in {x}",
            "no relief from {x}",
            "{x} not controlled",
        ),
        held_out_phrases=("no change in ongoing {x}", "no relief from uncontrolled {x}"),
    ),
    Status(
        "denied",
        billed=False,
        weight=17,
        phrases=("denies {x}", "no {x}", "without any {x}", "negative for {x}"),
        held_out_phrases=("denies any {x}", "exam negative for {x}"),
    ),
    Status(
        "ruled_out",
        billed=False,
        weight=10,
        phrases=("excluded {x}", "exam ruled out {x}", "not consistent with {x}", "{x} ruled out"),
        held_out_phrases=("exam excluded {x}", "{x} excluded"),
    ),
    Status(
        "family_history",
        billed=False,
        weight=9,
        phrases=("mother had {x}", "father had {x}", "sister has {x}", "family history of {x}"),
        held_out_phrases=("sister had {x}", "mother has {x}"),
    ),
    Status(
        "resolved",
        billed=False,
        weight=8,
        phrases=("past {x}", "previous {x}", "recovered from {x}", "{x} resolved"),
        held_out_phrases=("recovered from past {x}", "previous {x} resolved"),
    ),
    Status(
        "suspected",
        billed=False,
        weight=8,
        phrases=("possible {x}", "suspected {x}", "probable {x}", "{x} not confirmed"),
        held_out_phrases=("suspected {x} not confirmed", "suspected or probable {x}"),
    ),
)

# How often the junior coder bills a mention that must not be billed.
JUNIOR_CODES = {"denied": 0.1, "ruled_out": 0.2, "family_history": 0.35, "resolved": 0.7, "suspected": 0.4}
JUNIOR_MISSES = 0.04  # of the mentions that must be billed

# How many clauses a note may have. Some demonstrations are of a single clause: short notes are where a
# model that starts from nothing finds out which words belong to which code.
CLAUSES = {"demonstrations": (1, 2, 2, 2, 3), "train": (2, 2, 3), "validation": (2, 2, 3), "test": (2, 2, 3)}


@dataclass(frozen=True)
class Clause:
    """One or two conditions under one status, as the note words them."""

    status: Status
    conditions: tuple[Condition, ...]
    text: str
    unseen: frozenset[str]  # of {"name", "phrasing"}


def make_clause(rng: random.Random, status: Status, conditions: list[Condition], split: str) -> Clause:
    """Word a clause with the names and phrasings that the split may use."""
    held_out = split in ("validation", "test")
    unseen = set()
    phrases = status.phrases
    if held_out and rng.random() < HELD_OUT_PHRASES:
        phrases = status.held_out_phrases
        unseen.add("phrasing")
    if len(conditions) == 2:  # a list reads naturally only after its cue
        phrases = tuple(phrase for phrase in phrases if phrase.endswith("{x}")) or phrases
    names = []
    for condition in conditions:
        if held_out and condition.held_out_name and rng.random() < HELD_OUT_NAMES:
            names.append(condition.held_out_name)
            unseen.add("name")
        elif split == "demonstrations" and condition.held_out_name:
            names.append(rng.choice((*condition.names, condition.held_out_name)))
        else:
            names.append(rng.choice(condition.names))
    joined = (" or " if status.name == "denied" else " and ").join(names)
    return Clause(status, tuple(conditions), rng.choice(phrases).format(x=joined), frozenset(unseen))


def make_note(rng: random.Random, split: str) -> list[Clause]:
    """A few clauses (`CLAUSES`) over different conditions."""
    clauses: list[Clause] = []
    free = list(CONDITIONS)
    for _ in range(rng.choice(CLAUSES[split])):
        status = rng.choices(STATUSES, weights=[s.weight for s in STATUSES])[0]
        pool = [
            c
            for c in free
            if (c.familial or status.name != "family_history") and (c.resolves or status.name != "resolved")
        ]
        chosen = rng.sample(pool, 2 if rng.random() < PAIR_SHARE else 1)
        free = [c for c in free if c not in chosen]
        clauses.append(make_clause(rng, status, chosen, split))
    return clauses


def facts(note: list[Clause]) -> frozenset[tuple[str, str]]:
    """What a note states, however it words it."""
    return frozenset((c.code, clause.status.name) for clause in note for c in clause.conditions)


def codes_to_bill(note: list[Clause]) -> list[str]:
    """The truth, in the order of mention."""
    return [c.code for clause in note if clause.status.billed for c in clause.conditions]


def junior_codes(rng: random.Random, note: list[Clause]) -> list[str]:
    """What the junior coder bills for the same note."""
    codes = []
    for clause in note:
        for condition in clause.conditions:
            chance = 1 - JUNIOR_MISSES if clause.status.billed else JUNIOR_CODES[clause.status.name]
            if rng.random() < chance:
                codes.append(condition.code)
    return codes


def make_row(rng: random.Random, note: list[Clause], split: str, number: int) -> Row:
    """A JSONL row: prompt and truth, or prompt and the junior coder's answer."""
    header = f"{rng.choice('FM')} {rng.randint(19, 88)}: "
    text = header + "; ".join(clause.text for clause in note) + "."
    messages = [{"role": "developer", "content": INSTRUCTION}, {"role": "user", "content": text}]
    row: Row = {"messages": messages, "note_id": f"{split}-{number:04d}"}
    if split == "demonstrations":
        answer = ", ".join(junior_codes(rng, note)) or "none"
        messages.append({"role": "assistant", "content": answer})
        return row
    not_billed = sum(len(clause.conditions) for clause in note if not clause.status.billed)
    row["codes"] = codes_to_bill(note)
    row["traps"] = sorted({clause.status.name for clause in note} - {"present"})
    row["slice"] = "hard" if not_billed >= 2 else "standard"
    row["unseen"] = sorted(set().union(*(clause.unseen for clause in note)))
    return row


def make_splits(seed: int) -> dict[str, list[Row]]:
    """All splits from one stream of notes, so that no two notes anywhere state the same facts."""
    rng = random.Random(seed)
    seen: dict[frozenset[tuple[str, str]], bool] = {}  # facts stated so far: in one clause?
    worded: set[frozenset[str]] = set()
    splits: dict[str, list[Row]] = {}
    for split, size in SIZES.items():
        rows: list[Row] = []
        while len(rows) < size:
            note = make_note(rng, split)
            billed = len(codes_to_bill(note))
            if billed > 4:
                continue
            single = len(note) == 1
            words = frozenset(clause.text for clause in note)
            repeated = facts(note) in seen and not (single and seen[facts(note)])
            if repeated or words in worded:
                continue
            seen[facts(note)] = single
            worded.add(words)
            rows.append(make_row(rng, note, split, len(rows)))
        splits[split] = rows
    return splits


def main() -> None:
    """Write the four files."""
    parser = argparse.ArgumentParser(description="Write the data of the icd10 example.")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for split, rows in make_splits(arguments.seed).items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (arguments.out / f"{split}.jsonl").write_bytes(lines.encode())
        print(f"{split}: {len(rows)} rows")


if __name__ == "__main__":
    main()
