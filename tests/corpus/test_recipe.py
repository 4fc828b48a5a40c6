"""A bad recipe is answered with one clear message that names the nearest right one."""

from pathlib import Path
from typing import Any

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.corpus.recipe import find_recipe, load_recipe, parse_recipe
from tests.corpus.corpus import write_recipe

SOURCE = {"name": "a", "kind": "text", "root": "."}
GOOD: dict[str, Any] = {"name": "x", "tokenizer": {"kind": "bytes"}, "sources": [SOURCE]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard_token": 5}, "unknown key 'shard_token' (did you mean 'shard_tokens'?)"),
        ({"tokenizer": {"kind": "bytes", "vocabsize": 3}}, "did you mean 'vocab_size'?"),
        ({"sources": [SOURCE | {"globb": "*"}]}, "sources[0].globb"),
        # As shards/README.md and docs/claims.md say: sources are not weighed.
        ({"sources": [SOURCE | {"weight": 0.3}]}, "unknown key 'sources[0].weight'"),
        ({"mixture": {"a": 0.3}}, "unknown key 'mixture'"),
        ({"sources": [{"name": "a", "root": "."}]}, "sources[0].kind is missing"),
        ({"sources": [SOURCE | {"kind": "jsonlines"}]}, "did you mean 'jsonl'?"),
        ({"sources": [SOURCE | {"kind": "megatron"}]}, "`python -m experiments.megatron` in"),
        ({"sources": []}, "sources is empty"),
        ({"sources": {"a": 1}}, "must be a list"),
        ({"sources": [SOURCE, SOURCE]}, "same name"),
        ({"sources": [SOURCE | {"max_bytes": 0}]}, "max_bytes must be at least 1"),
        ({"sources": [SOURCE | {"exclude": "tests"}]}, "exclude must be a list"),
        ({"tokenizer": {"kind": "byte_bpe"}}, "vocab_size is needed"),
        ({"tokenizer": {"kind": "byte_bpe", "vocab_size": 200}}, "at least 257"),
        ({"tokenizer": {"kind": "ids", "vocab_size": 5, "eos_id": 5}}, "eos_id"),
        ({"tokenizer": {"kind": "bytes", "pad_id": 0}}, "pad_id is not for kind: bytes"),
        (
            {"tokenizer": {"kind": "ids", "vocab_size": 5, "eos_id": 0, "pad_id": -1}},
            "pad_id must be a token",
        ),
        ({"tokenizer": {"kind": "path"}}, "tokenizer.path is needed"),
        ({"tokenizer": "bytes"}, "tokenizer must be a block"),
        ({"profile": "tran"}, "did you mean 'train'?"),
        ({"chunk_tokens": 100, "shard_tokens": 250}, "must be a multiple"),
        ({"chunk_tokens": True}, "chunk_tokens must be int"),
        ({"chunk_tokens": "big"}, "chunk_tokens must be int"),
        ({"name": "../up"}, "not a usable name"),
    ],
)
def test_bad_value_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_recipe(GOOD | change, Path())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["name: [", "- a\n- b\n", "", "just text", "!!python/object:os.system x"])
def test_unusable_file_names_itself(tmp_path: Path, content: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"r\.yaml"):
        load_recipe(path)


def test_missing_recipe_lists_what_there_is() -> None:
    with pytest.raises(UsageError, match=r"did you mean 'stdlib'.*smoke"):
        find_recipe("stdlb")


@pytest.mark.parametrize("name", ["smoke", "stdlib"])
def test_shipped_recipes_load(name: str) -> None:
    assert load_recipe(find_recipe(name)).name == name


def test_hash_names_content_and_not_place(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    one, other = load_recipe(write_recipe(tmp_path / "a")), load_recipe(write_recipe(tmp_path / "b"))
    assert one.hash == other.hash
    assert load_recipe(write_recipe(tmp_path / "a", part_bytes=7)).hash != one.hash


def test_a_recipe_with_a_teacher_leads_to_stage_generate(tmp_path: Path) -> None:
    source = {"name": "taught", "generate": {"teacher": "models/r1", "prompts": "questions.jsonl"}}
    with pytest.raises(UsageError, match=r"sources\[0\]\.generate.*stage generate.*kind: traces"):
        load_recipe(write_recipe(tmp_path, sources=[source]))
