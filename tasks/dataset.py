"""Dataset rows: fetch, read, and validate before anything is trained.

Rows are parsed line by line rather than through an Arrow table: Arrow fills absent keys with null and
refuses mixed types, and graders must see each row exactly as it was written, with its line number.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.errors import BadInput
from tasks.results import DatasetReport, FileFacts, Finding
from tasks.store import S3Store, sha256_json

if TYPE_CHECKING:
    from tasks.run import Run

PROMPT_ROLES = ("system", "developer", "user", "assistant", "tool")
LINES_SHOWN = 100


def fetch(uri: str, split: str, folder: Path) -> Path:
    """A local JSONL copy of a dataset named by path, s3://bucket/key or Hugging Face dataset id or folder.

    Of a Hugging Face dataset the split of the same name is taken. Raises BadInput when there is nothing.
    """
    target = folder / f"{split}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    local = Path(uri)
    if uri.startswith("s3://"):
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        try:
            S3Store(f"s3://{bucket}").get(key, target)
        except FileNotFoundError:
            raise BadInput(f"{split}: no object {uri}") from None
    elif local.is_file():
        shutil.copyfile(local, target)
    elif local.is_dir() or ("://" not in uri and uri.count("/") == 1 and not local.suffix):
        _fetch_hf(uri, split, target)
    else:
        siblings = sorted(p.name for p in local.parent.glob("*.jsonl")) if local.parent.is_dir() else []
        hint = f" That folder holds: {', '.join(siblings)}." if siblings else ""
        raise BadInput(f"{split}: no file {uri}.{hint}")
    if not target.stat().st_size:
        raise BadInput(f"{split}: {uri} is empty; expected one JSON object per line")
    return target


def _fetch_hf(uri: str, split: str, target: Path) -> None:
    import datasets

    name = {"demonstrations": "train"}.get(split, split)
    try:
        rows = datasets.load_dataset(uri, split=name)
        with target.open("w", encoding="utf-8") as out:
            for row in rows:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
    except Exception as error:  # the library raises a dozen unrelated classes; all mean "cannot be loaded"
        raise BadInput(
            f"{split}: Hugging Face dataset {uri} (split {name}) cannot be loaded: {error}"
        ) from None


def read_rows(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(1-based line, row) of each line that is not blank; a string says what is wrong with the line."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                if b"\\ud" in line or b"\\uD" in line:
                    json.dumps(row, ensure_ascii=False).encode()
            except UnicodeDecodeError as error:
                yield number, f"not UTF-8 at byte {error.start}"
            except json.JSONDecodeError as error:
                yield number, f"not JSON: {error.msg} at column {error.colno}"
            except UnicodeEncodeError:
                yield number, "a text holds half of a surrogate pair, which no tokenizer can read"
            except RecursionError:
                yield number, "JSON nested too deeply"
            except ValueError as error:  # an integer of thousands of digits
                yield number, f"not JSON: {error}"
            else:
                yield (
                    number,
                    row if isinstance(row, dict) else f"a JSON {type(row).__name__}, expected an object",
                )


def load_rows(file: Path) -> list[dict[str, Any]]:
    """All rows of a validated file."""
    return [row for _, row in read_rows(file) if isinstance(row, dict)]


def shape_error(row: dict[str, Any]) -> str | None:
    """What keeps `row` from being a chat row of OpenAI's fine-tuning format, or None."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        return f"`messages` must be a list of at least one message, found {json.dumps(messages)[:60]}"
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"messages[{index}] must be an object"
        if message.get("role") not in PROMPT_ROLES:
            return f"messages[{index}].role is {message.get('role')!r}; expected one of {', '.join(PROMPT_ROLES)}"
        content = message.get("content")
        if not isinstance(content, str) and not (
            message["role"] == "assistant" and message.get("tool_calls")
        ):
            kind = "missing" if "content" not in message else f"of type {type(content).__name__}"
            return f"messages[{index}].content is {kind}; expected text"
    if row.get("tools"):
        return "`tools` in rows are not supported yet"
    return None


def prompt_texts(files: Iterable[Path]) -> Iterator[str]:
    """Every message's text, for training a tokenizer."""
    for file in files:
        for row in load_rows(file):
            yield from (m["content"] for m in row.get("messages", []) if isinstance(m.get("content"), str))


def validate(run: Run) -> DatasetReport:
    """Check every file of the job and the grader against its rows; keep GX's data docs in the run folder.

    The report is not ok when a finding is critical.
    """
    from tasks.model import context_limit, load_tokenizer
    from tasks.resolve import resolve
    from tasks.run import splits

    started = time.perf_counter()
    run.fetch(*[f"dataset/{split}.jsonl" for split in run.record.files])
    raw = {split: list(read_rows(run.dataset(split))) for split in run.record.files}
    tokenizer = load_tokenizer(run)
    limit = context_limit(run) - run.job.sampling.max_completion_tokens
    tables = {split: _facts(split, rows, tokenizer) for split, rows in raw.items()}
    _mark_overlap(tables)
    _mark_templates(run, raw, tables)
    findings = _expect(run, tables, limit)
    files = {
        split: FileFacts(
            uri=splits(run.job)[split],
            sha256=run.record.files[split],
            rows=len(facts),
            tokens_median=sorted(f["tokens"] for f in facts)[len(facts) // 2],
            tokens_max=max(f["tokens"] for f in facts),
        )
        for split, facts in tables.items()
    }
    report = DatasetReport(
        ok=not any(f.severity == "critical" for f in findings),
        files=files,
        findings=findings,
        docs=run.uri("dataset", "docs", "index.html"),
        resolved=resolve(run, files["train"].rows),
        seconds=time.perf_counter() - started,
    )
    run.path("dataset", "report.json").write_text(report.model_dump_json(indent=1), "utf-8")
    run.publish("dataset")
    return report


def refuse_unreadable(uri: str, rows: list[tuple[int, Any]]) -> None:
    """Raise BadInput with the first ten lines that do not parse, or when there is no row at all."""
    bad = [f"{uri}: line {line}: {problem}" for line, problem in rows if isinstance(problem, str)]
    if len(bad) > 10:
        bad = [*bad[:10], f"{uri}: and {len(bad) - 10} more lines"]
    if bad:
        raise BadInput("\n".join(bad))
    if not rows:
        raise BadInput(f"{uri}: holds no rows; expected one JSON object per line")


def refuse_unfit(uri: str, rows: list[tuple[int, Any]], grader: Any) -> None:
    """Raise BadInput when the grader asks for what not a single row has."""
    for problem in grader.check([row for _, row in rows]):
        if problem.every_row:
            raise BadInput(f"{uri}: {problem.message}; the grader reads it in {problem.path}")


def _facts(split: str, rows: list[tuple[int, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """One flat record per row: what the expectations look at."""
    facts = []
    for line, row in rows:
        error = shape_error(row)
        messages = row["messages"] if error is None else []
        answer = "assistant" if split == "demonstrations" else "user"
        prompt = messages[:-1] if split == "demonstrations" else messages
        facts.append(
            {
                "line": line,
                "shape_error": error,
                "last_role": messages[-1]["role"] if messages else answer,
                "prompt": sha256_json([[m["role"], m.get("content")] for m in prompt]) if prompt else None,
                "seen_in": None,
                "template_error": None,
                "tokens": 0,
            }
        )
    good = [index for index, fact in enumerate(facts) if fact["shape_error"] is None]
    texts = tokenizer.apply_chat_template(
        [rows[index][1]["messages"] for index in good],
        tokenize=False,
        add_generation_prompt=split != "demonstrations",
    )
    if texts:
        for index, ids in zip(good, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
            facts[index]["tokens"] = len(ids)
    return facts


def _mark_overlap(tables: dict[str, list[dict[str, Any]]]) -> None:
    """A prompt must not stand in two of train, validation, test; nor a demonstration in the latter two."""
    homes: dict[str, dict[str, int]] = {}
    for split, facts in tables.items():
        for fact in facts:
            if fact["prompt"]:
                homes.setdefault(fact["prompt"], {}).setdefault(split, fact["line"])
    for split in ("validation", "test"):
        for fact in tables[split]:
            others = {s: line for s, line in homes.get(fact["prompt"] or "", {}).items() if s != split}
            earlier = [s for s in ("train", "demonstrations", "validation") if s in others]
            if earlier:
                fact["seen_in"] = f"{earlier[0]} line {others[earlier[0]]}"


def _mark_templates(
    run: Run, raw: dict[str, list[tuple[int, Any]]], tables: dict[str, list[dict[str, Any]]]
) -> None:
    """Every `item.*` that a grader's template names must be in every row that will be graded."""
    import graders

    grader = graders.load(run.record.grader)
    for split in ("train", "validation", "test"):
        for problem in grader.check([row for _, row in raw[split]]):
            tables[split][problem.row]["template_error"] = problem.message


def _expect(run: Run, tables: dict[str, list[dict[str, Any]]], limit: int) -> list[Finding]:
    """Run the Great Expectations suite on each file and write its data docs."""
    from tasks.expectations import run_suites
    from tasks.run import splits

    outcomes = run_suites(tables, limit, run.path("dataset", "docs"))
    findings = []
    for split, check, severity, message, column, lines in outcomes:
        facts = {fact["line"]: fact for fact in tables[split]}
        detail = facts[lines[0]].get(column) if lines else None
        shown = ", ".join(map(str, lines[:5])) + (f" and {len(lines) - 5} more" if len(lines) > 5 else "")
        extra = f" (line {lines[0]}: {detail})" if isinstance(detail, str) and column != "prompt" else ""
        findings.append(
            Finding(
                check=check,
                severity=severity,
                file=splits(run.job)[split],
                message=f"{message}: lines {shown}{extra}",
                lines=lines[:LINES_SHOWN],
                count=len(lines),
            )
        )
    return findings
