"""`r1hpc serve` with vLLM itself, on a CPU: `make test-vllm`, in an environment of its own."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from r1hpc.base.run_dir import RunDir
from r1hpc.serving.vllm_server import SERVED
from r1hpc.telemetry.records.attempts import Cause
from r1hpc.telemetry.records.metrics import last_steps
from tests.runs import CHECKOUT, run_environment, wait_over
from tests.serving.clients import ask, key_of

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

_CONTROL = (
    "/pause",
    "/resume",
    "/collective_rpc",
    "/sleep",
    "/wake_up",
    "/reset_prefix_cache",
    "/update_weights",
)
"""What VLLM_SERVER_DEV_MODE=1 would open."""
_SETTINGS = ("serve.dtype=float32", "serve.options=[--max-num-batched-tokens=256,--max-num-seqs=8]")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "little"
    names = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_of = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    bytes_of.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_of.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_of, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = "{% for each in messages %}{{ each['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    sizes: Any = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(names), max_position_embeddings=256, eos_token_id=1, pad_token_id=0, **sizes
        )
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunDir, str]]:
    """(run, url), started by a user whose environment would open the control routes."""
    root = tmp_path_factory.mktemp("runs")
    words = [
        str(model),
        "--executor",
        "local",
        "--gpus",
        "0",
        "--idle",
        "2",
        "--json",
        "--run-root",
        str(root),
    ]
    environment = run_environment({**os.environ, "VLLM_SERVER_DEV_MODE": "1"})
    command = [sys.executable, "-m", "r1hpc.serve", *words, "--python", sys.executable, *_SETTINGS]
    done = subprocess.run(
        command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    run = RunDir(answer["run_dir"])
    yield run, answer["url"]
    run.stop.touch()
    wait_over(run)


def routes(run: RunDir) -> set[tuple[str, str]]:
    """(method, path) of all that vLLM has, as it says itself at its start."""
    said = re.findall(r"Route: (\S+), Methods: ([A-Z, ]+)", run.rank_log(1, 0).read_text())
    return {(method, path) for path, methods in said for method in methods.split(", ")}


def test_no_route_answers_without_the_key_and_only_the_served_ones_with_it(
    server: tuple[RunDir, str],
) -> None:
    run, url = server
    there = routes(run)
    assert {path for _, path in there} >= {
        "/v1/completions",
        "/health",
        "/load",
        "/invocations",
        "/openapi.json",
    }
    assert {path for _, path in there}.isdisjoint(_CONTROL), "VLLM_SERVER_DEV_MODE was not forced off"
    assert there >= SERVED, "what is served must be there in this version of vLLM"
    for method, path in sorted(there | {("POST", path) for path in _CONTROL}):
        body: dict[str, Any] | None = {} if method == "POST" else None
        assert ask(url, path, None, body, method) == 401, (method, path)
        assert ask(url, path, "wrong", body, method) == 401, (method, path)
        if (method, path) not in SERVED:
            assert ask(url, path, key_of(run), body, method) == 404, (method, path)


def test_a_hundred_requests_are_answered_and_counted(server: tuple[RunDir, str]) -> None:
    run, url = server
    key = key_of(run)
    assert [ask(url, path, key) for path in ("/health", "/v1/models", "/metrics", "/version")] == [200] * 4
    asked = {"model": "little", "prompt": "17 + 25 =", "max_tokens": 4}
    assert [ask(url, "/v1/completions", key, asked) for _ in range(100)] == [200] * 100
    # Together more tokens than a step takes: a seeded prompt that is read in two ends vLLM on a CPU.
    long = {**asked, "prompt": "17 + 25 = " * 15, "seed": 7}
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(partial(ask, url, "/v1/completions", key), [long] * 8)) == [200] * 8
    chat = {"model": "little", "messages": [{"role": "user", "content": "17 + 25"}], "max_tokens": 4}
    assert ask(url, "/v1/chat/completions", key, {**chat, "stream": True}) == 200
    assert ask(url, "/v1/completions", key, {**asked, "model": "another"}) == 404
    run.stop.touch()
    (attempt,) = wait_over(run)
    assert attempt.cause is Cause.stopped
    (last,) = last_steps(run, 1)
    assert last.number("requests") == 110
    assert last.step_time_s
