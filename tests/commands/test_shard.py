"""The command: one JSON object on stdout, one clear line on stderr, 0, 1 or 2."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.base.run_dir import RunDir
from r1hpc.config import load
from r1hpc.config.schema.run import DataConfig, RunConfig
from r1hpc.data.read.order import SamplePlan
from r1hpc.data.read.reader import open_dataset
from r1hpc.shard import main
from r1hpc.telemetry.records.attempts import record
from r1hpc.telemetry.records.metrics import MetricWriter
from tests.corpus.corpus import build, write_recipe, write_texts


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "r1hpc.shard", *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_build_verify_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = write_texts(tmp_path)
    recipe, out = str(write_recipe(tmp_path)), str(tmp_path / "out")
    found = []
    for arguments in (
        ["build", recipe, "--out", out, "--json"],
        ["build", recipe, "--out", out, "--json"],
        ["verify", out, "--json"],
        ["inspect", out, "--json", "--doc", "3"],
    ):
        assert main(arguments) == 0
        found.append(json.loads(capsys.readouterr().out))
    built, again, verified, inspected = found
    assert (built["built"], again["built"]) == (True, False)
    assert len({value["id"] for value in found}) == 1
    assert (verified["ok"], verified["problems"], verified["unlisted"]) == (True, [], [])
    assert inspected["sources"][0]["license"] == "CC0-1.0"
    assert inspected["document"]["text"] == texts["docs/003.txt"]


def test_trace_leads_from_a_sample_to_its_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(build(tmp_path).path)
    dataset = open_dataset(path)
    plan = SamplePlan(dataset.id, dataset.num_tokens, 600, 9)
    sample = 3 * plan.num_windows + 1
    assert main(["trace", path, "--seq-len", "600", "--seed", "9", "--sample", str(sample), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["epoch"], found["plan_hash"]) == (3, plan.plan_hash)
    tokens = dataset.read(found["token_start"], 601)
    joined = b"".join(_closed(tmp_path / info["path"]) for info in found["documents"])
    at = found["token_start"] - found["documents"][0]["token_start"]
    assert bytes(min(token, 255) for token in tokens.tolist()) == joined[at : at + 601]
    assert len(found["documents"]) > 1


def test_a_run_s_sample_is_looked_for_in_its_own_data_and_where_it_lies(tmp_path: Path) -> None:
    mine, other = (build(tmp_path, name, part_bytes=size).path for name, size in (("a", 900), ("b", 800)))
    traced = RunDir(tmp_path / "run")
    traced.create()
    data = DataConfig(path=str(mine), packing=True)
    load.save(RunConfig(stage="sft", data=data), traced.config)
    topology = {"num_nodes": 1, "ranks_per_node": 2, "gpus_per_node": 0}
    batch = {"global_batch_size": 8, "micro_batch_size": 2, "gradient_accumulation_steps": 2}
    traced.plan.write_text(json.dumps({"topology": topology, "batch": batch}))
    with pytest.raises(UsageError, match=r"b holds dataset .*, and run was trained on"):
        main(["trace", str(other), "--run", str(traced.path), "--sample", "1"])
    with pytest.raises(UsageError, match=r"data\.packing puts documents of any rank into a row"):
        main(["trace", str(mine), "--run", str(traced.path), "--step", "1"])
    assert main(["trace", str(mine), "--run", str(traced.path), "--sample", "1", "--seq-len", "8"]) == 0


def test_a_step_before_a_resume_on_other_ranks_asks_how_they_shared_the_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = build(tmp_path).path
    traced = RunDir(tmp_path / "run")
    traced.create()
    data = DataConfig(path=str(path), seq_len=8)
    load.save(RunConfig(stage="pretrain", data=data), traced.config)
    topology = {"num_nodes": 2, "ranks_per_node": 2, "gpus_per_node": 0}
    batch = {"global_batch_size": 8, "micro_batch_size": 2, "gradient_accumulation_steps": 1}
    traced.plan.write_text(json.dumps({"topology": topology, "batch": batch}))
    for attempt, ranks in ((1, 2), (2, 4)):
        record(traced, "begin", attempt=attempt, job_id="1", executor="local", host="n", ranks=ranks)
        MetricWriter(traced, attempt).step(global_step=attempt, loss=1.0)
    where = ["trace", str(path), "--run", str(traced.path), "--rank", "1", "--row", "1"]
    with pytest.raises(UsageError, match=r"step 1 was taken on 2 ranks, and the plan of run is for 4 now"):
        main([*where, "--step", "1"])
    assert main([*where, "--step", "1", "--world-size", "2", "--micro-batch-size", "1", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["layout"] == {"world_size": 2, "micro_batch_size": 1, "global_batch_size": 8}
    assert first["sample"] == 3
    assert main([*where, "--step", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("sample 11: ")
    assert "if the ranks shared the batch as in world size 4, micro batch size 2" in shown


def _closed(path: Path) -> bytes:
    """A document as the test above compares it: its bytes, and 255, which is not in UTF-8, for the EOS id."""
    return path.read_bytes() + b"\xff"


def test_inspect_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = build(tmp_path).path
    assert main(["inspect", str(path), "--doc", "0"]) == 0
    shown = capsys.readouterr().out
    for part in ("tiny", "CC0-1.0", "docs/000.txt", (tmp_path / "docs/000.txt").read_text()[:30]):
        assert part in shown


def test_control_characters_of_a_document_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.txt").write_text("red \x1b[31m alert")
    main(["inspect", str(build(tmp_path).path), "--doc", "0"])
    assert "\x1b" not in capsys.readouterr().out


def test_verify_names_each_bad_file_and_chunk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = build(tmp_path).path
    shard = path / "parts/part-00000/tokens/c/0"
    raw = bytearray(shard.read_bytes())
    raw[2 * (64 * 2 + 4)] ^= 1
    shard.write_bytes(raw)
    (path / "parts/part-00000/doc_source/c/0").unlink()
    (path / "stray").touch()
    assert main(["verify", str(path)]) == 1
    shown = capsys.readouterr().out
    assert "BAD  parts/part-00000/tokens/c/0: sha256 differs from the manifest; bad chunks: 2\n" in shown
    assert "BAD  parts/part-00000/doc_source/c/0: is missing\n" in shown
    assert "note stray" in shown
    assert "2 of " in shown


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["build", "smok", "--out", "x"], 2, "did you mean 'smoke'?"),
        (["build", "smoke", "--out", "x", "--worker", "2"], 2, "did you mean '--workers'?"),
        (["build", "smoke", "--out", "x", "--workers", "0"], 2, "--workers must be at least 1"),
        (["build", "smoke"], 2, "--out"),
        (["verify", "nowhere"], 1, "r1hpc.shard build"),
        (["inspect", "nowhere"], 1, "r1hpc.shard build"),
        (["trace", ".", "--seq-len", "8", "--sample", "9" * 20], 2, "--sample must lie between"),
        (["frobnicate"], 2, "frobnicate"),
        ([], 2, "required"),
    ],
)
def test_asked_wrongly(arguments: list[str], status: int, message: str) -> None:
    found = run(*arguments)
    assert (found.returncode, found.stdout) == (status, "")
    assert message in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    "flags", [["--jobs", "3"], ["--cluster", "nosuch"], ["-p", "cpu"], ["--time", "1:00:00"]]
)
def test_flags_of_slurm_do_not_build_on_the_login_node(tmp_path: Path, flags: list[str]) -> None:
    with pytest.raises(UsageError, match="is for --engine slurm: add that, or leave it out"):
        main(["build", "smoke", "--out", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_document_that_does_not_exist(tmp_path: Path) -> None:
    found = run("inspect", build(tmp_path).path, "--doc", "12")
    assert found.returncode == 2
    assert "--doc 12 is outside 0 to 11" in found.stderr


def test_trace_of_a_window_needs_its_length(tmp_path: Path) -> None:
    found = run("trace", build(tmp_path).path, "--sample", "3")
    assert found.returncode == 2
    assert "--seq-len is needed" in found.stderr


def test_smoke_recipe_builds(tmp_path: Path) -> None:
    found = run("build", "smoke", "--out", tmp_path / "smoke", "--json")
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    assert 200_000 < report["num_tokens"] < 2_000_000
    assert report["vocab_size"] == 512


def test_verify_says_how_far_it_is_where_a_person_looks(tmp_path: Path) -> None:
    path = build(tmp_path).path
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "r1hpc.shard", "verify", str(path), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=slave, timeout=120, check=True)
    os.close(slave)
    drawn = os.read(master, 65536)
    os.close(master)
    assert json.loads(done.stdout)["ok"]
    assert b"verifying" in drawn
    assert b"verifying" not in run("verify", path).stderr.encode()


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ("tokenizer: {kind: path, path: nosuch}\n", "tokenizer.path: .*nosuch is not there"),
        (
            "tokenizer: {kind: bytes}\ndecontaminate: {against: [nosuch.jsonl]}\n",
            "decontaminate.against: .*nosuch.jsonl is not there",
        ),
        ("tokenizer: {kind: bytes}\ndecontaminate: {against: [.]}\n", "is a folder: name its files"),
        ("tokenizer: {kind: bytes}\nclean: {lang: [yue, eng]}\n", "clean.lang: 'eng' is not one of the 176"),
    ],
)
def test_what_a_later_stage_would_find_missing_is_said_by_the_plan(
    tmp_path: Path, block: str, said: str
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n')
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"name: a\n{block}sources: [{{name: a, kind: jsonl, root: ., glob: a.jsonl}}]\n")
    for words in (["plan", str(recipe)], ["build", str(recipe), "--out", str(tmp_path / "out")]):
        with pytest.raises(UsageError, match=said):
            main(words)
