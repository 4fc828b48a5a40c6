"""Load a model's tokenizer and prompt form, compare vocabularies, and return the tokenizer of an export.

A tokenizer is a tokenizer.json with the files beside it, or the small built-in one of the arithmetic tasks.
Encoding and decoding are in format.py.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from r1hpc.base.errors import UsageError
from r1hpc.base.files import parse_json
from r1hpc.config.paths import has_own_template
from r1hpc.config.plugins import template_file
from r1hpc.config.schema.run import ModelConfig, RunConfig
from r1hpc.plan.model.chat_template import has_template, load_template
from r1hpc.plan.model.shape import load_teacher_config
from r1hpc.tasks.text.format import TAGS, PromptForm, SpecialIds, TooLongError, prompt_ids

CHARACTERS = "characters"
_AUTO = "auto"
ALPHABET = "0123456789+-*/=,:?() "
# The last one is DeepSeek's.
_EOS_NAMES = ("<eos>", "</s>", "<|endoftext|>", "<|end_of_text|>", "<\uff5cend\u2581of\u2581sentence\uff5c>")
_PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")
_COMPANIONS = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("tokenizer.model", "vocab.json", "merges.txt"),
)
"""Files beside a tokenizer.json that decide how transformers reads it."""


@dataclass(frozen=True)
class TokenizerFiles:
    """Tokenizer files beside the weights of an export."""

    files: dict[str, bytes]
    stops: tuple[int, ...]
    """IDs that end a completion, for config.json and generation_config.json."""


def character_tokenizer() -> tokenizers.Tokenizer:
    """Return a tokenizer of 27 tokens: <pad> <eos>, the four tags, then ALPHABET, one ID a character.

    Decoding keeps the tags, also with skip_special_tokens. format.encode names an unknown character; the
    tokenizer's own encode raises a shorter error.
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


def fitting(config: RunConfig, code: Path | None = None) -> Callable[[str, str], bool] | None:
    """Return a check that prompts keep to rollout.max_prompt_length, for make_task. None: none is dropped.
    `code`: see form_of."""
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


def special_ids(
    tokenizer: tokenizers.Tokenizer, model: ModelConfig, code: Path | None = None, end: int | None = None
) -> SpecialIds:
    """Return the IDs of the ends and of the padding; a model without padding uses its end.

    The files beside the tokenizer decide, else well-known names. A taught text ends with the token that
    closes a turn of the chat template, if there is one. A sampled text ends there, at the tokenizer's own
    end, and at those of generation_config.json (or config.json). `end` is that of a dataset's texts, whatever
    the files say; `code`: see form_of. Raise UsageError without an end token.
    """
    folder = _folder(model)
    named = {} if folder is None else named_tokens(folder)
    eos = _token(tokenizer, named.get("eos_token"), _EOS_NAMES)
    template = form_of(tokenizer, model, code).template
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
    """Return the form set by model.chat_template, model.system_prompt and model.open_thinking.

    `code` is the frozen code of a run inspected from outside, with its copy of a custom template. Raise
    UsageError if there is no such template, it does not compile, or for a system prompt without a template.
    """
    template, folder = None, _folder(model)
    if has_own_template(model):
        template = load_template(template_file(model, code), folder)
    elif model.chat_template == _AUTO and folder is not None and has_template(folder):
        template = load_template(folder)
    if model.system_prompt is not None and template is None:
        raise UsageError(
            "model.system_prompt needs a chat template, and there is none: leave it out, and write it into "
            "the task's template"
        )
    begin = "" if template is not None or folder is None else _begin(tokenizer, folder)
    return PromptForm(template, model.system_prompt, begin, model.open_thinking)


def as_trained(trained: ModelConfig, folder: Path) -> ModelConfig:
    """Return the model settings that prompt an exported model as its run did. Its folder has the rest."""
    return ModelConfig(
        path=str(folder),
        attn_implementation=trained.attn_implementation,
        chat_template="none" if trained.chat_template == "none" else _AUTO,
        system_prompt=trained.system_prompt,
        open_thinking=trained.open_thinking,
    )


def _begin(tokenizer: tokenizers.Tokenizer, folder: Path) -> str:
    """Return the token before every text: by `add_bos_token`, else what the tokenizer itself puts there."""
    named = named_tokens(folder)
    if named.get("add_bos_token") is False:
        return ""
    frame = tokenizer.encode("", add_special_tokens=True).tokens
    before = "".join(takewhile(lambda token: token != named.get("eos_token"), frame))
    return before or (str(named.get("bos_token", "")) if named.get("add_bos_token") else "")


def named_tokens(folder: Path) -> dict[str, Any]:
    """Return what the files beside a tokenizer.json say about tokens: `eos_token` etc. as text, and flags.
    Raise UsageError if one of them is no JSON object."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        try:
            content = parse_json(path.read_bytes()) if path.is_file() else {}
        except ValueError as error:
            raise UsageError(f"{path} is not valid JSON ({error}); restore it") from None
        if not isinstance(content, dict):
            raise UsageError(f"{path} must hold one JSON object; restore it")
        found |= {key: _content(value) for key, value in content.items() if value is not None}
    return found


def _content(token: Any) -> Any:
    """Return the text of a token, which Hugging Face writes as a string or as an object with `content`."""
    return token["content"] if isinstance(token, dict) and "content" in token else token


def asking_id(model: ModelConfig, form: PromptForm, ids: SpecialIds) -> str:
    """Return an id, by content, of how a question becomes a prompt: template, tokenizer, end tokens."""
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


def _token(tokenizer: tokenizers.Tokenizer, named: str | None, usual: tuple[str, ...]) -> int | None:
    ids = map(tokenizer.token_to_id, [named] if named else usual)
    return next((index for index in ids if index is not None), None)
