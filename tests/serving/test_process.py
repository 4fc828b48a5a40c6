"""How the server is started."""

from dataclasses import replace
from pathlib import Path

import pytest

from r1hpc.base.errors import ConfigError
from r1hpc.config.load import load
from r1hpc.serving.address import Place
from r1hpc.serving.process import command_of, environment_of

PLACE = Place("10.0.0.7", 12345, "n7")
SERVED = ["stage=serve", "model.path=/models/m", "resources.gpus_per_node=0"]


def test_the_host_is_named_and_the_gate_is_on(tmp_path: Path) -> None:
    config = load(None, [*SERVED, "serve.max_model_len=512", "serve.options=[--max-num-seqs=8]"])
    words = command_of(config, ["/py"], PLACE, "m")
    for pair in (
        ("--host", "10.0.0.7"),
        ("--port", "12345"),
        ("--middleware", "r1hpc.serving.vllm_server.Gate"),
        ("--tensor-parallel-size", "1"),
    ):
        assert words[words.index(pair[0]) + 1] == pair[1]
    assert words[-2:] == ["--max-model-len=512", "--max-num-seqs=8"]
    assert "--enforce-eager" in words
    on_gpus = replace(config, resources=replace(config.resources, gpus_per_node=4))
    words = command_of(on_gpus, ["/py"], PLACE, "m")
    assert "--enforce-eager" not in words
    assert words[words.index("--tensor-parallel-size") + 1] == "4"


def test_no_environment_opens_the_control_routes_or_brings_a_key_of_its_own() -> None:
    found = environment_of(
        {"VLLM_SERVER_DEV_MODE": "1", "VLLM_API_KEY": "known", "RANK": "3", "PYTHONPATH": "/own"},
        Path("/run/code"),
        Path("/run/server/key"),
    )
    assert found["VLLM_SERVER_DEV_MODE"] == "0"
    assert found.keys().isdisjoint({"VLLM_API_KEY", "RANK"})
    assert found["PYTHONPATH"] == "/run/code:/own"


@pytest.mark.parametrize(
    "word",
    [
        *(
            "--host=0.0.0.0",
            "--hos",
            "--port=1",
            "--middleware=a.B",
            "--middle=a.B",
            "--api-key=x",
            "--api_key",
        ),
        *(
            "--root-path=/x",
            "--root_pa=/x",
            "--uds=/tmp/s",
            "--config=f.yaml",
            "-tp=2",
            "--tensor-parallel-size=2",
        ),
    ],
)
def test_an_option_that_goes_past_the_key_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=r"serve\.options holds"):
        load(None, [*SERVED, f"serve.options=['{word}']"])


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "[::]", "*", "''", "0", "0x0", "0.0", "0:0:0:0:0:0:0:0", "::ffff:0.0.0.0"]
)
def test_every_address_of_a_node_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="every address"):
        load(None, [*SERVED, f"serve.host={host!r}" if host != "''" else "serve.host=''"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.from_scratch=true"], "no use"),
        (["resources.nodes=2"], "one node"),
        (["model.lora_rank=4"], "no use"),
        (['serve.host="\\0"'], "no name or address of a node"),
    ],
)
def test_what_cannot_be_served_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(None, [*SERVED, *words])
