"""The README is in short sentences, and docstrings begin with a verb.

python -m tests.test_writing        # the figures
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
_MOST_LINES = 100
_MOST_WORDS_ON_AVERAGE = 16.0
_MOST_WORDS = 35
_MOST_OPENINGS = 0  # lower it when there are fewer
_OPENINGS = {"What", "Of", "Whether", "Who", "Where"}


def sentences(page: str) -> list[str]:
    """Return the sentences of a Markdown page, without code blocks, tables and headings."""
    page = re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    page = re.sub(r"^( {4}|\||#).*$", "", page, flags=re.MULTILINE)
    page = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", page)
    blocks = re.split(r"\n\s*\n|^- |^\d+\. ", page, flags=re.MULTILINE)
    found = [part for block in blocks for part in re.split(r"(?<=[.!?])\s+", " ".join(block.split()))]
    return [sentence for sentence in found if sentence]


def odd_openings() -> list[str]:
    """Return the first line of each docstring in r1hpc/ that begins with What, Of, Whether, Who or Where."""
    found = []
    for path in sorted((ROOT / "r1hpc").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                words = (ast.get_docstring(node) or "").split(maxsplit=1)
                if words and words[0].rstrip(",:.") in _OPENINGS:
                    found.append(f"{path.relative_to(ROOT)}: {' '.join(words)}".splitlines()[0])
    return found


def mean_words(found: list[str]) -> float:
    return sum(len(sentence.split()) for sentence in found) / len(found)


def test_sentences_are_found_outside_of_code_and_tables() -> None:
    page = "# A head.\n\nOne [two](x.md). Three\nfour!\n\n    code. code.\n\n"
    page += "```yaml\na. b.\n```\n| a. | b. |\n\n- Five.\n"
    assert sentences(page) == ["One two.", "Three four!", "Five."]


def test_the_readme_is_short() -> None:
    page = README.read_text()
    assert len(page.splitlines()) <= _MOST_LINES
    found = sentences(page)
    assert [sentence for sentence in found if len(sentence.split()) > _MOST_WORDS] == []
    assert mean_words(found) <= _MOST_WORDS_ON_AVERAGE


def test_docstrings_begin_with_a_verb() -> None:
    found = odd_openings()
    assert len(found) <= _MOST_OPENINGS, (
        f"{len(found)} begin with {sorted(_OPENINGS)}: see them with -m tests.test_writing"
    )


if __name__ == "__main__":
    print(*odd_openings(), sep="\n")
    found = sentences(README.read_text())
    print(
        f"{len(odd_openings())} odd openings; README: {mean_words(found):.1f} words a sentence, longest",
        end=" ",
    )
    print(max(len(sentence.split()) for sentence in found))
