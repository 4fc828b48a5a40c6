"""Twenty rewards as people write them: each works unchanged, behind the guard."""

import textwrap
from contextlib import closing
from pathlib import Path

import pytest

from r1hpc.tasks.grading.judges import OWN_SCORE
from r1hpc.tasks.grading.verifier import Question, Verifier

_RIGHT = "<think>\n12 * 12 = 144, its quarter is 36.\n</think>\n<answer>\\boxed{36}</answer>"
_WRONG = "The answer is 35"

REWARDS = {
    "math_verify": """
        from math_verify import parse, verify

        def score(prompt, completion, answer, metadata):
            return float(verify(parse(answer), parse(completion)))
    """,
    "math_verify_inside": """
        def score(prompt, completion, answer, metadata):
            from math_verify import parse, verify
            gold, given = parse(f"${answer}$"), parse(completion)
            return 1.0 if verify(gold, given) else 0.0
    """,
    "math_verify_configured": """
        from latex2sympy2_extended import NormalizationConfig
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

        NORMAL = NormalizationConfig(boxed="all")
        BOXED = LatexExtractionConfig(normalization_config=NORMAL, boxed_match_priority=0)

        def score(prompt, completion, answer, metadata):
            gold = parse(f"\\\\boxed{{{answer}}}", extraction_mode="first_match")
            given = parse(completion, extraction_config=[BOXED, ExprExtractionConfig()])
            try:
                return float(verify(gold, given))
            except Exception:
                return 0.0
    """,
    "math_verify_metric": """
        from math_verify.metric import math_metric
        from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig

        check = math_metric(
            gold_extraction_target=(LatexExtractionConfig(), ExprExtractionConfig()),
            pred_extraction_target=(ExprExtractionConfig(), LatexExtractionConfig()),
        )

        def score(prompt, completion, answer, metadata):
            return float(check(["\\\\boxed{" + answer + "}"], [completion])[0])
    """,
    "sympy_parse_expr": """
        import re
        from sympy import simplify
        from sympy.parsing.sympy_parser import parse_expr

        def score(prompt, completion, answer, metadata):
            found = re.findall(r"\\d+", completion)
            return float(simplify(parse_expr(found[-1]) - parse_expr(answer)) == 0)
    """,
    "sympy_transformations": """
        from sympy.parsing.sympy_parser import (
            implicit_multiplication_application, parse_expr, standard_transformations,
        )

        RULES = (*standard_transformations, implicit_multiplication_application)

        def score(prompt, completion, answer, metadata):
            text = completion.rpartition("{")[2].partition("}")[0] if "{" in completion else "0"
            given, gold = (parse_expr(f"({each}) x", transformations=RULES) for each in (text, answer))
            return float((given - gold).expand() == 0)
    """,
    "sympy_latex": """
        import re
        import sympy
        from latex2sympy2_extended import latex2sympy

        def score(prompt, completion, answer, metadata):
            boxed = re.search(r"\\\\boxed\\{(.*?)\\}", completion)
            if boxed is None:
                return 0.0
            return float(sympy.simplify(latex2sympy(boxed[1]) - latex2sympy(answer)) == 0)
    """,
    "sympy_sympify": """
        def score(prompt, completion, answer, metadata):
            import re
            from sympy import sympify
            numbers = re.findall(r"-?\\d+", completion)
            return float(sympify(numbers[-1]).equals(sympify(answer)))
    """,
    "sympy_solve": """
        import sympy

        def score(prompt, completion, answer, metadata):
            x = sympy.symbols("x")
            roots = sympy.solve(x**2 - (36 + int(answer)) * x + 36 * int(answer), x)
            return float(any(f"{{{root}}}" in completion for root in roots))
    """,
    "sympy_factor_lambdify": """
        import re
        import sympy

        def score(prompt, completion, answer, metadata):
            x, y = sympy.symbols("x y")
            given = re.findall(r"\\d+", completion)[-1]
            error = sympy.Integer(given) - sympy.Integer(answer)
            difference = sympy.factor((x + y) ** 2 - x**2 - 2 * x * y - y**2 + error)
            return float(sympy.lambdify([x, y], difference)(1, 2) == 0)
    """,
    "numpy_top": """
        import re
        import numpy as np

        def score(prompt, completion, answer, metadata):
            numbers = np.array([float(each) for each in re.findall(r"\\d+", completion)])
            return np.isclose(numbers[-1], float(answer)).astype(np.float32)
    """,
    "numpy_inside": """
        def score(prompt, completion, answer, metadata):
            import numpy as np
            import re
            error = abs(float(re.findall(r"\\d+", completion)[-1]) - float(answer))
            return np.where(error < 0.5, 1.0, 0.0)
    """,
    "numpy_random_linalg": """
        import numpy as np

        def score(prompt, completion, answer, metadata):
            from numpy.linalg import norm
            features = np.array([completion.count("\\\\boxed{36}"), 0.0])
            return float(norm(features) / max(1.0, norm(features)))
    """,
    "regex_format": """
        import re

        def score(prompt, completion, answer, metadata):
            pattern = r"^<think>\\n.*?\\n</think>\\n<answer>.*?</answer>$"
            return 1.0 if re.match(pattern, completion, re.DOTALL | re.MULTILINE) else 0.0
    """,
    "regex_module": """
        import regex

        BOXED = regex.compile(r"\\\\boxed(\\{(?:[^{}]++|(?1))*\\})")

        def score(prompt, completion, answer, metadata):
            found = BOXED.findall(completion)
            return int(bool(found) and found[-1][1:-1] == answer)
    """,
    "xml_count": """
        TAGS = ("<think>", "</think>", "<answer>", "</answer>")

        def count_xml(text):
            return 0.25 * sum(text.count(tag) == 1 for tag in TAGS)

        def score(prompt, completion, answer, metadata):
            return count_xml(completion)
    """,
    "json_dataclass": """
        def score(prompt, completion, answer, metadata):
            import json
            from collections import Counter, namedtuple
            from dataclasses import make_dataclass
            Row = make_dataclass("Row", ["given", "gold"])
            given = completion.rpartition("{")[2].partition("}")[0] if "{" in completion else "0"
            row = Row(json.loads(given), json.loads(answer))
            return Counter([row.given])[row.gold]
    """,
    "fraction_ast": """
        import ast
        from fractions import Fraction

        def score(prompt, completion, answer, metadata):
            text = completion.rpartition("{")[2].partition("}")[0] or "0"
            try:
                return float(Fraction(ast.literal_eval(text)) == Fraction(answer))
            except (SyntaxError, ValueError):
                return 0.0
    """,
    "torch_model": """
        import torch

        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(256, 8), torch.nn.Linear(8, 1))

        @torch.no_grad()
        def score(prompt, completion, answer, metadata):
            ids = torch.tensor(list(completion.encode()))[None]
            value = torch.sigmoid(model(ids).mean())
            return value * 0 + float(answer in completion)
    """,
    "transformers_model": """
        def score(prompt, completion, answer, metadata):
            import torch
            from transformers import GPT2Config, GPT2LMHeadModel

            global model
            if "model" not in globals():
                model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=8, n_layer=1, n_head=1)).eval()
            ids = torch.tensor([list(completion.encode())])
            with torch.inference_mode():
                loss = model(ids, labels=ids).loss
            return loss.item() * 0 + (answer in completion)
    """,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REWARDS)
def test_it_works_unchanged(tmp_path: Path, name: str) -> None:
    path = tmp_path / "rewards.py"
    path.write_text(textwrap.dedent(REWARDS[name]))
    metadata = {"prompt": "A quarter of 12 * 12?", "metadata": {}}
    with closing(Verifier(OWN_SCORE, {"spec": f"{path}:score", "code": None}, timeout_s=60)) as verifier:
        values = verifier.values([Question(text, "36", metadata) for text in (_RIGHT, _WRONG)])
        assert verifier.sentences == []
    assert values == [1, 0]
