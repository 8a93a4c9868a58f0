"""The icd10 example: its data is reproducible, separate between splits and true; its grader cannot be gamed."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "icd10"
SPLITS = ("train", "validation", "test", "demonstrations")


@pytest.fixture(scope="module")
def data() -> Any:
    spec = importlib.util.spec_from_file_location("icd10_data", EXAMPLE / "data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    return {
        split: [json.loads(line) for line in (EXAMPLE / "data" / f"{split}.jsonl").read_text().splitlines()]
        for split in SPLITS
    }


def note_text(row: dict[str, Any]) -> str:
    return next(m["content"] for m in row["messages"] if m["role"] == "user")


def body(row: dict[str, Any]) -> str:
    """The note without sex and age, which tell no two notes apart."""
    return note_text(row).split(": ", 1)[1]


def reader(data: Any) -> tuple[list[Any], list[tuple[str, Any]]]:
    """Every wording of every status, longest first, and every name."""
    names = sorted(
        ((n, c) for c in data.CONDITIONS for n in (*c.names, c.held_out_name) if n), key=lambda p: -len(p[0])
    )
    phrases = []
    for status in data.STATUSES:
        for phrase in (*status.phrases, *status.held_out_phrases):
            phrases.append((re.compile(re.escape(phrase).replace(r"\{x\}", "(.+)")), phrase, status))
    return sorted(phrases, key=lambda p: -len(p[1])), names


def read(text: str, phrases: list[Any], names: list[tuple[str, Any]]) -> set[tuple[str, str]]:
    """The facts of a note, read back from its text alone."""
    facts = set()
    for clause in text.rstrip(".").split("; "):
        for pattern, _, status in phrases:
            match = pattern.fullmatch(clause)
            parts = re.split(" and | or ", match.group(1)) if match else []
            found = [next((c for n, c in names if n == part), None) for part in parts]
            if parts and all(found):
                facts |= {(condition.code, status.name) for condition in found if condition}
                break
        else:
            pytest.fail(f"cannot read {clause!r}")
    return facts


def test_committed_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    command = [sys.executable, "-I", str(EXAMPLE / "data.py"), "--seed", "11", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    for split in SPLITS:
        name = f"{split}.jsonl"
        assert (tmp_path / name).read_bytes() == (EXAMPLE / "data" / name).read_bytes(), name


def test_another_seed_gives_other_notes(data: Any, rows: dict[str, list[dict[str, Any]]]) -> None:
    other = {body(row) for row in data.make_splits(8)["test"]}
    assert len(other & {body(row) for row in rows["test"]}) < 10


def test_truth_follows_from_the_text_alone(data: Any, rows: dict[str, list[dict[str, Any]]]) -> None:
    phrases, names = reader(data)
    billed = {status.name for status in data.STATUSES if status.billed}
    for split in ("train", "validation", "test"):
        for row in rows[split]:
            facts = read(body(row), phrases, names)
            assert {code for code, status in facts if status in billed} == set(row["codes"]), row
            assert len(set(row["codes"])) == len(row["codes"]) <= 4
            not_billed = sum(status not in billed for _, status in facts)
            assert row["slice"] == ("hard" if not_billed >= 2 else "standard")
            assert row["messages"][-1]["role"] == "user"


def test_no_two_notes_state_the_same_facts(data: Any, rows: dict[str, list[dict[str, Any]]]) -> None:
    phrases, names = reader(data)
    seen: dict[frozenset[tuple[str, str]], str] = {}
    texts: set[str] = set()
    for split in SPLITS:
        for row in rows[split]:
            assert body(row) not in texts, body(row)
            texts.add(body(row))
            facts = frozenset(read(body(row), phrases, names))
            if split == "demonstrations" and "; " not in body(row):
                continue  # single clauses may repeat a fact in other words; see below
            assert facts not in seen, (row["note_id"], seen.get(facts))
            seen[facts] = row["note_id"]
    single = {frozenset(read(body(r), phrases, names)) for r in rows["demonstrations"] if "; " not in body(r)}
    held_out = {facts for facts, note_id in seen.items() if not note_id.startswith("demonstrations")}
    assert not single & held_out


def test_held_out_wording_stays_out_of_training(data: Any, rows: dict[str, list[dict[str, Any]]]) -> None:
    wordings = {p for s in data.STATUSES for p in s.held_out_phrases}
    patterns = [re.compile(re.escape(p).replace(r"\{x\}", r"[\w ]+")) for p in wordings]
    for split in ("train", "demonstrations"):
        for row in rows[split]:
            assert not any(p.fullmatch(c) for p in patterns for c in body(row).rstrip(".").split("; ")), body(
                row
            )
    names = [c.held_out_name for c in data.CONDITIONS if c.held_out_name]
    trained = " ".join(body(row) for row in rows["train"])
    assert not [name for name in names if re.search(rf"\b{re.escape(name)}\b", trained)]
    unseen = [row["unseen"] for row in rows["test"]]
    assert sum("name" in u for u in unseen) > 60
    assert sum("phrasing" in u for u in unseen) > 60
    assert sum(row["slice"] == "hard" for row in rows["test"]) > 60


def test_junior_coder_errs_by_status(data: Any, rows: dict[str, list[dict[str, Any]]]) -> None:
    phrases, names = reader(data)
    coded = {status.name: [0, 0] for status in data.STATUSES}
    for row in rows["demonstrations"]:
        answer = row["messages"][-1]["content"]
        codes = set() if answer == "none" else set(answer.split(", "))
        facts = read(body(row), phrases, names)
        assert codes <= {code for code, _ in facts}, "invents nothing"
        for code, status in facts:
            coded[status][0] += code in codes
            coded[status][1] += 1
    shares = {status: hit / total for status, (hit, total) in coded.items()}
    assert shares["present"] > 0.9
    for status, chance in data.JUNIOR_CODES.items():
        assert abs(shares[status] - chance) < 0.08, shares


def grades(cases: list[tuple[Any, list[str]]]) -> list[float]:
    """The grader's source, run on its own in an interpreter that sees nothing of this repository."""
    source = json.loads((EXAMPLE / "grader.json").read_text())["source"]
    program = source + "\nimport json, sys\nprint(json.dumps([grade(s, i) for s, i in json.load(sys.stdin)]))"
    pairs = [({"output_text": text}, {"codes": codes}) for text, codes in cases]
    done = subprocess.run(
        [sys.executable, "-I", "-c", program],
        input=json.dumps(pairs),
        capture_output=True,
        text=True,
        check=True,
    )
    return list(json.loads(done.stdout))


@pytest.mark.parametrize(
    ("text", "codes", "expected"),
    [
        ("E11.9, I10", ["E11.9", "I10"], 1.0),
        ("I10,E11.9", ["E11.9", "I10"], 1.0),
        (" i10\ne11.9.\n", ["E11.9", "I10"], 1.0),
        ("none", [], 1.0),
        ("None.", [], 1.0),
        ("none", ["I10"], 0.0),
        ("I10", [], 0.0),
        ("", [], 0.0),
        ("", ["I10"], 0.0),
        (None, ["I10"], 0.0),
        ("I10", ["E11.9", "I10"], 2 / 3),
        ("I10, I10", ["I10"], 2 / 3),
        ("I10, none", ["I10"], 2 / 3),
        ("The code is I10", ["I10"], 0.0),
        ("I10, because of the blood pressure", ["I10"], 2 / 3),
        (",,,", ["I10"], 0.0),
        ("F32.A", ["F32.A"], 1.0),
    ],
)
def test_grader(text: str | None, codes: list[str], expected: float) -> None:
    assert grades([(text, codes)]) == [pytest.approx(expected)]


def test_no_lazy_answer_pays(data: Any, rows: dict[str, list[dict[str, Any]]]) -> None:
    everything = ", ".join(c.code for c in data.CONDITIONS)
    for answer in (everything, "none", "I10", "I10, " * 20):
        scores = grades([(answer, row["codes"]) for row in rows["test"]])
        assert sum(scores) / len(scores) < 0.3, answer
    truth = grades([(", ".join(row["codes"]) or "none", row["codes"]) for row in rows["test"]])
    assert set(truth) == {1.0}
