"""A long document is encoded in pieces that give the ids of the whole, and memory does not grow with it."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre

from r1hpc.base.errors import UsageError
from r1hpc.corpus.build import vocabulary
from r1hpc.corpus.build.vocabulary import Cuts, Encoder, NoCutError, byte_tokenizer, train_byte_bpe
from r1hpc.corpus.clean import clean
from r1hpc.corpus.inspect.describe import audit
from r1hpc.corpus.sources import lines
from r1hpc.corpus.sources.lines import parse_json
from tests.corpus.corpus import build, text

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def split(*expressions: str) -> Any:
    found = [pre.Split(Regex(expression), "isolated") for expression in expressions]
    return pre.Sequence([*found, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


CUT = {
    "gpt2": (None, pre.ByteLevel(add_prefix_space=False)),
    "prefix": (None, pre.ByteLevel(add_prefix_space=True)),
    "smollm2": (
        None,
        pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]),
    ),
    "llama3": (None, split(LLAMA3)),
    "qwen": (normalizers.NFC(), split(LLAMA3.replace("{1,3}", ""))),
    "o200k": (None, split(O200K)),
    "deepseek": (normalizers.Sequence([]), split(*DEEPSEEK)),
    "bert": (normalizers.BertNormalizer(), pre.BertPreTokenizer()),
    "whitespace": (normalizers.NFKC(), pre.Whitespace()),
    "words": (None, pre.WhitespaceSplit()),
    "metaspace": (None, pre.Metaspace()),
    "joins commas": (None, split(r"\w+, \w+|.")),
    "looks behind": (None, pre.Split(Regex(r"(?<=a) |\w+|\W"), "isolated")),
    "possessive": (None, pre.Split(Regex(r"\p{L}++|\P{L}"), "isolated")),
}
WHOLE = {
    "none": (None, None),
    "metaspace": (None, pre.Metaspace(split=False)),
    "llama2": (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None),
    "lines": (None, pre.Split(Regex(r"[^\n]*\n|[^\n]+"), "isolated")),
}
WORDS = [
    *(
        "the",
        "Don't",
        "it's",
        "l'été",
        " ",
        "  ",
        "\n",
        "\n\n",
        " \n",
        "\t",
        "12,345",
        "3.14",
        "年",
        "'LL",
        "A",
    ),
    *(
        "中文，好。",  # noqa: RUF001
        "日本語です、",
        "a,b",
        ", ",
        "e\u0301",
        "\U0001f600",
        "ﬁ",
        "=== ",
        '{"a": 1,"b":2}',
        "\r\n",
    ),
    *("<|x|>", "ＡＢ，Ｃ", "ſ", "\u0301", "한국어", "Σ ", "x86_64", "//", "\u3000", "zZ ", "b c"),  # noqa: RUF001
]


def draw_text(draw: random.Random, num_words: int) -> str:
    return "".join(draw.choice(WORDS) + draw.choice(["", " ", "\n", ","]) for _ in range(num_words))


def train(normalizer: Any, pre_tokenizer: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    for name, part in (("normalizer", normalizer), ("pre_tokenizer", pre_tokenizer)):
        if part is not None:
            setattr(tokenizer, name, part)
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["[UNK]", "<|x|>"], show_progress=False)
    tokenizer.train_from_iterator([draw_text(random.Random(0), 3000)], trainer)
    return tokenizer


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("parse_special", [False, True])
def test_pieces_give_the_ids_of_the_whole(name: str, parse_special: bool) -> None:
    tokenizer = train(*CUT[name])
    tokenizer.encode_special_tokens = not parse_special
    found, draw = Cuts(tokenizer), random.Random(1)
    num_pieces = 0
    for _ in range(8):
        whole = draw_text(draw, draw.randint(50, 300))
        pieces = list(found.pieces(whole.encode(), 60))
        num_pieces += len(pieces)
        assert "".join(pieces) == whole
        ids = [number for piece in pieces for number in tokenizer.encode(piece, add_special_tokens=False).ids]
        assert ids == tokenizer.encode(whole, add_special_tokens=False).ids
    assert num_pieces > 16


@pytest.mark.parametrize("name", WHOLE)
def test_where_no_place_is_sure_a_long_text_is_not_cut(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "MOST_BYTES", 1000)
    found = Cuts(train(*WHOLE[name]))
    short, long = text(1, 100)[:1000].encode(), text(1, 1000).encode()
    assert list(found.pieces(short, 60)) == [short.decode()]
    with pytest.raises(NoCutError, match=r"too long: .* of text, with no place in the 1000 B from byte 0"):
        list(found.pieces(long, 60))


@pytest.mark.parametrize(
    "token",
    [{"content": "a b"}, {"content": "end", "rstrip": True}, {"content": "b end", "normalized": True}],
)
def test_a_token_that_spans_words_is_not_cut(token: dict[str, Any]) -> None:
    from tokenizers import AddedToken

    tokenizer = train(*CUT["words"])
    tokenizer.add_tokens([AddedToken(**token)])
    whole = "word a b end word " * 20
    pieces = list(Cuts(tokenizer).pieces(whole.encode(), 50))
    assert len(pieces) > 5
    ids = [number for piece in pieces for number in tokenizer.encode(piece, add_special_tokens=False).ids]
    assert ids == tokenizer.encode(whole, add_special_tokens=False).ids


def test_bytes_are_cut_anywhere_but_in_a_special_token(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer("<|end|>"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    whole = "xyzü<|end|>" * 50
    pieces = list(Cuts(tokenizer).pieces(whole.encode(), 40))
    assert len(pieces) > 10
    ids = [number for piece in pieces for number in tokenizer.encode(piece).ids]
    assert ids == tokenizer.encode(whole).ids


def test_a_tokenizer_trained_on_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [draw_text(random.Random(number), 500) for number in range(4)]
    whole = train_byte_bpe(texts, 400, "<|x|>")
    monkeypatch.setattr("r1hpc.corpus.build.vocabulary.PIECE_BYTES", 100)
    monkeypatch.setattr("r1hpc.corpus.build.vocabulary._TRAINING_BYTES", 100)
    assert train_byte_bpe([texts[0].encode(), *texts[1:]], 400, "<|x|>") == whole


def test_an_encoder_cuts_long_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(*CUT["gpt2"]).save(str(tmp_path / "tokenizer.json"))
    draw = random.Random(2)
    texts = [draw_text(draw, count) for count in (5, 400, 3, 900, 7)]
    whole = Encoder(tmp_path / "tokenizer.json", "<|x|>").encode_known(texts)
    monkeypatch.setattr("r1hpc.corpus.build.vocabulary.PIECE_BYTES", 500)
    monkeypatch.setattr(vocabulary.Cuts.pieces, "__defaults__", (500,))
    encoder = Encoder(tmp_path / "tokenizer.json", "<|x|>")
    seen: list[int] = []
    encode = encoder.encode_mixed

    def noted(texts: list[str], chats: list[bool]) -> Any:
        seen.extend(map(len, texts))
        return encode(texts, chats)

    monkeypatch.setattr(encoder, "encode_mixed", noted)
    for one, other in zip(whole, encoder.encode_known(texts), strict=True):
        assert np.array_equal(one, other)
    assert max(seen) <= 500


BUILD = """
import sys
from r1hpc.shard import main
status = main(["build", *sys.argv[1:]])
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:")))
sys.exit(status)
"""


def test_a_long_line_takes_little_memory(tmp_path: Path) -> None:
    """Each byte of 4 MB took 130 bytes of memory."""
    line = json.dumps({"text": "\n".join(text(number, 1000) for number in range(625))})
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "long.jsonl").write_text(line + "\n")
    source = {"name": "a", "kind": "jsonl", "root": "docs", "glob": "*.jsonl"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps({"name": "a", "tokenizer": {"kind": "byte_bpe", "vocab_size": 260}, "sources": [source]})
    )
    command = [sys.executable, "-c", BUILD, str(recipe), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 550 * 1024


def test_a_document_that_cannot_be_cut_is_refused_or_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("r1hpc.corpus.build.vocabulary.PIECE_BYTES", 2000)
    monkeypatch.setattr("r1hpc.corpus.build.encode.PIECE_BYTES", 2000)
    monkeypatch.setattr(vocabulary, "MOST_BYTES", 3000)
    train(*WHOLE["llama2"]).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text(text(1, 100))
    (tmp_path / "docs" / "b.txt").write_text(text(2, 2000))
    monkeypatch.setattr(vocabulary.Cuts.pieces, "__defaults__", (2000,))
    tokenizer = {"kind": "path", "path": "tokenizer.json", "eos_token": "<|x|>"}
    with pytest.raises(
        UsageError, match=r"b\.txt, record 0: it is too long: 1\d\.\d KiB of text.*tokenizer\.kind"
    ):
        build(tmp_path, tokenizer=tokenizer)
    found = audit(build(tmp_path, tokenizer=tokenizer, clean={"repair": False}).path)
    assert found["documents"] == {"in": 2, "kept": 1, "dropped": {"tokenizer": 1}}


def test_stage_clean_leaves_out_what_would_fill_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clean, "MAX_TEXT_CHARS", 1000)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text(text(1, 100))
    (tmp_path / "docs" / "b.txt").write_text(text(2, 2000))
    found = audit(build(tmp_path, clean={"repair": False}).path)
    assert found["documents"]["dropped"] == {"over_64_mib": 1}


@pytest.mark.parametrize("is_ascii", [True, False])
def test_a_long_string_of_json_is_read_in_pieces(is_ascii: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(3)
    value = "".join(
        draw.choice(['"', "\\", "\n", "é", "中", "\U0001f600", "abc", "\\u00e9"]) for _ in range(3000)
    )
    raw = json.dumps({"id": 'a"b', "text": value, "n": [1, {"text": value}]}, ensure_ascii=is_ascii).encode()
    for block in (40, 41, 100, 997):
        monkeypatch.setattr(lines, "_BLOCK", block)
        monkeypatch.setattr(lines, "_LONG_BYTES", block)
        found = parse_json(raw, lambda record: record["text"])
        assert isinstance(found, bytes)
        assert found.decode() == value
        assert parse_json(raw, lambda record: record["n"]) == [1, {"text": value}]
        assert parse_json(raw, lambda record: record["id"]) == 'a"b'
    with pytest.raises(ValueError, match=r"^not JSON \("):
        parse_json(raw[:1000], lambda record: record["text"])
    lone = json.dumps({"text": "x" * 2000 + "\udc80"}).encode()
    assert parse_json(lone, lambda record: record["text"]) == "x" * 2000 + "\udc80"


def test_a_text_without_tokens_does_not_let_the_next_spell_a_special_one(tmp_path: Path) -> None:
    words = {word: number for number, word in enumerate(("a", "<|", "x", "|>", "<|x|>"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre.Whitespace()
    tokenizer.add_special_tokens(["<|x|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = Encoder(tmp_path / "tokenizer.json", "<|x|>")
    unknown, said = encoder.encode_known(["unknown", "a <|x|>"], [True, False])
    assert isinstance(unknown, str)
    assert list(said) == [0, 1, 2, 3]
