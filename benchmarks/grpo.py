"""GRPO beside TRL's GRPOTrainer: same starting weights, task, rewards and batch; seconds a step, alternating.

    pip install trl
    python benchmarks/grpo.py [--rounds 3] [--steps 40] [--model DIR]
    make models/SmolLM2-135M-Instruct && python benchmarks/grpo.py --job smollm2 --rounds 2 --steps 8

The recipe is the stage grpo of jobs/r1.yaml: 32 prompts x 8 samples on a model of 0.34 M parameters in fp32.
With --job qwen2 it is the same on a Qwen2 of as many parameters, which must be 1.15 x TRL at its best.
With --job smollm2 it is that of jobs/smollm2.yaml with 16 prompts x 8 in fp32, at a fifth of its rate and
without a warm-up, on two cores and without greedy decoding; beside the speed the mean reward of all steps is
compared, whose questions are the same.
Each round has a seed of its own for the questions and the samples.
Arms, one after the other in each round, on one core and on two: r1hpc, with a rank on each core; TRL at its
best (no gradient checkpointing, no logging, fused AdamW; two cores as two threads and as two processes) and
TRL as it comes. A step is all that lies between the ends of two steps without an evaluation between them; its
median counts. Printed: samples per second as ratios on equally many cores, and the first step at which greedy
decoding gets 0.95 of the held-out items right. What it must show: 1.4 x TRL at its best, 1.8 x TRL as it
comes, no more steps, two ranks no slower per sample than one.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
WARM_UP_STEPS = 4
EVALUATE_EVERY = 4
HELD_OUT = 256
GOAL = 0.95
BEST: dict[str, Any] = {
    "gradient_checkpointing": False,
    "optim": "adamw_torch_fused",
    "logging_steps": 10**9,
}


@dataclass(frozen=True)
class Arm:
    """What is timed; `settings` are TRL's, None is ours."""

    processes: int
    threads: int
    settings: dict[str, Any] | None = None

    @property
    def num_cores(self) -> int:
        return self.processes * self.threads


ARMS = {
    "r1hpc, 1 rank": Arm(1, 1),
    "TRL best, 1 thread": Arm(1, 1, BEST),
    "TRL default, 1 thread": Arm(1, 1, {}),
    "r1hpc, 2 ranks": Arm(2, 1),
    "TRL best, 2 threads": Arm(1, 2, BEST),
    "TRL best, 2 processes": Arm(2, 1, BEST),
    "TRL default, 2 threads": Arm(1, 2, {}),
}


@dataclass(frozen=True)
class Recipe:
    """What both train."""

    overrides: tuple[str, ...]
    """Over the stage rl of its job."""
    arms: tuple[str, ...]
    evaluate_every: int
    """Steps between two evaluations; 0: none is made."""
    job: str = "r1"
    model: dict[str, Any] | None = None
    """The config.json that the cold start begins with; None: the job's."""

    def stages(self) -> dict[str, dict[str, Any]]:
        from r1hpc.config import load
        from research.ablation.study import base_stages

        found = base_stages(load.find_job(self.job), [f"rl:{override}" for override in self.overrides])
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
R1 = ("train.micro_batch_size=256",)
RECIPES = {
    "r1": Recipe(R1, tuple(ARMS), EVALUATE_EVERY),
    "qwen2": Recipe(R1, tuple(ARMS), EVALUATE_EVERY, model=QWEN2),
    "smollm2": Recipe(
        (
            *("train.precision=fp32", "train.global_batch_size=128", "train.micro_batch_size=32"),
            *("rollout.num_prompts=16", "task.seed=1", "task.first_item=0"),
            # A batch half as large unlearns at the job's rate, and TRL's warm-up begins at 0, a step late.
            *("train.lr=1e-5", "train.warmup_steps=0"),
        ),
        ("r1hpc, 2 ranks", "TRL best, 2 threads", "TRL best, 2 processes"),
        0,
        job="smollm2",
    ),
}


@dataclass(frozen=True)
class Told:
    """What an arm did."""

    step_s: float
    """Median."""
    goal_step: int | None
    """The first at the goal."""
    reward: float
    """Mean over all steps, whose questions are the same in every arm."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--job", choices=RECIPES, default="r1", help="whose recipe")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--model", type=Path, help="model folder to start from; default: a new cold start")
    parser.add_argument("--first-seed", type=int, default=0, help="of the first round; the next has the next")
    parser.add_argument("--trl", nargs=2, metavar=("ARM", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trl:
        arm, out = options.trl
        train_with_trl(
            options.job, options.model, options.steps, ARMS[arm], Path(out), seeded(options.first_seed)
        )
        return
    arms = RECIPES[options.job].arms
    found: dict[str, list[Told]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        start = options.model.absolute() if options.model else cold_start(options.job, folder)
        for seed in range(options.first_seed, options.first_seed + options.rounds):
            for name in found:
                told = run_arm(options.job, name, folder / f"{seed}", start, options.steps, seed)
                found[name].append(told)
                print(f"seed {seed}: {name:<22} {told.step_s * 1e3:6.1f} ms/step, ", end="")
                print(
                    f"held-out {GOAL} at step {told.goal_step or '-'}, reward {told.reward:.3f}", flush=True
                )
    ours = {ARMS[name].num_cores: name for name in arms if ARMS[name].settings is None}
    for name in arms:
        if ARMS[name].settings is not None:
            mine = ours[ARMS[name].num_cores]
            print(f"samples/s, {mine} / {name}: {ratio_of(found[mine], found[name])}")
    if len(ours) > 1:
        print(f"samples/s, {ours[2]} / {ours[1]}: {ratio_of(found[ours[2]], found[ours[1]])}")


def ratio_of(ours: list[Told], theirs: list[Told]) -> str:
    """Ours over theirs in speed, round by round."""
    ratios = [b.step_s / a.step_s for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f} (min {min(ratios):.2f}, max {max(ratios):.2f})"


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
    done = subprocess.run(command, env=environment(arm.threads), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    told = json.loads(out.read_text())
    evaluated = RECIPES[job].evaluate_every
    return Told(median_step(told["times"], evaluated), first_at_goal(told["greedy"]), told["reward"])


def cold_start(job: str, folder: Path) -> Path:
    """The stages traces and sft of the job; of r1 a model that thinks in 3 answers of 10."""
    from r1hpc.config import load

    base = RECIPES[job].stages()
    base["sft"]["data"] |= {"traces": ["${stage:traces}/traces.jsonl"], "path": None}
    stages = [
        {"name": "traces", "needs": [], **base["traces"]},
        {"name": "sft", "needs": ["traces"], **base["sft"]},
    ]
    load.write_yaml(folder / "start.yaml", {"stages": stages})
    submit(folder, folder / "start.yaml", "start", [], 1)
    return folder / "start" / "sft" / "model"


def run_ours(job: str, folder: Path, start: Path, steps: int, arm: Arm, seed: int) -> Told:
    from r1hpc.config import load

    recipe, file, name = RECIPES[job], folder / "grpo.yaml", f"ranks{arm.processes}"
    load.write_yaml(file, recipe.stages()["rl"])
    overrides = [
        *seeded(seed),
        f"model.path={start}",
        f"train.num_steps={steps}",
        f"resources.ranks_per_node={arm.processes}",
        f"resources.cpus_per_task={arm.threads}",
        f"evaluate.every={recipe.evaluate_every}",
        f"evaluate.num_items={HELD_OUT if recipe.evaluate_every else 1}",
        "evaluate.num_samples=1",
        "checkpoint.save_every=100000",
    ]
    submit(folder, file, name, overrides, arm.threads)
    run = folder / name / "metrics"
    lines = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    greedy = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    return Told(
        median_step({line["global_step"]: line["time"] for line in lines}, recipe.evaluate_every),
        first_at_goal({line["global_step"]: line["greedy"]["value"] for line in greedy}),
        statistics.fmean(line["reward"] for line in lines),
    )


def submit(root: Path, job: Path, name: str, overrides: list[str], threads: int) -> None:
    command = [sys.executable, "-m", "r1hpc.submit", str(job), "--executor", "local", "--run-root", str(root)]
    command += ["--run-name", name, "--follow", *overrides]
    subprocess.run(command, cwd=CHECKOUT, env=environment(threads), check=True, stdout=subprocess.DEVNULL)


def train_with_trl(job: str, start: Path, steps: int, arm: Arm, out: Path, overrides: list[str]) -> None:
    """The same recipe in TRL, asked in the same form and scored by the same Scorer."""
    import datasets
    import torch
    import transformers
    import trl

    from r1hpc.config import load
    from r1hpc.tasks.registry import make_task
    from r1hpc.tasks.rewards import Completion, Scorer
    from r1hpc.tasks.tokenizer import form_of, load_tokenizer, special_ids

    recipe = RECIPES[job]
    config = load.merge_layers([recipe.stages()["rl"]], [f"model.path={start}", *overrides])
    task, rollout, train = make_task(config.task), config.rollout, config.train
    own = load_tokenizer(config.model)
    form, ids = form_of(own, config.model), special_ids(own, config.model)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(start / "tokenizer.json"),
        pad_token=own.id_to_token(ids.pad),
        eos_token=own.id_to_token(ids.eos),
        padding_side="left",
    )
    micro = min(train.micro_batch_size, train.global_batch_size // arm.processes)
    rewards: list[float] = []
    items = [task.item(index) for index in range(rollout.num_prompts * steps)]
    held_out = [task.item(index, held_out=True) for index in range(HELD_OUT)]
    scorer = Scorer(config.reward, task, max_completion_length=rollout.max_completion_length)

    def reward(completion_ids: list[list[int]], index: list[int], **_: Any) -> list[float]:
        made = [
            Completion(form.said(own.decode(ids)), len(ids), ids[-1] != tokenizer.eos_token_id)
            for ids in completion_ids
        ]
        size = rollout.num_generations
        groups = [(items[index[g]], made[g : g + size]) for g in range(0, len(made), size)]
        found = [score.reward for group in scorer.score_groups(groups) for score in group]
        rewards.append(statistics.fmean(found))
        return found

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        """The end of each step, and now and then the accuracy of greedy decoding."""

        def __init__(self) -> None:
            self.times: dict[int, float] = {}
            self.greedy: dict[int, float] = {}

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.times[state.global_step] = time.time()
            if recipe.evaluate_every and state.global_step % recipe.evaluate_every == 0:
                self.greedy[state.global_step] = self.evaluate(model)

        def evaluate(self, model: Any) -> float:
            prompts = [form.prompt(item.prompt) for item in held_out]
            asked = tokenizer(prompts, return_tensors="pt", padding=True)
            with torch.no_grad():
                found = model.generate(
                    input_ids=asked["input_ids"],
                    attention_mask=asked["attention_mask"],
                    max_new_tokens=rollout.max_completion_length,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                )
            texts = tokenizer.batch_decode(found[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
            groups = [
                (item, [Completion(text, len(text), False)])
                for item, text in zip(held_out, texts, strict=True)
            ]
            return statistics.fmean(group[0].correct for group in scorer.score_groups(groups))

    arguments = trl.GRPOConfig(
        output_dir=str(out.parent / "trl"),
        use_cpu=True,
        bf16=False,
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=train.global_batch_size // micro // arm.processes,
        num_generations=rollout.num_generations,
        max_completion_length=rollout.max_completion_length,
        temperature=rollout.temperature,
        learning_rate=train.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=train.warmup_steps,
        adam_beta1=train.beta1,
        adam_beta2=train.beta2,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        beta=config.rl.kl_coef,
        epsilon=config.rl.clip_low,
        epsilon_high=config.rl.clip_high,
        loss_type="dapo",
        shuffle_dataset=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=train.seed,
        **(arm.settings or {}),
    )
    watch = Watch()
    data = datasets.Dataset.from_dict(
        {"prompt": [form.prompt(item.prompt) for item in items], "index": list(range(len(items)))}
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(start, attn_implementation="sdpa")
    with scorer:
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=arguments,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[watch],
        )
        trainer.train()
    # Each process has rewarded its own share of a step.
    shares = [rewards]
    if arm.processes > 1:
        shares = [[] for _ in range(arm.processes)]
        torch.distributed.all_gather_object(shares, rewards)
    if trainer.is_world_process_zero():
        of_steps = [statistics.fmean(step) for step in zip(*shares, strict=True)]
        told = {"times": watch.times, "greedy": watch.greedy, "reward": statistics.fmean(of_steps)}
        out.write_text(json.dumps(told))


def median_step(times: dict[Any, float], evaluate_every: int) -> float:
    """Seconds between the ends of steps, but for those after an evaluation and the first few."""
    ordered = sorted((int(step), at) for step, at in times.items())
    gaps = [
        after - before
        for (step, before), (_, after) in itertools.pairwise(ordered)
        if step >= WARM_UP_STEPS and not (evaluate_every and step % evaluate_every == 0)
    ]
    return statistics.median(gaps)


def first_at_goal(greedy: dict[Any, float]) -> int | None:
    return min((int(step) for step, value in greedy.items() if value >= GOAL), default=None)


def environment(threads: int) -> dict[str, str]:
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(CHECKOUT),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


if __name__ == "__main__":
    main()
