"""Whole stages by rollout.engine=vllm with vLLM itself, on a CPU: `make test-vllm`."""

import json

import pytest

from r1hpc.base.run_dir import RunDir
from r1hpc.telemetry.records.attempts import Cause
from r1hpc.telemetry.records.metrics import audit_ledger, read_ledger, read_steps
from tests.runs import submit, until_stopped, wait_over, wait_step

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

_JOB = """\
include: [rl/r1, deepspeed/zero1]
stage: rl
task: {name: chain_sum, options: {num_terms: 3}}
model:
  tokenizer: characters
  config:
    model_type: qwen2
    num_hidden_layers: 2
    num_attention_heads: 2
    num_key_value_heads: 1
    hidden_size: 64
    intermediate_size: 96
    initializer_range: 0.2
    tie_word_embeddings: true
    bos_token_id: null
    eos_token_id: 1
    pad_token_id: 0
rl: {kl_coef: 0.0}
rollout:
  engine: vllm
  num_prompts: 8
  num_generations: 4
  max_prompt_length: 8
  max_completion_length: 12
  vllm_options: {kv_cache_memory_bytes: 67108864}
reward: {terms: {accuracy: 1.0, format: 0.1, diversity: 0.1}}
train: {num_steps: 6, global_batch_size: 16, micro_batch_size: 4, lr: 1e-3, precision: fp32}
evaluate: {every: 4, num_items: 16, num_samples: 2}
checkpoint: {save_every: 2}
resources: {nodes: 1, gpus_per_node: 0, ranks_per_node: 2, cpus_per_task: 1, time: "00:30:00"}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Six steps, two for each rollout; stopped between the two of the second one, and resumed."""
    root = tmp_path_factory.mktemp("vllm")
    job = root / "vllm.yaml"
    job.write_text(_JOB)
    run = submit(root, "rl", job=str(job), env=until_stopped(root / "rl", 4)).run
    wait_step(run, 3, timeout_s=300)
    run.stop.touch()
    assert [a.cause for a in wait_over(run, 120)] == [Cause.stopped]
    submit(root, "rl", "--resume")
    assert wait_over(run, 300)[-1].cause is Cause.finished
    return run


def test_every_step_weighs_what_vllm_drew(trained: RunDir) -> None:
    steps = read_steps(trained).effective
    assert sorted(steps) == [1, 2, 3, 4, 5, 6]
    for number, step in steps.items():
        weight, capped = step.value("importance_weight"), step.value("importance_capped_share")
        assert weight == pytest.approx(1.0, abs=1e-3), number
        assert capped is not None
        assert 0 <= capped < 0.5
    handed = [step.value("handover_largest_logprob_difference") for step in steps.values()]
    assert [value for value in handed if value is not None]
    assert all(value <= 1e-3 for value in handed if value is not None)


def test_a_stop_between_two_updates_of_a_rollout_shows_no_item_twice(trained: RunDir) -> None:
    assert {record.attempt for record in read_ledger(trained).values()} == {1, 2}
    assert audit_ledger(trained).exactly_once


def test_it_answers_as_the_sampler_does(trained: RunDir) -> None:
    """Greedily, the exported model says the same by both, but where rounding makes two tokens alike."""
    said = {engine: _greedy_answers(trained, engine) for engine in ("vllm", "sampler")}
    assert len(said["vllm"]) == len(said["sampler"]) == 64
    alike = sum(said["vllm"][index] == text for index, text in said["sampler"].items())
    assert alike >= 58
    assert len(set(said["vllm"].values())) > 3, "not all the same answer"


def _greedy_answers(trained: RunDir, engine: str) -> dict[int, str]:
    root = trained.path.parent
    words = (f"model.path={trained.model}", "stage=evaluate", "evaluate.num_items=64", "model.config={}")
    run = submit(root, engine, *words, f"rollout.engine={engine}", job=str(root / "vllm.yaml")).run
    assert wait_over(run, 400)[-1].cause is Cause.finished
    lines = [json.loads(line) for part in run.parts.glob("part-*") for line in part.read_text().splitlines()]
    return {line["index"]: line["greedy"] for line in lines}
