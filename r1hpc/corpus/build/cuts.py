"""Cut a long text where its tokenizer surely begins a new word: the pieces give the ids of the whole text.

    for piece in Cuts(tokenizer).pieces(raw): ...

A tokenizer divides a text by regular expressions before its model sees the words. A place between two
characters is sure if no expression can match across it and one of them must end or begin a match there. Both
follow from the expression's syntax (`_Parser`); the tokenizers library itself tells which characters a class
holds. Expressions with look-behind, anchors or possessive matches are not supported. For them no place is
sure, nor where a normalizer or an added token may join the pieces.
"""

import codecs
import functools
import json
import re
import unicodedata
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from r1hpc.base.units import format_bytes

PIECE_BYTES = 2**20
MOST_BYTES = 6 * 2**20
"""Bytes of text encoded at once if there is no place to cut: the library takes 130 bytes for each."""
NO_CUT = "it is too long: "

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_IDEOGRAPHS = "".join(map(chr, range(0x4E00, 0x9FA6)))
_LEFT = {_LETTERS: "[A-Za-z]", "0123456789": "[0-9]", _IDEOGRAPHS: "[\u4e00-\u9fa5]"}
_RIGHT = " \n,\uff0c\u3002"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_PUNCTUATION = r"\p{P}|[!-/:-@\[-`{-~]"
_FIXED = {"Whitespace": r"\w+|[^\w\s]+", "WhitespaceSplit": r"\s", "BertPreTokenizer": rf"\s|{_PUNCTUATION}"}
_LOCAL = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer")
"""Normalizers that change nothing across a place before an ASCII space, line feed or comma."""
_CLASS = r"\[(?:\\.|\[(?:\\.|[^\]\\])*\]|[^\]\\\[])*\]"
_ATOM = re.compile(
    rf"\\[pP]\{{\^?\w+\}}|\\u[0-9A-Fa-f]{{4}}|\\[sSdDwWhHnrtfv]|\\[^\w\s]|{_CLASS}|[^\\\[\](){{}}|*+?^$]"
)
_QUANTIFIER = re.compile(r"(?:[*+?]|\{\d*,?\d*\})\??(?![*+?{])")
_GROUP = re.compile(r"\((\?:|\?i:|\?=|\?!|(?!\?))")


class NoCutError(Exception):
    """A text has no sure place where one is needed."""


class Cuts:
    """The places where one tokenizer surely divides a text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def pieces(self, raw: bytes, piece_bytes: int = PIECE_BYTES) -> Iterator[str]:
        """Yield the text of UTF-8 bytes in pieces of `piece_bytes`, or up to six megabytes if necessary.

        Raises:
            NoCutError: six megabytes without a sure place.
        """
        at = 0
        while at < len(raw):
            for size in (piece_bytes, MOST_BYTES):
                text = _decode(raw, at, size)
                if at + size >= len(raw):
                    break
                if found := self._last and self._last.match(text):
                    text = text[: found.end()]
                    break
            else:
                length, most = format_bytes(len(raw)), format_bytes(MOST_BYTES)
                raise NoCutError(
                    f"{NO_CUT}{length} of text, with no place in the {most} from byte {at} where this "
                    "tokenizer surely begins a new word"
                )
            at += len(text.encode())
            yield text

    @functools.cached_property
    def _last(self) -> re.Pattern[str] | None:
        """Return a pattern that matches up to the last sure place of a text."""
        members = _flat(_state(self._tokenizer.pre_tokenizer), "pretokenizers")
        normalizers = [item["type"] for item in _flat(_state(self._tokenizer.normalizer), "normalizers")]
        tokens = list(self._tokenizer.get_added_tokens_decoder().values())
        if not normalizers and self._is_by_character(members):
            own = re.escape("".join({char for token in tokens for char in token.content}))
            return re.compile(rf".*[^\s{own}](?=[^\s{own}])", re.DOTALL)
        places = [
            f"{pattern}(?={right})"
            for left, pattern in _LEFT.items()
            for right in _RIGHT
            if _is_local(normalizers, left + right)
            and _are_apart(members, left, right)
            and not any(_token_joins(token, left, right) for token in tokens)
        ]
        return re.compile(f".*(?:{'|'.join(places)})", re.DOTALL) if places else None

    def _is_by_character(self, members: list[dict[str, Any]]) -> bool:
        """True if each byte has its own id, as with tokenizer.kind bytes."""
        if [item["type"] for item in members] != ["ByteLevel"]:
            return False
        if members[0]["use_regex"] or members[0]["add_prefix_space"]:
            return False
        model = json.loads(self._tokenizer.model.__getstate__())
        joins = model["type"] != "BPE" or model["merges"] or model["fuse_unk"] or model.get("ignore_merges")
        return not joins


def is_utf8(raw: bytes) -> bool:
    """True if the bytes are valid UTF-8, checked piece by piece."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for at in range(0, len(raw), PIECE_BYTES):
            decoder.decode(raw[at : at + PIECE_BYTES], final=at + PIECE_BYTES >= len(raw))
    except UnicodeDecodeError:
        return False
    return True


def _decode(raw: bytes, at: int, size: int) -> str:
    """Return at most `size` bytes from `at`, complete characters only."""
    stop = min(at + size, len(raw))
    while stop < len(raw) and raw[stop] & 0xC0 == 0x80:
        stop -= 1
    return raw[at:stop].decode()


def _state(component: Any) -> dict[str, Any]:
    """Return the component as in tokenizer.json."""
    return json.loads(component.__getstate__()) if component is not None else {}


def _flat(state: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """Return the components in order, with sequences unpacked."""
    if state.get("type") == "Sequence":
        return [item for inner in state[key] for item in _flat(inner, key)]
    return [state] if state else []


def _is_local(normalizers: list[str], characters: str) -> bool:
    """True if the normalizers leave the place between these characters as it is."""
    is_safe = characters.isascii() or set(normalizers) <= {"NFC"}
    return is_safe and all(name in _LOCAL for name in normalizers)


def _token_joins(token: Any, left: str, right: str) -> bool:
    """True if an added token could reach over the place."""
    for content in (token.content, unicodedata.normalize("NFKC", token.content)):
        if any(a in left and b == right for a, b in pairwise(content)):
            return True
        if token.rstrip and right.isspace() and content[-1:] in left:
            return True
    return False


def _are_apart(members: list[dict[str, Any]], left: str, right: str) -> bool:
    """True if the pre-tokenizers divide between any character of `left` and the character `right`."""
    adds_space = any(item.get("add_prefix_space") or item["type"] == "Metaspace" for item in members)
    if adds_space and right != " ":  # at the beginning of any piece
        return False
    for item in members:
        expression = _expression(item)
        node = _parse(expression, left, right) if expression else None
        if node is None or node.joins:
            return False
        if _all_match(node.plain, left) or _all_match(node.plain, right):
            return True
    return False


def _expression(item: dict[str, Any]) -> str | None:
    """Return the regular expression by which a pre-tokenizer divides; None if unknown."""
    kind = item["type"]
    if kind == "ByteLevel":
        return _GPT2 if item["use_regex"] else None
    if kind == "Digits":
        return r"\p{N}" if item["individual_digits"] else r"\p{N}+"
    if kind == "Metaspace":
        return " " if item["split"] else None
    if kind in ("Punctuation", "Split") and item["behavior"] not in ("Isolated", "Removed"):
        return None
    if kind == "Punctuation":
        return _PUNCTUATION
    if kind == "Split":
        pattern: dict[str, str] = item["pattern"]
        return pattern.get("Regex") or re.sub(r"([^\w\s])", r"\\\1", pattern.get("String", "")) or None
    return _FIXED.get(kind)


class _Node(NamedTuple):
    """The matches of a part of an expression at the two characters of a place."""

    nullable: bool = True
    first: bool = False
    """It can begin with the right one."""
    last: bool = False
    """It can end with the left one."""
    joins: bool = False
    """It can contain the left one followed by the right one."""
    plain: str = ""
    """The expression without look-aheads."""

    def then(self, other: "_Node") -> "_Node":
        return _Node(
            self.nullable and other.nullable,
            self.first or (self.nullable and other.first),
            other.last or (other.nullable and self.last),
            self.joins or other.joins or (self.last and other.first),
            self.plain + other.plain,
        )

    def repeated(self, quantifier: str) -> "_Node":
        nullable = self.nullable or quantifier[0] in "*?" or quantifier.startswith(("{0", "{,"))
        joins = self.joins or (self.last and self.first)
        return _Node(nullable, self.first, self.last, joins, self.plain + quantifier)


class _Parser:
    """Parse one expression for one place. ValueError for unsupported syntax."""

    def __init__(self, expression: str, left: str, right: str) -> None:
        self._text, self._left, self._right = expression, left, right
        self._at = 0

    def parse(self) -> _Node:
        node = self._alternatives("")
        if self._at < len(self._text) or node.nullable:
            raise ValueError(self._text)
        return node

    def _alternatives(self, flag: str) -> _Node:
        found = [self._sequence(flag)]
        while self._take("|"):
            found.append(self._sequence(flag))
        return _Node(
            any(node.nullable for node in found),
            any(node.first for node in found),
            any(node.last for node in found),
            any(node.joins for node in found),
            "|".join(node.plain for node in found),
        )

    def _sequence(self, flag: str) -> _Node:
        found = _Node()
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            found = found.then(self._repeated(flag))
        return found

    def _repeated(self, flag: str) -> _Node:
        node = self._one(flag)
        quantifier = _QUANTIFIER.match(self._text, self._at)
        if quantifier is None:
            return node
        self._at = quantifier.end()
        return node.repeated(quantifier.group())

    def _one(self, flag: str) -> _Node:
        if group := _GROUP.match(self._text, self._at):
            self._at = group.end()
            kind = group.group(1)
            inner = self._alternatives("?i:" if kind == "?i:" else flag)
            if not self._take(")"):
                raise ValueError(self._text)
            if kind in ("?=", "?!"):  # the part before must not match the left one: it would see the right
                return _Node(first=True, joins=inner.joins, plain="(?!)")
            return inner._replace(plain=f"({kind or '?:'}{inner.plain})")
        atom = _ATOM.match(self._text, self._at)
        if atom is None:
            raise ValueError(self._text)
        self._at = atom.end()
        tested = f"({flag or '?:'}{atom.group()})"
        first, last = (_matches_any(tested, chars) for chars in (self._right, self._left))
        return _Node(False, first, last, plain=atom.group())

    def _take(self, char: str) -> bool:
        is_there = self._text[self._at : self._at + 1] == char
        self._at += is_there
        return is_there


@functools.lru_cache(maxsize=256)
def _parse(expression: str, left: str, right: str) -> _Node | None:
    try:
        return _Parser(expression, left, right).parse()
    except ValueError:
        return None


@functools.lru_cache(maxsize=256)
def _all_match(expression: str, characters: str) -> bool:
    """True if the expression matches each of the characters by itself."""
    split = _remover(expression)
    return not any(split.pre_tokenize_str(char) for char in characters)


@functools.lru_cache(maxsize=1024)
def _matches_any(expression: str, characters: str) -> bool:
    """True if the expression, an atom, matches one of the characters."""
    return "".join(piece for piece, _ in _remover(expression).pre_tokenize_str(characters)) != characters


def _remover(expression: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(expression), "removed")
