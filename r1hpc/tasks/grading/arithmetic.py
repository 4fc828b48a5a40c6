"""Parse untrusted arithmetic without evaluating it in Python.

Everything is bounded before it is computed: characters, digits of a number, depth. Sums and products have any
number of operands, so that a long flat text is a shallow tree. `value` computes a tree of integers exactly;
algebra.py makes a SymPy expression of any tree.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARACTERS = 512
MAX_DIGITS = 30
MAX_DEPTH = 24
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d*)?|\.\d+)|(?P<name>[A-Za-z]\w{0,15})|(?P<mark>\*\*|[-+*/^()]))", re.ASCII
)
_INTEGER = re.compile(r"0|[1-9]\d*", re.ASCII)


class RefusedError(ValueError):
    """Text outside the grammar or the bounds. It is not judged and counts as wrong."""


@dataclass(frozen=True)
class Node:
    """`number` and `name` carry text; `sum`, `product`, `negative`, `inverse`, `power`, `call` operands."""

    kind: str
    text: str = ""
    operands: tuple["Node", ...] = ()


def parse(text: str, algebra: bool = False) -> Node:
    """Return the tree of `text`: integers, + - * / and parentheses; with `algebra` also school algebra. Raise
    RefusedError for anything else, or beyond the bounds."""
    if len(text) > MAX_CHARACTERS:
        raise RefusedError(f"{len(text)} characters, at most {MAX_CHARACTERS} are read")
    parser = _Parser(_tokens(text), algebra)
    node = parser.sum(0)
    if parser.next():
        raise RefusedError("something follows the expression")
    return node


def value(node: Node) -> Fraction:
    """Return the exact value of a tree of integers; raise ZeroDivisionError for a division by zero."""
    if node.kind == "number":
        return Fraction(int(node.text))
    operands = [value(operand) for operand in node.operands]
    if node.kind == "negative":
        return -operands[0]
    if node.kind == "inverse":
        return 1 / operands[0]
    return sum(operands, Fraction(0)) if node.kind == "sum" else math.prod(operands, start=Fraction(1))


def numbers(node: Node) -> Counter[int]:
    """Count how often each integer occurs in the tree."""
    if node.kind == "number":
        return Counter([int(node.text)])
    return sum((numbers(operand) for operand in node.operands), Counter[int]())


def _tokens(text: str) -> list[tuple[str, str]]:
    found, position = [], 0
    text = text.rstrip(" \t\r\n")
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise RefusedError(f"{text[position : position + 1]!r} is not arithmetic")
        kind = match.lastgroup or ""
        found.append((kind, match[kind]))
        position = match.end()
    return found


class _Parser:
    """Recursive descent; every recursion passes `_deeper`."""

    def __init__(self, tokens: list[tuple[str, str]], algebra: bool) -> None:
        self._tokens = tokens
        self._position = 0
        self._algebra = algebra

    def next(self) -> str:
        return self._tokens[self._position][1] if self._position < len(self._tokens) else ""

    def sum(self, depth: int) -> Node:
        operands = [self._product(depth)]
        while self.next() in ("+", "-"):
            sign = self._take()
            operand = self._product(depth)
            operands.append(operand if sign == "+" else Node("negative", operands=(operand,)))
        return operands[0] if len(operands) == 1 else Node("sum", operands=tuple(operands))

    def _product(self, depth: int) -> Node:
        operands = [self._signed(depth)]
        while self.next() in ("*", "/"):
            sign = self._take()
            operand = self._signed(depth)
            operands.append(operand if sign == "*" else Node("inverse", operands=(operand,)))
        return operands[0] if len(operands) == 1 else Node("product", operands=tuple(operands))

    def _signed(self, depth: int) -> Node:
        if self._algebra and self.next() in ("+", "-"):
            sign = self._take()
            operand = self._signed(_deeper(depth))
            return operand if sign == "+" else Node("negative", operands=(operand,))
        base = self._atom(depth)
        if self._algebra and self.next() in ("**", "^"):
            self._take()
            return Node("power", operands=(base, self._signed(_deeper(depth))))
        return base

    def _atom(self, depth: int) -> Node:
        if self.next() == "(":
            return self._enclosed(depth)
        if self._position == len(self._tokens):
            raise RefusedError("the expression ends too early")
        kind, text = self._tokens[self._position]
        self._position += 1
        if kind == "number":
            if len(text) > MAX_DIGITS:
                raise RefusedError(f"a number of {len(text)} digits, at most {MAX_DIGITS} are read")
            if not self._algebra and not _INTEGER.fullmatch(text):
                raise RefusedError(f"{text} is not a plain integer")
            return Node("number", text)
        if kind != "name" or not self._algebra:
            raise RefusedError(f"{text!r} where a number should stand")
        return Node("call", text, (self._enclosed(depth),)) if self.next() == "(" else Node("name", text)

    def _enclosed(self, depth: int) -> Node:
        self._take()
        inner = self.sum(_deeper(depth))
        if self.next() != ")":
            raise RefusedError("a parenthesis is not closed")
        self._take()
        return inner

    def _take(self) -> str:
        self._position += 1
        return self._tokens[self._position - 1][1]


def _deeper(depth: int) -> int:
    if depth >= MAX_DEPTH:
        raise RefusedError(f"nested deeper than {MAX_DEPTH}")
    return depth + 1
