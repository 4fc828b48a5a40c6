"""Load recipes: the YAML files that define a dataset.

    recipe = load_recipe(find_recipe("stdlib"))
    recipe.hash                     # hash of the recipe's content, not of its file's place

Keys are listed in shards/README.md. Paths in a recipe are relative to the recipe file.
"""

import sysconfig
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_type_hints

from r1hpc.base.errors import UsageError
from r1hpc.base.names import at_home, check_name, nearest, one_of, printable
from r1hpc.config.yaml_files import UniqueKeyLoader, read_yaml
from r1hpc.data.format.manifest import digest
from r1hpc.data.format.mix import MixRecipe, check_weighted

RULES = ("gopher_quality", "gopher_repetition", "c4", "fineweb")
_GROUPS = {"gopher": ("gopher_quality", "gopher_repetition")}
PII = ("keep", "mask", "drop")
PYTHON_STDLIB = "python-stdlib"
EOS_TOKEN = "<|endoftext|>"
TRACES = "traces"
KINDS = ("text", "jsonl", "parquet", "hdf5", "arrow", TRACES)
_STAGE_KEYS = ("clean", "dedup", "decontaminate", "mix", "max_unreadable")
_TRACE_KEYS = ("prompt_field", "completion_field", "on_invalid")
_FOREIGN_KEYS = {
    TRACES: ("field", "on_invalid_utf8", "chat_template"),
    "text": (*_TRACE_KEYS, "field", "chat_template"),
}
"""Other kinds exclude the keys of traces."""
_Block = TypeVar("_Block")


@dataclass(frozen=True)
class TokenizerRecipe:
    """How text becomes ids."""

    kind: str
    """byte_bpe: trained here; bytes: one id a byte; path: a tokenizer.json; ids: the inputs are ids."""
    vocab_size: int | None = None
    """byte_bpe: at least 257 (256 bytes and the EOS token); ids: the vocabulary the ids come from."""
    sample_bytes: int = 4_000_000
    """byte_bpe: about how much text to train on, spread evenly over the inputs."""
    path: str | None = None
    """path: tokenizer.json or the folder that holds it."""
    eos_token: str = EOS_TOKEN
    eos_id: int | None = None
    """ids: the id that ends a document; path: instead of eos_token."""
    pad_id: int | None = None
    """ids, path: the id that pads rows of ids to one length; removed from their ends."""

    def __post_init__(self) -> None:
        one_of("tokenizer.kind", self.kind, ("byte_bpe", "bytes", "path", "ids"))
        if self.kind in ("byte_bpe", "ids") and self.vocab_size is None:
            raise UsageError(f"tokenizer.vocab_size is needed with kind: {self.kind}")
        if self.kind == "byte_bpe" and (self.vocab_size or 0) < 257:
            raise UsageError(f"tokenizer.vocab_size must be at least 257 for byte_bpe, not {self.vocab_size}")
        if self.kind == "path" and self.path is None:
            raise UsageError("tokenizer.path is needed with kind: path")
        if self.eos_id is not None and self.kind in ("byte_bpe", "bytes"):
            raise UsageError(
                f"tokenizer.eos_id is not for kind: {self.kind}, whose EOS is tokenizer.eos_token"
            )
        if self.kind == "ids" and not 0 <= (-1 if self.eos_id is None else self.eos_id) < (
            self.vocab_size or 0
        ):
            raise UsageError("tokenizer.eos_id between 0 and vocab_size - 1 is needed with kind: ids")
        if self.pad_id is not None and self.kind in ("byte_bpe", "bytes"):
            raise UsageError(f"tokenizer.pad_id is not for kind: {self.kind}, whose inputs are texts")
        for name in ("eos_id", "pad_id"):
            if (getattr(self, name) or 0) < 0:
                raise UsageError(f"tokenizer.{name} must be a token id, not {getattr(self, name)}")
        if (self.vocab_size or 1) >= 2**32 - 1:
            raise UsageError(f"tokenizer.vocab_size {self.vocab_size} does not fit 32-bit ids")

    @property
    def eos(self) -> str | int:
        """Return the token that closes a document, or its id."""
        return self.eos_token if self.eos_id is None else self.eos_id


@dataclass(frozen=True)
class SourceRecipe:
    """One set of input files of one kind and one licence."""

    name: str
    kind: str
    """text: one document a file; jsonl: one a line; parquet: one a row; hdf5: one a row of a dataset;
    arrow: one a row of Arrow files, as `datasets` saves them; traces: one a JSONL line of prompt and
    completion, stored with their roles."""
    root: str
    """Folder, or python-stdlib for the running Python's own library."""
    glob: str = "**/*"
    exclude: tuple[str, ...] = ()
    """Folders or files to leave out: names or patterns of names, anywhere below root; with `/` paths below
    root. An entry that leaves out nothing is refused."""
    field: str = "text"
    """JSONL field, Parquet column or HDF5 dataset that holds the text (or the ids)."""
    license: str = "unknown"
    max_bytes: int | None = None
    """Take complete files in sorted order, skipping each that would exceed this sum."""
    max_documents: int | None = None
    """All kinds but text: at most this many documents of each file."""
    on_invalid_utf8: str = "error"
    """error, skip the document, or replace the bad bytes by U+FFFD. Not for traces."""
    prompt_field: str = "prompt"
    """traces: the JSONL field that is given."""
    completion_field: str = "completion"
    """traces: the JSONL field that is learnt; the EOS id is appended to it."""
    on_invalid: str = "error"
    """traces: error, or skip a line that is no trace."""
    clean: "CleanRecipe | None" = None
    """The recipe's own clean, with the keys that the source gives instead; null: the recipe's."""
    max_dropped: float = 1.0
    """Share of the source's records that may be dropped. It changes no byte, so it is not in the hash."""
    chat_template: str | None = None
    """For a field of messages: a Jinja file, or a folder of a tokenizer; null: tokenizer.path's own."""

    def __post_init__(self) -> None:
        check_name(self.name, "source name")
        if self.kind == "megatron":
            raise UsageError(
                f"source {self.name}: turn Megatron's files into Parquet by `python -m experiments.megatron` "
                "in r1hpc's sources, and name them with kind: parquet, field: input_ids"
            )
        one_of(f"source {self.name}: kind", self.kind, KINDS)
        one_of(f"source {self.name}: on_invalid_utf8", self.on_invalid_utf8, ("error", "skip", "replace"))
        one_of(f"source {self.name}: on_invalid", self.on_invalid, ("error", "skip"))
        defaults = {field.name: field.default for field in fields(self)}
        for name in _FOREIGN_KEYS.get(self.kind, _TRACE_KEYS):
            if getattr(self, name) != defaults[name]:
                raise UsageError(
                    f"source {self.name}: {name} is not for kind: {self.kind}; traces have prompt_field, "
                    "completion_field and on_invalid, texts on_invalid_utf8, and those in lines or rows "
                    "field and chat_template"
                )
        if self.kind == "text" and self.max_documents is not None:
            raise UsageError(f"source {self.name}: max_documents is not for kind: text; use max_bytes")
        if not 0 <= self.max_dropped <= 1:
            raise UsageError(f"source {self.name}: max_dropped must be 0 to 1, not {self.max_dropped}")
        for name in ("max_bytes", "max_documents"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"source {self.name}: {name} must be at least 1, not {value}")


@dataclass(frozen=True)
class CleanRecipe:
    """The documents to keep, and what to repair or mask in them."""

    lang: tuple[str, ...] = ()
    """ISO 639 codes to keep; none: all languages, and none is identified."""
    min_lang_score: float = 0.65
    """FineWeb's threshold for English (Penedo et al. 2024, section 3.3)."""
    rules: tuple[str, ...] = ()
    """gopher (both halves), gopher_quality, gopher_repetition, c4, fineweb."""
    repair: bool = True
    """Text repair by ftfy: mojibake, control characters, HTML entities, line ends, NFC."""
    pii: str = "keep"
    """keep, mask, or drop the document."""

    def __post_init__(self) -> None:
        for rule in self.rules:
            one_of("clean.rules", rule, (*_GROUPS, *RULES))
        one_of("clean.pii", self.pii, PII)
        if not 0 <= self.min_lang_score <= 1:
            raise UsageError(f"clean.min_lang_score must lie between 0 and 1, not {self.min_lang_score}")
        for code in self.lang:
            if not code.isalpha() or code != code.lower():
                raise UsageError(f"clean.lang: {code!r} is not a language code such as en, de or zh")

    @property
    def single_rules(self) -> tuple[str, ...]:
        """Return the rules by their own names, in the order in which they apply."""
        chosen = {name for rule in self.rules for name in _GROUPS.get(rule, (rule,))}
        return tuple(name for name in RULES if name in chosen)


@dataclass(frozen=True)
class MinhashRecipe:
    """Near duplicates by MinHash over word n-grams, found by bands of rows (FineWeb's numbers)."""

    ngram: int = 5
    bands: int = 14
    rows: int = 8
    threshold: float = 0.7
    """Candidates with a lower estimated Jaccard similarity are not duplicates."""

    def __post_init__(self) -> None:
        for name in ("ngram", "bands", "rows"):
            if not 1 <= getattr(self, name) <= 256:
                raise UsageError(
                    f"dedup.minhash.{name} must lie between 1 and 256, not {getattr(self, name)}"
                )
        if not 0 <= self.threshold <= 1:
            raise UsageError(f"dedup.minhash.threshold must lie between 0 and 1, not {self.threshold}")


@dataclass(frozen=True)
class DedupRecipe:
    """Keep the first of equal or nearly equal documents, over all sources in their order."""

    exact: bool = True
    minhash: MinhashRecipe | None = None


@dataclass(frozen=True)
class DecontaminateRecipe:
    """Leave out documents that share an n-gram of words with an evaluation file."""

    against: tuple[str, ...]
    """Files: JSON lines (each string in them), or text (each paragraph)."""
    ngram: int = 13
    """Llama and GPT-3 use 13; an item of fewer words is searched as a whole, down to min_words."""
    min_words: int = 8

    def __post_init__(self) -> None:
        if not self.against:
            raise UsageError("decontaminate.against is empty: name the evaluation files")
        if not 1 <= self.min_words <= self.ngram <= 256:
            raise UsageError(
                "decontaminate needs 1 <= min_words <= ngram <= 256, "
                f"not min_words {self.min_words} and ngram {self.ngram}"
            )


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a dataset's bytes, except the inputs themselves."""

    name: str
    tokenizer: TokenizerRecipe
    sources: tuple[SourceRecipe, ...]
    profile: str = "train"
    """train: raw chunks, one small read per window; compact: zstd, several times smaller, slower windows."""
    chunk_tokens: int = 2**15
    shard_tokens: int = 2**24
    part_bytes: int = 2**28
    """Input bytes per part, the unit of work of one writer. A matter of layout, not of --workers."""
    clean: CleanRecipe | None = None
    dedup: DedupRecipe | None = None
    decontaminate: DecontaminateRecipe | None = None
    mix: MixRecipe | None = None
    max_unreadable: float = 0.0
    """Share of records that may be unreadable; they are put aside and counted. 0: the first is an error."""
    folder: Path = Path()
    """Folder of the recipe file; not part of the hash."""

    def __post_init__(self) -> None:
        check_name(self.name, "recipe name")
        one_of("profile", self.profile, ("train", "compact"))
        if not self.sources:
            raise UsageError("sources is empty: name at least one")
        if len({source.name for source in self.sources}) != len(self.sources):
            raise UsageError("two sources have the same name")
        if len(self.sources) > 65_535:
            raise UsageError("at most 65,535 sources")
        if len({source.kind == TRACES for source in self.sources}) > 1:
            raise UsageError("sources of kind traces and of other kinds do not mix in one dataset")
        if self.is_traces and self.tokenizer.kind == "ids":
            raise UsageError("traces are text: tokenizer.kind must be path, bytes or byte_bpe, not ids")
        if self.chunk_tokens < 1 or self.shard_tokens < 1 or self.shard_tokens % self.chunk_tokens:
            raise UsageError(
                f"shard_tokens ({self.shard_tokens}) must be a multiple of chunk_tokens ({self.chunk_tokens})"
            )
        if self.part_bytes < 1:
            raise UsageError(f"part_bytes must be at least 1, not {self.part_bytes}")
        if not 0 <= self.max_unreadable < 1:
            raise UsageError(f"max_unreadable is a share from 0 to less than 1, not {self.max_unreadable}")
        if self.mix is not None and self.mix.weights:
            check_weighted("mix.weights", self.mix.weights, [source.name for source in self.sources])
        stages = {"clean": self.cleans, "dedup": self.dedup, "decontaminate": self.decontaminate}
        asked = [name for name, block in stages.items() if block]
        if asked and (self.is_traces or self.tokenizer.kind == "ids"):
            what = "traces" if self.is_traces else "token ids"
            raise UsageError(f"{asked[0]} works on texts, not on {what}; leave it out")
        if self.is_traces and self.max_unreadable:
            raise UsageError("max_unreadable is not for traces, whose sources have on_invalid: skip")

    @property
    def content(self) -> dict[str, Any]:
        """Return the resolved recipe as plain JSON types."""
        content = asdict(self)
        del content["folder"]
        for name in _STAGE_KEYS:  # new keys, which must not change the ids of older recipes
            if content[name] in (None, 0.0):
                del content[name]
        if self.tokenizer.pad_id is None:
            del content["tokenizer"]["pad_id"]
        for source in content["sources"]:
            del source["max_dropped"]  # it refuses a dataset and changes none
            if source["kind"] != TRACES:  # those keys do not concern it and must not change its id
                for key in _TRACE_KEYS:
                    del source[key]
            for key in ("clean", "chat_template"):
                if source[key] is None:
                    del source[key]
        return content

    @property
    def is_traces(self) -> bool:
        """True if documents have roles."""
        return self.sources[0].kind == TRACES

    @property
    def cleans(self) -> tuple[CleanRecipe, ...]:
        """Return the recipe's clean and those of its sources."""
        blocks = (self.clean, *(source.clean for source in self.sources))
        return tuple(block for block in blocks if block is not None)

    @property
    def is_prepared(self) -> bool:
        """True if documents pass through stages before they become tokens."""
        return bool(self.max_unreadable or self.cleans or self.dedup or self.decontaminate)

    @property
    def hash(self) -> str:
        return digest(self.content)

    def input_path(self, source: int, name: str) -> Path:
        """Return the path of an input, whose name is relative to the root of its source."""
        return self.resolve(self.sources[source].root) / name

    def resolve(self, path: str) -> Path:
        """Return a path relative to the recipe file; python-stdlib is the running Python's library."""
        if path == PYTHON_STDLIB:
            return Path(sysconfig.get_path("stdlib"))
        return self.folder / at_home(path)


def find_recipe(name: str | Path) -> Path:
    """Return the recipe file at path `name`, or of that name in shards/ (.yaml or not); else ConfigError."""
    from r1hpc.config.assets import assets, find_named

    shards = assets("shards")
    return find_named("recipe", str(name), (Path(name), shards / name, shards / f"{name}.yaml"), shards)


def load_recipe(path: Path) -> Recipe:
    """Parse one recipe file; UsageError names the key that is unknown, or of a wrong type or value."""
    content = read_yaml(path, UniqueKeyLoader)
    try:
        return parse_recipe(content, path.absolute().parent)
    except UsageError as error:
        raise UsageError(f"recipe {path}: {error}") from None


def parse_recipe(content: Any, folder: Path) -> Recipe:
    """Return a Recipe from plain YAML values; `folder` is the base of its paths."""
    values = dict(_mapping(content, "the recipe"))
    _check_keys(values, [field.name for field in fields(Recipe) if field.name != "folder"], "")
    values["tokenizer"] = _block(TokenizerRecipe, values.get("tokenizer"), "tokenizer")
    if (clean := values.get("clean")) is not None:
        values["clean"] = _block(CleanRecipe, clean, "clean")
    sources = values.get("sources")
    if not isinstance(sources, list):
        raise UsageError("sources must be a list of blocks, each with name, kind and root")
    blocks = []
    for number, item in enumerate(sources):
        where = f"sources[{number}]"
        if "generate" in _mapping(item, where):
            raise UsageError(
                f"{where}.generate: recipes of 0.2.0 had teachers. Run stage generate, and name its "
                "traces.jsonl by kind: traces, or by kind: jsonl, field: completion"
            )
        if item.get("clean") is not None:
            item = {**item, "clean": {**(clean or {}), **_mapping(item["clean"], f"{where}.clean")}}
        blocks.append(_block(SourceRecipe, item, where))
    return _block(Recipe, {**values, "sources": tuple(blocks), "folder": folder}, "recipe")


def _block(cls: type[_Block], content: Any, where: str) -> _Block:
    values = dict(_mapping(content, where))
    prefix = "" if cls is Recipe else f"{where}."
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    _check_keys(values, list(known), prefix)
    for name, field in known.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise UsageError(f"{prefix}{name} is missing")
    types = get_type_hints(cls)
    return cls(**{name: _typed(value, types[name], f"{prefix}{name}") for name, value in values.items()})


def _typed(value: Any, wanted: Any, where: str) -> Any:
    if wanted == tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise UsageError(f"{where} must be a list of strings, not {value!r}")
        return tuple(value)
    options = get_args(wanted) if isinstance(wanted, UnionType) else (wanted,)
    for option in options:
        if is_dataclass(option) and value is not None and not isinstance(value, option):  # type: ignore[arg-type]
            return _block(option, value, where)  # type: ignore[arg-type]
    if wanted == dict[str, float]:
        block = _mapping(value, where)
        return {name: _typed(number, float, f"{where}.{name}") for name, number in block.items()}
    plain = tuple(getattr(option, "__origin__", option) for option in options)
    if float in plain and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, plain) or (isinstance(value, bool) and bool not in plain):
        expected = " or ".join("null" if option is type(None) else option.__name__ for option in plain)
        raise UsageError(f"{where} must be {expected}, not {value!r}")
    return value


def _mapping(content: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise UsageError(f"{where} must be a block of `key: value` lines")
    return content


def _check_keys(content: Mapping[str, Any], known: list[str], prefix: str) -> None:
    for key in content:
        if key not in known:
            raise UsageError(f"unknown key {printable(prefix + key)!r}{nearest(key, known)}")
