"""Regrading saved rollouts: tables, resuming, comparing two graders."""

import json

import pytest

from graders import GraderError, load, sample_from_text
from graders.regrade import compare, regrade

SPEC = {
    "type": "multi",
    "name": "both",
    "graders": {
        "exact": {
            "type": "string_check", "operation": "eq", "input": "{{sample.output_json.answer}}", "reference": "{{item.answer}}",
        },
        "near": {
            "type": "text_similarity", "evaluation_metric": "fuzzy_match",
            "input": "{{sample.output_text}}", "reference": "{{item.answer}}",
        },
    },
    "calculate_output": "0.5 * exact + 0.5 * near",
}  # fmt: skip


def write(path, count=40):
    rows = [
        {
            "item": {"answer": str(i % 3)},
            "sample": {"output_text": json.dumps({"answer": str(i % 2)}) if i % 10 else "oops"},
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_tables_and_grades_file(tmp_path):
    write(tmp_path / "s.jsonl")
    seen = []
    summary = regrade(
        load(SPEC), tmp_path / "s.jsonl", tmp_path / "g.jsonl", progress=lambda *p: seen.append(p)
    )
    grades = [json.loads(line) for line in (tmp_path / "g.jsonl").read_text().splitlines()]
    assert len(grades) == summary.rows == 40
    assert set(grades[0]) == {"reward", "sub_rewards", "errors", "seconds", "token_usage", "logs", "details"}
    assert summary.errors == {"sample_parse_error": 4}
    assert summary.graders["reward"].failed == summary.graders["exact"].failed == 4
    assert summary.graders["near"].failed == 0
    rewards = [g["reward"] for g in grades if g["reward"] is not None]
    assert summary.graders["reward"].mean == pytest.approx(sum(rewards) / 36)
    assert summary.slowest[0]["seconds"] == max(g["seconds"] for g in grades)
    assert seen[0] == (0, 40)
    assert seen[-1] == (40, 40)
    json.dumps(summary.to_dict())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.jsonl", "s.jsonl"]


def test_resumes_after_interruption_with_the_same_result(tmp_path, monkeypatch):
    monkeypatch.setattr("graders.regrade.BATCH", 8)
    write(tmp_path / "s.jsonl")
    whole = regrade(load(SPEC), tmp_path / "s.jsonl", tmp_path / "whole.jsonl")

    def stop(done, total):
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regrade(load(SPEC), tmp_path / "s.jsonl", tmp_path / "g.jsonl", progress=stop)
    with open(tmp_path / "g.jsonl", "a") as torn:
        torn.write('{"reward": 1.0, "sub')
    resumed = regrade(load(SPEC), tmp_path / "s.jsonl", tmp_path / "g.jsonl")
    assert resumed.resumed == 16
    assert resumed.rows == 40
    assert resumed.graders == whole.graders
    lines = [
        [json.loads(line)["reward"] for line in (tmp_path / name).read_text().splitlines()]
        for name in ("g.jsonl", "whole.jsonl")
    ]
    assert lines[0] == lines[1]


def test_does_not_go_on_with_another_grader(tmp_path, monkeypatch):
    monkeypatch.setattr("graders.regrade.BATCH", 8)
    write(tmp_path / "s.jsonl")

    def stop(done, total):
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regrade(load(SPEC), tmp_path / "s.jsonl", tmp_path / "g.jsonl", progress=stop)
    with pytest.raises(GraderError, match="another grader"):
        regrade(load({**SPEC, "calculate_output": "exact"}), tmp_path / "s.jsonl", tmp_path / "g.jsonl")


def test_against_another_grader_and_against_a_file(tmp_path):
    write(tmp_path / "s.jsonl")
    other = load(SPEC["graders"]["near"] | {"name": "near"})
    by_grader = regrade(load(SPEC), tmp_path / "s.jsonl", against=other).against
    regrade(other, tmp_path / "s.jsonl", tmp_path / "other.jsonl")
    by_file = regrade(load(SPEC), tmp_path / "s.jsonl", against=tmp_path / "other.jsonl").against
    assert by_grader == by_file
    assert by_grader.rows == 36
    assert 0 < by_grader.spearman <= 1


def test_rank_correlation_is_scipys():
    from scipy.stats import kendalltau, spearmanr

    one, two = [0.1, 0.5, 0.5, 0.9, None, 0.3], [1, 3, 2, 3, 9, 5]
    found = compare(one, two)
    a, b = [0.1, 0.5, 0.5, 0.9, 0.3], [1, 3, 2, 3, 5]
    assert found.spearman == pytest.approx(spearmanr(a, b).statistic)
    assert found.kendall == pytest.approx(kendalltau(a, b).statistic)
    assert found.most_apart[0]["row"] == 5
    assert compare([1.0, 1.0], [0.0, 1.0]).spearman is None


def test_parquet_rows_grade_as_jsonl_rows_do(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = write(tmp_path / "s.jsonl")
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "s.parquet")
    texts = [{key: json.dumps(value) for key, value in row.items()} for row in rows]
    parquet.write_table(pa.Table.from_pylist(texts), tmp_path / "t.parquet")
    means = {
        regrade(load(SPEC), tmp_path / n).graders["reward"].mean
        for n in ("s.jsonl", "s.parquet", "t.parquet")
    }
    assert len(means) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}\n", "row 1"),
        ("nope\n", "line 1: not JSON"),
        ('{"item": {}, "sample": {"output_text": 1}}\n', "output_text: expected a string"),
    ],
)
def test_bad_rows_are_named(tmp_path, text, message):
    (tmp_path / "s.jsonl").write_text(text)
    with pytest.raises(GraderError, match=message):
        regrade(load(SPEC), tmp_path / "s.jsonl")


def test_output_json_is_parsed_for_python_graders(tmp_path):
    row = {"item": {}, "sample": {"output_text": '{"a": 0.5}'}}
    (tmp_path / "s.jsonl").write_text(json.dumps(row) + "\n")
    spec = {
        "type": "python",
        "name": "p",
        "source": "def grade(sample, item): return sample['output_json']['a']",
    }
    with load(spec, workers=1) as grader:
        assert regrade(grader, tmp_path / "s.jsonl").graders["reward"].mean == 0.5
    assert sample_from_text('{"a": 0.5}')["output_json"] == {"a": 0.5}


@pytest.mark.parametrize("lines", ["", '{"item": {}, "sample": {"output_text": "x"}}\n{"item": 1}\n'])
def test_nothing_is_written_for_samples_that_cannot_be_read(tmp_path, lines):
    samples, out = tmp_path / "s.jsonl", tmp_path / "grades.jsonl"
    samples.write_text(lines)
    with load(SPEC) as grader, pytest.raises(GraderError, match=r"s\.jsonl"):
        regrade(grader, samples, out)
    assert [p.name for p in tmp_path.iterdir()] == ["s.jsonl"]
