"""Pages are in short sentences without odd words, and docstrings begin with a verb.

python -m tests.test_writing        # the figures
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "shards" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
_MOST_LINES = 100
_MOST_WORDS_ON_AVERAGE = {README: 16.0}
_MOST_WORDS_ON_AVERAGE_OF_A_PAGE = 18.0
_MOST_WORDS = 35
# Words that made the pages read like a bad translation. A sentence without them is always clearer.
_ODD_WORDS = re.compile(
    r"\b(is at work|on record|brought to its end|likewise|whoever|for want of|as ever|nobody is"
    r"|it is said|told (of|apart)|of (one's|its|your|their|our) own|gives no sign|lies? in|lies beside)\b",
    re.IGNORECASE,
)
_MOST_OPENINGS = 0  # lower it when there are fewer
_FOLDERS = ("r1hpc", "benchmarks", "research", "experiments")
_OPENINGS = {"What", "Of", "Whether", "Who", "Where"}


def sentences(page: str) -> list[str]:
    """Return the sentences of a Markdown page, without code blocks, tables and headings."""
    page = re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    page = re.sub(r"^( {4}|\||#|!\[|:::|<).*$", "", page, flags=re.MULTILINE)
    page = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", page)
    blocks = re.split(r"\n\s*\n|^- |^\d+\. ", page, flags=re.MULTILINE)
    found = [part for block in blocks for part in re.split(r"(?<=[.!?])\s+", " ".join(block.split()))]
    return [sentence for sentence in found if sentence]


def odd_openings() -> list[str]:
    """Return the docstrings that begin with What, Of, Whether, Who or Where, those of settings too."""
    found = []
    for path in (path for folder in _FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            text = (
                node.value.value
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                else ""
            )
            words = text.split(maxsplit=1) if isinstance(text, str) else []
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
    assert len(README.read_text().splitlines()) <= _MOST_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_sentences_are_short(page: Path) -> None:
    found = sentences(page.read_text())
    assert [sentence for sentence in found if len(sentence.split()) > _MOST_WORDS] == []
    assert mean_words(found) <= _MOST_WORDS_ON_AVERAGE.get(page, _MOST_WORDS_ON_AVERAGE_OF_A_PAGE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_words_are_plain(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$|^ {4}.*?$|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert [line for line in prose.splitlines() if _ODD_WORDS.search(line)] == []


def test_docstrings_begin_with_a_verb() -> None:
    found = odd_openings()
    assert len(found) <= _MOST_OPENINGS, (
        f"{len(found)} begin with {sorted(_OPENINGS)}: see them with -m tests.test_writing"
    )


if __name__ == "__main__":
    print(*odd_openings(), sep="\n")
    for path in PAGES:
        found = sentences(path.read_text())
        longest = max(len(sentence.split()) for sentence in found)
        words, name = len(path.read_text().split()), str(path.relative_to(ROOT))
        print(f"{name:28} {words:5} words, {mean_words(found):4.1f} a sentence, at most {longest}")
