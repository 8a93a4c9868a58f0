"""The first look: each local type grades, a bad grader says where, a dataset is checked without sampling."""

import pytest

from graders import GraderError, grade, load, sample_from_text

CHECK = {
    "type": "string_check",
    "name": "exact",
    "operation": "eq",
    "input": "{{ sample.output_text }}",
    "reference": "{{item.answer}}",
}


def test_string_check_gives_one_or_zero():
    pairs = [({"answer": "4"}, sample_from_text("4")), ({"answer": "4"}, sample_from_text("5"))]
    assert [g.reward for g in grade(CHECK, pairs)] == [1.0, 0.0]


def test_multi_adds_python_and_text():
    spec = {
        "type": "multi",
        "name": "both",
        "graders": {
            "exact": CHECK,
            "length": {
                "type": "python",
                "source": "def grade(sample, item):\n    print('seen')\n    return len(sample['output_text']) / 10",
            },
        },
        "calculate_output": "0.5 * exact + 0.5 * length",
    }
    with load(spec, workers=1) as grader:
        seen = []
        grades = grader.grade(
            [({"answer": "abcde"}, sample_from_text("abcde"))] * 3, lambda i, g: seen.append(i)
        )
    assert [g.reward for g in grades] == [0.75] * 3
    assert grades[0].sub_rewards == {"exact": 1.0, "length": 0.5}
    assert grades[0].logs == "length: seen\n"
    assert sorted(seen) == [0, 1, 2]


def test_missing_variable_is_an_error_and_no_reward():
    (found,) = grade(CHECK, [({}, sample_from_text("4"))])
    assert found.reward is None
    assert found.errors == ["invalid_variable_error"]
    assert found.to_openai("exact", "string_check")["reward"] == 0.0


def test_bad_grader_names_field_and_nearest():
    with pytest.raises(GraderError, match=r"grader\.operation: found 'equals'.*eq"):
        load({**CHECK, "operation": "equals"})
    with pytest.raises(GraderError, match=r"unknown field.*nearest: 'reference'"):
        load({**CHECK, "refrence": "x"})


def test_check_reports_a_key_no_row_has():
    problems = load({**CHECK, "reference": "{{item.anwser}}"}).check([{"answer": "4"}] * 3)
    assert [(p.row, p.path, p.key) for p in problems] == [(0, "grader.reference", "item.anwser")]
    assert "nearest: 'answer'" in problems[0].message
