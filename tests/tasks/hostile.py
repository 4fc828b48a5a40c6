"""Completions that a policy, or somebody who writes its data, could produce to break a verifier.

    for text in hostile(seed=0, count=10_000, canary=Path("evaluated")): ...

Anything that evaluates one of the programs among them leaves the canary file behind.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

from r1hpc.tasks.text.format import TAGS, compose

Maker = Callable[[random.Random], str]

_UNICODE = [
    *("\u0664\u0662", "\uff14", "\u00b2", "\u2074", "\u1d7f", "\u200b4", "\u202e24", "4\u0301"),
    *("\ud800", "\udfff", "\ufeff4", "\U0001d7db", "\u2460", "\xa04"),
]
_CONTROL = ["\x00", "4\x00", "\x004", "\x1b[2J", "\r\n4", "\x7f", "\x85", "\u2028", "4\x00\x00\x00\x054"]


def hostile(seed: int, count: int, canary: Path) -> Iterator[str]:
    """`count` completions, the same for the same seed."""
    draw = random.Random(seed)
    makers: list[Maker] = [_towers, _nested, _digits, _odd, _formats, _latex, _literals, _tags, _huge]
    programs = _programs(canary)
    makers.append(lambda draw: draw.choice(programs))
    for _ in range(count):
        payload = draw.choice(makers)(draw)
        if draw.random() < 0.2:
            payload += draw.choice(("+", " ", "\n", "**", ",", "$")) + draw.choice(makers)(draw)
        yield _wrapped(draw, payload)


def _wrapped(draw: random.Random, payload: str) -> str:
    """Mostly where the verifier reads it."""
    if draw.random() < 0.85:
        return compose("", payload)
    return draw.choice((payload, compose(payload, "4"), f"<answer>{payload}", compose("", payload) * 2))


def _programs(canary: Path) -> list[str]:
    touch = f"__import__('os').system('touch {canary}')"
    return [
        touch,
        f"[{touch}]",
        f"({touch},)",
        f"eval({touch!r})",
        f"exec({touch!r})",
        f"open('{canary}','w')",
        f"4 if {touch} else 4",
        f"[x for x in [{touch}]]",
        f"(lambda: {touch})()",
        f"f'{{{touch}}}'",
        f"sympify({touch!r})",
        f"Symbol({touch!r})",
        f"$\\text{{{touch}}}$",
        f"${touch}$",
        f"\\write18{{touch {canary}}}",
        f"\\input{{|touch {canary}}}",
        f"$(touch {canary})",
        f"`touch {canary}`",
        f"4; touch {canary}",
        f"{{{{ {touch} }}}}",
        f"!!python/object/apply:os.system ['touch {canary}']",
        f"cos\nsystem\n(S'touch {canary}'\ntR.",
        "().__class__.__base__.__subclasses__()",
        "__builtins__",
        "quit()",
        "exit()",
        "input()",
        "breakpoint()",
        "raise SystemExit",
        "import os",
        "while True: pass",
    ]


def _towers(draw: random.Random) -> str:
    numbers = [str(draw.choice((2, 9, 33, 71, 99, 10**6, 10**18))) for _ in range(draw.randint(2, 5))]
    if draw.random() < 0.3:
        return "$" + "^{".join(numbers) + "}" * (len(numbers) - 1) + "$"
    return draw.choice(("**", "^", "^^", "<<")).join(numbers)


def _nested(draw: random.Random) -> str:
    depth = draw.choice((10, 24, 25, 60, 250, 500, 5000, 100_000))
    opening, closing = draw.choice(
        ("()", "[]", "{}", ("-", ""), ("sin(", ")"), ("\\frac{", "}{2}"), ("\\sqrt{", "}"))
    )
    return opening * depth + draw.choice(("4", "", "x")) + closing * draw.choice((depth, depth - 1, 0))


def _digits(draw: random.Random) -> str:
    count = draw.choice((20, 31, 400, 1000, 5000, 10**6))
    shape = draw.choice(
        ("{}", "-{}", "{}!", "{}/{}", "1e{}", "0x{}", ".{}", "{}.{}", "{},000", "{} 000", "{}%", "sqrt({})")
    )
    return shape.replace("{}", draw.choice("149") * count)


def _odd(draw: random.Random) -> str:
    return "".join(draw.choice(_UNICODE + _CONTROL) for _ in range(draw.choice((1, 2, 5, 300))))


def _formats(draw: random.Random) -> str:
    return draw.choice(
        (
            "{}",
            "{0}",
            "{0.__class__.__init__.__globals__}",
            "{answer}",
            "{:999999999}",
            "%s%s%s%n",
            "%999999999d",
        )
        + (
            "${IFS}",
            "{question}",
            "\\x00",
            "\\N{DIGIT FOUR}",
            "{!r}",
            "%(answer)s",
            "4' or '1'='1",
            "$$",
            "$",
            "\\",
        )
    )


def _latex(draw: random.Random) -> str:
    number = draw.choice(("10", "1000", "10^{9}", "99999999", "n"))
    bomb = draw.choice(
        (
            f"\\sum_{{k=1}}^{{{number}}} \\frac{{1}}{{k^2}}",
            f"\\prod_{{k=1}}^{{{number}}} k",
            f"\\int_0^{{{number}}} e^{{-x^2}} \\sin(x^x) dx",
            f"\\binom{{{number}}}{{{number}}}",
            f"{number}!",
            f"\\lim_{{x \\to 0}} x^{{{number}}}",
            "\\begin{matrix}" + "1 & 2 \\\\" * draw.choice((2, 60)) + "\\end{matrix}",
            "\\def\\x{\\x\\x}\\x",
            "\\boxed{" * draw.choice((2, 50)) + "4",
            "x^{x^{x^{x^{x}}}} = y^{y^{y}}",
            "(a+b+c+d+e)^{" + number + "}",
            "1,2," * draw.choice((5, 200)),
            "\\{" + ",".join(str(n) for n in range(draw.choice((5, 150)))) + "\\}",
            "x_{1}" * 100,
            "|" * draw.choice((3, 100)),
        )
    )
    return draw.choice((bomb, f"${bomb}$", f"\\[{bomb}\\]", f"\\boxed{{{bomb}}}"))


def _literals(draw: random.Random) -> str:
    return draw.choice(
        ("[1]*10**9", "'a'*10**10", "[[0]*10**5]*10**5", "1<<10**10", "range(10**12)", "[" * 90 + "]" * 90)
        + (
            "{1:{2:{3:[]}}}",
            "[1,2,[3",
            "b'4'",
            "None",
            "nan",
            "inf",
            "1e999",
            "-0",
            "1j",
            "...",
            "*",
            "[*[1]*9]",
        )
        + (
            "list(range(10**10))",
            "sum(range(10**10))",
            "factorial(10**7)",
            "factorint(2**400-1)",
            "x=4",
            "4,4",
        )
    )


def _tags(draw: random.Random) -> str:
    pieces = [*TAGS, "4", " ", "<answer", "</ANSWER>", "<eos>", "&lt;answer&gt;", "<answer/>", "<!--"]
    return "".join(draw.choice(pieces) for _ in range(draw.choice((1, 3, 12, 2000))))


def _huge(draw: random.Random) -> str:
    size = draw.choice((2_000, 20_000, 3_000_000))
    return draw.choice(("4", "a", "4+", "((", "\\frac", " ", "\n", "\u56db", "$4", "<")) * size
