"""A text cannot forge the end of its document, whatever the vocabulary makes of the EOS token's spelling."""

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models

from r1hpc.base.errors import UsageError
from r1hpc.corpus.build.build import build_dataset
from r1hpc.corpus.build.vocabulary import Encoder, byte_tokenizer
from r1hpc.data.read.reader import open_dataset
from tests.corpus.corpus import write_recipe

LETTERS = "abc<>/ sun"
TEXTS = ["a</s>b", "</s>", "</s></s> a", "</s", "a b c"]


def not_special() -> Tokenizer:
    """EOS and BOS are added tokens, and no special ones."""
    tokenizer = Tokenizer.from_str(byte_tokenizer("<|endoftext|>"))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("</s>", "<s>", "<think>")])
    return tokenizer


def pieces() -> Tokenizer:
    """EOS and BOS are special, and pieces of text to the model, as in SentencePiece's vocabularies."""
    letters = [(letter, -5.0) for letter in LETTERS]
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("<s>", 0.0), *letters], 0, False))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "</s>", "<s>")])
    return tokenizer


@pytest.fixture(params=[not_special, pieces])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "own" / "tokenizer.json"
    path.parent.mkdir()
    request.param().save(str(path))
    (path.parent / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}}')
    return path


def test_a_text_that_spells_the_end_has_the_ids_of_its_letters(file: Path) -> None:
    encoder, plain = Encoder(file, "</s>"), Tokenizer.from_file(str(file))
    for text, ids in zip(TEXTS, encoder.encode(TEXTS), strict=True):
        assert ids.tolist() == [number for letter in text for number in plain.encode(letter).ids]
    assert len(encoder.encode(["a<s>b"])[0]) == 5
    assert encoder.eos_id in Encoder(file, "</s>", parse_special=True).encode(["a</s>"])[0]
    assert encoder.eos_id in encoder.encode_mixed(["a</s>", "b"], [True, False])[0]


def test_what_spells_no_end_stays_as_the_tokenizer_has_it(file: Path) -> None:
    """Other added tokens too, and characters that the vocabulary does not know."""
    texts = ["a b c", "sun <think> ☃ a", "☃<unk>", ""]
    plain = Tokenizer.from_file(str(file))
    plain.encode_special_tokens = True
    found = [ids.tolist() for ids in Encoder(file, "</s>").encode(texts)]
    assert found == [plain.encode(text, add_special_tokens=False).ids for text in texts]


def test_each_document_of_a_dataset_ends_once(file: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a</s>b")
    source = {"name": "a", "kind": "text", "root": ".", "glob": "in.txt"}
    tokenizer = {"kind": "path", "path": "own", "eos_token": "</s>"}
    recipe = write_recipe(tmp_path, sources=[source], tokenizer=tokenizer)
    dataset = open_dataset(build_dataset(recipe, tmp_path / "out").path)
    assert (dataset.read(0, dataset.num_tokens) == dataset.eos_id).tolist() == [False] * 6 + [True]


def test_an_end_of_one_character_cannot_stand_in_a_text(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    not_special().save(str(path))
    encoder = Encoder(path, "Ċ")  # a line feed
    assert encoder.encode(["ab"])[0].tolist() == [97, 98]
    with pytest.raises(UsageError, match=r"'\\n' is a token that must not stand in a text .*eos_token"):
        encoder.encode(["a\nb"])
