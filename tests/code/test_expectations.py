"""The Great Expectations suite: each rule catches its fault, names its lines, and the pages are written."""

from __future__ import annotations

import pytest

from tasks.expectations import run_suites, suite

LIMIT = 50


def fact(line: int, **changes) -> dict:
    return {
        "line": line,
        "shape_error": None,
        "last_role": "user",
        "prompt": f"digest {line}",
        "seen_in": None,
        "template_error": None,
        "tokens": 10,
        **changes,
    }


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """All faults at once, on lines that are not row numbers, so that one build of the pages is enough."""
    docs = tmp_path_factory.mktemp("docs")
    tables = {
        "train": [
            fact(2),
            fact(3, shape_error="`messages` must be a list", prompt=None, tokens=0),
            fact(5, last_role="assistant"),
            fact(6, tokens=LIMIT),
            fact(8, tokens=LIMIT + 1),
            fact(9, prompt="same"),
            fact(11, prompt="same"),
            fact(12, template_error="item.answer is missing"),
            fact(13, prompt=None, shape_error="bad", tokens=0),
        ],
        "validation": [fact(1), fact(4, seen_in="train line 2"), fact(7, seen_in="train line 5")],
        "test": [fact(1), fact(2)],
        "demonstrations": [fact(1, last_role="assistant"), fact(2, last_role="user")],
    }
    return run_suites(tables, LIMIT, docs), docs


def test_every_fault_is_found_with_its_lines(outcome):
    failed, _ = outcome
    found = {(split, check): (severity, column, lines) for split, check, severity, _, column, lines in failed}
    assert found == {
        ("train", "shape"): ("critical", "shape_error", [3, 13]),
        ("train", "last_role"): ("critical", "last_role", [5]),
        ("train", "length"): ("critical", "tokens", [8]),
        ("train", "duplicates"): ("warning", "prompt", [9, 11]),
        ("train", "grader_fields"): ("critical", "template_error", [12]),
        ("validation", "overlap"): ("critical", "seen_in", [4, 7]),
        ("demonstrations", "last_role"): ("critical", "last_role", [2]),
    }


def test_messages_say_what_is_expected(outcome):
    failed, _ = outcome
    said = {(split, check): message for split, check, _, message, _, _ in failed}
    assert said["train", "length"] == f"the prompt leaves no room for an answer (limit {LIMIT} tokens)"
    assert said["train", "last_role"] == "the last message must be from the user"
    assert said["demonstrations", "last_role"] == "the last message must be from the assistant"


def test_data_docs_are_pages(outcome):
    _, docs = outcome
    index = (docs / "index.html").read_text("utf-8")
    assert "<html" in index
    pages = list((docs / "validations").rglob("*.html"))
    assert len(pages) == 4
    assert any("template_error" in page.read_text("utf-8") for page in pages)


def test_each_file_has_the_rules_that_make_sense_for_it():
    rules = {
        split: [rule[0] for rule in suite(split, 9)] for split in ("train", "validation", "demonstrations")
    }
    assert "overlap" not in rules["train"]  # the training file is where prompts may be from
    assert "overlap" in rules["validation"]
    assert "grader_fields" not in rules["demonstrations"]  # demonstrations are never graded
