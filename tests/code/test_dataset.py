"""Rows: fetched from anywhere, read with their line numbers, refused with the reason."""

from __future__ import annotations

import json

import pytest

from tasks.dataset import _facts, _mark_overlap, fetch, load_rows, prompt_texts, read_rows, shape_error
from tasks.errors import BadInput
from tasks.train.tiny import train_tokenizer

GOOD = {"messages": [{"role": "user", "content": "2+2?"}], "answer": "4"}


def lines(tmp_path, *raw: bytes | dict):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in raw))
    return file


def test_rows_come_with_their_line_numbers_as_written(tmp_path):
    odd = {**GOOD, "nested": {"a": [1, None, 2.5], "é": True}, "big": 2**80}
    file = lines(tmp_path, GOOD, b"", b"   ", odd, b"")
    assert list(read_rows(file)) == [(1, GOOD), (4, odd)]
    assert load_rows(file) == [GOOD, odd]
    assert "answer" not in load_rows(lines(tmp_path, GOOD, {"messages": []}))[1]  # absent is not null


def test_windows_line_ends_byte_order_mark_and_no_last_newline(tmp_path):
    raw = b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n" + json.dumps(GOOD).encode()
    assert list(read_rows(lines(tmp_path, raw))) == [(1, GOOD), (2, GOOD)]


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    row = {"messages": [{"role": "user", "content": "a\u2028b\u0085c"}]}
    file = lines(tmp_path, json.dumps(row, ensure_ascii=False).encode(), GOOD)
    assert list(read_rows(file)) == [(1, row), (2, GOOD)]


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b'{"messages": [', "not JSON: "),
        (b"{'messages': []}", "not JSON: "),
        (b'{"a": 1} {"b": 2}', "not JSON: Extra data at column 10"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        (b'{"a": "\xe9"}', "not UTF-8 at byte 7"),
        (b"[1, 2]", "a JSON list, expected an object"),
        (b'"text"', "a JSON str, expected an object"),
        (b"null", "a JSON NoneType, expected an object"),
        (b"[" * 100_000, "JSON nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not JSON: "),
        (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "half of a surrogate pair"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_broken_line_says_what_is_wrong_and_the_next_is_read(tmp_path, raw, problem):
    (first, found), second = read_rows(lines(tmp_path, raw, GOOD))
    assert first == 1
    assert isinstance(found, str)
    assert problem in found
    assert "\n" not in found
    assert second == (2, GOOD)


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    ((_, row),) = read_rows(lines(tmp_path, b'{"messages": [{"role": "user", "content": "\\ud83d\\ude00"}]}'))
    assert row["messages"][0]["content"] == "😀"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (GOOD, None),
        ({"messages": [{"role": "developer", "content": ""}, {"role": "user", "content": "x"}]}, None),
        (
            {
                "messages": [
                    {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
                    {"role": "tool", "content": "r"},
                ]
            },
            None,
        ),
        ({**GOOD, "tools": []}, None),
        ({}, "`messages` must be a list of at least one message, found null"),
        ({"messages": []}, "found []"),
        ({"messages": "hello"}, 'found "hello"'),
        ({"messages": {"role": "user"}}, "must be a list"),
        ({"messages": ["hello"]}, "messages[0] must be an object"),
        ({"messages": [{"role": "human", "content": "x"}]}, "messages[0].role is 'human'; expected one of"),
        ({"messages": [{"content": "x"}]}, "messages[0].role is None"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role is ['user']"),
        ({"messages": [GOOD["messages"][0], {"role": "user"}]}, "messages[1].content is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "content is of type NoneType"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content is of type list"),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]},
            "content is of type NoneType",
        ),
        ({**GOOD, "tools": [{"type": "function"}]}, "not supported yet"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_shape(row, problem):
    found = shape_error(row)
    assert found is None if problem is None else problem in found


def test_fetch_copies_a_file(tmp_path):
    source = lines(tmp_path, GOOD)
    target = fetch(str(source), "validation", tmp_path / "in")
    assert target == tmp_path / "in" / "validation.jsonl"
    assert target.read_bytes() == source.read_bytes()


def test_fetch_says_what_else_is_there(tmp_path):
    lines(tmp_path, GOOD)
    with pytest.raises(BadInput, match=r"^train: no file .*/row\.jsonl\. That folder holds: rows\.jsonl\.$"):
        fetch(str(tmp_path / "row.jsonl"), "train", tmp_path / "in")
    with pytest.raises(BadInput, match=r"no file .*nowhere/rows\.jsonl\.$"):
        fetch(str(tmp_path / "nowhere" / "rows.jsonl"), "train", tmp_path / "in")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(BadInput, match="is empty; expected one JSON object per line"):
        fetch(str(tmp_path / "empty.jsonl"), "test", tmp_path / "in")


def test_fetch_from_s3(s3, tmp_path):
    s3.put_object(Bucket="bucket", Key="data/rows.jsonl", Body=json.dumps(GOOD).encode())
    target = fetch("s3://bucket/data/rows.jsonl", "train", tmp_path / "in")
    assert load_rows(target) == [GOOD]
    with pytest.raises(BadInput, match="train: no object s3://bucket/data/other"):
        fetch("s3://bucket/data/other.jsonl", "train", tmp_path / "in")


def test_fetch_a_folder_of_the_datasets_library(tmp_path, monkeypatch):
    """A local folder in the hub's layout is read by split name; demonstrations are its `train`."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps(GOOD) + "\n")
    (folder / "test.jsonl").write_text(json.dumps({**GOOD, "answer": "5"}) + "\n")
    assert load_rows(fetch(str(folder), "test", tmp_path / "in"))[0]["answer"] == "5"
    assert load_rows(fetch(str(folder), "demonstrations", tmp_path / "in"))[0]["answer"] == "4"
    with pytest.raises(BadInput, match=r"validation: Hugging Face dataset .* cannot be loaded") as caught:
        fetch(str(folder), "validation", tmp_path / "in")
    assert "\n" not in str(caught.value)


def test_a_dataset_that_is_no_json_is_refused(tmp_path, monkeypatch):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.table({"picture": [b"\x89PNG"]}), tmp_path / "hub" / "train.parquet")
    with pytest.raises(BadInput, match=r"cannot be loaded: .*bytes"):
        fetch(str(tmp_path / "hub"), "train", tmp_path / "in")


def test_prompt_texts_skip_what_is_not_text(tmp_path):
    file = lines(
        tmp_path,
        {"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": None}]},
        b"broken",
        GOOD,
    )
    assert list(prompt_texts([file])) == ["s", "2+2?"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["two plus two is four", "three and four", "one"] * 3)


def table(tokenizer, split: str, *rows: dict) -> list[dict]:
    return _facts(split, list(enumerate(rows, 1)), tokenizer)


def ask(text: str, answer: str | None = None) -> dict:
    reply = [{"role": "assistant", "content": answer}] if answer is not None else []
    return {"messages": [{"role": "user", "content": text}, *reply]}


def test_facts_of_rows(tokenizer):
    bad = {"messages": []}
    first, second, third = table(tokenizer, "train", ask("two plus two"), bad, ask("one", "four"))
    expected = tokenizer.apply_chat_template(ask("two plus two")["messages"], add_generation_prompt=True)
    ids = expected["input_ids"] if not isinstance(expected, list) else expected
    assert first["tokens"] == len(ids)
    assert (first["shape_error"], first["last_role"]) == (None, "user")
    assert "messages" in second["shape_error"]
    assert (second["tokens"], second["prompt"]) == (0, None)
    assert third["last_role"] == "assistant"


def test_the_prompt_of_a_demonstration_leaves_its_answer_out(tokenizer):
    (shown,) = table(tokenizer, "demonstrations", ask("one", "four"))
    (asked,) = table(tokenizer, "test", ask("one"))
    assert shown["prompt"] == asked["prompt"]


def test_overlap_names_where_the_prompt_was_seen_first(tokenizer):
    tables = {
        "train": table(tokenizer, "train", ask("one"), ask("two")),
        "validation": table(tokenizer, "validation", ask("three"), ask("two")),
        "test": table(tokenizer, "test", ask("four"), ask("three"), ask("five"), {"messages": []}),
        "demonstrations": table(tokenizer, "demonstrations", ask("five", "x"), ask("one", "x")),
    }
    _mark_overlap(tables)
    assert [f["seen_in"] for f in tables["train"]] == [None, None]
    assert [f["seen_in"] for f in tables["validation"]] == [None, "train line 2"]
    assert [f["seen_in"] for f in tables["test"]] == [
        None,
        "validation line 1",
        "demonstrations line 1",
        None,
    ]
    assert [f["seen_in"] for f in tables["demonstrations"]] == [None, None]  # what trains may repeat


def test_role_takes_part_in_what_a_prompt_is(tokenizer):
    as_user = table(tokenizer, "train", ask("one"))[0]
    as_system = table(tokenizer, "train", {"messages": [{"role": "system", "content": "one"}]})[0]
    assert as_user["prompt"] != as_system["prompt"]
