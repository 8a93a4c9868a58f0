"""The endpoint grader against a loopback server: contract, retries, limits."""

import time

import pytest

from graders import GraderError, load, sample_from_text

PAIR = ({"answer": "4"}, sample_from_text("four"))


def endpoint(server, **fields):
    table = fields.pop("endpoints", {})
    return load({"type": "endpoint", "name": "mine", "url": server.url + "/grade", **fields}, endpoints=table)


def test_posts_sample_item_and_trace_id(server):
    server.answer = lambda *_: (200, {"score": 0.5})
    with endpoint(server, headers={"X-Team": "blue"}) as grader:
        grades = grader.grade([PAIR, ({"answer": "5"}, {**PAIR[1], "trace_id": "rollout-7"})])
    assert [g.reward for g in grades] == [0.5, 0.5]
    path, body, headers = server.requests[0]
    assert path == "/grade"
    assert sorted(body) == ["item", "sample", "trace_id"]
    assert body["item"] == {"answer": "4"}
    assert body["sample"]["output_text"] == "four"
    assert headers["x-team"] == "blue"
    assert {r[1]["trace_id"] for r in server.requests} > {"rollout-7"}


def test_server_errors_are_retried_with_the_same_trace_id(server):
    answers = iter([(503, {}), (429, {}), (200, {"score": 1})])
    server.answer = lambda *_: next(answers)
    with endpoint(server) as grader:
        assert grader.grade([PAIR])[0].reward == 1.0
    assert len({r[1]["trace_id"] for r in server.requests}) == 1


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ((500, {}), "unresponsive_reward_error"),
        ((400, {"error": "bad sample"}), "other_error"),
        ((302, {}), "other_error"),
        ((200, {"value": 1}), "other_error"),
        ((200, {"score": "1"}), "other_error"),
        ((200, {"score": True}), "other_error"),
        ((200, b'{"score": NaN}'), "other_error"),
        ((200, {"score": 10**400}), "other_error"),
        ((200, b"x" * (2 << 20)), "other_error"),
    ],
)
def test_each_failure_has_its_class(server, answer, error):
    server.answer = lambda *_: answer
    with endpoint(server, max_retries=1) as grader:
        (grade,) = grader.grade([PAIR])
    assert grade.errors == [error]
    assert grade.reward is None
    assert grade.details[error]


def test_time_limit(server):
    def slow(*_):
        time.sleep(1)
        return 200, {"score": 1}

    server.answer = slow
    start = time.monotonic()
    with endpoint(server, timeout=0.2) as grader:
        (grade,) = grader.grade([PAIR])
    assert grade.errors == ["unresponsive_reward_error"]
    assert time.monotonic() - start < 0.9


def test_rate_limit_spaces_requests(server):
    server.answer = lambda *_: (200, {"score": 1})
    with endpoint(server, rate_limit=50) as grader:
        grader.grade([PAIR] * 20)
    assert server.times[-1] - server.times[0] > 19 / 50 * 0.95


def test_bearer_token_comes_from_the_table(server, monkeypatch):
    server.answer = lambda *_: (200, {"score": 1})
    url = server.url + "/grade"
    with (
        endpoint(server, endpoints={url: {"api_key_env": "GRADER_KEY"}}) as grader,
        pytest.raises(GraderError, match="GRADER_KEY is not set"),
    ):
        grader.grade([PAIR])
    monkeypatch.setenv("GRADER_KEY", "s3cret")
    with endpoint(server, endpoints={url: {"api_key_env": "GRADER_KEY"}}) as grader:
        grader.grade([PAIR])
    assert server.requests[0][2]["authorization"] == "Bearer s3cret"
