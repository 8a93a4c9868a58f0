"""Every grader on the shelf: right answers, half-right ones, abstention, and attempts to cheat."""

import json

import pytest

from graders import GraderError, load, sample_from_text
from graders.library import FOLDER, names, ready

CODE = "Here:\n```python\nimport stripe\nc = stripe.Charge.create(1, amount=5, currency='usd')\n```"
PLAN = "<plan>add</plan><code>x = 1</code>"
EVENTS = [
    {"who": "Ann", "name": "school", "start": "2026-01-05T08:00", "end": "2026-01-05T12:00"},
    {"who": "Ann", "name": "piano", "start": "2026-01-05T14:00", "end": "2026-01-05T15:00"},
]
RULES = [
    {"kind": "required", "name": "piano"},
    {"kind": "before", "first": "school", "then": "piano"},
    {"kind": "within", "start": 7, "end": 20},
]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
    "required": ["a", "b"],
}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


# grader -> [(item, answer text or tool calls, score)]
CASES = {
    "multiset_f1": [
        ({"reference_answer": ["a", "a", "b"]}, '["b", "a", "a"]', 1), ({"reference_answer": ["a", "a", "b"]}, '{"predicted": ["a", "b"]}', 0.8),
        ({"reference_answer": [{"x": 1, "y": 2}]}, '[{"y": 2, "x": 1}]', 1), ({"reference_answer": []}, "[]", 1),
        ({"reference_answer": []}, '["a"]', 0), ({"reference_answer": ["a"]}, "[]", 0), ({"reference_answer": ["a"]}, "a", 0),
        ({"reference_answer": ["a"]}, json.dumps(["a"] * 9), 0.2),
    ],
    "set_f1": [
        ({"reference_answer": ["a", "b"]}, '["b", "a", "a"]', 1), ({"reference_answer": ["a", "b"]}, '["a"]', 2 / 3),
        ({"reference_answer": []}, "[]", 1), ({"reference_answer": ["a"]}, '["b"]', 0),
    ],
    "fuzzy_span_f1": [
        ({"reference_answer": ["the buyer shall pay"]}, '["the buyer shall pay"]', 1), ({"reference_answer": []}, "[]", 1),
        ({"reference_answer": []}, '["x"]', 0), ({"reference_answer": ["x"]}, "[]", 0),
        ({"reference_answer": ["abcd", "wxyz"]}, '["abcd", "abcd", "abcd"]', 2 / 3),
    ],
    "staged_format": [
        ({"reference_answer": "x = 1"}, PLAN, 1), ({"reference_answer": "x = 1"}, "x = 1", 0), ({"reference_answer": "x"}, "<plan>a</plan>", 0.05),
        ({"reference_answer": "x"}, "<code>x</code><plan>a</plan>", 0.15), ({"reference_answer": "x = 1"}, PLAN + " more", 0.4),
        ({"reference_answer": "x = 1"}, PLAN + PLAN, 0.2),
    ],
    "ast_patterns": [
        ({"patterns": ["stripe.Charge.create(..., amount=_)"]}, CODE, 1), ({"patterns": ["stripe.Charge.create(..., amount=7)"]}, CODE, 0),
        ({"patterns": ["stripe.Charge.create(...)", "open(...)"]}, CODE, 0.5), ({"patterns": ["f(_)"]}, "f(", 0),
        ({"patterns": ["f(_)"]}, "# f(1)\n'f(1)'", 0), ({"patterns": ["f(_)"]}, "g(f(x + 1))", 1),
    ],
    "numeric_tolerance": [
        ({"reference_answer": 100}, "It is 100.", 1), ({"reference_answer": "1234.5"}, "about 1,234.5 EUR", 1), ({"reference_answer": 100}, "100.9", 1),
        ({"reference_answer": 100}, "105.5", 0.5), ({"reference_answer": 100}, "120", 0), ({"reference_answer": -3}, "first 7, then -3", 1),
        ({"reference_answer": 0}, "0", 1), ({"reference_answer": 5}, "none", 0), ({"reference_answer": 1e-3}, "1e-3", 1),
    ],
    "tool_call": [
        ({"reference_tools": [{"name": "f", "arguments": {"a": 1, "b": 2}}]}, [call("f", a=1, b=2)], 1),
        ({"reference_tools": [{"name": "f", "arguments": {"a": 1, "b": 2}}]}, [call("f", a=1)], 0.7),
        ({"reference_tools": [{"name": "f", "arguments": {}}]}, [call("g")], 0), ({"reference_tools": []}, [], 1), ({"reference_tools": []}, [call("f")], 0),
        ({"reference_tools": [{"name": "f"}]}, [call("f"), call("g")], 0.5),
        ({"reference_tools": [{"name": "f"}]}, [{"function": {"name": "f", "arguments": "{oops"}}], 0.4),
    ],
    "json_schema": [
        ({"schema": SCHEMA}, '{"a": 1, "b": "x"}', 1), ({"schema": SCHEMA}, '{"a": 1}', 0.25), ({"schema": SCHEMA}, '{"a": "1", "b": 2}', 0),
        ({"schema": SCHEMA}, "a: 1", 0), ({"schema": SCHEMA}, "[]", 0),
    ],
    "schedule_constraints": [
        ({"constraints": RULES}, json.dumps({"events": EVENTS}), 1), ({"constraints": RULES}, json.dumps({"events": EVENTS[:1]}), 0.6),
        ({"constraints": RULES}, '{"events": []}', 0), ({"constraints": RULES}, "busy", 0),
        ({"constraints": []}, json.dumps([EVENTS[0], {**EVENTS[1], "start": "2026-01-05T11:00"}]), 0.5),
        ({"constraints": RULES}, json.dumps([EVENTS[0], {**EVENTS[1], "start": "2026-01-05T13:00Z"}]), 0),
    ],
}  # fmt: skip
WITH_JUDGE = {"weighted_rubric", "label_and_explanation"}


@pytest.mark.parametrize("name", CASES)
def test_scores(name):
    pairs, expected = [], []
    for item, answer, score in CASES[name]:
        tools = answer if isinstance(answer, list) else None
        pairs.append((item, sample_from_text("" if tools is not None else answer, tools)))
        expected.append(score)
    with load(ready(name), workers=1) as grader:
        grades = grader.grade(pairs)
        assert grader.check([item for item, _ in pairs]) == []
    assert [g.details for g in grades if g.errors] == []
    assert [g.reward for g in grades] == [pytest.approx(score) for score in expected]


def judge_reply(result):
    content = json.dumps({"steps": [], "result": result})
    return 200, {"choices": [{"message": {"content": content}, "finish_reason": "stop"}], "usage": {}}


def test_rubric_sends_question_rubric_and_answer(server):
    server.answer = lambda *_: judge_reply(0.6)
    item = {"question": "Why?", "rubric": [{"points": 0.5, "criterion": "names the cause"}]}
    with load(ready("weighted_rubric"), endpoints={"*": {"base_url": server.url}}) as grader:
        assert grader.check([item]) == []
        assert grader.grade([(item, sample_from_text("Because."))])[0].reward == 0.6
    sent = server.requests[0][1]["messages"][1]["content"]
    assert "Why?" in sent
    assert '"criterion": "names the cause"' in sent
    assert "Because." in sent


@pytest.mark.parametrize(("label", "reward"), [("yes", 0.75), ("no", 0.0)])
def test_eloquence_does_not_pay_for_a_wrong_label(server, label, reward):
    server.answer = lambda *_: judge_reply(0.5)
    item = {"label": "yes", "explanation": "it is"}
    sample = sample_from_text(json.dumps({"label": label, "explanation": "because"}))
    with load(ready("label_and_explanation"), endpoints={"*": {"base_url": server.url}}) as grader:
        assert grader.grade([(item, sample)])[0].reward == pytest.approx(reward)


def test_every_grader_is_tested_and_on_the_page():
    assert set(names()) == set(CASES) | WITH_JUDGE
    page = (FOLDER / "README.md").read_text()
    assert all(f"`{name}`" in page for name in names())
    with pytest.raises(GraderError, match="nearest: 'set_f1'"):
        ready("set_f2")
