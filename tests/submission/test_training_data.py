"""What the nodes would only find after the queue is refused at submission, with the file and line of it."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from r1hpc.base.errors import R1hpcError
from r1hpc.config.schema.run import ModelConfig, RunConfig
from r1hpc.config.schema.sections import DeepspeedConfig
from r1hpc.corpus.build.build import build_dataset
from r1hpc.submission.estimate import estimate_job
from r1hpc.submission.order import Order, Purpose
from r1hpc.submission.plan_run import PlannedRun, plan_new_run
from r1hpc.tasks.text.tokenizer import character_tokenizer
from r1hpc.train.checks import model as model_checks
from tests.plan.tensorfiles import llama_shapes, write_header
from tests.submission.chains import submit, write_chain

_SHAPE = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 16}
_JOB = """
include: [stage/sft, deepspeed/zero1]
stage: sft
model: {path: model, tokenizer: characters}
data: {traces: [mine.jsonl], seq_len: 16}
train: {num_steps: 2, global_batch_size: 2, micro_batch_size: 2, warmup_steps: 0, precision: fp32}
resources: {gpus_per_node: 0, ranks_per_node: 1}
"""
_RECIPE = "name: a\ntokenizer: {kind: bytes}\nsources: [{name: a, kind: traces, root: ., glob: mine.jsonl}]\n"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(_JOB)
    Path("mine.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n')
    model = Path("model")
    model.mkdir()
    config = {"model_type": "llama", "vocab_size": 27, **_SHAPE}
    (model / "config.json").write_text(json.dumps(config))
    write_header(model / "model.safetensors", llama_shapes(config))


def plan(*overrides: str) -> PlannedRun:
    return plan_new_run(Order(Purpose.dry_run, "local", overrides=overrides, job="job.yaml", run_root=Path()))


def refused(*overrides: str) -> str:
    with pytest.raises(R1hpcError) as error:
        plan(*overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("data.traces=[no.jsonl]", "data.traces: {here}/no.jsonl is not there"),
        ("data.traces=[]", "stage sft learns from prompts and completions, and data.recipe=smoke makes"),
        ("data.path=model", "data.path={here}/model and data.traces=['{here}/mine.jsonl'] name two datasets"),
        ("data.traces=[] data.path=mine.jsonl", "data.path {here}/mine.jsonl is a file: give the folder"),
        ("data.traces=[] data.path=model", "data.path {here}/model has no manifest.json"),
        ("data.traces=[] data.path=no", "no dataset in {here}/no"),
        ("stage=pretrain data.traces=[] data.path=mine.jsonl", "is a file: give the folder of a dataset"),
        ("stage=pretrain", "data.traces is of stage sft, and has no use in stage pretrain: add stage=sft"),
        ("data.seq_len=5", "the trace of {here}/mine.jsonl:1 has 6 tokens with its EOS: set data.seq_len=6"),
        ("train.precision=fp16", "train.precision=fp16 trains on GPUs only"),
        (
            'data.mix.schedule=[{"from_step":2,"weights":{"mine":1}}]',
            "data.mix.schedule[0].weights names no source 'mine'",
        ),
        ("model.lora_rank=2 model.lora_targets=[q]", "model.lora_targets=['q']: no module in the weights of"),
        ("model.path=no model.tokenizer=null", "model.path {here}/no is not a folder"),
    ],
)
def test_it_is_refused_with_what_to_do(tmp_path: Path, overrides: str, said: str) -> None:
    assert said.format(here=tmp_path) in refused(*overrides.split())
    assert plan().plan.num_steps == 2


def test_a_schedule_names_the_sources_that_the_recipe_has() -> None:
    Path("recipe.yaml").write_text(_RECIPE)
    recipe = ("data.traces=[]", "data.recipe=recipe.yaml", "data.seq_len=32")
    assert plan(*recipe, "data.mix.schedule=[{from_step: 2, weights: {a: 1}}]")
    said = refused(*recipe, "data.mix.schedule=[{from_step: 2, weights: {b: 1}}]")
    assert said == "data.mix.schedule[0].weights names no source 'b'"


def test_documents_without_roles_are_refused_and_a_recipe_of_traces_is_not(tmp_path: Path) -> None:
    Path("recipe.yaml").write_text(_RECIPE)
    assert plan("data.traces=[]", "data.recipe=recipe.yaml", "data.seq_len=32")
    Path("recipe.yaml").write_text(_RECIPE.replace("traces", "jsonl"))
    assert "documents without roles" in refused("data.traces=[]", "data.recipe=recipe.yaml")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "a JSON list, not an object with 'prompt'"),
        ('{"question": "1", "answer": "2"}', "no field 'prompt': rename 'question' to 'prompt'"),
        ('{"prompt": "1", "answer": "2"}', "no field 'completion': rename 'answer' to 'completion'"),
        ('{"promt": "1", "completion": "2"}', "no field 'prompt' (did you mean 'promt'?)"),
        ('{"messages": []}', "no field 'prompt': write what the user says in 'messages' as 'prompt'"),
        ('{"a": 1, "b": 2}', "no field 'prompt'; it has 'a', 'b'"),
        ('{"prompt": "1", "completion": ""}', "field 'completion' is empty"),
        ('{"prompt": "1", "completion": "2<eos>"}', "the completion holds <eos>, which is added to"),
        ('{"prompt": "one", "completion": "2"}', "the tokenizer has no token for ['e', 'n', 'o']"),
    ],
)
def test_a_line_that_is_no_trace_is_named(tmp_path: Path, line: str, said: str) -> None:
    with Path("mine.jsonl").open("a") as file:
        file.write(f"\n{line}\n")
    message = refused()
    assert message.startswith(f"{tmp_path}/mine.jsonl:3: {said}")
    assert "on_invalid" not in message


def test_a_long_one_is_found_however_far_on_it_stands(tmp_path: Path) -> None:
    """Ten MiB of blanks before it: what is taken apart line by line are the first eight."""
    with Path("mine.jsonl").open("w") as file:
        file.write(f'{{"prompt": "1", "completion": "2"{" " * 1000}}}\n' * 10_000)
        file.write(f'{{"prompt": "1", "completion": "{"2" * 3000}"}}\n')
    assert f"the trace of {tmp_path}/mine.jsonl:10001 has 3,002 tokens" in refused()


def test_a_model_that_is_nowhere_is_named_before_its_tokenizer() -> None:
    assert "on the login node: `hf download Of/Nobody`" in refused(
        "model.path=Of/Nobody", "model.tokenizer=null"
    )


def test_a_tokenizer_of_another_model_is_noted() -> None:
    character_tokenizer().save("model/tokenizer.json")
    assert not [note for note in plan().notes if "tokenizer" in note]
    other = json.loads(Path("model/tokenizer.json").read_text())
    other["model"]["vocab"] |= {"0": other["model"]["vocab"]["1"], "1": other["model"]["vocab"]["0"]}
    Path("model/tokenizer.json").write_text(json.dumps(other))
    (note,) = [note for note in plan().notes if "tokenizer" in note]
    assert "model.tokenizer=characters is not the tokenizer of" in note
    assert "2 of its 27 tokens have another id there" in note


def test_what_is_submitted_is_estimated() -> None:
    """The vocabulary is the tokenizer's, not that of the recipe which traces stand in for."""
    estimated = estimate_job("job.yaml", num_gpus=None)
    assert estimated.node_hours is not None


def test_an_empty_file_is_no_data(tmp_path: Path) -> None:
    Path("mine.jsonl").write_text("\n")
    assert f"{tmp_path}/mine.jsonl holds no line" in refused()


def test_of_a_chain_only_what_no_stage_writes_is_looked_for(tmp_path: Path) -> None:
    common = _JOB.replace("stage: sft\n", "task: {name: chain_sum}\n").replace("[mine.jsonl]", "[]")
    common = common.replace("path: model", f"path: {tmp_path}/model") + "stages:\n"
    stages = "  - {{name: one, stage: traces}}\n  - {{name: two, stage: sft, data: {{traces: ['{}']}}}}\n"
    words = ("--executor", "local", "--dry-run")
    path = write_chain(tmp_path, stages.format("${stage:one}/traces.jsonl"), common)
    done = submit(tmp_path, str(path), *words)
    assert done.returncode == 0, done.stderr
    done = submit(tmp_path, str(write_chain(tmp_path, stages.format("/no.jsonl"), common)), *words)
    assert done.returncode == 2
    assert "stage two: data.traces: /no.jsonl is not there" in done.stderr


def test_a_thinking_that_is_opened_and_never_closed_is_noted() -> None:
    opened = "prompts end in <think>"
    assert not [note for note in plan().notes if opened in note]
    (note,) = [note for note in plan("model.open_thinking=true").notes if opened in note]
    assert "the completion of" in note
    assert "mine.jsonl:1 has no </think>: the model would learn to answer inside the thinking" in note
    Path("mine.jsonl").write_text('{"prompt": "1+1=", "completion": "</think>2"}\n')
    assert not [note for note in plan("model.open_thinking=true").notes if opened in note]


def test_what_a_line_says_beside_is_noted() -> None:
    Path("mine.jsonl").write_text('{"prompt": "1", "completion": "2", "system": "Add.", "thinking": false}\n')
    (note,) = [note for note in plan().notes if "beside prompt" in note]
    Path("mine.jsonl").write_text('{"prompt": "1", "completion": "2=2", "reasoning": "2"}\n')
    assert not [note for note in plan().notes if "beside prompt" in note], "it stands in the completion"
    assert "mine.jsonl has 'system' beside prompt and completion, which is not learnt" in note


def test_a_folder_gives_its_compressed_files_too() -> None:
    Path("folder").mkdir()
    Path("mine.jsonl").rename("folder/a.jsonl")
    with gzip.open("folder/b.jsonl.gz", "wt") as file:
        file.write('{"prompt": "1+1=", "completion": "2222222222222"}\n')
    assert "folder/b.jsonl.gz:1 has 18 tokens" in refused("data.traces=[folder]")
    Path("folder/b.jsonl").write_text(Path("folder/a.jsonl").read_text())  # gzip -k
    assert plan("data.traces=[folder]").config.data.traces


def test_an_adapter_on_the_output_head_is_refused_where_its_weights_are_divided() -> None:
    model = ModelConfig(path="x", lora_rank=2, lora_targets=["model.lm_head"])
    config = RunConfig(stage="sft", model=model, deepspeed=DeepspeedConfig(zero_stage=3))
    with pytest.raises(R1hpcError, match=r"names the output head \(model.lm_head\).* or take zero_stage=2"):
        model_checks._refuse_adapted_head(config)
    model_checks._refuse_adapted_head(replace(config, deepspeed=DeepspeedConfig(zero_stage=2)))
    model_checks._refuse_adapted_head(
        replace(config, model=ModelConfig(lora_rank=2, lora_targets=["q_proj"]))
    )


def test_data_that_is_too_small_is_refused_before_the_queue(tmp_path: Path) -> None:
    Path("text.jsonl").write_text(json.dumps({"text": "a few words of text"}) + "\n")
    Path("r.yaml").write_text(
        "name: a\ntokenizer: {kind: bytes}\nsources: [{name: a, kind: jsonl, root: ., glob: text.jsonl}]\n"
    )
    build_dataset(tmp_path / "r.yaml", tmp_path / "text")
    Path("r.yaml").write_text(_RECIPE)
    build_dataset(tmp_path / "r.yaml", tmp_path / "traces")
    pretrain = ("stage=pretrain", "data.traces=[]", "data.path=text")
    assert "holds 20 tokens, but a sample needs data.seq_len + 1 = 129" in refused(
        *pretrain, "data.seq_len=128"
    )
    sft = ("data.traces=[]", "data.path=traces", "data.validation_documents=1")
    assert "data.validation_documents=1 leaves none of the 1 documents" in refused(*sft)
