"""The article's claims, one by one: its numbers, what public sources say, what r1hpc has in their place.

What was measured is not here: `chain/claims.py` fills it in under the names in `measured`, from the results
of the ablations and from r1hpc's own arithmetic.
"""

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """What public sources leave of a claim."""

    wrong = "wrong"
    inconsistent = "inconsistent"
    unverifiable = "no source"
    plausible = "plausible"
    half = "half right"
    right = "right"
    opinion = "opinion"


@dataclass(frozen=True)
class Claim:
    """One claim of the article."""

    title: str
    claim: str
    """In our words, with the article's numbers."""
    verdict: Verdict
    sources: str
    here: str
    """What r1hpc does instead, or offers."""
    measured: str | None = None
    """A name in chain/claims.py. None: nothing was measured."""


CLAIMS = (
    Claim(
        "When R1 appeared",
        "The paper appeared in 2023, month and day left as X.",
        Verdict.wrong,
        "arXiv 2501.12948 is of January 2025.",
        "Nothing depends on it.",
    ),
    Claim(
        "A hundred days of reproductions",
        "Within 100 days more than 200 projects tried, 37 reproduced it end to end, in a fifth of the time.",
        Verdict.unverifiable,
        "No list of such projects is known. A survey of the first 100 days (arXiv 2505.00551, May 2025) "
        "covers supervised fine-tuning and reinforcement learning with verifiable rewards. open-r1 "
        "announced its first step, distillation, 126 days after R1's release; its README does not "
        "announce pure RL or the multi-stage recipe as done.",
        "jobs/r1.yaml is the whole chain at a size that two CPU cores finish.",
    ),
    Claim(
        "A dynamic attention gate is R1's core",
        "sigmoid(gamma QK^T / sqrt(d)) V with a learned gamma that begins at 0.5.",
        Verdict.wrong,
        "R1 is DeepSeek-V3-Base post-trained; arXiv 2501.12948 changes nothing in the architecture. The "
        "article's code has neither a causal mask nor a normalisation, so the output grows with the "
        "context. Sigmoid attention exists (arXiv 2409.04431) and matches softmax when it is "
        "regularised, with a bias of about -log n.",
        "model.attn_implementation=softmax | gate | gate_norm | sigmoid_bias for any transformers model "
        "that takes its attention from outside; all causal. The default is softmax.",
        "attention",
    ),
    Claim(
        "The gate gains 12.7 % F1 at 1,024 tokens and more, for 8.3 % more compute",
        "F1 + 12.7 % on long texts, compute + 8.3 %.",
        Verdict.unverifiable,
        "No source, no data set, no baseline are given. A gate without a fused kernel also gives up "
        "FlashAttention, so a fixed extra cost of 8.3 % is unlikely on a GPU (an inference, not "
        "measured).",
        "The gates are not fused: all scores are held in memory.",
        "gate_time",
    ),
    Claim(
        "R1 is trained by PPO",
        "PPO with a reward of its own.",
        Verdict.wrong,
        "arXiv 2501.12948, section 2.2: GRPO (arXiv 2402.03300), without a critic. PPO is a sound "
        "alternative: TinyZero and Open-Reasoner-Zero train with it.",
        "rl.algorithm=grpo | ppo; presets rl/r1 (GRPO), rl/dr_grpo (arXiv 2503.20783), rl/dapo (arXiv "
        "2503.14476) and rl/seed (PPO with the article's settings).",
        "algorithm",
    ),
    Claim(
        "The reward is 0.6 task + 0.3 efficiency + 0.1 diversity",
        "alpha:beta:gamma = 0.6:0.3:0.1, found by a search.",
        Verdict.wrong,
        "arXiv 2501.12948: R1-Zero has rule-based accuracy and format rewards and no neural reward "
        "model; R1 adds language consistency, summed directly. No weighted sum of this kind.",
        "reward.terms is a registry of named terms with weights, each logged by itself; rl/seed has the "
        "article's weights.",
        "reward",
    ),
    Claim(
        "Efficiency is FLOPs per token",
        "R_efficiency is FLOPs per token.",
        Verdict.wrong,
        "For a dense model it is the same for every answer, so an advantage that subtracts the group's "
        "mean does not see it (arithmetic). What works is the length of the answer, as in Kimi k1.5 "
        "(arXiv 2501.12599) or DAPO's penalty for overlong answers.",
        "efficiency_flops is the literal term, efficiency_tokens the one that says something.",
        "flops_term",
    ),
    Claim(
        "That ratio cuts latency by 15 %",
        "15 % less inference latency at equal quality.",
        Verdict.unverifiable,
        "No source.",
        "Every evaluation reports the length of the answers, which is what a reward can change.",
        "length",
    ),
    Claim(
        "R1's data: 30 % CommonCrawl, 40 % law and medicine, 30 % GPT-4",
        "A mixture of 30/40/30.",
        Verdict.wrong,
        "arXiv 2501.12948: thousands of cold-start traces, then about 600,000 reasoning traces by "
        "rejection sampling and 200,000 others, two epochs.",
        "Stages traces and generate make such data. A data recipe may name several sources, but neither "
        "it nor a run can weigh them: each has the share that its tokens (fine-tuning: its documents) "
        "have of the whole, so 30/40/30 must be made beforehand, by what each source holds.",
    ),
    Claim(
        "Cleaning, dynamic sampling, teacher and student",
        "Named as the answers to costly domain data.",
        Verdict.plausible,
        "In the literature dynamic sampling means dropping groups without variance (DAPO, arXiv "
        "2503.14476), not balancing domains. open-r1 decontaminates by 8-grams and filters by pass "
        "rate.",
        "rl.max_resamples replaces groups without variance; generate.keep and generate.max_pass_rate "
        "filter; jobs/r1.yaml distils into a third of the size.",
        "dapo",
    ),
    Claim(
        "Batch 256 on 4 A100s as 8 x 32",
        "Global batch 256 by 8 accumulation steps of 32 on each of 4 cards.",
        Verdict.inconsistent,
        "32 x 8 x 4 = 1,024.",
        "global_batch_size = micro_batch_size x accumulation x ranks is checked before anything is "
        "submitted.",
        "batch",
    ),
    Claim(
        "FP16 + FP8 on A100 is 40 % faster",
        "Mixed FP16 and FP8 by Transformer Engine on A100.",
        Verdict.wrong,
        "NVIDIA Transformer Engine's support matrix: FP8 from compute capability 8.9 on; an A100 is 8.0.",
        "train.precision=bf16 (the default), fp16, fp32. FP8 is refused with the reason.",
        "precision",
    ),
    Claim(
        "Gradient compression takes all-reduce from 35 % to 12 %",
        "NCCL with gradient compression.",
        Verdict.plausible,
        "The mechanism exists (1-bit Adam, arXiv 2102.02888, in DeepSpeed); the numbers have no source, "
        "and none of the open RL trainers named here uses it.",
        "Not built in; deepspeed.extra reaches DeepSpeed's own options.",
    ),
    Claim(
        "lr 3e-5, betas (0.9, 0.98), cosine over 5,000 steps",
        "AdamW with these for the whole reproduction.",
        Verdict.wrong,
        "For reinforcement learning of all weights the open trainers take 3e-7 to 1e-6 (TRL, verl, "
        "OpenRLHF, TinyZero, SimpleRL-Zoo, Logic-RL); 3e-5 is a rate for fine-tuning.",
        "Presets for real models have 1e-6; rl/seed has the article's. The models of 0.3 M parameters "
        "here take 1e-4.",
    ),
    Claim(
        "INT8 costs 2.3 % accuracy and gives 3 x throughput",
        "Dynamic quantisation for latency.",
        Verdict.unverifiable,
        "No source. torch's dynamic quantisation is a CPU path.",
        "Not built in yet.",
    ),
    Claim(
        "Distilled to 6B, 92 % is kept",
        "A student of 6 B parameters.",
        Verdict.wrong,
        "arXiv 2501.12948: students of 1.5, 7, 8, 14, 32 and 70 B, by supervised fine-tuning alone. The "
        "7 B keeps 70 % (AIME 2024, 55.5 of 79.8) to 95 % (MATH-500, 92.8 of 97.3).",
        "Stage distil of jobs/r1.yaml, from scratch on the teacher's answers.",
    ),
    Claim(
        "LoRA with quantisation for small devices",
        "Recommended.",
        Verdict.plausible,
        "LoRA (arXiv 2106.09685) is in most open trainers, QLoRA (arXiv 2305.14314) in some.",
        "model.lora_rank, through peft; no quantised base weights.",
    ),
    Claim(
        "Model parallelism for very long sequences",
        "Sharding the model handles them.",
        Verdict.half,
        "Tensor and pipeline parallelism shard weights; long sequences need sequence or context "
        "parallelism (Ulysses, arXiv 2309.14509; Ring Attention, arXiv 2310.01889).",
        "ZeRO 0 to 3 shard states and weights; sequence parallelism is not built in.",
    ),
    Claim(
        "7 + 15 + 25 + 40 + 13 days",
        "Five stages of a reproduction.",
        Verdict.right,
        "They add up to 100; a plan, not evidence.",
        "configs/campaign/hundred_days.yaml has the stages, each with a share of the GPU-hours.",
    ),
    Claim(
        "GPU-hours = 0.8 x parameters (10^8) + 0.3 x GB; 7B and 100 GB are 560",
        "An estimate by a sum, with an example.",
        Verdict.wrong,
        "Cost multiplies, it does not add: 6 x parameters x tokens FLOPs. Llama 2 7B took 184,320 "
        "A100-hours for 2 T tokens (at second hand), which is 2,304 for the 25 B tokens of 100 GB.",
        "r1hpc estimate: from FLOPs with an interval, or by the article's formula, which says what it is.",
        "gpu_hours",
    ),
    Claim(
        "SwishGLU is a non-standard activation to avoid",
        "Use it with care.",
        Verdict.wrong,
        "SwiGLU (arXiv 2002.05202) is what Llama, Qwen and DeepSeek use.",
        "Models are transformers' own, activations included.",
    ),
    Claim(
        "Fix the random seed to reproduce",
        "Keep it the same.",
        Verdict.half,
        "Right, and not sufficient: sampler, reward order and a resume matter too. TRL's resume inside "
        "a generation window samples anew from the newer policy.",
        "Every completion has a random stream of its own; a resumed run is compared bit by bit with an "
        "undisturbed one in the tests (tests/train/test_rl_disturbed.py).",
    ),
    Claim(
        "Lightning, Dask and Pandas, W&B or TensorBoard",
        "Recommended tools.",
        Verdict.opinion,
        "None of the open R1 trainers named here uses Lightning or Dask.",
        "DeepSpeed, Zarr shards; r1hpc export writes for TensorBoard, Prometheus and W&B.",
    ),
)
