"""Parse untrusted arithmetic without evaluating it in Python.

Everything is bounded before it is computed: characters, digits of a number, depth. Python's own parser reads
the text and runs nothing; of its trees the few kinds named here are taken. Sums and products have any number
of operands, so that a long flat text is a shallow tree. `value` computes a tree of integers exactly;
algebra.py makes a SymPy expression of any tree.
"""

import ast
import math
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

MAX_CHARACTERS = 512
MAX_DIGITS = 30
MAX_DEPTH = 24
_READABLE = re.compile(r"[\w\s.+*/^()-]*", re.ASCII)
_BLANK = re.compile(r"\s")
_NUMBER = re.compile(r"\d+(?:\.\d*)?|\.\d+", re.ASCII)
_NAME = re.compile(r"[A-Za-z]\w{0,15}", re.ASCII)
_ZEROS = re.compile(r"(?<![\w.])0+(?=\d)")
"""Zeros before a number, which Python refuses and algebra does not."""


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
    if not _READABLE.fullmatch(text):
        raise RefusedError("a character that is not of arithmetic")
    _check_depth(max(accumulate((char == "(") - (char == ")") for char in text), default=0))
    text = _BLANK.sub(" ", text).strip().replace("^", "**")
    if algebra:
        text = _ZEROS.sub("", text)
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, MemoryError, RecursionError):  # its parser has limits of its own
        raise RefusedError("not an expression") from None
    return _Reader(text, algebra).node(tree, 0)


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


class _Reader:
    """Turns Python's tree of a text into ours. Depth counts signs and exponents; parse counts parentheses."""

    def __init__(self, text: str, algebra: bool) -> None:
        self._text, self._algebra = text, algebra

    def node(self, tree: ast.expr, depth: int) -> Node:
        _check_depth(depth)
        match tree:
            case ast.Constant():
                return self._number(self._text[tree.col_offset : tree.end_col_offset])
            case ast.BinOp(op=ast.Add() | ast.Sub()):
                return Node("sum", operands=self._operands(tree, ast.Add, ast.Sub, "negative", depth))
            case ast.BinOp(op=ast.Mult() | ast.Div()):
                return Node("product", operands=self._operands(tree, ast.Mult, ast.Div, "inverse", depth))
            case ast.BinOp(base, ast.Pow(), exponent) if self._algebra:
                return Node("power", operands=(self.node(base, depth), self.node(exponent, depth + 1)))
            case ast.UnaryOp(ast.UAdd(), operand) if self._algebra:
                return self.node(operand, depth + 1)
            case ast.UnaryOp(ast.USub(), operand) if self._algebra:
                return Node("negative", operands=(self.node(operand, depth + 1),))
            case ast.Call(ast.Name(name), [operand], []) if self._algebra and _NAME.fullmatch(name):
                return Node("call", name, (self.node(operand, depth),))
            case ast.Name(name) if self._algebra and _NAME.fullmatch(name):
                return Node("name", name)
        raise RefusedError(f"{type(tree).__name__} where a number should stand")

    def _operands(
        self, tree: ast.expr, plain: type[ast.operator], opposite: type[ast.operator], kind: str, depth: int
    ) -> tuple[Node, ...]:
        """Return the operands of a chain of + and -, or of * and /, in one row; `kind` marks opposites."""
        operands: list[Node] = []
        while isinstance(tree, ast.BinOp) and isinstance(tree.op, (plain, opposite)):
            operand = self.node(tree.right, depth)
            is_opposite = isinstance(tree.op, opposite)
            operands.append(Node(kind, operands=(operand,)) if is_opposite else operand)
            tree = tree.left
        return (self.node(tree, depth), *reversed(operands))

    def _number(self, text: str) -> Node:
        if len(text) > MAX_DIGITS:
            raise RefusedError(f"a number of {len(text)} digits, at most {MAX_DIGITS} are read")
        if not _NUMBER.fullmatch(text) or not (self._algebra or (text.isdigit() and text == str(int(text)))):
            raise RefusedError(f"{text} is not a plain number")
        return Node("number", text)


def _check_depth(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise RefusedError(f"nested deeper than {MAX_DEPTH}")
