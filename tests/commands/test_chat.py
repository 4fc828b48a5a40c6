"""The chat command: a folder or a run is talked to, thinking apart, piped or asked once."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch

from r1hpc import chat
from r1hpc.base.errors import StateError, UsageError
from r1hpc.config.schema.run import ModelConfig
from r1hpc.tasks.text.tokenizer import exported_tokenizer
from tests.commands.commands import as_json
from tests.recorded import RecordedRun

SAID = "<think>17, so 7</think><answer>7</answer>"


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the built-in vocabulary that says SAID to `8+9=`, and ends: next token by the last one's
    position alone."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from r1hpc.tasks.text.format import encode
    from r1hpc.tasks.text.tokenizer import character_tokenizer

    folder = tmp_path_factory.mktemp("parrot")
    tokenizer = character_tokenizer()
    ids = [*encode(tokenizer, "8+9="), *encode(tokenizer, SAID.replace(", so ", ",")), 1]
    config = GPT2Config(
        vocab_size=27, n_positions=32, n_embd=32, n_layer=1, n_head=1, tie_word_embeddings=False
    )
    network = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.transformer.ln_f.weight.fill_(1)
        network.transformer.wpe.weight.copy_(torch.eye(32))
        for position, following in enumerate(ids[1:]):
            network.lm_head.weight[following, position] = 10
    network.save_pretrained(folder)
    for name, content in exported_tokenizer(ModelConfig(tokenizer="characters")).files.items():
        (folder / name).write_bytes(content)
    return folder


def test_one_question_for_a_script(parrot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = as_json(chat, [str(parrot), "--ask", "8+9="], capsys)
    assert (said["thinking"], said["answer"]) == ("17,7", "7")
    assert said["text"] == "<think>17,7</think><answer>7</answer>"


def test_tags_may_be_special_tokens(parrot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(parrot, tmp_path / "special")
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = True
    (folder / "tokenizer.json").write_text(json.dumps(content))
    said = as_json(chat, [str(folder), "--ask", "8+9="], capsys)
    assert said["text"] == "<think>17,7</think><answer>7</answer>"


def test_piped_lines_are_questions_and_thinking_is_shown_apart(
    parrot: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("8+9=\n\n8+9=\n/quit\n8+9=\n"))
    assert chat.main([str(parrot), "--max-tokens", "40"]) == 0
    assert capsys.readouterr().out == "thinking> 17,7\nanswer> 7\n" * 2


def test_a_model_with_few_positions_is_no_traceback(parrot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has 32, and learned ones have no next."""
    as_json(chat, [str(parrot), "--ask", "1+" * 12 + "1=", "--max-tokens", "1000"], capsys)
    with pytest.raises(UsageError, match=r"has 42 tokens, and the model 32 positions: begin another"):
        chat.main([str(parrot), "--ask", "1+" * 20 + "1="])


def test_a_tag_may_come_in_pieces(capsys: pytest.CaptureFixture[str]) -> None:
    text = "<think> a < b </think>\n<answer>\x1b[31m4</answer> <b"
    assert chat._show(iter(text)) == text
    assert capsys.readouterr().out == "thinking> a < b \nanswer> [31m4\nsays> <b\n"


def test_what_cannot_be_talked_to_is_named(parrot: Path, tmp_path: Path) -> None:
    run = str(RecordedRun(tmp_path / "demo").run.path)
    with pytest.raises(
        StateError, match=rf"has left no model yet: `python -m r1hpc\.export {run} --out DIR`"
    ):
        chat.main([run])
    with pytest.raises(UsageError, match=r"--ask TEXT"):
        chat.main([run, "--json"])
    with pytest.raises(UsageError, match="--max-tokens 0"):
        chat.main([run, "--max-tokens", "0"])
    with pytest.raises(UsageError, match=r"model\.system_prompt needs a chat template"):
        chat.main([str(parrot), "--system", "Be brief.", "--ask", "8+9="])
    with pytest.raises(UsageError, match="no token for"):
        chat.main([str(parrot), "--ask", "hello"])
