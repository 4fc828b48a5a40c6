"""The training loop beside a bare DeepSpeed script of the same model: start-up and steps per second.

    python benchmarks/loop.py [--rounds 3] [--steps 60] [--hidden-size 256]

Two CPU ranks each, ZeRO 1, bf16, in turns. Ours reads verified shards, agrees on stops, keeps a ledger and
metrics; the bare script feeds random tokens from memory and keeps nothing. Printed, round by round: the
median step time of each and the ratio of steps per second (ours / bare), which must be >= 0.99; the seconds
to the end of the first step from the begin of the attempt or the start of the script, which must be <= 1.2 x.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
WARM_UP_STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument(
        "--bare-rank", nargs=4, metavar=("RANK", "PORT", "OUT", "VOCAB"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.bare_rank:
        rank, port, out, vocab = options.bare_rank
        bare_rank(int(rank), int(port), Path(out), int(vocab), options.steps, options.hidden_size)
        return
    ratios, starts = [], []
    with tempfile.TemporaryDirectory() as folder:
        for round_ in range(options.rounds):
            ours, our_start, vocab = run_ours(Path(folder), f"ours-{round_}", options)
            bare, bare_start = run_bare(Path(folder), vocab, options)
            ratios.append(bare / ours)
            starts.append(our_start / bare_start)
            print(
                f"round {round_ + 1}: ours {ours * 1e3:.1f} ms/step, bare {bare * 1e3:.1f} ms/step, "
                f"steps/s ours/bare {bare / ours:.3f}; to the first step {our_start:.1f} s, bare "
                f"{bare_start:.1f} s, {starts[-1]:.2f} x",
                flush=True,
            )
    print(f"median ratio {statistics.median(ratios):.3f} (min {min(ratios):.3f}, max {max(ratios):.3f})")
    print(f"to the first step: median {statistics.median(starts):.2f} x the bare script's time")


def overrides(options: argparse.Namespace) -> list[str]:
    size = options.hidden_size
    return [
        f"train.num_steps={options.steps}",
        "checkpoint.save_every=100000",
        "train.global_batch_size=8",
        "train.micro_batch_size=2",
        "data.seq_len=256",
        f"model.config.hidden_size={size}",
        f"model.config.intermediate_size={4 * size}",
    ]


def run_ours(root: Path, name: str, options: argparse.Namespace) -> tuple[float, float, int]:
    """(median step time, seconds to the first step, vocabulary) of a run through the public command."""
    command = [sys.executable, "-m", "r1hpc.submit", "jobs/smoke.yaml", "--executor", "local", "--nodes", "2"]
    command += ["--run-root", str(root), "--run-name", name, "--follow", *overrides(options)]
    subprocess.run(command, cwd=CHECKOUT, env=environment(), check=True, stdout=subprocess.DEVNULL)
    lines = (root / name / "metrics" / "train.jsonl").read_text().splitlines()
    manifest = next((root / "datasets").glob("*/manifest.json"))
    events = map(json.loads, (root / name / "attempts.jsonl").read_text().splitlines())
    begin = next(event["time"] for event in events if event["event"] == "begin")
    times = [json.loads(line)["time"] for line in lines]
    return median_step(times), times[0] - begin, vocabulary(manifest)


def run_bare(root: Path, vocab: int, options: argparse.Namespace) -> tuple[float, float]:
    """(median step time, seconds to the first step) of the bare script."""
    from r1hpc.slurm.rank_env import choose_port

    with choose_port() as listener:
        port = listener.getsockname()[1]
    out = root / f"bare-{time.time_ns()}.json"
    command = [
        sys.executable,
        __file__,
        "--steps",
        str(options.steps),
        "--hidden-size",
        str(options.hidden_size),
    ]
    begin = time.time()
    ranks = [
        subprocess.Popen(
            [*command, "--bare-rank", str(rank), str(port), str(out), str(vocab)], env=environment()
        )
        for rank in range(2)
    ]
    if any(rank.wait() for rank in ranks):
        raise SystemExit("the bare script failed")
    times = json.loads(out.read_text())
    return median_step(times), times[0] - begin


def bare_rank(rank: int, port: int, out: Path, vocab: int, steps: int, hidden_size: int) -> None:
    """A script as a user would write it without r1hpc: a model, an engine, a loop."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import deepspeed
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as ours: both talk over gloo
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=vocab,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        config={
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 1.0,
            "steps_per_print": 10**12,
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
            "zero_optimization": {"stage": 1},
            "bf16": {"enabled": True},
        },
    )
    tokens = torch.randint(vocab, (steps, 2, 2, 257))
    times = []
    for step in range(steps):
        for micro_batch in tokens[step]:
            logits = engine(input_ids=micro_batch[:, :-1]).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), micro_batch[:, 1:].flatten())
            engine.backward(loss)
            engine.step()
        times.append(time.time())
    if rank == 0:
        out.write_text(json.dumps(times))
    torch.distributed.destroy_process_group()


def median_step(times: list[float]) -> float:
    steps = [after - before for before, after in itertools.pairwise(times)]
    return statistics.median(steps[WARM_UP_STEPS:])


def vocabulary(manifest: Path) -> int:
    from r1hpc.data.read.reader import open_dataset

    return open_dataset(manifest.parent).vocab_size


def environment() -> dict[str, str]:
    """Bytecode is kept, as on a user's machine: the frozen code has none when its first attempt begins."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}


if __name__ == "__main__":
    main()
