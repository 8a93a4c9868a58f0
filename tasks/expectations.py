"""The Great Expectations suite over dataset rows, and its data docs as HTML."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any, Literal

Severity = Literal["critical", "warning", "info"]
Outcome = tuple[str, str, Severity, str, str, list[int]]


def suite(split: str, limit: int) -> list[tuple[str, Severity, str, Any]]:
    """(check, severity, message, expectation) for one file."""
    import great_expectations.expectations as gxe

    last = "assistant" if split == "demonstrations" else "user"
    rules: list[tuple[str, Severity, str, Any]] = [
        ("shape", "critical", "not a chat row", gxe.ExpectColumnValuesToBeNull(column="shape_error")),
        (
            "last_role",
            "critical",
            f"the last message must be from the {last}",
            gxe.ExpectColumnValuesToBeInSet(column="last_role", value_set=[last]),
        ),
        (
            "length",
            "critical",
            f"the prompt leaves no room for an answer (limit {limit} tokens)",
            gxe.ExpectColumnValuesToBeBetween(column="tokens", max_value=limit),
        ),
        (
            "duplicates",
            "warning",
            "the same prompt stands in several rows",
            gxe.ExpectColumnValuesToBeUnique(column="prompt"),
        ),
    ]
    if split != "demonstrations":
        rules.append(
            (
                "grader_fields",
                "critical",
                "the grader names a field that the row lacks",
                gxe.ExpectColumnValuesToBeNull(column="template_error"),
            )
        )
    if split in ("validation", "test"):
        rules.append(
            (
                "overlap",
                "critical",
                "the prompt also stands in another file, so that results on it prove nothing",
                gxe.ExpectColumnValuesToBeNull(column="seen_in"),
            )
        )
    return rules


def run_suites(tables: dict[str, list[dict[str, Any]]], limit: int, docs: Path) -> list[Outcome]:
    """Check each table (records with `line`, `shape_error`, `last_role`, `tokens`, `prompt`, …).

    Returns the failed rules as (split, check, severity, message, column, lines). Writes data docs to `docs`.
    """
    import great_expectations as gx
    import pandas as pd

    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = {"globally": False}
        context.add_data_docs_site(
            site_name="dataset",
            site_config={
                "class_name": "SiteBuilder",
                "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
                "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs)},
            },
        )
        source = context.data_sources.add_pandas("rows")
        failed: list[Outcome] = []
        for split, facts in tables.items():
            frame = pd.DataFrame(facts).astype(
                {"shape_error": object, "seen_in": object, "template_error": object}
            )
            batch = source.add_dataframe_asset(split).add_batch_definition_whole_dataframe("all")
            rules = suite(split, limit)
            expectations = context.suites.add(gx.ExpectationSuite(name=split))
            for check, severity, _, expectation in rules:
                expectation.severity = severity
                expectation.meta = {"check": check}
                expectations.add_expectation(expectation)
            definition = context.validation_definitions.add(
                gx.ValidationDefinition(name=split, data=batch, suite=expectations)
            )
            result = context.checkpoints.add(
                gx.Checkpoint(
                    name=split,
                    validation_definitions=[definition],
                    result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["line"]},
                )
            ).run(batch_parameters={"dataframe": frame})
            by_check = {check: (severity, message) for check, severity, message, _ in rules}
            for validation in result.run_results.values():
                for outcome in validation.results:
                    if outcome.success:
                        continue
                    check = outcome.expectation_config.meta["check"]
                    lines = sorted(row["line"] for row in outcome.result.get("unexpected_index_list") or [])
                    column = outcome.expectation_config.kwargs["column"]
                    failed.append((split, check, *by_check[check], column, lines))
        context.build_data_docs()
    return failed
