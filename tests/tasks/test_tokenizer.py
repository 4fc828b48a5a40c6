"""Ids of the built-in tokenizer, and finding the one of a model."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from r1hpc.base.errors import UsageError
from r1hpc.config.schema.rl import TaskConfig
from r1hpc.config.schema.run import ModelConfig
from r1hpc.plan.model.chat_template import load_template
from r1hpc.tasks.problems.registry import make_task
from r1hpc.tasks.text.format import TAGS, SpecialIds, decode, encode
from r1hpc.tasks.text.tokenizer import (
    ALPHABET,
    asking_id,
    character_tokenizer,
    check_data_tokens,
    exported_tokenizer,
    form_of,
    load_tokenizer,
    special_ids,
)
from tests.tasks.tokenizers_of_others import gemma_like, llama3_like

_TOKENIZER = character_tokenizer()
_PIECES = [*TAGS, "<eos>", *ALPHABET]


@pytest.fixture(scope="module")
def of_others(tmp_path_factory: pytest.TempPathFactory) -> list[tokenizers.Tokenizer]:
    """One of bytes, one in sentencepiece's manner with a tag that is not special, and the built-in one."""
    folder = tmp_path_factory.mktemp("tokenizers")
    folders = (llama3_like(folder / "bytes"), gemma_like(folder / "marks"))
    return [*(load_tokenizer(ModelConfig(path=str(path))) for path in folders), _TOKENIZER]


def test_the_ids_are_pinned() -> None:
    """Trained weights hold them."""
    assert _TOKENIZER.get_vocab_size() == 27
    assert encode(_TOKENIZER, "<pad><eos><think></think><answer></answer>") == [0, 1, 2, 3, 4, 5]
    assert encode(_TOKENIZER, ALPHABET) == list(range(6, 27))
    assert special_ids(_TOKENIZER, ModelConfig(tokenizer="characters")) == SpecialIds(pad=0, eos=1)


@given(st.lists(st.sampled_from(_PIECES)).map("".join))
def test_text_comes_back(text: str) -> None:
    assert _TOKENIZER.decode(encode(_TOKENIZER, text), skip_special_tokens=False) == text


@given(st.lists(st.integers(0, 26)))
def test_ids_come_back(ids: list[int]) -> None:
    assert encode(_TOKENIZER, _TOKENIZER.decode(ids, skip_special_tokens=False)) == ids


def test_tags_stay_where_special_tokens_go() -> None:
    ids = encode(_TOKENIZER, "<think>1</think><answer>1</answer><eos><pad>")
    assert _TOKENIZER.decode(ids, skip_special_tokens=True) == "<think>1</think><answer>1</answer>"


def test_tags_stay_where_they_are_special_tokens(tmp_path: Path) -> None:
    """As transformers' add_special_tokens leaves them after somebody's own fine-tuning."""
    text = "<think>23 + 34,  so 57</think>\n<answer>57</answer>"
    for folder in (llama3_like(tmp_path / "bytes"), gemma_like(tmp_path / "marks")):
        model = ModelConfig(path=str(folder))
        tokenizer = load_tokenizer(model)
        tokenizer.add_special_tokens([*TAGS, "<|mark|>"])
        (mark,), ids = encode(tokenizer, "<|mark|>"), encode(tokenizer, text)
        end = special_ids(tokenizer, model)
        assert all(tokenizer.token_to_id(tag) in ids for tag in TAGS)
        assert not any(tag in tokenizer.decode(ids) for tag in TAGS[1:])
        assert decode(tokenizer, [[mark, *ids[:9], mark, *ids[9:], end.eos, end.pad], []]) == [text, ""]


def test_an_end_that_is_no_special_token_is_not_said() -> None:
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(["<|im_end|>"])
    (end,) = encode(tokenizer, "<|im_end|>")
    said = "<answer>7</answer>"
    assert decode(tokenizer, [[*encode(tokenizer, said), end]], stops=[end]) == [said]
    # A tag may be what ends an answer, and is judged all the same.
    assert decode(tokenizer, [encode(tokenizer, said)], stops=encode(tokenizer, TAGS[3])) == [said]


def test_what_stands_between_a_question_and_a_model_has_a_name(tmp_path: Path) -> None:
    model = ModelConfig(path=str(llama3_like(tmp_path)))

    def name() -> str:
        load_template.cache_clear()  # an attempt is a process of its own
        tokenizer = load_tokenizer(model)
        return asking_id(model, form_of(tokenizer, model), special_ids(tokenizer, model))

    names = [name(), name()]
    for file in ("chat_template.jinja", "tokenizer.json", "generation_config.json"):
        path = tmp_path / file
        before = path.read_text() if path.exists() else None
        changed = {
            "chat_template.jinja": "{{ messages[0]['content'] }}!",
            "tokenizer.json": f"{before} ",
            "generation_config.json": json.dumps({"eos_token_id": []}),
        }[file]
        path.write_text(changed)
        names.append(name())
        path.unlink() if before is None else path.write_text(before)
    assert len({*names}) == 4, "but for the first two each is another"
    assert name() == names[0]


@given(st.lists(st.lists(st.integers(0, 999), max_size=12), max_size=4))
def test_without_such_tags_a_text_is_what_the_library_makes_of_it(
    of_others: list[tokenizers.Tokenizer], rows: list[list[int]]
) -> None:
    """Ids that no token has are among them: an embedding may have more rows."""
    for tokenizer in of_others:
        assert decode(tokenizer, rows) == tokenizer.decode_batch(rows)


@given(st.characters().filter(lambda char: char not in ALPHABET))
def test_any_other_character_is_refused(char: str) -> None:
    with pytest.raises(UsageError, match="no token for"):
        encode(_TOKENIZER, f"12{char}34")


def test_half_a_surrogate_pair_is_refused_as_any_other() -> None:
    """JSON may escape one: a question file holds it, and no tokenizer takes it."""
    with pytest.raises(UsageError, match=r"no token for \['\\ud800'\]"):
        encode(_TOKENIZER, "12\ud80034")


def test_the_refused_character_is_named() -> None:
    with pytest.raises(UsageError, match=r"\['a', 'b'\].*model.tokenizer"):
        encode(_TOKENIZER, "1ab2")


def test_its_file_is_the_same_tokenizer(tmp_path: Path) -> None:
    _TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    for model in (ModelConfig(path=str(tmp_path)), ModelConfig(tokenizer=str(tmp_path / "tokenizer.json"))):
        loaded = load_tokenizer(model)
        assert encode(loaded, "<think>1+2</think>") == encode(_TOKENIZER, "<think>1+2</think>")
        assert special_ids(loaded, model) == SpecialIds(0, 1)
    assert load_tokenizer(ModelConfig(tokenizer="characters")).get_vocab() == _TOKENIZER.get_vocab()


@pytest.mark.parametrize("name", ["chain_sum", "countdown"])
def test_the_arithmetic_tasks_fit_its_alphabet(name: str) -> None:
    task = make_task(TaskConfig(name))
    for item in map(task.item, range(200)):
        encode(_TOKENIZER, item.prompt + task.demonstration(item, thinking=True))


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model\.tokenizer=characters"):
        load_tokenizer(ModelConfig())
    with pytest.raises(UsageError, match=r"tokenizer.json does not exist.*save_pretrained"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match=r"tokenizer.json is not a tokenizer.json"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))


def _other_tokenizer(folder: Path, *special: str, config: object = None) -> ModelConfig:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}))
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return ModelConfig(path=str(folder))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, SpecialIds(pad=1, eos=2)),
        ({"eos_token": {"content": "<|im_end|>"}}, SpecialIds(pad=2, eos=2)),
        ({"eos_token": "<|endoftext|>", "pad_token": None}, SpecialIds(pad=1, eos=1)),
        (None, SpecialIds(pad=1, eos=1)),
    ],
)
def test_special_tokens_of_other_models(tmp_path: Path, config: object, expected: SpecialIds) -> None:
    model = _other_tokenizer(tmp_path, "<|endoftext|>", "<|im_end|>", config=config)
    assert special_ids(load_tokenizer(model), model) == expected


def test_a_tokenizer_without_an_end(tmp_path: Path) -> None:
    model = _other_tokenizer(tmp_path, "<|im_start|>")
    with pytest.raises(UsageError, match="eos_token"):
        special_ids(load_tokenizer(model), model)
    model = _other_tokenizer(tmp_path, "<|im_start|>", config={"eos_token": "<gone>"})
    with pytest.raises(UsageError, match="eos_token"):
        special_ids(load_tokenizer(model), model)


def test_what_a_file_was_last_called_with_does_not_cut_or_fill_up(tmp_path: Path) -> None:
    saved = character_tokenizer()
    saved.enable_truncation(2)
    saved.enable_padding(length=9)
    saved.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(ModelConfig(tokenizer=str(tmp_path)))
    assert encode(loaded, "1+2=3") == encode(_TOKENIZER, "1+2=3")


def test_data_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    _TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    model = ModelConfig(tokenizer="characters")
    check_data_tokens(tmp_path, model)
    check_data_tokens(None, model)
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())
    words = vocabulary["model"]["vocab"]
    words["7"], words["8"] = words["8"], words["7"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(UsageError, match=r"another tokenizer than the model's: 2 of its 27 tokens"):
        check_data_tokens(tmp_path, model)


def test_the_end_of_a_datasets_documents_is_the_first_end_of_its_model(tmp_path: Path) -> None:
    """Where a chat's end of turn is named in the files, and where nothing is."""
    folder = tmp_path / "data"
    folder.mkdir()
    named = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[EOS]": 1}, "a"))
    named.save(str(folder / "tokenizer.json"))
    bare = ModelConfig(tokenizer=str(folder))
    with pytest.raises(UsageError, match="does not say which token ends a text"):
        exported_tokenizer(bare)
    assert exported_tokenizer(bare, end=1).stops == (1,)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    assert exported_tokenizer(bare, end=1).stops == (1, 0)
