"""The Job: OpenAI's names, strict keys, and errors that name file, line, field and the nearest valid name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from tasks.errors import BadInput
from tasks.job import Job, explain, load_job


def write(folder: Path, document, name: str = "job.yaml") -> Path:
    file = folder / name
    file.write_text(document if isinstance(document, str) else yaml.safe_dump(document, sort_keys=False))
    return file


def refusal(folder: Path, document) -> list[str]:
    with pytest.raises(BadInput) as caught:
        load_job(write(folder, document))
    return str(caught.value).splitlines()


def changed(job: dict, dotted: str, value) -> dict:
    """A deep copy of `job` with one key set."""
    copy = json.loads(json.dumps(job))
    node = copy
    *path, last = dotted.split(".")
    for part in path:
        node = node.setdefault(part, {})
    node[last] = value
    return copy


def test_the_least_job_loads_with_defaults(tmp_path, job_dict):
    job = load_job(write(tmp_path, job_dict))
    assert job.hyperparameters.n_epochs == "auto"
    assert job.optimizer.loss == "dapo"
    assert job.grading.invalid_grade == "drop"
    assert job.budget.rate_card == "openai"
    assert job.seed == 42
    assert job.warm_start is None


def test_files_are_taken_from_the_jobs_folder(tmp_path, job_dict, monkeypatch):
    folder = tmp_path / "case"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.jsonl").write_text("{}\n")
    job_dict |= {
        "training_file": "data/train.jsonl",
        "validation_file": "s3://bucket/key.jsonl",
        "test_file": "file-abc123",
        "warm_start": {"file": str(tmp_path / "elsewhere.jsonl")},
    }
    job_dict["method"]["reinforcement"]["grader"] = "grader.json"
    write(folder, job_dict)
    monkeypatch.chdir(tmp_path)
    for given in (Path("case"), Path("case/job.yaml"), folder):
        job = load_job(given)
        assert job.training_file == str(folder / "data" / "train.jsonl")
        assert job.validation_file == "s3://bucket/key.jsonl"
        assert job.test_file == "file-abc123"
        assert job.warm_start.file == str(tmp_path / "elsewhere.jsonl")
        assert job.method.reinforcement.grader == str(folder / "grader.json")
        assert job.name == job.suffix == "case"


def test_a_hub_dataset_is_not_taken_for_a_path(tmp_path, job_dict):
    job = load_job(write(tmp_path, {**job_dict, "training_file": "openai/gsm8k"}))
    assert job.training_file == "openai/gsm8k"
    (tmp_path / "openai" / "gsm8k").mkdir(parents=True)
    job = load_job(write(tmp_path, {**job_dict, "training_file": "openai/gsm8k"}))
    assert job.training_file == str(tmp_path / "openai" / "gsm8k")


def test_a_model_folder_beside_the_job_is_found_and_a_hub_id_left_alone(tmp_path, job_dict):
    (tmp_path / "weights").mkdir()
    assert load_job(write(tmp_path, {**job_dict, "model": "weights"})).model == str(tmp_path / "weights")
    assert load_job(write(tmp_path, {**job_dict, "model": "Qwen/Qwen3-0.6B"})).model == "Qwen/Qwen3-0.6B"
    assert (
        load_job(write(tmp_path, {**job_dict, "model": "models:/x@champion"})).model == "models:/x@champion"
    )


def test_names(job_dict):
    assert Job.model_validate({**job_dict, "suffix": "icd-10.v2_b"}).name == "icd-10.v2_b"
    assert Job.model_validate({**job_dict, "training_file": "s3://b/cases/icd/train.jsonl"}).name == "icd"
    for bad in ("-x", ".x", "a b", "", "x" * 65, "a/b"):
        with pytest.raises(ValidationError):
            Job.model_validate({**job_dict, "suffix": bad})


def test_openais_own_request_body_is_a_job(job_dict):
    """The example of OpenAI's API reference, with a test file beside it."""
    job = Job.model_validate(
        {
            **job_dict,
            "seed": 7,
            "metadata": {"team": "coding"},
            "suffix": "rft",
            "method": {
                "type": "reinforcement",
                "reinforcement": {
                    "grader": {"type": "string_check"},
                    "response_format": {"type": "json_schema"},
                    "hyperparameters": {
                        "n_epochs": "auto",
                        "batch_size": 32,
                        "learning_rate_multiplier": 0.5,
                        "compute_multiplier": "auto",
                        "eval_interval": 10,
                        "eval_samples": 2,
                        "reasoning_effort": "medium",
                    },
                },
            },
        }
    )
    assert job.hyperparameters.batch_size == 32
    assert Job.model_validate_json(job.model_dump_json()) == job


def test_the_form_describes_every_field():
    """Prefect draws its parameter form from this schema."""
    schema = Job.model_json_schema()
    for name, section in {"Job": schema, **schema["$defs"]}.items():
        assert section.get("description"), name
        assert section["additionalProperties"] is False
    top = schema["properties"]
    assert {"training_file", "validation_file", "test_file", "method", "model"} <= set(schema["required"])
    assert top["seed"]["default"] == 42


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("seeds", 1, "unknown key `seeds`. Did you mean `seed`?"),
        ("sampling.temprature", 1, "unknown key `sampling.temprature`. Did you mean `temperature`?"),
        (
            "method.reinforcement.hyperparameters.batchsize",
            1,
            "unknown key `method.reinforcement.hyperparameters.batchsize`. Did you mean `batch_size`?",
        ),
        ("budget.zzz", 1, "unknown key `budget.zzz`. Valid here: rate_card."),
    ],
)
def test_unknown_keys_name_the_nearest(tmp_path, job_dict, key, value, hint):
    lines = refusal(tmp_path, changed(job_dict, key, value))
    assert len(lines) == 1
    assert lines[0].endswith(hint)


def test_a_finding_names_file_and_line(tmp_path, job_dict):
    text = (
        yaml.safe_dump(job_dict, sort_keys=False)
        + "sampling:\n  group_size: 8\n\n  # hot\n  temperature: 9\n"
    )
    line = text.splitlines().index("  temperature: 9") + 1
    (finding,) = refusal(tmp_path, text)
    assert finding.startswith(f"{tmp_path / 'job.yaml'}:{line}: `sampling.temperature` is 9; expected ")
    assert "less than or equal to 5" in finding


def test_a_missing_key_is_named_in_full(tmp_path, job_dict):
    del job_dict["method"]["reinforcement"]["grader"]
    del job_dict["test_file"]
    lines = refusal(tmp_path, job_dict)
    assert sorted(line.split(": ", 1)[1] for line in lines) == [
        "required key `method.reinforcement.grader` is missing.",
        "required key `test_file` is missing.",
    ]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("method.reinforcement.hyperparameters.n_epochs", 51, ["51", "50", "'auto'"]),
        ("method.reinforcement.hyperparameters.n_epochs", "many", ["'many'", "integer", "'auto'"]),
        ("method.reinforcement.hyperparameters.compute_multiplier", 11, ["11", "10"]),
        ("sampling.group_size", 1, ["1", "2"]),
        ("sampling.temperature", 0, ["0", "greater than 0"]),
        ("optimizer.loss", "ppo", ["'ppo'", "'dapo'", "'cispo'"]),
        ("grading.invalid_grade", "skip", ["'skip'", "'drop'", "number"]),
        ("evaluation.bootstrap", 10, ["10", "200"]),
        ("seed", -1, ["-1", "0"]),
        ("model", "", ["''"]),
        ("method.type", "dpo", ["'dpo'", "'reinforcement'"]),
        ("resources.device", "tpu", ["'tpu'", "'cuda'"]),
        ("warm_start.file", 3, ["3", "string"]),
    ],
)
def test_a_bad_value_is_one_line_with_what_was_found_and_expected(tmp_path, job_dict, key, value, words):
    lines = refusal(tmp_path, changed(job_dict, key, value))
    assert len(lines) == 1
    assert f"`{key}` is" in lines[0]
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "key",
    [
        "promotion.min_gain",
        "evaluation.pass_threshold",
        "grading.invalid_grade",
        "optimizer.learning_rate",
        "optimizer.kl",
        "sampling.temperature",
    ],
)
def test_numbers_are_finite(tmp_path, job_dict, key, value):
    lines = refusal(tmp_path, changed_yaml(job_dict, key, value))
    assert all(f"`{key}` is" in line for line in lines)


def changed_yaml(job: dict, key: str, value: float) -> str:
    return yaml.safe_dump(changed(job, key, value))


def test_every_finding_is_reported_at_once(tmp_path, job_dict):
    job = changed(changed(job_dict, "seed", "x"), "sampling.group_size", 0)
    job["colour"] = "red"
    assert len(refusal(tmp_path, job)) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found an empty file"),
        ("- a\n- b\n", "found a list"),
        ("just words\n", "found a str"),
        ("model: [tiny\n", "not valid YAML"),
        ("a: b: c\n", "not valid YAML"),
        ("model: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_what_is_no_job_at_all(tmp_path, text, message):
    (line,) = refusal(tmp_path, text)
    assert line.startswith(f"{tmp_path / 'job.yaml'}: ")
    assert message in line


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(BadInput, match=r"job\.yaml: no such file"):
        load_job(tmp_path)
    with pytest.raises(BadInput, match=r"nowhere: no such file"):
        load_job(tmp_path / "nowhere")
    (tmp_path / "job.yaml").write_bytes(b"model: \xff\xfe\n")
    with pytest.raises(BadInput, match="cannot be read"):
        load_job(tmp_path)


def test_explain_without_a_file_speaks_of_the_source(job_dict):
    """The API explains a request body, which has no lines."""
    body = changed(job_dict, "sampling.temperature", 9)
    with pytest.raises(ValidationError) as caught:
        Job.model_validate(body)
    (line,) = explain(caught.value, body, "request")
    assert line.startswith("request: `sampling.temperature` is 9; expected")
