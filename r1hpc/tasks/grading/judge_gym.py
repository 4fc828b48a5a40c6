"""Judge reasoning-gym's questions with the generator's own score_answer, without evaluating text.

Imported only in the verifier's process. Several generators call eval(answer) or sympy.parse_expr(answer).
While an answer is judged, these read only literals and school algebra (`71**33**12` would otherwise hang, and
`__import__('os')` would run). When a generator makes a question, its own texts are evaluated as usual.
Where a scorer accepts wrong answers, `_STRICTER` adds a condition.
"""

import ast
import builtins
import operator
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import reasoning_gym

from r1hpc.tasks.grading import arithmetic
from r1hpc.tasks.grading.algebra import replace_parse_expr
from r1hpc.tasks.grading.arithmetic import RefusedError
from r1hpc.tasks.sandbox import guard

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Invert: operator.invert,
}
_MAX_MAGNITUDE = 2**256


def load(settings: Mapping[str, Any]) -> "GymJudge":
    """Return the judge of one generator; `settings` are its name, seed and options."""
    replace_parse_expr()

    def read_literal(text: Any, *scopes: Any) -> Any:
        return literal(text) if guard.is_armed() else builtins.eval(text, *scopes)

    for name, module in sys.modules.items():
        if name.startswith("reasoning_gym."):
            module.__dict__["eval"] = read_literal
    generator, seed, options = settings["generator"], settings["seed"], settings["options"]
    return GymJudge(reasoning_gym.create_dataset(generator, seed=seed, **options))


class GymJudge:
    """Make an item's entry again, since entries are not plain JSON; outside the answer's time limit."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._source = -1
        self._entry: Any = None

    def prepare(self, metadata: Mapping[str, Any]) -> None:
        """Make the entry; a few generators search for seconds."""
        self._source = metadata["source_index"]
        self._entry = self._dataset[self._source]

    def __call__(self, text: str, answer: str, metadata: Mapping[str, Any]) -> bool:
        assert metadata["source_index"] == self._source, "prepare first"
        meant = _STRICTER.get(self._entry["metadata"].get("source_dataset", ""))
        if meant is not None and not meant(text, self._entry):
            return False
        return float(self._dataset.score_answer(text, self._entry)) >= 1.0


def _is_near(text: str, entry: Mapping[str, Any]) -> bool:
    value = Fraction(text.strip().replace(",", ""))
    return abs(value - Fraction(entry["answer"])) <= Fraction(1, 10_000)


def _tree(text: str) -> arithmetic.Node:
    """Return the tree of integers and + - * / alone, also with a sign; raise RefusedError for others."""
    tree = arithmetic.parse(text.strip(), algebra=True)
    if not _kinds(tree) <= {"number", "sum", "product", "negative", "inverse"} or "." in text:
        raise RefusedError("not arithmetic of whole numbers")
    return tree


def _kinds(node: arithmetic.Node) -> set[str]:
    return {node.kind}.union(*map(_kinds, node.operands))


def _is_24(text: str, entry: Mapping[str, Any]) -> bool:
    tree = _tree(text)
    return arithmetic.value(tree) == 24 and arithmetic.numbers(tree) == Counter(entry["metadata"]["numbers"])


_STRICTER: dict[str, Callable[[str, Mapping[str, Any]], bool]] = {
    # any text but an empty one
    "game_of_life_halting": lambda text, entry: text.strip().casefold() == str(entry["answer"]).casefold(),
    "coin_flip": _is_near,  # `0`, the beginning of 0.3125
    "complex_arithmetic": lambda text, _: "nan" not in text.casefold(),  # the distance to a nan is none
    "puzzle24": _is_24,  # `6*4*1*1`, of whatever numbers
    "countdown": lambda text, _: bool(_tree(text)),  # `(28+98)*(a-a)`
}
"""Further conditions on a right answer, by generator: reasoning-gym 0.1.25 accepts one text, in the comment,
as an answer to every question of it, which a rewarded policy finds."""


def literal(text: str) -> Any:
    """Return what eval would for numbers, strings, lists, tuples, integer arithmetic, else RefusedError."""
    try:
        return _walked(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, MemoryError, RecursionError, ArithmeticError, TypeError) as error:
        raise RefusedError(f"no literal: {error}") from None


def _walked(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.List):
        return [_walked(element) for element in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_walked(element) for element in node.elts)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _small(_UNARY[type(node.op)](_small(_walked(node.operand))))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _small(_walked(node.left)), _small(_walked(node.right))
        if isinstance(node.op, ast.LShift) and right > 256:
            raise RefusedError("a shift by more than 256")
        return _small(_BINARY[type(node.op)](left, right))
    raise RefusedError(f"{type(node).__name__} in a literal")


def _small(value: Any) -> Any:
    """Allow numbers of bounded size only: a string times a number could fill the memory."""
    if not isinstance(value, int | float) or abs(value) > _MAX_MAGNITUDE:
        raise RefusedError("arithmetic on something large, or on no number")
    return value
