"""score_model, label_model and cosine against a loopback server that speaks the OpenAI protocol."""

import json
import time

import pytest

from graders import GraderError, load, sample_from_text

SCORE = {
    "type": "score_model",
    "name": "judge",
    "model": "judge-1",
    "input": [
        {"role": "system", "content": "Score the answer."},
        {"role": "user", "content": "Reference {{item.answer}}, answer {{ sample.output_text }}"},
    ],
    "range": [0, 5],
}


def reply(result, **message):
    content = json.dumps({"steps": [{"description": "look", "conclusion": "fine"}], "result": result})
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "judge-1",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": content, **message},
            }
        ],
        "usage": {
            "prompt_tokens": 190,
            "completion_tokens": 134,
            "total_tokens": 324,
            "prompt_tokens_details": {"cached_tokens": 64},
        },
    }


def judge(server, spec=SCORE, cache_dir=None, retries=0, **options):
    table = {"*": {"base_url": server.url + "/v1", "max_retries": retries}}
    return load(spec, endpoints=table, cache_dir=cache_dir, **options)


PAIR = ({"answer": "4"}, sample_from_text("four"))


def test_request_is_templated_and_forces_the_documented_schema(server):
    server.answer = lambda *_: (200, reply(3.5))
    spec = {**SCORE, "sampling_parameters": {"temperature": 0, "max_completion_tokens": 64, "seed": 7}}
    with judge(server, spec) as grader:
        (grade,) = grader.grade([PAIR])
    path, body, _ = server.requests[0]
    assert path == "/v1/chat/completions"
    assert body["messages"][1] == {"role": "user", "content": "Reference 4, answer four"}
    assert (body["temperature"], body["max_completion_tokens"], body["seed"]) == (0, 64, 7)
    assert body["response_format"]["json_schema"]["name"] == "float_score_classification"
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["required"] == ["steps", "result"]
    assert list(schema["properties"]) == ["steps", "result"]
    assert grade.reward == 3.5
    assert grade.logs == "look: fine"
    assert grade.token_usage == {
        "judge-1": {"prompt_tokens": 190, "completion_tokens": 134, "total_tokens": 324, "cached_tokens": 64}
    }
    answer = grade.to_openai("judge", "score_model")
    assert answer["metadata"]["token_usage"]["total_tokens"] == 324
    assert answer["metadata"]["sampled_model_name"] == "judge-1"
    assert answer["model_grader_token_usage_per_model"]["judge-1"]["prompt_tokens"] == 190


@pytest.mark.parametrize(("result", "reward"), [(7, 5.0), (-3, 0.0), (2, 2.0), (10**400, 5.0)])
def test_score_is_clamped_to_range(server, result, reward):
    server.answer = lambda *_: (200, reply(result))
    with judge(server) as grader:
        assert grader.grade([PAIR])[0].reward == reward


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ((200, reply(1, refusal="I cannot")), "model_grader_refusal_error"),
        ((200, reply("good")), "model_grader_parse_error"),
        ((200, reply(True)), "model_grader_parse_error"),
        ((200, reply(None)), "model_grader_parse_error"),
        ((200, reply(1, content="not json")), "model_grader_parse_error"),
        ((200, reply(1, content="[" * 100_000)), "model_grader_parse_error"),
        ((200, {"choices": []}), "model_grader_parse_error"),
        ((500, {"error": {"message": "broken"}}), "model_grader_server_error"),
        ((404, {"error": {"message": "no such model"}}), "model_grader_server_error"),
        ((200, b"<html>"), "model_grader_server_error"),
        ((200, [1, 2]), "model_grader_server_error"),
    ],
)
def test_each_failure_has_its_own_class(server, answer, error):
    server.answer = lambda *_: answer
    with judge(server) as grader:
        (grade,) = grader.grade([PAIR])
    assert grade.errors == [error]
    assert grade.reward is None
    assert grade.to_openai("judge", "score_model")["reward"] == 0.0
    if error == "model_grader_server_error":
        assert grade.to_openai("j", "score_model")["metadata"]["errors"]["model_grader_server_error_details"]


def test_nobody_listening_is_a_server_error():
    table = {"*": {"base_url": "http://127.0.0.1:9/v1", "max_retries": 0}}
    with load(SCORE, endpoints=table) as grader:
        assert grader.grade([PAIR])[0].errors == ["model_grader_server_error"]


def test_server_errors_are_retried(server):
    answers = iter([(500, {}), (429, {}), (200, reply(1))])
    server.answer = lambda *_: next(answers)
    with judge(server, retries=3) as grader:
        assert grader.grade([PAIR])[0].reward == 1.0
    assert len(server.requests) == 3


def test_cache_answers_equal_requests_once_and_costs_no_tokens(server, tmp_path):
    server.answer = lambda *_: (200, reply(2))
    pairs = [PAIR] * 20 + [({"answer": "4"}, sample_from_text("other"))]
    with judge(server, cache_dir=tmp_path) as grader:
        first = grader.grade(pairs)
    assert [g.reward for g in first] == [2.0] * 21
    assert len(server.requests) == 2
    assert sum(g.token_usage["judge-1"]["total_tokens"] for g in first) == 2 * 324
    with judge(server, cache_dir=tmp_path) as grader:
        again = grader.grade(pairs)
    assert len(server.requests) == 2
    assert [g.reward for g in again] == [2.0] * 21
    assert all(g.token_usage == {"judge-1": dict.fromkeys(g.token_usage["judge-1"], 0)} for g in again)


def test_failures_are_not_cached(server, tmp_path):
    answers = iter([(200, reply("bad")), (200, reply(1))])
    server.answer = lambda *_: next(answers)
    with judge(server, cache_dir=tmp_path) as grader:
        assert grader.grade([PAIR])[0].errors == ["model_grader_parse_error"]
        assert grader.grade([PAIR])[0].reward == 1.0


def test_concurrency_limit_holds(server):
    def slow(*_):
        time.sleep(0.05)
        return 200, reply(1)

    server.answer = slow
    with judge(server, concurrency=4) as grader:
        assert [g.reward for g in grader.grade([PAIR] * 20)] == [1.0] * 20
    assert server.most_running == 4


def test_missing_variable_sends_no_request(server):
    with judge(server) as grader:
        (grade,) = grader.grade([({}, sample_from_text("x"))])
    assert grade.errors == ["invalid_variable_error"]
    assert server.requests == []


def test_no_key_says_which_variable(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with load(SCORE) as grader, pytest.raises(GraderError, match="OPENAI_API_KEY is not set"):
        grader.grade([PAIR])
    table = {"judge-1": {"base_url": "http://127.0.0.1:9/v1", "api_key_env": "MY_KEY"}}
    with load(SCORE, endpoints=table) as grader, pytest.raises(GraderError, match="MY_KEY is not set"):
        grader.grade([PAIR])


def test_key_is_sent(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "s3cret")
    server.answer = lambda *_: (200, reply(1))
    table = {"judge-1": {"base_url": server.url, "api_key_env": "MY_KEY"}}
    with load(SCORE, endpoints=table) as grader:
        grader.grade([PAIR])
    assert server.requests[0][2]["authorization"] == "Bearer s3cret"


def test_images_and_audio_are_templated(server):
    server.answer = lambda *_: (200, reply(1))
    content = [
        "plain {{item.answer}}",
        {"type": "input_text", "text": "{{item.answer}}"},
        {"type": "input_image", "image_url": "{{item.image}}", "detail": "low"},
        {"type": "input_audio", "input_audio": {"data": "{{item.audio}}", "format": "wav"}},
    ]
    spec = {**SCORE, "input": [{"role": "user", "content": content, "type": "message"}]}
    with judge(server, spec) as grader:
        grader.grade([({"answer": "4", "image": "data:,x", "audio": "AAAA"}, PAIR[1])])
    assert server.requests[0][1]["messages"][0]["content"] == [
        {"type": "text", "text": "plain 4"},
        {"type": "text", "text": "4"},
        {"type": "image_url", "image_url": {"url": "data:,x", "detail": "low"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    ]


LABEL = {
    "type": "label_model",
    "name": "tone",
    "model": "judge-1",
    "input": [{"role": "user", "content": "{{sample.output_text}}"}],
    "labels": ["good", "fine", "bad"],
    "passing_labels": ["good", "fine"],
}


@pytest.mark.parametrize(("label", "reward"), [("good", 1.0), ("fine", 1.0), ("bad", 0.0), ("odd", None)])
def test_label_model(server, label, reward):
    server.answer = lambda *_: (200, reply(label))
    with judge(server, LABEL) as grader:
        assert grader.grade([PAIR])[0].reward == reward
    schema = server.requests[0][1]["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["result"] == {"type": "string", "enum": ["good", "fine", "bad"]}


def test_label_must_be_one_of_labels():
    with pytest.raises(GraderError, match="passing_labels: found 'great'"):
        load({**LABEL, "passing_labels": ["great"]})


def test_multi_adds_judges_and_their_tokens(server):
    server.answer = lambda *_: (200, reply(1))
    spec = {
        "type": "multi",
        "name": "all",
        "graders": {
            "a": SCORE,
            "b": {**SCORE, "model": "judge-2"},
            "c": LABEL,
            "d": {
                "type": "string_check",
                "operation": "like",
                "input": "{{sample.output_text}}",
                "reference": "fo",
            },
        },
        "calculate_output": "a + b + d",
    }
    with judge(server, spec) as grader:
        (grade,) = grader.grade([PAIR])
    assert grade.sub_rewards == {"a": 1.0, "b": 1.0, "c": None, "d": 1.0}
    assert grade.errors == ["model_grader_parse_error"]  # 1 is no label
    assert grade.token_usage["judge-1"]["prompt_tokens"] == 2 * 190
    assert grade.token_usage["judge-2"]["prompt_tokens"] == 190
    assert grade.parts["a"].reward == 1.0


def test_cosine(server):
    vectors = {"four": [1.0, 0.0], "4": [1.0, 1.0]}

    def embed(path, body, headers):
        data = [
            {"object": "embedding", "index": i, "embedding": vectors[t]} for i, t in enumerate(body["input"])
        ]
        usage = {"prompt_tokens": 2, "total_tokens": 2}
        return 200, {"object": "list", "model": body["model"], "data": data, "usage": usage}

    server.answer = embed
    spec = {
        "type": "text_similarity",
        "name": "near",
        "evaluation_metric": "cosine",
        "input": "{{sample.output_text}}",
        "reference": "{{item.answer}}",
    }
    with judge(server, spec) as grader:
        (grade,) = grader.grade([PAIR])
    assert grade.reward == pytest.approx(2**-0.5)
    assert grade.token_usage == {
        "text-embedding-3-large": {
            "prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2, "cached_tokens": 0,
        }
    }  # fmt: skip
