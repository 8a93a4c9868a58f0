# ruff: noqa: PT017 - the errors under test are one outcome of two
"""Whatever the input, nothing comes out but a value or a declared error."""

import gc
import json
import operator
import os
import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graders import ERROR_CLASSES, GraderError, grade, load, sample_from_text
from graders.errors import Ungradable
from graders.formula import parse_formula
from graders.samples import MISSING, parse_json
from graders.templates import parse_template

RUNS = int(os.environ.get("HYPOTHESIS_RUNS", "400"))
texts = st.text(max_size=60)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
items = st.dictionaries(st.sampled_from(["a", "b", "c d", "0", "é"]), values, max_size=4)
steps = st.sampled_from(
    [".a", ".b", "[0]", "[-1]", "['c d']", ".0", ".é", "[99999999999]", "..", "[", " .a ", ".a.b"]
)
templates = st.lists(
    texts
    | st.builds(
        lambda n, s, p: "{{" + p + n + "".join(s) + p + "}}",
        st.sampled_from(["item", "sample", "sample.output_json", "x"]),
        st.lists(steps, max_size=3),
        st.sampled_from(["", " "]),
    ),
    max_size=3,
).map("".join)
formulas = st.lists(
    st.sampled_from(
        [
            *"+-*/^(),. ab1",
            "0.5",
            "1e3",
            "min(",
            "max(",
            "log(",
            "sqrt(",
            "abs(",
            "exp(",
            "floor(",
            "**",
            "é",
            "1e400",
            "9" * 400,
        ]
    ),
    max_size=14,
).map("".join)


def check_template(template, item, text):
    sample = sample_from_text(text)
    try:
        parsed = parse_template(template, "t")
    except GraderError as error:
        assert "\n" not in str(error)
        return
    try:
        assert isinstance(parsed.render(item, sample), str)
    except Ungradable as error:
        assert error.error_class in ERROR_CLASSES


def check_formula(formula, a, b):
    try:
        parsed = parse_formula(formula, ["a", "b"])
    except GraderError as error:
        assert error.error_class == "formula_parse_error"
        return
    try:
        value = parsed.evaluate({"a": a, "b": b})
    except Ungradable as error:
        assert error.error_class == "other_error"
    else:
        assert isinstance(value, float)
        assert value - value == 0


scores = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=RUNS, deadline=None)
@given(templates, items, texts | values.map(lambda v: json.dumps(v)))
def test_templates_raise_only_declared_errors(template, item, text):
    check_template(template, item, text)


@settings(max_examples=RUNS, deadline=None)
@given(formulas | texts, scores, scores)
def test_formulas_raise_only_declared_errors(formula, a, b):
    check_formula(formula, a, b)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(templates, items, texts | values.map(lambda v: json.dumps(v)), formulas | texts, scores, scores)
def test_ten_thousand_of_each(template, item, text, formula, a, b):
    check_template(template, item, text)
    check_formula(formula, a, b)


@settings(max_examples=RUNS, deadline=None)
@given(
    st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 3), st.sampled_from("+-*"), st.sampled_from("+-*")
)
def test_formulas_agree_with_arithmetic(a, b, power, one, two):
    source = f"a {one} -b {two} a^{power}"
    apply = {"+": operator.add, "-": operator.sub, "*": operator.mul}
    last = a**power
    expected = apply[one](a, -b * last) if two == "*" else apply[two](apply[one](a, -b), last)
    assert parse_formula(source, ["a", "b"]).evaluate({"a": a, "b": b}) == expected


@settings(max_examples=RUNS, deadline=None)
@given(values)
def test_any_spec_is_refused_in_one_line_or_loads(value):
    try:
        load(value)
    except GraderError as error:
        assert "\n" not in str(error)


@settings(max_examples=RUNS, deadline=None)
@given(
    st.sampled_from(
        ["type", "name", "input", "reference", "operation", "extra", "graders", "calculate_output"]
    ),
    values,
    st.sampled_from(
        ["string_check", "text_similarity", "python", "score_model", "label_model", "endpoint", "multi"]
    ),
)
def test_any_field_is_refused_in_one_line_or_loads(field, value, kind):
    spec = {"type": kind, "name": "x", "input": "a", "reference": "b", "operation": "eq", field: value}
    try:
        load(spec)
    except GraderError as error:
        assert "\n" not in str(error)


@settings(max_examples=RUNS, deadline=None)
@given(values.map(lambda v: json.dumps(v)) | texts)
def test_json_is_found_or_missing(text):
    value = parse_json(text)
    if value is not MISSING:
        json.dumps(value)


MULTI = {
    "type": "multi",
    "name": "m",
    "graders": {
        "eq": {"type": "string_check", "operation": "eq", "input": "{{sample.output_text}}", "reference": "{{item.r}}"},
        "like": {"type": "string_check", "operation": "ilike", "input": "{{sample.output_json.a}}", "reference": "{{item.r}}"},
        "fuzzy": {"type": "text_similarity", "evaluation_metric": "fuzzy_match", "input": "{{sample.output_text}}", "reference": "{{item.r}}"},
    },
    "calculate_output": "0.4 * eq + 0.3 * like + 0.3 * fuzzy",
}  # fmt: skip


def grade_random_pairs(count):
    """Grade `count` random pairs in batches; return the growth of Python's memory in bytes after the first tenth."""
    dice = random.Random(0)
    grader = load(MULTI)

    def pair():
        text = "".join(dice.choices('abc {}[]":1', k=dice.randrange(20)))
        if dice.random() < 0.5:
            text = json.dumps({"a": text})
        return ({"r": text[:5]} if dice.random() < 0.9 else {}), sample_from_text(text)

    start = 0
    tracemalloc.start()
    try:
        for done in range(0, count, 1000):
            for found in grader.grade([pair() for _ in range(1000)]):
                assert (found.reward is None) == bool(found.errors)
            if done == count // 10:
                gc.collect()
                start = tracemalloc.get_traced_memory()[0]
        found = None
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - start
    finally:
        tracemalloc.stop()


def test_grading_keeps_no_memory():
    assert grade_random_pairs(20_000) < 200_000


@pytest.mark.slow
def test_a_million_pairs_keep_no_memory():
    assert grade_random_pairs(1_000_000) < 200_000


def test_python_pool_keeps_no_memory_and_no_descriptors():
    spec = {"type": "python", "source": "def grade(sample, item): return item['x']"}
    pairs = [({"x": 0.5}, sample_from_text("y" * 1000))] * 500
    with load(spec, workers=1, isolation="worker") as grader:
        grader.grade(pairs)
        tracemalloc.start()
        files = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            assert all(g.reward == 0.5 for g in grader.grade(pairs))
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(os.listdir("/proc/self/fd")) == files
    assert grown < 200_000


def test_order_is_kept_and_results_repeat():
    spec = {
        "type": "python",
        "source": "def grade(sample, item): return float(item['n']) + len({*'abc'}) / 10",
    }
    pairs = [({"n": n}, sample_from_text("x")) for n in range(200)]
    assert [g.reward for g in grade(spec, pairs)] == [n + 0.3 for n in range(200)]
