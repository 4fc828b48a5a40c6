"""Questions of a test set in training text: the ones that are there, and no others."""

import random

from r1hpc.corpus.clean.contamination import overlap

_RANDOM = random.Random(0)
_WORDS = [f"word{n}" for n in range(5000)]


def _text(count: int) -> str:
    return " ".join(_RANDOM.choices(_WORDS, k=count))


def test_what_stands_in_the_text_is_found_and_nothing_else() -> None:
    questions = [_text(_RANDOM.randrange(13, 60)) for _ in range(300)]
    planted = set(_RANDOM.sample(range(300), 40))
    texts = []
    for number in planted:
        words = questions[number].split()
        start = _RANDOM.randrange(len(words) - 12)
        piece = ", ".join(words[start : start + 13]).upper()  # 13 of its words, signs and case changed
        texts.append(f"{_text(80)} {piece} {_text(80)}")
    near = [" ".join(questions[n].split()[:12]) for n in range(300) if n not in planted]
    texts += [*near, *(_text(200) for _ in range(3000))]
    _RANDOM.shuffle(texts)
    found = overlap(questions, iter(texts))
    assert {number for number, hit in enumerate(found) if hit} == planted


def test_a_short_question_must_stand_there_whole_and_of_a_very_short_one_nothing_is_said() -> None:
    short, other, tiny = _text(9), _text(9), _text(7)
    text = f"{_text(30)} {short} {' '.join(other.split()[:8])} {tiny} {_text(30)}"
    assert overlap([short, other, tiny], [text]) == [True, False, None]
    assert overlap([short], []) == [False]
