"""A run that names its traces gets one dataset for its whole life, whatever happens to the files later."""

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from r1hpc.attempt.may_begin import MayPassError
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.run_dir import RunDir
from r1hpc.config.schema.cluster import ClusterConfig
from r1hpc.config.schema.run import DataConfig, ModelConfig, RunConfig
from r1hpc.corpus.engine.work_dir import work_folder
from r1hpc.data.read.sft_documents import open_traces
from r1hpc.tasks.text.format import encode
from r1hpc.tasks.text.tokenizer import character_tokenizer, form_of, load_tokenizer, special_ids
from r1hpc.train.supervised.dataset import ensure_dataset, refuse_foreign
from tests.tasks.tokenizers_of_others import llama3_like

TRACES = [(f"{n}+{n}=", f"<think>{n}*2</think><answer>{2 * n}</answer>") for n in range(30)]


def write(path: Path, traces: list[tuple[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"prompt": prompt, "completion": done, "reward": 1.0}) for prompt, done in traces)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def config(*traces: Path, **model: Any) -> RunConfig:
    data = DataConfig(traces=[str(path) for path in traces])
    return RunConfig(stage="sft", data=data, model=ModelConfig(**({"tokenizer": "characters"} | model)))


def new_run(folder: Path, name: str = "one") -> RunDir:
    run = RunDir(folder / "runs" / name)
    run.create()
    return run


def texts(path: Path) -> list[tuple[list[int], int]]:
    dataset = open_traces(path)
    found = [dataset.read_document(number) for number in range(dataset.num_documents)]
    return [(tokens.tolist(), num_prompt_tokens) for tokens, num_prompt_tokens in found]


def expected(traces: list[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """As a sampler sees the prompts: by the same tokenizer, through the same function."""
    tokenizer = character_tokenizer()
    eos = special_ids(tokenizer, ModelConfig(tokenizer="characters")).eos
    ids = [(encode(tokenizer, prompt), encode(tokenizer, done)) for prompt, done in traces]
    return [([*prompt, *done, eos], len(prompt)) for prompt, done in ids]


def test_files_and_folders_become_one_dataset(tmp_path: Path) -> None:
    first = write(tmp_path / "odd name [1].jsonl", TRACES[:10])
    for name, part in (("b", TRACES[20:]), ("a", TRACES[10:20])):
        write(tmp_path / "more" / f"{name}.jsonl", part)
    write(tmp_path / "more" / "notes.txt", [])
    write(tmp_path / "more" / "below" / "c.jsonl", TRACES)
    path = ensure_dataset(new_run(tmp_path), config(first, tmp_path / "more"))
    assert path.parent == tmp_path / "runs" / "datasets"
    assert texts(path) == expected(TRACES)


def test_the_same_traces_are_the_same_dataset_wherever_they_lie(tmp_path: Path) -> None:
    ids = []
    for name in ("x", "y"):
        run = new_run(tmp_path / name)
        ids.append(open_traces(ensure_dataset(run, config(write(tmp_path / name / "t.jsonl", TRACES)))).id)
    assert ids[0] == ids[1]


def test_runs_at_once_share_the_dataset(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", TRACES)
    found: list[Path] = []
    runs = [new_run(tmp_path, f"run{n}") for n in range(3)]
    threads = [
        threading.Thread(target=lambda run=run: found.append(ensure_dataset(run, config(path))))
        for run in runs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == 1
    assert [item.name for item in found[0].parent.iterdir()] == [found[0].name]


def test_a_resumed_run_outlives_its_files_but_not_other_ones(tmp_path: Path) -> None:
    run, path = new_run(tmp_path), write(tmp_path / "t.jsonl", TRACES)
    dataset = ensure_dataset(run, config(path))
    assert ensure_dataset(run, config(path)) == dataset
    write(path, TRACES[1:])
    with pytest.raises(R1hpcError, match=rf"have changed since it began.*data\.path={dataset}"):
        ensure_dataset(run, config(path))
    path.unlink()
    assert ensure_dataset(run, config(path)) == dataset
    with pytest.raises(MayPassError, match=r"t\.jsonl is not there"):
        ensure_dataset(new_run(tmp_path, "two"), config(path))


def test_what_is_built_is_taken_without_writing_the_traces_again(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", TRACES)
    run = new_run(tmp_path)
    dataset = ensure_dataset(run, config(path))
    shutil.rmtree(run.path / "dataset")
    other = new_run(tmp_path, "two")
    assert ensure_dataset(run, config(path)) == ensure_dataset(other, config(path)) == dataset
    assert not (run.path / "dataset").exists()
    assert not (other.path / "dataset").exists()
    assert json.loads((other.path / "dataset.json").read_text()) == {"path": str(dataset)}


def test_what_is_not_whole_is_not_taken(tmp_path: Path) -> None:
    run, path = new_run(tmp_path), write(tmp_path / "t.jsonl", TRACES)
    dataset = ensure_dataset(run, config(path))
    work = work_folder(dataset)  # of a build that was killed before its last step
    work.mkdir()
    assert ensure_dataset(run, config(path)) == dataset
    assert not work.exists()
    (dataset / "parts" / "part-00000" / "inputs.json").unlink()
    with pytest.raises(R1hpcError, match=r"inputs\.json"):
        ensure_dataset(run, config(path))
    shutil.rmtree(dataset)
    assert ensure_dataset(run, config(path)) == dataset
    assert len(texts(dataset)) == len(TRACES)


def test_a_run_root_that_is_reached_by_another_path_has_the_same_dataset(tmp_path: Path) -> None:
    run, path = new_run(tmp_path), write(tmp_path / "t.jsonl", TRACES)
    dataset = ensure_dataset(run, config(path))
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    assert ensure_dataset(RunDir(tmp_path / "link" / "one"), config(path)).samefile(dataset)
    (tmp_path / "link").unlink()
    (tmp_path / "runs").rename(tmp_path / "moved")
    moved = ensure_dataset(RunDir(tmp_path / "moved" / "one"), config(path))
    assert moved == tmp_path / "moved" / "datasets" / dataset.name


def test_another_tokenizer_is_another_dataset(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", TRACES)
    folder = tmp_path / "model"
    folder.mkdir()
    character_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<pad>"}}')
    one = ensure_dataset(new_run(tmp_path), config(path))
    models: list[dict[str, Any]] = [{"tokenizer": str(folder)}, {"tokenizer": None, "path": str(folder)}]
    for number, model in enumerate(models):
        other = ensure_dataset(new_run(tmp_path, f"other{number}"), config(path, **model))
        assert other != one
        assert open_traces(other).eos_id == 0
        assert (other / "tokenizer" / "tokenizer_config.json").is_file()


def test_a_model_with_a_chat_template_is_taught_what_it_will_be_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", TRACES[:3])
    model: dict[str, Any] = {"tokenizer": None, "path": str(llama3_like(tmp_path / "model"))}
    dataset = ensure_dataset(new_run(tmp_path), config(path, **model))
    tokenizer = load_tokenizer(ModelConfig(**model))
    for (tokens, num_prompt), (prompt, completion) in zip(texts(dataset), TRACES, strict=False):
        asked = form_of(tokenizer, ModelConfig(**model)).prompt(prompt)
        assert tokens[:num_prompt] == encode(tokenizer, asked)
        assert tokenizer.decode(tokens[num_prompt:], skip_special_tokens=False) == f"{completion}<|eot_id|>"
    plain = ensure_dataset(new_run(tmp_path, "plain"), config(path, chat_template="none", **model))
    assert plain != dataset
    assert tokenizer.decode(texts(plain)[0][0][:1], skip_special_tokens=False) == "<|begin_of_text|>"
    write(path, [*TRACES[:2], ("1<|eot_id|>", "2")])
    with pytest.raises(UsageError, match=r"t\.jsonl:3: a message spells the special token"):
        ensure_dataset(new_run(tmp_path, "forged"), config(path, **model))


def test_bad_line_is_told_with_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [*TRACES[:4], ("1+1=", "")])
    with pytest.raises(R1hpcError, match=r"t\.jsonl:5: field 'completion' is empty"):
        ensure_dataset(new_run(tmp_path), config(path))


def test_a_line_in_the_model_s_form_is_told_with_file_and_line(tmp_path: Path) -> None:
    """The build sees copies of the files; the user has not."""
    path = write(tmp_path / "t.jsonl", [*TRACES[:2], ("1+1=", "2<|eot_id|>")])
    model: dict[str, Any] = {"tokenizer": None, "path": str(llama3_like(tmp_path / "model"))}
    with pytest.raises(R1hpcError, match="holds the EOS token") as error:
        ensure_dataset(new_run(tmp_path), config(path, **model))
    assert f"error: {path}:3: " in str(error.value)
    assert "inputs/0" not in str(error.value)
    assert "on_invalid" not in str(error.value)


def test_data_path_wins(tmp_path: Path) -> None:
    data = DataConfig(path=str(tmp_path / "there"), traces=["nowhere"])
    assert ensure_dataset(new_run(tmp_path), RunConfig(data=data)) == tmp_path / "there"


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize(
    ("owner", "mode", "whose"), [(None, 0o777, "every user may write"), (4711, 0o755, "4711")]
)
def test_another_users_dataset_is_not_trained_on(
    tmp_path: Path, owner: int | None, mode: int, whose: str, trusted: bool
) -> None:
    """In a shared run root anybody can make `datasets/` or a dataset of this name first."""
    if owner is not None and os.getuid() != 0:
        pytest.skip("only root can give a folder away")
    config = RunConfig(cluster=ClusterConfig(trust_shared_run_root=trusted))
    for folder in (tmp_path / "a" / "datasets", tmp_path / "b" / "datasets" / "smoke"):
        folder.mkdir(parents=True)
        refuse_foreign(tmp_path / folder.parts[len(tmp_path.parts)] / "datasets" / "smoke", config)
        folder.chmod(mode)
        if owner is not None:
            os.chown(folder, owner, -1)
        target = folder if folder.name == "smoke" else folder / "smoke"
        if trusted:
            refuse_foreign(target, config)
            continue
        with pytest.raises(R1hpcError, match=f"{whose}.*{folder}, so its data is not used"):
            refuse_foreign(target, config)
