"""Read algebra for the judges without evaluating text: trees of arithmetic.py become SymPy expressions.

It replaces SymPy's parse_expr, which evals the text, in all packages while an answer is judged. Imported only
in the verifier's process, by judge_math.py and judge_gym.py. The answer's time limit bounds SymPy's own work.
"""

import sys
from collections.abc import Mapping
from typing import Any

import sympy
import sympy.parsing.sympy_parser

from r1hpc.tasks.grading.arithmetic import Node, RefusedError, parse
from r1hpc.tasks.sandbox import guard

_MAX_EXPONENT = 200
_FUNCTIONS = {
    **{name: getattr(sympy, name) for name in ("sin", "cos", "tan", "asin", "acos", "atan", "exp", "log")},
    **{name: getattr(sympy, name) for name in ("sinh", "cosh", "tanh", "sec", "csc", "cot", "sqrt")},
    "ln": sympy.log,
    "Abs": sympy.Abs,
    "abs": sympy.Abs,
}
_CONSTANTS = {"pi": sympy.pi, "E": sympy.E, "I": sympy.I}


def parse_expr(text: str, local_dict: Mapping[str, Any] | None = None, **_: Any) -> Any:
    """Replace sympy.parse_expr: the same for school algebra, RefusedError for all else. Names in `local_dict`
    have its values, others are symbols."""
    return _built(parse(text, algebra=True), local_dict or {})


def replace_parse_expr() -> None:
    """Replace SymPy's parse_expr in every loaded package while an answer is judged. This includes SymPy
    itself: sympify("42") and Number("42") evaluate their text."""
    original = sympy.parsing.sympy_parser.parse_expr

    def reader(text: str, *arguments: Any, **options: Any) -> Any:
        chosen = parse_expr if guard.is_armed() else original
        return chosen(text, *arguments, **options)

    for module in list(sys.modules.values()):
        for name in [name for name, value in vars(module).items() if value is original]:
            setattr(module, name, reader)


def _built(node: Node, known: Mapping[str, Any]) -> Any:
    operands = [_built(operand, known) for operand in node.operands]
    if node.kind == "number":
        return sympy.Float(node.text) if "." in node.text else sympy.Integer(node.text)
    if node.kind == "name":
        return known.get(node.text, _CONSTANTS.get(node.text, sympy.Symbol(node.text)))
    if node.kind == "call":
        if node.text not in _FUNCTIONS:
            raise RefusedError(f"{node.text} is not a function of school algebra")
        return _FUNCTIONS[node.text](operands[0])
    if node.kind == "power":
        base, exponent = operands
        if exponent.is_number and not abs(exponent) <= _MAX_EXPONENT:  # as in `99**98**97`
            raise RefusedError(f"an exponent above {_MAX_EXPONENT}")
        return base**exponent
    if node.kind == "negative":
        return -operands[0]
    if node.kind == "inverse":
        return 1 / operands[0]
    return sympy.Add(*operands) if node.kind == "sum" else sympy.Mul(*operands)
