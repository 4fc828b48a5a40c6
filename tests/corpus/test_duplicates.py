"""Near duplicates among documents, and the items of an evaluation inside them."""

import random
import re
from pathlib import Path

import numpy as np
import pytest

from r1hpc.base.errors import UsageError
from r1hpc.corpus.clean.batch import TextBatch
from r1hpc.corpus.clean.contamination import build_index
from r1hpc.corpus.clean.minhash import Bands, Signatures, near_duplicates, sign
from r1hpc.corpus.recipe import DecontaminateRecipe, MinhashRecipe
from tests.corpus.test_prepare import prose


def bands_of(signatures: Signatures, recipe: MinhashRecipe) -> Bands:
    """Return the bands of signatures in memory."""
    return lambda band: signatures[:, band * recipe.rows : (band + 1) * recipe.rows]


def edited(text: str, words: int, seed: int) -> str:
    """A copy in which some words are others."""
    draw, found = random.Random(seed), text.split()
    for place in draw.sample(range(len(found)), words):
        found[place] = f"x{draw.randrange(10**6)}"
    return " ".join(found)


def jaccard(a: str, b: str, size: int = 5) -> float:
    grams = []
    for text in (a, b):
        words = re.findall(r"\w+", text.lower())
        grams.append({tuple(words[n : n + size]) for n in range(len(words) - size + 1)})
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def test_near_duplicates_recall_and_precision() -> None:
    recipe = MinhashRecipe()
    originals = [prose(n, 25) for n in range(300)]
    copies = [edited(text, 1 + n % 12, n) for n, text in enumerate(originals)]
    similarity = [jaccard(a, b) for a, b in zip(originals, copies, strict=True)]
    signatures = sign(TextBatch(originals + copies, normal=True), recipe)
    groups = near_duplicates(bands_of(signatures, recipe), len(signatures), recipe)
    found = groups.original[300:] == np.arange(300)
    close = np.array(similarity) >= 0.8
    assert close.sum() > 50
    assert found[close].mean() >= 0.95
    dropped = np.flatnonzero(groups.original != np.arange(600))
    true = [
        (d >= 300 and groups.original[d] == d - 300 and similarity[d - 300] >= 0.5) for d in dropped.tolist()
    ]
    assert np.mean(true) >= 0.98
    error = np.abs(groups.similarity[300:] - similarity)[found]
    assert error.mean() < 0.05


def test_near_duplicates_do_not_depend_on_the_batch() -> None:
    recipe = MinhashRecipe(ngram=3, bands=4, rows=4)
    texts = [prose(n) for n in range(20)] + ["", "one", "one two", "雨 落"]
    whole = sign(TextBatch(texts, normal=True), recipe)
    for number, text in enumerate(texts):
        assert np.array_equal(sign(TextBatch([text], normal=True), recipe)[0], whole[number])
    twice = np.concatenate([whole, whole])
    groups = near_duplicates(bands_of(twice, recipe), len(twice), recipe)
    assert groups.original.tolist() == [*range(24), *range(20), 44, *range(21, 24)]


def test_planted_contamination_is_found(tmp_path: Path) -> None:
    items = [prose(n, 4) for n in range(100, 140)]
    path = tmp_path / "test.jsonl"
    path.write_text(
        "".join(f'{{"q": {{"text": "{item}"}}, "answer": ["{n}"]}}\n' for n, item in enumerate(items))
    )
    recipe = DecontaminateRecipe(against=("test.jsonl",))
    index = build_index([path], recipe)
    draw = random.Random(0)
    dirty = []
    for n, item in enumerate(items):
        words = item.split()
        place = draw.randrange(len(words) - 13)
        piece = " ".join(words[place : place + 13]).upper().replace(".", " --")
        dirty.append(f"{prose(n)} {piece} {prose(n + 50)}")
    clean = [prose(n) for n in range(200, 240)]
    found = index.find(TextBatch(dirty + clean, normal=True))
    assert (found[:40] == 0).all()
    assert (found[40:] == -1).all()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '{{"q": "{0}"}}\n{{"q": "{1}"}}\n'),
        ("a.test", '{{"q": "{0}"}}\n{{"q": "{1}"}}\n'),
        ("a.json", '[\n  {{"q": "{0}"}},\n  {{"q": "{1}"}}\n]'),
        ("a.txt", "[1]\n\n{0}\n\n{1}\n"),
    ],
)
def test_evaluation_files_are_read_by_what_they_hold(tmp_path: Path, name: str, content: str) -> None:
    questions = [
        "Tell me what nine times seven minus three is.",
        "How many legs have seven spiders and a dog?",
    ]
    (tmp_path / name).write_text(content.format(*questions))
    index = build_index([tmp_path / name], DecontaminateRecipe(against=(name,)))
    assert index.find(TextBatch(questions, normal=True)).tolist() == [0, 0]


def test_an_evaluation_file_of_broken_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"q": "What is nine times seven minus three plus one?"')
    with pytest.raises(UsageError, match="neither one JSON value nor an object a line"):
        build_index([tmp_path / "a.json"], DecontaminateRecipe(against=("a.json",)))


def test_short_items_are_searched_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("What is nine times seven minus three plus one?\n\nToo short\n")
    index = build_index([tmp_path / "a.txt"], DecontaminateRecipe(against=("a.txt",)))
    texts = [
        "Well: what is nine times seven, minus three, plus one? 61.",
        "What is nine times seven minus three?",
    ]
    assert index.find(TextBatch(texts, normal=True)).tolist() == [0, -1]
    (tmp_path / "b.txt").write_text("Too short")
    with pytest.raises(UsageError, match=r"b\.txt has no item of at least 8 words"):
        build_index([tmp_path / "b.txt"], DecontaminateRecipe(against=("b.txt",)))
