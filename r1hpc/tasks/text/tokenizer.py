"""Load a model's tokenizer: a tokenizer.json, or the small built-in one of the arithmetic tasks."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from r1hpc.base.errors import ConfigError, UsageError
from r1hpc.base.files import parse_json
from r1hpc.config.paths import has_own_template
from r1hpc.config.plugins import template_file
from r1hpc.config.schema.run import ModelConfig, RunConfig
from r1hpc.plan.model.shape import load_teacher_config
from r1hpc.tasks.grading.completion import TAGS
from r1hpc.tasks.text.prompt_format import PromptForm, named_tokens, prompt_form

CHARACTERS = "characters"
ALPHABET = "0123456789+-*/=,:?() "
_EOS_NAMES = (
    "<eos>",
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek's
)
_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")
_COMPANIONS = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("tokenizer.model", "vocab.json", "merges.txt"),
)
"""Files beside a tokenizer.json that decide how transformers reads it."""


class TooLongError(ConfigError):
    """A prompt of more tokens than rollout.max_prompt_length."""


@dataclass(frozen=True)
class SpecialIds:
    """`pad` fills rows, `eos` ends a taught text."""

    pad: int
    eos: int
    also: tuple[int, ...] = ()
    """Further tokens that end a completion: chat models have several."""

    @property
    def stops(self) -> tuple[int, ...]:
        """Return every token that ends a completion."""
        return (self.eos, *self.also)


@dataclass(frozen=True)
class TokenizerFiles:
    """Tokenizer files beside the weights of an export."""

    files: dict[str, bytes]
    stops: tuple[int, ...]
    """IDs that end a completion, for config.json and generation_config.json."""


def character_tokenizer() -> tokenizers.Tokenizer:
    """Return a tokenizer of 27 tokens: <pad> <eos>, the four tags, then ALPHABET, one ID a character.

    Decoding keeps the tags, also with skip_special_tokens. `encode` of this module names an unknown
    character; the tokenizer's own encode raises a shorter error.
    """
    words = ["<pad>", "<eos>", *TAGS, *ALPHABET]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    tokenizer.add_tokens([tokenizers.AddedToken(tag, normalized=False) for tag in TAGS])
    return tokenizer


def load_tokenizer(model: ModelConfig) -> tokenizers.Tokenizer:
    """Load `model.tokenizer`: `characters`, a tokenizer.json, its folder, or None for model.path. Raise
    UsageError if there is none, or it is no tokenizer."""
    if model.tokenizer == CHARACTERS:
        return character_tokenizer()
    path = tokenizer_file(model)
    try:
        loaded = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    # The library raises plain Exception for a file of another form.
    except Exception as error:
        raise UsageError(f"{path} is not a tokenizer.json that `tokenizers` can read: {error}") from None
    # A file keeps its last truncation and padding, and would silently cut or fill every text.
    loaded.no_truncation()
    loaded.no_padding()
    return loaded


def tokenizer_file(model: ModelConfig) -> Path:
    """Return the path of the tokenizer.json; raise UsageError if there is none."""
    named = model.tokenizer or model.path
    if named is None:
        raise UsageError(
            "no tokenizer: give model.tokenizer=characters (the arithmetic tasks), model.tokenizer=FILE "
            "(a tokenizer.json), or model.path=DIR of a model that has one"
        )
    path = Path(named)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise UsageError(
            f"{path} does not exist: give model.tokenizer=FILE. Where a model has only the older files, "
            "transformers' AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes tokenizer.json"
        )
    return path


def encode(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    """Return the IDs of `text` without special tokens around it; UsageError for an unknown character."""
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    # The library raises plain Exception for a missing token.
    except Exception as error:
        unknown = sorted({char for char in text if not _known(tokenizer, char)})
        raise UsageError(
            f"the tokenizer has no token for {unknown or error} in {text[:80]!r}; "
            "the built-in `characters` holds digits, + - * / = , : ? ( ) and space: give model.tokenizer"
        ) from None
    return ids


def prompt_ids(
    tokenizer: tokenizers.Tokenizer, form: PromptForm, prompt: str, where: str, most: int
) -> tuple[int, ...]:
    """Return the tokens of a prompt in the model's prompt form.

    `where` is the line of its file, for errors; empty: it is from none. Raise TooLongError if it has more
    than `most` tokens, UsageError for an unknown character, or if the chat template refuses the prompt.
    """
    at = where and f"{where}: "
    try:
        ids = tuple(encode(tokenizer, form.prompt(prompt)))
    except UsageError as error:
        raise UsageError(f"{at}{error}") from None
    if len(ids) > most:
        shorter = "; or shorten task.options.template; task.drop_longer=true leaves out a task's longer rows"
        raise TooLongError(
            f"{at}a prompt has {len(ids)} tokens: raise rollout.max_prompt_length, now {most} "
            f"({prompt!r:.80}){shorter if where else ''}"
        )
    return ids


def fitting(config: RunConfig, code: Path | None = None) -> Callable[[str, str], bool] | None:
    """Return a check that prompts keep to rollout.max_prompt_length, for make_task. None: none is dropped.
    `code`: see prompt_format.prompt_form."""
    if not config.task.drop_longer or config.stage == "traces":
        return None
    tokenizer = load_tokenizer(config.model)
    form = form_of(tokenizer, config.model, code)

    def fits(prompt: str, where: str) -> bool:
        try:
            prompt_ids(tokenizer, form, prompt, where, config.rollout.max_prompt_length)
        except TooLongError:
            return False
        return True

    return fits


def decode(
    tokenizer: tokenizers.Tokenizer, rows: Sequence[Sequence[int]], stops: Sequence[int] = ()
) -> list[str]:
    """Return the model's text for each row of IDs: without special tokens, but with the tags.

    Tags are often added to a vocabulary as special tokens. The library's skip_special_tokens would remove
    them too, and the answer could not be judged. `stops`, which end a completion, are left out too: some
    tokenizers hold their end as a common token.
    """
    added = tokenizer.get_added_tokens_decoder().items()
    silent = {index for index, token in added if token.special} | set(stops)
    silent -= {tokenizer.token_to_id(tag) for tag in TAGS}
    spoken = [[index for index in row if index not in silent] for row in rows]
    texts: list[str] = tokenizer.decode_batch(spoken, skip_special_tokens=False)
    return texts


def special_ids(
    tokenizer: tokenizers.Tokenizer,
    model: ModelConfig | None = None,
    code: Path | None = None,
    end: int | None = None,
) -> SpecialIds:
    """Return the IDs of the ends and of the padding; a model without padding uses its end.

    With `model` the files beside the tokenizer decide, else well-known names. A taught text ends with the
    token that closes a turn of the chat template, if there is one. A sampled text ends there, at the
    tokenizer's own end, and at those of generation_config.json (or config.json). `end` is that of a dataset's
    texts, whatever the files say; `code`: see prompt_format.prompt_form. Raise UsageError without an end
    token.
    """
    folder = None if model is None else _folder(model)
    named = {} if folder is None else named_tokens(folder)
    eos = _token(tokenizer, named.get("eos_token"), _EOS_NAMES)
    template = None if model is None else prompt_form(model, tokenizer, folder, code).template
    turn = template.end_of_turn() if template is not None else None
    turn_id = None if turn is None else tokenizer.token_to_id(turn)
    ends = [end, turn_id, eos, *_listed_ends(tokenizer, folder)]
    known = list(dict.fromkeys(end for end in ends if end is not None))
    if not known:
        raise UsageError(
            "the tokenizer does not say which token ends a text: put tokenizer_config.json with "
            '"eos_token" beside tokenizer.json'
        )
    pad = _token(tokenizer, named.get("pad_token"), _PAD_NAMES)
    return SpecialIds(known[0] if pad is None else pad, known[0], tuple(known[1:]))


def form_of(tokenizer: tokenizers.Tokenizer, model: ModelConfig, code: Path | None = None) -> PromptForm:
    """Return the prompt form for a model with this tokenizer; see prompt_format.prompt_form."""
    return prompt_form(model, tokenizer, _folder(model), code)


def asking_id(model: ModelConfig, form: PromptForm, ids: SpecialIds) -> str:
    """Return the name, by content, of all between a question and a model: template, tokens, ends."""
    tokens = b"" if model.tokenizer == CHARACTERS else tokenizer_file(model).read_bytes()
    around = json.dumps([form.id, ids.stops]).encode()
    return hashlib.sha256(around + tokens).hexdigest()[:16]


def vocabulary_size(tokenizer: tokenizers.Tokenizer) -> int:
    """Return one more than the largest ID: the least size of a model's embedding."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


def _ids(model: ModelConfig) -> dict[str, int]:
    found: dict[str, int] = load_tokenizer(model).get_vocab(with_added_tokens=True)
    return found


def other_vocabulary(model: ModelConfig) -> str | None:
    """Return a sentence if model.tokenizer gives other IDs than the tokenizer beside the weights."""
    own = Path(model.path or "", "tokenizer.json")
    if model.path is None or model.tokenizer is None or not own.is_file():
        return None
    theirs, ours = _ids(dataclasses.replace(model, tokenizer=None)), _ids(model)
    moved = sum(theirs.get(token) != index for token, index in ours.items())
    if not moved:
        return None
    return (
        f"model.tokenizer={model.tokenizer} is not the tokenizer of {model.path}: {moved:,} of its "
        f"{len(ours):,} tokens have another id there, or none, and mean nothing to the weights; leave "
        "it out to take the model's own"
    )


def check_data_tokens(tokenizer: Path | None, model: ModelConfig) -> None:
    """Refuse a dataset whose tokens have other IDs than those of the weights to be trained on it.

    `tokenizer` is the folder of the dataset's tokenizer; None: it was made of IDs. Raise UsageError with how
    many have.
    """
    if tokenizer is None:
        return
    theirs, ours = _ids(ModelConfig(tokenizer=str(tokenizer))), _ids(model)
    # A token that the model's tokenizer lacks may still have a row in the embedding, as in a base model.
    moved = sum(ours.get(token, index) != index for token, index in theirs.items())
    if moved:
        raise UsageError(
            f"the dataset was made with another tokenizer than the model's: {moved:,} of its {len(theirs):,} "
            "tokens have another id there, and mean something else to the weights; build it with tokenizer: "
            "{kind: path, path: MODEL}"
        )


def check_teacher_tokens(config: RunConfig) -> None:
    """Refuse a teacher of rl.algorithm=distill whose tokens have other IDs than the student's. Raise
    UsageError also if it has no tokenizer.json to compare, or too small an embedding."""
    hf_config = load_teacher_config(config)
    if hf_config is None:
        return
    teacher = str(config.rl.teacher)
    if not Path(teacher, "tokenizer.json").is_file():
        raise UsageError(
            f"rl.teacher {teacher} has no tokenizer.json, so its tokens cannot be compared: "
            "add the one it was trained with"
        )
    theirs, ours = _ids(ModelConfig(path=teacher)), _ids(config.model)
    differing = sum(theirs.get(token) != ours.get(token) for token in {*theirs, *ours})
    if differing:
        raise UsageError(
            f"rl.teacher {teacher} has another vocabulary than the student: {differing:,} of "
            f"{len({*theirs, *ours}):,} tokens have another id there, or none, and distributions over "
            "different tokens cannot be compared: take a teacher of the same family, or fine-tune on its "
            "completions (stages generate and sft)"
        )
    rows = hf_config.get("vocab_size")
    if isinstance(rows, int) and rows <= max(ours.values()):
        raise UsageError(
            f"the embedding of rl.teacher {teacher} has {rows:,} rows for {len(ours):,} tokens: it is not "
            "the model that its tokenizer.json is of"
        )


def exported_tokenizer(
    model: ModelConfig, end: int | None = None, code: Path | None = None
) -> TokenizerFiles:
    """Return the files of a model's tokenizer, byte for byte if it has a folder; `end` and `code` as in
    special_ids.

    A custom chat template of the run replaces the tokenizer's. A missing tokenizer_config.json is made, so
    that transformers reads tokenizer.json as it is and not as the model_type's usual kind.
    """
    tokenizer, folder = load_tokenizer(model), _folder(model)
    ids = special_ids(tokenizer, model, code, end)
    if folder is None:
        files = {"tokenizer.json": tokenizer.to_str(pretty=True).encode()}
    else:
        files = {"tokenizer.json": tokenizer_file(model).read_bytes()}
        files |= {name: (folder / name).read_bytes() for name in _COMPANIONS if (folder / name).is_file()}
    if "tokenizer_config.json" not in files:
        named = {"eos_token": tokenizer.id_to_token(ids.eos), "pad_token": tokenizer.id_to_token(ids.pad)}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
        files["tokenizer_config.json"] = json.dumps(config, indent=2).encode()
    if has_own_template(model):
        files["chat_template.jinja"] = template_file(model, code).read_bytes()
    return TokenizerFiles(files, ids.stops)


def _folder(model: ModelConfig) -> Path | None:
    return None if model.tokenizer == CHARACTERS else tokenizer_file(model).parent


def _listed_ends(tokenizer: tokenizers.Tokenizer, folder: Path | None) -> list[int]:
    """Return eos_token_id of generation_config.json, else of config.json, which may be a list.

    Keep only tokens of its own: configurations of small models have been left with the default of their
    model_type, which is any token of another vocabulary.
    """
    if folder is None:
        return []
    added = tokenizer.get_added_tokens_decoder()
    for name in ("generation_config.json", "config.json"):
        try:
            value = parse_json((folder / name).read_bytes()).get("eos_token_id")
        except (OSError, ValueError, AttributeError):  # no model's folder, or one that others refuse
            continue
        listed = value if isinstance(value, list) else [value]
        if value is not None:
            return [token for token in listed if token in added]
    return []


def _known(tokenizer: tokenizers.Tokenizer, char: str) -> bool:
    is_text = not "\ud800" <= char <= "\udfff"  # half a surrogate pair, as JSON may escape one
    return is_text and tokenizer.token_to_id(char) is not None


def _token(tokenizer: tokenizers.Tokenizer, named: str | None, usual: tuple[str, ...]) -> int | None:
    found = [tokenizer.token_to_id(word) for word in ([named] if named else usual)]
    ids: list[int] = [index for index in found if index is not None]
    return ids[0] if ids else None
