"""`calculate_output` of a multi grader: a formula over the scores, parsed by hand, never evaluated as code.

    sum     = product (("+" | "-") product)*
    product = sign (("*" | "/") sign)*
    sign    = ("-" | "+") sign | power
    power   = atom ("^" sign)?
    atom    = number | name | function "(" sum ("," sum)* ")" | "(" sum ")"

So `^` (power) binds tightest and to the right: -2^2 = -4, 2^3^2 = 512, 2^-1 = 0.5. Functions: min and max
of one or more arguments; abs, floor, ceil, exp, sqrt and log (natural) of one. The documents leave
precedence, unary minus and the base of log open (reference 2.6); these are the usual choices.

The parse gives a postfix program, run on a small stack: no recursion while scoring, and no way to reach
anything but arithmetic.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from graders.errors import GraderError, Ungradable, nearest

MAX_LENGTH = 10_000  # characters; far above any real formula, far below what would take time to parse
MAX_DEPTH = 100  # nested parentheses, signs and powers

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?![\w.])|(?P<name>[A-Za-z_]\w*)|(?P<sign>[-+*/^(),]))"
)
_BINARY: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "^": math.pow,
}
_UNARY: dict[str, Callable[[float], float]] = {
    "abs": abs,
    "floor": lambda x: float(math.floor(x)),
    "ceil": lambda x: float(math.ceil(x)),
    "exp": math.exp,
    "sqrt": math.sqrt,
    "log": math.log,
}
_MANY: dict[str, Callable[[list[float]], float]] = {"min": min, "max": max}
_BINARY_OP, _NUMBER, _NAME, _UNARY_OP, _MANY_OP = range(5)
FUNCTIONS = (*_MANY, *_UNARY)


@dataclass(frozen=True, slots=True)
class Formula:
    """A parsed formula. `names` are the scores it reads, in order of appearance."""

    source: str
    names: tuple[str, ...]
    program: tuple[tuple[int, Any], ...]

    def evaluate(self, scores: Mapping[str, float]) -> float:
        """The value for these scores. Raises `Ungradable` (other_error) where arithmetic has no real,
        finite answer: division by zero, log of 0, sqrt or fractional power of a negative, overflow."""
        try:
            value = _run(self.program, scores)
        except (ArithmeticError, ValueError) as error:
            raise Ungradable("other_error", f"{self.source}: {error} with {dict(scores)}") from None
        if not math.isfinite(value):
            raise Ungradable("other_error", f"{self.source}: the result is {value} with {dict(scores)}")
        return value


def _run(program: tuple[tuple[int, Any], ...], scores: Mapping[str, float]) -> float:
    stack: list[float] = []
    for kind, what in program:
        if kind == _BINARY_OP:
            right = stack.pop()
            stack[-1] = what(stack[-1], right)
        elif kind == _NUMBER:
            stack.append(what)
        elif kind == _NAME:
            stack.append(scores[what])
        elif kind == _UNARY_OP:
            stack[-1] = what(stack[-1])
        else:
            function, count = what
            arguments = stack[-count:]
            del stack[-count:]
            stack.append(function(arguments))
    return float(stack[0])


def parse_formula(source: str, names: Collection[str], where: str = "calculate_output") -> Formula:
    """Parse a formula over `names`.

    Raises `GraderError` (class formula_parse_error) that gives the column, counted from 1, what stands
    there and what was expected; for an unknown name also the nearest known one.
    """
    if len(source) > MAX_LENGTH:
        raise GraderError(
            f"{where}: {len(source)} characters, expected at most {MAX_LENGTH}",
            error_class="formula_parse_error",
        )
    parser = _Parser(source, names, where)
    parser.sum()
    if parser.text is not None:
        raise parser.error("expected an operator or the end")
    return Formula(source, tuple(dict.fromkeys(parser.names)), tuple(parser.program))


class _Parser:
    def __init__(self, source: str, known: Collection[str], where: str) -> None:
        self.source, self.known, self.where = source, known, where
        self.program: list[tuple[int, Any]] = []
        self.names: list[str] = []
        self.depth = 0
        self.end = 0
        self.advance()

    def advance(self) -> None:
        self.start = len(self.source) - len(self.source[self.end :].lstrip())
        if self.start == len(self.source):
            self.kind, self.text = "end", None
            return
        match = _TOKEN.match(self.source, self.end)
        if not match:
            self.text = self.source[self.start]
            raise self.error("expected a number, a name or an operator")
        self.kind = str(match.lastgroup)
        self.text = match[self.kind]
        self.end = match.end()

    def error(self, expected: str) -> GraderError:
        found = "the end" if self.text is None else repr(self.text)
        hint = " (power is written ^)" if self.source[self.start - 1 : self.start + 1] == "**" else ""
        return GraderError(
            f"{self.where}: column {self.start + 1}: found {found}, {expected}{hint}",
            error_class="formula_parse_error",
        )

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.error(f"expected at most {MAX_DEPTH} levels of nesting")

    def sum(self) -> None:
        self.chain("+-", lambda: self.chain("*/", self.sign))

    def chain(self, operators: str, operand: Callable[[], None]) -> None:
        operand()
        while self.text is not None and self.kind == "sign" and self.text in operators:
            apply = _BINARY[self.text]
            self.advance()
            operand()
            self.program.append((_BINARY_OP, apply))

    def sign(self) -> None:
        self.deeper()
        if self.text == "-":
            self.advance()
            self.sign()
            self.program.append((_UNARY_OP, operator.neg))
        elif self.text == "+":
            self.advance()
            self.sign()
        else:
            self.power()
        self.depth -= 1

    def power(self) -> None:
        self.atom()
        if self.text == "^":
            self.advance()
            self.sign()
            self.program.append((_BINARY_OP, _BINARY["^"]))

    def atom(self) -> None:
        if self.kind == "number" and self.text is not None:
            self.program.append((_NUMBER, float(self.text)))
            self.advance()
        elif self.kind == "name" and self.text is not None:
            self.name(self.text)
        elif self.text == "(":
            self.advance()
            self.sum()
            self.close()
        else:
            raise self.error("expected a number, a name or '('")

    def close(self) -> None:
        if self.text != ")":
            raise self.error("expected ')'")
        self.advance()

    def name(self, name: str) -> None:
        start = self.start
        self.advance()
        if self.text == "(":
            self.call(name, start)
        elif name in self.known:
            self.names.append(name)
            self.program.append((_NAME, name))
        else:
            raise self.unknown(name, start, self.known, "a key of graders")

    def call(self, name: str, start: int) -> None:
        if name not in FUNCTIONS:
            raise self.unknown(name, start, FUNCTIONS, "a function")
        self.advance()
        count = 1
        self.sum()
        while self.text == ",":
            self.advance()
            self.sum()
            count += 1
        if name in _UNARY and count != 1:
            self.start, self.text = start, name
            raise self.error(f"expected one argument, not {count}")
        self.close()
        if name in _UNARY:
            self.program.append((_UNARY_OP, _UNARY[name]))
        else:
            self.program.append((_MANY_OP, (_MANY[name], count)))

    def unknown(self, name: str, start: int, known: Collection[str], what: str) -> GraderError:
        self.start, self.text = start, name
        return self.error(f"expected {what}: {', '.join(known)}{nearest(name, known)}")
