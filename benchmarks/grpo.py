"""GRPO beside TRL's GRPOTrainer: same starting weights, task, rewards and batch; seconds a step, alternating.

    pip install trl
    python benchmarks/grpo.py [--rounds 3] [--steps 40] [--model DIR]
    make models/SmolLM2-135M-Instruct && python benchmarks/grpo.py --job smollm2 --rounds 2 --steps 8

The recipe is the stage grpo of jobs/r1.yaml: 32 prompts x 8 samples on a model of 0.34 M parameters in fp32.
With --job qwen2 it is the same on a Qwen2 of as many parameters, which must be 1.15 x TRL at its best.
With --job long it is the Qwen2 again, taught to think at length: completions of up to 256 tokens, 8 prompts
x 8.
With --job smollm2 it is that of jobs/smollm2.yaml with 16 prompts x 8 in fp32, at a fifth of its rate and
without a warm-up, on two cores and without greedy decoding; beside the speed the mean reward of all steps is
compared, whose questions are the same.
Each round has a seed of its own for the questions and the samples.
Arms, one after the other in each round, on one core and on two: r1hpc, with a rank on each core; the same
without the skip of tied groups (rl.skip_tied_groups=false); TRL at its best (no gradient checkpointing, no
logging, fused AdamW, no search for unused parameters; two cores as two threads and as two processes) and TRL
as it comes. A step is all that lies between the ends of two steps without an evaluation between them; its
median counts, and the mean of the CPU time of all processes, which other work on the machine disturbs less.
Printed: samples per second as ratios on equally many cores, the share of tied groups, and the
first step at which greedy decoding gets 0.95 of the held-out items right. How much the skip saves depends on
that share, which grows as the task is solved; the ratio without the skip does not depend on it.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

CHECKOUT = Path(__file__).resolve().parent.parent
WARM_UP_STEPS = 4
EVALUATE_EVERY = 4
HELD_OUT = 256
GOAL = 0.95
BEST: dict[str, Any] = {
    "gradient_checkpointing": False,
    "optim": "adamw_torch_fused",
    "logging_steps": 10**9,
    "ddp_find_unused_parameters": False,
}


@dataclass(frozen=True)
class Arm:
    """One timed way; `settings` are TRL's, None is ours; `skips` is our rl.skip_tied_groups."""

    processes: int
    threads: int
    settings: dict[str, Any] | None = None
    skips: bool = True

    @property
    def num_cores(self) -> int:
        return self.processes * self.threads


ARMS = {
    "r1hpc, 1 rank": Arm(1, 1),
    "r1hpc, 1 rank, no skip": Arm(1, 1, skips=False),
    "TRL best, 1 thread": Arm(1, 1, BEST),
    "TRL default, 1 thread": Arm(1, 1, {}),
    "r1hpc, 2 ranks": Arm(2, 1),
    "r1hpc, 2 ranks, no skip": Arm(2, 1, skips=False),
    "TRL best, 2 threads": Arm(1, 2, BEST),
    "TRL best, 2 processes": Arm(2, 1, BEST),
    "TRL default, 2 threads": Arm(1, 2, {}),
}


@dataclass(frozen=True)
class Recipe:
    """Settings that both train with."""

    overrides: tuple[str, ...]
    """Over the stages of its job, those of one kind as KIND:KEY=VALUE."""
    arms: tuple[str, ...]
    evaluate_every: int
    """Steps between two evaluations; 0: none is made."""
    job: str = "r1"
    model: dict[str, Any] | None = None
    """The config.json that the cold start begins with; None: the job's."""
    repeats: int = 1
    """How often the cold start's demonstrations write down their thinking."""

    def stages(self) -> dict[str, dict[str, Any]]:
        from r1hpc.config.assets import find_job
        from research.ablation.study import base_stages

        found = base_stages(find_job(self.job), self.overrides)
        if self.model is not None:
            found["sft"]["model"]["config"] = self.model
        return found


QWEN2 = {"model_type": "qwen2", "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
QWEN2 |= {
    "hidden_size": 96,
    "intermediate_size": 288,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
QWEN2 |= {"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
R1 = ("rl:train.micro_batch_size=256",)
LONG = (
    *("data.seq_len=288", "traces:generate.num_items=6000", "traces:generate.thinking_share=1.0"),
    *("sft:train.num_steps=150", "sft:train.global_batch_size=16", "sft:train.micro_batch_size=8"),
    *("rollout.max_completion_length=256", "rollout.num_prompts=8", "rl:train.global_batch_size=64"),
    # Few of its answers are right: that they end is rewarded too.
    *("rl:train.micro_batch_size=64", "rl:reward.terms={accuracy: 1, overlong: 0.5}"),
)
RECIPES = {
    "r1": Recipe(R1, tuple(ARMS), EVALUATE_EVERY),
    "qwen2": Recipe(R1, tuple(ARMS), EVALUATE_EVERY, model=QWEN2),
    "long": Recipe(LONG, tuple(ARMS)[:3], 0, model=QWEN2 | {"max_position_embeddings": 512}, repeats=40),
    "smollm2": Recipe(
        (
            *("rl:train.precision=fp32", "rl:train.global_batch_size=128", "rl:train.micro_batch_size=32"),
            *("rl:rollout.num_prompts=16", "rl:task.seed=1", "rl:task.first_item=0"),
            # A batch half as large unlearns at the job's rate, and TRL's warm-up begins at 0, a step late.
            *("rl:train.lr=1e-5", "rl:train.warmup_steps=0"),
        ),
        ("r1hpc, 2 ranks", "r1hpc, 2 ranks, no skip", "TRL best, 2 threads", "TRL best, 2 processes"),
        0,
        job="smollm2",
    ),
}


@dataclass(frozen=True)
class Told:
    """Result of an arm."""

    step_s: float
    """Median."""
    cpu_s: float
    """CPU time of a step, of all processes; the mean."""
    goal_step: int | None
    """The first at the goal."""
    reward: float
    """Mean over all steps, whose questions are the same in every arm."""
    ties: float
    """Share of groups that were rewarded alike, the same mean."""
    length: float
    """Tokens of a completion, the same mean."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--job", choices=RECIPES, default="r1", help="whose recipe")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--model", type=Path, help="model folder to start from; default: a new cold start")
    parser.add_argument("--first-seed", type=int, default=0, help="of the first round; the next has the next")
    parser.add_argument("--arms", default="", help="regular expression: only the arms that it is found in")
    parser.add_argument("--trl", nargs=2, metavar=("ARM", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trl:
        arm, out = options.trl
        from benchmarks._trl_grpo import train_with_trl
        from r1hpc.config import load

        recipe = RECIPES[options.job]
        overrides = [f"model.path={options.model}", *seeded(options.first_seed)]
        settings = load.merge_layers([recipe.stages()["rl"]], overrides)
        train_with_trl(settings, ARMS[arm], options.steps, recipe.evaluate_every, Path(out))
        return
    arms = [arm for arm in RECIPES[options.job].arms if re.search(options.arms, arm)]
    found: dict[str, list[Told]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        start = options.model.absolute() if options.model else cold_start(options.job, folder)
        for seed in range(options.first_seed, options.first_seed + options.rounds):
            for name in found:
                told = run_arm(options.job, name, folder / f"{seed}", start, options.steps, seed)
                found[name].append(told)
                print(f"seed {seed}: {name:<23} {told.step_s * 1e3:6.1f} ms/step, ", end="")
                print(f"{told.cpu_s * 1e3:6.1f} ms of CPU, ", end="")
                print(f"tied groups {told.ties:.2f}, {told.length:.0f} tokens a completion, ", end="")
                print(
                    f"held-out {GOAL} at step {told.goal_step or '-'}, reward {told.reward:.3f}", flush=True
                )
    ours = [name for name in arms if ARMS[name].settings is None]
    for mine in ours:
        for name in arms:
            if ARMS[name].settings is not None and ARMS[name].num_cores == ARMS[mine].num_cores:
                print(f"samples/s, {mine} / {name}: {ratio_of(found[mine], found[name])}")
    if (two := "r1hpc, 2 ranks") in ours and (one := "r1hpc, 1 rank") in ours:
        print(f"samples/s, {two} / {one}: {ratio_of(found[two], found[one])}")


def ratio_of(ours: list[Told], theirs: list[Told]) -> str:
    """Ours over theirs in speed, round by round, and the share of tied groups in both."""
    pairs = list(zip(ours, theirs, strict=True))
    found = [[b.step_s / a.step_s for a, b in pairs], [b.cpu_s / a.cpu_s for a, b in pairs]]
    speed, cpu = (f"{statistics.median(of):.2f} (min {min(of):.2f}, max {max(of):.2f})" for of in found)
    ties = [statistics.fmean(told.ties for told in arm) for arm in (ours, theirs)]
    return f"{speed}, by CPU time {cpu}, tied groups {ties[0]:.2f} and {ties[1]:.2f}"


class CpuClock(threading.Thread):
    """CPU time of the processes that have `mark` in their environment, read ten times a second."""

    def __init__(self, mark: str) -> None:
        super().__init__(daemon=True)
        self._mark, self._is_over = mark.encode(), threading.Event()
        self._read: list[tuple[float, float]] = []
        self.start()

    def run(self) -> None:
        ticks: dict[Path, int] = {}
        while not self._is_over.wait(0.1):
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if process in ticks or self._mark in (process / "environ").read_bytes():
                        stat = (process / "stat").read_text().rpartition(")")[2].split()
                        ticks[process] = int(stat[11]) + int(stat[12])
            self._read.append((time.time(), sum(ticks.values()) / os.sysconf("SC_CLK_TCK")))

    def seconds(self, times: dict[Any, float]) -> dict[Any, float]:
        """Stop; return the CPU time used until each of `times`."""
        self._is_over.set()
        at, used = map(numpy.array, zip(*self._read, strict=True))
        return {key: float(numpy.interp(time, at, used)) for key, time in times.items()}


def seeded(seed: int) -> list[str]:
    """Overrides: other samples, other questions than those of the job and of other seeds."""
    return [f"train.seed={seed}", f"task.seed={100 + seed}"] if seed else []


def run_arm(job: str, name: str, folder: Path, start: Path, steps: int, seed: int) -> Told:
    folder.mkdir(exist_ok=True)
    arm = ARMS[name]
    if arm.settings is None:
        return run_ours(job, folder, start, steps, arm, seed)
    out = folder / "trl.json"
    launcher = [sys.executable]
    if arm.processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arm.processes}"]
    command = [*launcher, __file__, "--job", job, "--model", str(start), "--steps", str(steps)]
    command += ["--first-seed", str(seed), "--trl", name, str(out)]
    clock = CpuClock(f"R1HPC_BENCHMARK={folder}")
    done = subprocess.run(command, env=environment(arm.threads, folder), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return told_of(job, clock, **json.loads(out.read_text()))


def told_of(
    job: str, clock: CpuClock, times: dict[Any, float], greedy: dict[Any, float], means: list[float]
) -> Told:
    seconds, cpu = (gaps(each, RECIPES[job].evaluate_every) for each in (times, clock.seconds(times)))
    return Told(statistics.median(seconds), statistics.fmean(cpu), first_at_goal(greedy), *means)


def cold_start(job: str, folder: Path) -> Path:
    """The stages traces and sft of the job; of r1 a model that thinks in 3 answers of 10."""
    from r1hpc.config.yaml_files import write_yaml

    base = RECIPES[job].stages()
    write_yaml(folder / "traces.yaml", base["traces"])
    submit(folder, folder / "traces.yaml", "traces", [], 1)
    traces = folder / "traces" / "traces.jsonl"
    lines = [json.loads(line) for line in traces.read_text().splitlines()]
    for line in lines:
        thinking = line["completion"].partition("<think>")[2].partition("</think>")[0]
        line["completion"] = line["completion"].replace(thinking, thinking * RECIPES[job].repeats, 1)
    traces.write_text("".join(json.dumps(line) + "\n" for line in lines))
    base["sft"]["data"] |= {"traces": [str(traces)], "path": None}
    write_yaml(folder / "sft.yaml", base["sft"])
    submit(folder, folder / "sft.yaml", "sft", [], 1)
    return folder / "sft" / "model"


def run_ours(job: str, folder: Path, start: Path, steps: int, arm: Arm, seed: int) -> Told:
    from r1hpc.config.yaml_files import write_yaml

    recipe, file = RECIPES[job], folder / "grpo.yaml"
    name = f"ranks{arm.processes}-{'skip' if arm.skips else 'all'}"
    write_yaml(file, recipe.stages()["rl"])
    overrides = [
        *seeded(seed),
        f"model.path={start}",
        f"train.num_steps={steps}",
        f"resources.ranks_per_node={arm.processes}",
        f"resources.cpus_per_task={arm.threads}",
        f"rl.skip_tied_groups={arm.skips}",
        f"evaluate.every={recipe.evaluate_every}",
        f"evaluate.num_items={HELD_OUT if recipe.evaluate_every else 1}",
        "evaluate.num_samples=1",
        "checkpoint.save_every=100000",
    ]
    clock = CpuClock(f"R1HPC_BENCHMARK={folder}")
    submit(folder, file, name, overrides, arm.threads)
    run = folder / name / "metrics"
    lines = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    greedy = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    keys = ("reward", "zero_variance_share", "response_length")
    return told_of(
        job,
        clock,
        {line["global_step"]: line["time"] for line in lines},
        {line["global_step"]: line["greedy"]["value"] for line in greedy},
        [statistics.fmean(line[key] for line in lines) for key in keys],
    )


def submit(root: Path, job: Path, name: str, overrides: list[str], threads: int) -> None:
    command = [sys.executable, "-m", "r1hpc.submit", str(job), "--executor", "local", "--run-root", str(root)]
    command += ["--run-name", name, "--follow", *overrides]
    subprocess.run(
        command, cwd=CHECKOUT, env=environment(threads, root), check=True, stdout=subprocess.DEVNULL
    )


def gaps(times: dict[Any, float], evaluate_every: int) -> list[float]:
    """Seconds between the ends of steps, but for those after an evaluation and the first few."""
    ordered = sorted((int(step), at) for step, at in times.items())
    return [
        after - before
        for (step, before), (_, after) in itertools.pairwise(ordered)
        if step >= WARM_UP_STEPS and not (evaluate_every and step % evaluate_every == 0)
    ]


def first_at_goal(greedy: dict[Any, float]) -> int | None:
    return min((int(step) for step, value in greedy.items() if value >= GOAL), default=None)


def environment(threads: int, mark: Path) -> dict[str, str]:
    return {
        **os.environ,
        "R1HPC_BENCHMARK": str(mark),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


if __name__ == "__main__":
    main()
