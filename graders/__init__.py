"""Graders: OpenAI's grader JSON in, scores out.

    from graders import load, sample_from_text

    with load({"type": "string_check", "name": "exact", "operation": "eq",
               "input": "{{sample.output_text}}", "reference": "{{item.answer}}"}) as grader:
        grades = grader.grade([({"answer": "4"}, sample_from_text("4"))])

A library of its own: it knows nothing of training, and imports heavy things only when a grader needs them.
"""

from graders.errors import ERROR_CLASSES, ERROR_KEYS, GraderError, Problem
from graders.grader import Grader, grade, load
from graders.result import Grade
from graders.samples import sample_from_text

__all__ = [
    "ERROR_CLASSES",
    "ERROR_KEYS",
    "Grade",
    "Grader",
    "GraderError",
    "Problem",
    "grade",
    "load",
    "sample_from_text",
]
