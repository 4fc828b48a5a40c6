"""Each rule by its number, and the words it counts against plain Python."""

import random
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1hpc.corpus.clean import rules
from r1hpc.corpus.clean import text as language
from r1hpc.corpus.clean.batch import TextBatch, ngrams
from r1hpc.corpus.clean.text import repair
from tests.corpus.test_prepare import prose

GOOD = prose(1, 20)

# --- batches --------------------------------------------------------------------------------------

_TEXTS = st.lists(
    st.text(alphabet="ab Z.\n\t\u00e9\u3000\u96e8\u201c9_", max_size=60), min_size=1, max_size=6
)


@settings(max_examples=200)
@given(_TEXTS)
def test_words_are_those_of_split(texts: list[str]) -> None:
    batch = TextBatch(texts)
    found = [
        batch.bytes[start:stop].tobytes().decode()
        for start, stop in zip(batch.words.start.tolist(), batch.words.stop.tolist(), strict=True)
    ]
    expected = [re.findall("\u96e8|[^\\s\u96e8]+", text) for text in texts]
    assert found == [word for words in expected for word in words]
    assert batch.words.count().tolist() == [len(words) for words in expected]
    assert batch.chars(batch.words).tolist() == [len(word) for word in found]
    hashes = batch.hashes(batch.words).tolist()
    assert len(set(hashes)) == len(set(found))
    assert Counter(Counter(hashes).values()) == Counter(Counter(found).values())


@settings(max_examples=200)
@given(_TEXTS)
def test_normal_words_are_lower_case_letters_and_digits(texts: list[str]) -> None:
    batch = TextBatch(texts, normal=True)
    found = [
        batch.bytes[start:stop].tobytes().decode()
        for start, stop in zip(batch.words.start.tolist(), batch.words.stop.tolist(), strict=True)
    ]
    expected = [re.findall("\u96e8|[^\\W\u96e8]+", text.lower()) for text in texts]
    assert found == [word for words in expected for word in words]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("a ==== b ---- c .... d", "a = = = = b ---- c .... d"),
        ("don't snake_case c-d x:y (a) 3.14 foo()", "don't snake_case c - d x : y ( a ) 3.14 foo ( )"),
        ("1,000 --flag -a https://a.org/b-c, C++", "1,000 --flag -a https://a.org/b-c , C++"),
        ("and\u2014well, \u201cq\u201d \u96e8\u843d", "and \u2014 well , \u201c q \u201d \u96e8 \u843d"),
    ],
)  # fmt: skip
def test_tokens_are_words_and_signs(text: str, tokens: str) -> None:
    batch = TextBatch([text])
    found = zip(batch.tokens.start.tolist(), batch.tokens.stop.tolist(), strict=True)
    assert [batch.bytes[start:stop].tobytes().decode() for start, stop in found] == tokens.split()


@settings(max_examples=200)
@given(_TEXTS)
def test_lines_and_paragraphs(texts: list[str]) -> None:
    batch = TextBatch(texts)
    assert batch.lines.count().tolist() == [sum(bool(s.strip()) for s in t.split("\n")) for t in texts]
    expected = [len([p for p in re.split(r"\n(?:[^\S\n]*\n)+", text) if p.strip()]) for text in texts]
    assert batch.paragraphs.count().tolist() == expected


@settings(max_examples=100)
@given(st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=4), st.integers(1, 5))
def test_ngrams_stay_inside_their_document(documents: list[list[int]], size: int) -> None:
    words = np.array([word for words in documents for word in words], dtype=np.uint64)
    document = np.repeat(np.arange(len(documents)), [len(words) for words in documents])
    keys, first = ngrams(words, document, size)
    spelled = [tuple(words[place : place + size].tolist()) for place in first.tolist()]
    assert len(spelled) == sum(max(0, len(item) - size + 1) for item in documents)
    assert len({*zip(spelled, keys.tolist(), strict=True)}) == len(set(spelled)) == len(set(keys.tolist()))


# --- rules ----------------------------------------------------------------------------------------


def quality(text: str, languages: list[str] | None = None) -> tuple[str, float]:
    found = rules.quality([text, GOOD], TextBatch([text, GOOD]), languages)
    assert found.rule[1] == ""
    return found.rule[0].removeprefix("gopher_quality."), float(found.value[0])


_ENDINGS = ["the water have with that\u2026", "the others have with it here now", "more of the rest of it"]


@pytest.mark.parametrize(
    ("text", "rule", "value"),
    [
        (GOOD, "", None),
        ("the of and # " * 16, "words", 48),
        ("the of to be " * 30_000, "words", 120_000),
        ("a b " * 50, "word_length", 1),
        ("the incomprehensibilities andantewise " * 30, "word_length", None),
        ("the have with #tag " * 30, "hash_signs", 0.2),
        ("the have with this... " * 30, "ellipses", 0.2),
        ("\n".join(["- the have with this and that"] * 20), "bullet_lines", 1.0),
        ("\n".join(_ENDINGS * 20), "ellipsis_lines", 1 / 3),
        ("the have with 1234 5678 " * 20, "alpha_words", 0.6),
        ("rain falls upon roofs while nobody minds " * 12, "stop_words", 0),
    ],
)
def test_gopher_quality(text: str, rule: str, value: float | None) -> None:
    found, number = quality(text)
    assert found == rule
    if value is not None:
        assert number == pytest.approx(value)


def test_english_words_are_not_asked_of_other_languages() -> None:
    german = "Regen fällt auf Dächer, während niemand achtet darauf und alle schlafen weiter. " * 8
    assert quality(german)[0] == "stop_words"
    assert quality(german, ["de", "en"])[0] == ""
    chinese = "雨水落在屋顶上没有人注意到这件事情大家都在睡觉而河水继续流向大海。" * 5
    assert quality(chinese)[0] == ""


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (GOOD, ""),
        ("\n".join([GOOD, *["The same line of this text."] * 20]), "duplicate_lines"),
        ("\n\n".join([GOOD, *["One paragraph.\nIn two lines."] * 20]), "duplicate_paragraphs"),
        ("\n".join([prose(3), prose(4, 40), prose(4, 40), prose(5)]), "duplicate_line_chars"),
        (" ".join(["river bank", *GOOD.split()[:40]] * 1 + ["river bank"] * 30), "top_2_gram"),
        (f"{prose(8, 9)} {prose(9, 6)} {prose(9, 6)}", "duplicate_5_grams"),
    ],
)
def test_gopher_repetition(text: str, rule: str) -> None:
    found = rules.repetition(TextBatch([GOOD, text]))
    assert found.rule[0] == ""
    assert found.rule[1].removeprefix("gopher_repetition.").startswith(rule)
    assert bool(found.rule[1]) == bool(rule)


def _share_in_repeated_ngrams(text: str, size: int) -> float:
    """datatrove's find_all_duplicate, word by word."""
    words = text.split()
    seen: set[tuple[str, ...]] = set()
    repeated = place = 0
    while place < len(words) - size + 1:
        gram = tuple(words[place : place + size])
        if gram in seen:
            repeated += sum(map(len, gram))
            place += size
        else:
            seen.add(gram)
            place += 1
    return repeated / len(text)


@pytest.mark.parametrize("seed", range(20))
def test_repetition_values_are_those_of_the_definition(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    text = " ".join(draw.choice(["aa", "bbb", "cccc", "d", "ee"]) for _ in range(300))
    for size in (2, 5, 10):
        expected = _share_in_repeated_ngrams(text, size)
        monkeypatch.setattr(rules, "MAX_TOP_NGRAM", {})
        monkeypatch.setattr(rules, "MAX_DUPLICATE_NGRAMS", {size: expected - 1e-9})
        found = rules.repetition(TextBatch([GOOD, text]))
        if expected:
            assert found.rule == ["", f"gopher_repetition.duplicate_{size}_grams"]
            assert found.value[1] == pytest.approx(expected)
        monkeypatch.setattr(rules, "MAX_DUPLICATE_NGRAMS", {size: expected})
        assert rules.repetition(TextBatch([GOOD, text])).rule == ["", ""]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_most_frequent_ngram_is_that_of_the_definition(
    size: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    words = [draw.choice(["aa", "bbb", "cccc", "d", "ee"]) for _ in range(draw.choice([3, 40, 300]))]
    counts = Counter(zip(*(words[at:] for at in range(size)), strict=False))
    often = max(counts.values(), default=0)
    longest = max((len(" ".join(gram)) for gram, count in counts.items() if count == often), default=0)
    expected = often * longest / len(" ".join(words)) if often > 1 else 0.0
    monkeypatch.setattr(rules, "MAX_DUPLICATE_NGRAMS", {10: 1.0})
    monkeypatch.setattr(rules, "MAX_TOP_NGRAM", {size: expected - 1e-9})
    found = rules.repetition(TextBatch([GOOD, " ".join(words)]))
    if expected:
        assert found.rule[1] == f"gopher_repetition.top_{size}_gram"
        assert found.value[1] == pytest.approx(expected)
    monkeypatch.setattr(rules, "MAX_TOP_NGRAM", {size: expected})
    assert rules.repetition(TextBatch([" ".join(words)])).rule == [""]


_NOISE = [
    "Home | About | Contact",
    "Please enable Javascript to read this.",
    "Read our privacy policy.",
    "Too short.",
    "It ends in...",
]


def test_c4_takes_lines_out_and_judges_the_rest() -> None:
    sentences = [f"This is sentence number {n} of the text." for n in range(6)]
    bad = ["\n".join(sentences[:4]), "{" + sentences[0], "Lorem ipsum dolor sit."]
    found, texts = rules.judge_c4(["\n".join([*sentences, *_NOISE]), *bad])
    assert found.rule == ["", "c4.sentences", "c4.curly_bracket", "c4.lorem_ipsum"]
    assert texts[0].split("\n") == sentences
    assert found.value[1] == 4
    cited, changed = rules.judge_c4(["\n".join(f"{line[:-1]}[{n}]." for n, line in enumerate(sentences))])
    assert (cited.rule, changed[0].split("\n")) == ([""], sentences)


_LONG = [f"Incomprehensibilitiesnotwithstanding{n}." for n in range(20)]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (GOOD, ""),
        (
            "\n".join(f"item {n} of a list that goes on and on without end" for n in range(20)),
            "punctuated_lines",
        ),
        ("\n".join(f"Line {n} is short." for n in range(20)), "short_lines"),
        ("\n".join([GOOD, GOOD, prose(2)]), "duplicate_line_chars"),
        ("\n".join(_LONG), "lines_per_word"),
    ],
)
def test_fineweb(text: str, rule: str) -> None:
    assert rules.judge_fineweb([text], TextBatch([text])).rule[0].removeprefix("fineweb.") == rule


@pytest.mark.parametrize(
    ("text", "repaired"),
    [
        ("plain text, nothing wrong with it: $5 & more\n", "plain text, nothing wrong with it: $5 & more\n"),
        ("sch\u00c3\u00b6n", "sch\u00f6n"),
        ("It\u00e2\u20ac\u2122s broken", "It\u2019s broken"),
        ("a &lt;b&gt; c", "a <b> c"),
        ("cafe\u0301", "caf\u00e9"),
        ("line\r\nend\x00 \ufeff", "line\nend "),
        ("\u201cquotes\u201d stay, \ufb01 too", "\u201cquotes\u201d stay, \ufb01 too"),
    ],
)
def test_repair(text: str, repaired: str) -> None:
    assert repair(text) == repaired


def test_language() -> None:
    texts = [
        "Guten Tag, wie geht es Ihnen heute?",
        "The rain falls on the roofs.\nOf the town.",
        "我们今天早上去市场买了很多新鲜的蔬菜和水果。",
    ]
    assert [code for code, _ in language.identify(texts)] == ["de", "en", "zh"]
    assert 0 <= language.identify([""])[0][1] <= 1
