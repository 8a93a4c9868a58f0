"""Every example and rule of the reference on graders (string checks to graders.run), as a table."""

import json
import math

import pytest

from graders import ERROR_KEYS, Grade, GraderError, grade, load, sample_from_text
from graders.formula import parse_formula
from graders.spec import MAX_SOURCE


def check(operation, text, reference):
    spec = {"type": "string_check", "name": "c", "operation": operation, "input": "{{sample.output_text}}", "reference": "{{item.r}}"}  # fmt: skip
    return grade(spec, [({"r": reference}, {"output_text": text})])[0].reward


@pytest.mark.parametrize(
    ("operation", "text", "reference", "reward"),
    [
        ("eq", "Yes", "Yes", 1), ("eq", "yes", "Yes", 0), ("eq", "Yes ", "Yes", 0),
        ("ne", "yes", "Yes", 1), ("ne", "Yes", "Yes", 0), ("neq", "yes", "Yes", 1),
        ("like", "say Yes now", "Yes", 1), ("like", "say yes now", "Yes", 0), ("like", "Yes", "say Yes now", 0),
        ("like", "50%", "5%", 0), ("like", "abc", "a_c", 0), ("like", "abc", "", 1),
        ("ilike", "say YES now", "yes", 1), ("ilike", "no", "yes", 0), ("ilike", "STRASSE", "straße", 1),
    ],
)  # fmt: skip
def test_string_check(operation, text, reference, reward):
    assert check(operation, text, reference) == reward


METRICS = ["fuzzy_match", "bleu", "gleu", "meteor", *(f"rouge_{n}" for n in (1, 2, 3, 4, 5, "l"))]


@pytest.mark.parametrize("metric", METRICS)
def test_text_similarity_orders_same_near_far(metric):
    spec = {"type": "text_similarity", "name": "t", "evaluation_metric": metric, "input": "{{sample.output_text}}", "reference": "{{item.r}}"}  # fmt: skip
    reference = "the quick brown fox jumps over the lazy dog"
    texts = [reference, "the quick brown fox jumps over a lazy cat", "zzz"]
    same, near, far = (g.reward for g in grade(spec, [({"r": reference}, {"output_text": t}) for t in texts]))
    assert same == pytest.approx(1, abs=0.01)
    assert 0 < near < same
    assert far == pytest.approx(0, abs=0.3)
    assert all(
        0 <= g.reward <= 1
        for g in grade(
            spec, [({"r": r}, {"output_text": t}) for r in ("", "é", "…") for t in ("", "é", "a b")]
        )
    )


def test_similarity_numbers_are_the_libraries_own():
    from nltk.translate.gleu_score import sentence_gleu
    from rapidfuzz import fuzz, utils
    from rouge_score.rouge_scorer import RougeScorer

    from graders.similarity import metric

    a, b = "The cat sat on a mat.", "the cat was on the mat"
    assert metric("fuzzy_match")(a, b) == fuzz.WRatio(a, b, processor=utils.default_process) / 100
    assert metric("rouge_l")(a, b) == RougeScorer(["rougeL"]).score(b, a)["rougeL"].fmeasure
    assert metric("rouge_2")(a, b) == RougeScorer(["rouge2"]).score(b, a)["rouge2"].fmeasure
    assert metric("gleu")("a b c", "a b d") == sentence_gleu([["a", "b", "d"]], ["a", "b", "c"])


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{item.reference_answer}}", "1.0"), ("{{ item.reference_answer }}", "1.0"), ("{{item.n.deep.er}}", "x"),
        ("{{ item.list[1] }}", "b"), ("{{item.list[-1]}}", "b"), ("{{item.list.0}}", "a"), ("{{item['odd key']}}", "o"),
        ("{{ item.n }}", '{"deep": {"er": "x"}}'), ("{{item.list}}", '["a", "b"]'), ("{{item.yes}}", "true"),
        ("{{item.nothing}}", "null"), ("{{item.accent}}", "é"), ("{{item.messages}}", '[{"role": "user", "content": "é"}]'),
        ("{{sample.output_json.a[0].b}}", "7"), ("{{sample.output_tools[0].function.arguments}}", '{"x":1}'),
        ("{{ sample.choices[0].message.content }}", '{"a": [{"b": 7}]}'), ("{{sample.output_text}}", '{"a": [{"b": 7}]}'),
        ("a {{item.list[0]}} b {{item.yes}} c", "a a b true c"), ("{{'{{'}} {{item.yes}}", "{{ true"), ("plain }} text", "plain }} text"),
        ("", ""),
    ],
)  # fmt: skip
def test_templates(template, text):
    from graders.templates import parse_template

    item = {
        "reference_answer": 1.0, "n": {"deep": {"er": "x"}}, "list": ["a", "b"], "odd key": "o", "yes": True, "nothing": None,
        "accent": "é", "messages": [{"role": "user", "content": "é"}],
    }  # fmt: skip
    sample = sample_from_text(
        '{"a": [{"b": 7}]}', tools=[{"function": {"name": "f", "arguments": '{"x":1}'}}]
    )
    assert parse_template(template, "t").render(item, sample) == text


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{item.missing}}", "invalid_variable_error"), ("{{item.list[9]}}", "invalid_variable_error"),
        ("{{item.list.x}}", "invalid_variable_error"), ("{{sample.output_tools[0]}}", "invalid_variable_error"),
        ("{{sample.output_json.a}}", "sample_parse_error"), ("{{sample.output_json}}", "sample_parse_error"),
    ],
)  # fmt: skip
def test_template_errors(template, error):
    spec = {"type": "string_check", "name": "c", "operation": "eq", "input": template, "reference": ""}
    (found,) = grade(spec, [({"list": [1]}, sample_from_text("not json"))])
    assert (found.errors, found.reward) == ([error], None)


@pytest.mark.parametrize("template", ["{{x}}", "{{items.a}}", "{{item.}}", "{{item[}}", "{{item.a", "{{}}", "{{item.a | upper}}", "{{sample.output_txt}}", "{{item.a()}}"])  # fmt: skip
def test_bad_templates_are_refused_at_load(template):
    with pytest.raises(GraderError, match=r"grader\.input") as caught:
        load({"type": "string_check", "name": "c", "operation": "eq", "input": template, "reference": ""})
    assert caught.value.error_class == "invalid_variable_error"


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("0.5 * a + 0.5 * b", 0.5), ("a", 1), ("-2^2", -4), ("2^3^2", 512), ("2^-1", 0.5), ("(a + b) * 3", 3), ("1 - 2 - 3", -4),
        ("8 / 4 / 2", 1), ("2 + 3 * 4", 14), ("min(a, b, 0.5)", 0), ("max(a, b)", 1), ("abs(-a)", 1), ("floor(1.7)", 1),
        ("ceil(1.2)", 2), ("exp(0)", 1), ("sqrt(9)", 3), ("log(exp(2))", 2), ("--a", 1), ("+a", 1), ("1e2", 100), (".5", 0.5),
        ("max(min(a, 1), 0)", 1), ("-a^2", -1), ("2*-a", -2), ("floor(-0.5)", -1),
    ],
)  # fmt: skip
def test_formulas(formula, value):
    assert parse_formula(formula, ["a", "b"]).evaluate({"a": 1.0, "b": 0.0}) == pytest.approx(value)


@pytest.mark.parametrize(
    ("formula", "column"),
    [
        ("0.5 * text_similarity_score +  0.5 * string_check_score)", 7), ("a +", 4), ("(a", 3), ("a b", 3), ("a ** 2", 4),
        ("max()", 5), ("abs(a, b)", 1), ("eval(a)", 1), ("a.b", 2), ("1..2", 1), ("__import__('os')", 1), ("a; b", 2), ("", 1),
        ("a if b else a", 3), ("ä", 1), ("a)", 2), ("(" * 500 + "a" + ")" * 500, 101),
    ],
)  # fmt: skip
def test_bad_formulas_name_the_column(formula, column):
    with pytest.raises(GraderError, match=rf"column {column}:") as caught:
        parse_formula(formula, ["a", "b"])
    assert caught.value.error_class == "formula_parse_error"


@pytest.mark.parametrize(
    "formula", ["1 / b", "log(b)", "log(-a)", "sqrt(-a)", "(-a)^0.5", "exp(1000)", "9^9^9", "1e308 * 10"]
)
def test_arithmetic_without_answer_is_other_error(formula):
    part = {"type": "string_check", "operation": "eq", "input": "{{sample.output_text}}", "reference": "x"}
    spec = {
        "type": "multi",
        "name": "m",
        "graders": {"a": part, "b": {**part, "reference": "y"}},
        "calculate_output": formula,
    }
    (found,) = grade(spec, [({}, sample_from_text("x"))])
    assert (found.reward, found.errors) == (None, ["other_error"])
    assert found.sub_rewards == {"a": 1.0, "b": 0.0}


PYTHON = {
    "float": ("return 0.5", 0.5), "int": ("return 1", 1.0), "negative": ("return -1.0", -1.0), "above one": ("return 5", 5.0),
    "bool": ("return True", 1.0), "numpy": ("import numpy; return numpy.float32(0.5)", 0.5),
    "numpy bool": ("import numpy; return numpy.bool_(1)", 1.0), "fraction": ("from fractions import Fraction as F; return F(1, 4)", 0.25),
    "order is sample, item": ("return float(sample['output_text'] == 'answer' and item['k'] == 'row')", 1.0),
    "output_json": ("return float('output_json' not in sample)", 1.0),
    "none": ("return None", None), "text": ("return '1'", None), "raises": ("raise ValueError('no')", None), "nan": ("return float('nan')", None),
    "rapidfuzz as in the documents": (
        "from rapidfuzz import fuzz, utils\n    return fuzz.WRatio(sample['output_text'], 'answer', processor=utils.default_process) / 100", 1.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PYTHON)
@pytest.mark.parametrize("isolation", ["call", "worker"])
def test_python_return_values(name, isolation):
    body, reward = PYTHON[name]
    spec = {
        "type": "python",
        "source": f"def grade(sample, item):\n    {body.replace('; ', chr(10) + '    ')}",
    }
    with load(spec, workers=1, isolation=isolation) as grader:
        (found,) = grader.grade([({"k": "row"}, sample_from_text("answer"))])
    assert found.reward == reward, found
    assert found.errors == ([] if reward is not None else ["python_grader_runtime_error"])


def test_traceback_points_into_the_source():
    with load(
        {"type": "python", "source": "def grade(sample, item):\n    return item['nope']"}, workers=1
    ) as grader:
        (found,) = grader.grade([({}, sample_from_text("x"))])
    text = found.to_openai("p", "python")["metadata"]["errors"]["python_grader_runtime_error_details"]
    assert 'File "<grader>", line 2, in grade' in text
    assert "KeyError: 'nope'" in text


def source_of(size):
    start = "def grade(sample, item):\n    return 1.0\n#"
    return start + "x" * (size - len(start))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (source_of(MAX_SOURCE), "262144 bytes"), ("def grade(sample): return 1", "two positional"), ("def grade(a, b, c): return 1", "two positional"),
        ("def grade(a, b, *, c): return 1", "two positional"), ("def grad(a, b): return 1", "no function grade"),
        ("def grade(a, b) return 1", "line 1, column"), ("async def grade(a, b): return 1", "async"), ("", "not empty"), ("\0", "null"),
    ],
)  # fmt: skip
def test_bad_sources_are_refused_at_load(source, message):
    with pytest.raises(GraderError, match=message):
        load({"type": "python", "name": "p", "source": source})


def test_largest_source_loads():
    load({"type": "python", "name": "p", "source": source_of(MAX_SOURCE - 1)})


SUB = {"type": "string_check", "name": "one", "operation": "eq", "input": "a", "reference": "a"}


@pytest.mark.parametrize("graders", [{"one": SUB}, [SUB], SUB])
def test_multi_takes_dict_list_and_single(graders):
    spec = {"type": "multi", "name": "m", "graders": graders, "calculate_output": "one"}
    assert load(spec).spec["graders"]["one"]["operation"] == "eq"
    assert load(spec).sha256 == load({**spec, "graders": {"one": SUB}}).sha256


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "multi", "name": "m", "graders": {"m": {"type": "multi", "graders": {"a": SUB}, "calculate_output": "a"}}, "calculate_output": "m"}, "no multi inside multi"),
        ({"type": "multi", "name": "m", "graders": [SUB, SUB], "calculate_output": "one"}, "twice"),
        ({"type": "multi", "name": "m", "graders": {}, "calculate_output": "1"}, "at least one"),
        ({"type": "multi", "name": "m", "graders": {"a": SUB}}, "calculate_output: missing"),
        ({"name": "x"}, "grader.type: missing"), ([], "expected an object"), ("nonsense", "not JSON"),
        ({"type": "score_model", "name": "s", "model": "m", "input": [{"role": "robot", "content": ""}]}, r"input\[0\]\.role"),
        ({"type": "score_model", "name": "s", "model": "m", "input": [], }, "not empty"),
        ({"type": "score_model", "name": "s", "model": "m", "input": [{"role": "user", "content": ""}], "range": [1, 0]}, "range"),
        ({"type": "score_model", "name": "s", "model": "m", "input": [{"role": "user", "content": ""}], "sampling_params": {"temprature": 1}}, "nearest: 'temperature'"),
        ({"type": "text_similarity", "name": "s", "input": "", "reference": "", "evaluation_metric": "rouge_6"}, "nearest: 'rouge_"),
        ({"type": "endpoint", "name": "s", "url": "ftp://x"}, "http"),
    ],
)  # fmt: skip
def test_bad_specs(spec, message):
    with pytest.raises(GraderError, match=message) as caught:
        load(spec)
    assert "\n" not in str(caught.value)


def test_both_spellings_normalise_to_one_grader(tmp_path):
    base = {"type": "score_model", "name": "s", "model": "m", "input": [{"role": "user", "content": "x"}]}
    new = load(
        {
            **base,
            "sampling_params": {"max_completions_tokens": 9, "temperature": None},
            "range": [0, 1],
            "pass_threshold": None,
        }
    )
    old = load(json.dumps({**base, "sampling_parameters": {"max_completion_tokens": 9}}))
    path = tmp_path / "g.json"
    path.write_text(json.dumps(new.spec))
    assert new.spec == old.spec == load(path).spec
    assert new.sha256 == old.sha256
    assert new.spec["range"] == [0, 1]


def test_graders_run_response_has_every_documented_key():
    answer = Grade.failed("python_grader_runtime_error", "Traceback", seconds=1.5).to_openai("n", "python")
    assert set(answer) == {"reward", "metadata", "sub_rewards", "model_grader_token_usage_per_model"}
    assert set(answer["metadata"]) == {"name", "type", "errors", "execution_time", "scores", "token_usage", "sampled_model_name"}  # fmt: skip
    assert tuple(answer["metadata"]["errors"]) == ERROR_KEYS
    assert len(ERROR_KEYS) == 14
    assert answer["metadata"]["errors"]["python_grader_runtime_error_details"] == "Traceback"
    assert answer["reward"] == 0.0
    from openai.types.fine_tuning.alpha import GraderRunResponse

    parsed = GraderRunResponse.model_construct(**answer)
    assert parsed.metadata.errors.python_grader_runtime_error is True


def test_invalid_grade_stands_in_the_response_only():
    spec = {
        "type": "multi",
        "name": "m",
        "graders": {"one": {**SUB, "input": "{{item.x}}"}},
        "calculate_output": "one",
        "invalid_grade": -1,
    }
    (found,) = grade(spec, [({}, sample_from_text("x"))])
    assert found.reward is None
    assert found.to_openai("m", "multi")["reward"] == -1


def test_check_names_template_row_and_key():
    spec = {
        "type": "multi",
        "name": "m",
        "graders": {"a": {**SUB, "input": "{{item.x}}", "reference": "{{item.deep[0].y}}"}},
        "calculate_output": "a",
    }
    items = [{"x": 1, "deep": [{"y": 1}]}, {"deep": [{"y": 1}]}, {"x": 1, "deep": []}]
    found = [(p.row, p.path, p.key, p.template) for p in load(spec).check(items)]
    assert found == [
        (1, "graders.a.input", "item.x", "{{item.x}}"),
        (2, "graders.a.reference", "item.deep[0]", "{{item.deep[0].y}}"),
    ]
    assert load(spec).check(items[:1]) == []


def test_check_reads_python_sources():
    swapped = load({"type": "python", "source": "def grade(item, sample): return 1"}).check([{}])
    assert "wrong way round" in swapped[0].message
    (typo,) = load({"type": "python", "source": "def grade(s, i): return i['anwser'] + i['answer']"}).check(
        [{"answer": 1}]
    )
    assert (typo.key, "nearest: 'answer'" in typo.message) == ("item.anwser", True)


def test_check_of_fifty_thousand_rows_is_quick():
    import time

    spec = {
        "type": "multi",
        "name": "m",
        "graders": {"a": {**SUB, "input": "{{item.x}}", "reference": "{{item.deep[0].y}}"}},
        "calculate_output": "a",
    }
    items = [{"x": 1, "deep": [{"y": 1}]}] * 50_000
    start = time.monotonic()
    assert load(spec).check(items) == []
    assert time.monotonic() - start < 3


def test_import_is_quick_and_light():
    import subprocess
    import sys

    code = (
        "import sys, time; t = time.perf_counter(); import graders; d = time.perf_counter() - t\n"
        "heavy = {'prefect', 'mlflow', 'torch', 'openai', 'rapidfuzz', 'nltk', 'numpy', 'pydantic', 'scipy'} & set(sys.modules)\n"
        "print(d); assert not heavy, heavy"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(times) < 0.2
    assert math.isfinite(min(times))
