"""The ablations: what is compared with what, each arm as overrides of an ordinary run.

    ablation = ABLATIONS["reward"]
    arms = choose_arms(ablation, None, base)     # all that this hardware can run; the others with the reason

An arm that changes the cold start has one of its own; the others of a seed share theirs. What the arms leave
open comes from the stages `traces`, `sft` and `rl` of a chain file, jobs/r1.yaml unless told otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest, printable
from r1hpc.config.schema import RunConfig
from r1hpc.plan.hardware import find_gpu

Overrides = tuple[str, ...]


@dataclass(frozen=True)
class Arm:
    """One of the things compared: overrides of the stage rl, and of the cold start where it changes that."""

    name: str
    words: str
    rl: Overrides = ()
    sft: Overrides = ()


@dataclass(frozen=True)
class Ablation:
    """Arms, of which the first is the baseline."""

    name: str
    question: str
    arms: tuple[Arm, ...]

    @property
    def baseline(self) -> Arm:
        return self.arms[0]


@dataclass(frozen=True)
class Choice:
    """The arms that are run, and the reason for each of the others."""

    arms: tuple[Arm, ...]
    refused: dict[str, str]


def _everywhere(name: str, words: str, *overrides: str) -> Arm:
    return Arm(name, words, rl=overrides, sft=overrides)


def _attention(name: str, words: str) -> Arm:
    return _everywhere(name, words, f"model.attn_implementation={name}")


def _composite(alpha: float, beta: float, gamma: float) -> Arm:
    """The article's weighted sum; its FLOPs per token is the length of the answer here (tasks/terms.py)."""
    terms = f"accuracy={alpha}", f"efficiency_tokens={beta}", f"diversity={gamma}", "format=0.0"
    return Arm(
        "_".join(f"{weight:g}" for weight in (alpha, beta, gamma)),
        f"{alpha:g} accuracy + {beta:g} efficiency (length) + {gamma:g} diversity",
        rl=tuple(f"reward.terms.{term}" for term in terms),
    )


_RULE = tuple(
    f"reward.terms.{term}"
    for term in ("accuracy=1.0", "format=0.1", "efficiency_tokens=0.0", "diversity=0.0")
)
# The section `rl` of the presets r1, dr_grpo, dapo and seed, all without a KL term; batch, rate and reward
# are those of the job. The critic begins at 0 and has few steps: the preset's 1e-5 would leave it there.
_GRPO = ("rl.algorithm=grpo", "rl.loss_level=sequence", "rl.clip_high=0.2", "rl.max_resamples=0")
_ALGORITHMS = (
    Arm("grpo", "configs/rl/r1: advantage over sigma, mean of each answer's mean", _GRPO),
    Arm(
        "dr_grpo",
        "configs/rl/dr_grpo: no division by sigma, nor by the answer's length",
        (*_GRPO, "rl.scale_advantage=false", "rl.loss_level=constant"),
    ),
    Arm(
        "ppo",
        "configs/rl/seed: a critic and GAE, lambda 0.95",
        ("rl.algorithm=ppo", "rl.loss_level=token", "rl.clip_high=0.2", "rl.critic_lr=1e-3"),
    ),
    Arm(
        "dapo",
        "configs/rl/dapo: mean over tokens, clip-higher, groups without variance replaced",
        (
            *("rl.algorithm=grpo", "rl.loss_level=token", "rl.clip_high=0.28", "rl.mask_truncated=true"),
            "rl.max_resamples=3",
        ),
    ),
)

ABLATIONS = {
    ablation.name: ablation
    for ablation in (
        Ablation(
            "attention",
            "does a gate in place of softmax learn better?",
            (
                _attention("softmax", "softmax"),
                _attention("gate", "the article's gate, made causal, not normalised"),
                _attention("gate_norm", "the gate, each row divided by its sum"),
                _attention("sigmoid_bias", "sigmoid with bias -log n (arXiv 2409.04431)"),
            ),
        ),
        Ablation(
            "reward",
            "does a reward for efficiency and diversity gain anything over the rule reward?",
            (
                Arm("rule", "1 accuracy + 0.1 format", _RULE),
                _composite(0.6, 0.3, 0.1),
                _composite(0.3, 0.6, 0.1),
                _composite(0.2, 0.7, 0.1),
                _composite(0.1, 0.8, 0.1),
                _composite(0.2, 0.0, 0.8),
            ),
        ),
        Ablation(
            "precision",
            "what does half precision cost and gain?",
            (
                _everywhere("fp32", "fp32", "train.precision=fp32"),
                _everywhere("bf16", "bf16 with fp32 master weights", "train.precision=bf16"),
                _everywhere("fp16", "fp16 with dynamic loss scaling", "train.precision=fp16"),
                _everywhere("fp8", "fp8"),
            ),
        ),
        Ablation("algorithm", "which policy gradient?", _ALGORITHMS),
    )
}


def find_ablation(name: str) -> Ablation:
    """The ablation of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in ABLATIONS:
        known = ", ".join(ABLATIONS)
        raise UsageError(f"no ablation {printable(name)!r}{nearest(name, ABLATIONS)}; there are: {known}")
    return ABLATIONS[name]


def choose_arms(ablation: Ablation, names: Sequence[str] | None, base: RunConfig) -> Choice:
    """The arms asked for, the baseline first; None: all that the hardware of `base` can run.

    Raises:
        UsageError: an arm that is not there, or one asked for by name that cannot run.
    """
    known = {arm.name: arm for arm in ablation.arms}
    for name in names or ():
        if name not in known:
            raise UsageError(
                f"ablation {ablation.name} has no arm {printable(name)!r}{nearest(name, known)}; "
                f"it has: {', '.join(known)}"
            )
    reasons = {arm.name: reason for arm in ablation.arms if (reason := _reason_against(arm, base))}
    for name in names or ():
        if name in reasons:
            raise UsageError(f"arm {name}: {reasons[name]}")
    wanted = {ablation.baseline.name, *(names or known)}
    chosen = tuple(arm for arm in ablation.arms if arm.name in wanted and arm.name not in reasons)
    if len(chosen) < 2:
        raise UsageError(f"--arms names nothing beside the baseline {ablation.baseline.name}: name another")
    return Choice(chosen, {} if names else reasons)


def _reason_against(arm: Arm, base: RunConfig) -> str | None:
    """Why an arm cannot run where `base` runs; None: it can."""
    on_cpu, kind = base.resources.gpus_per_node == 0, base.cluster.gpu_type
    if arm.name == "fp16" and on_cpu:
        return "fp16 needs a GPU: DeepSpeed does not support it on a CPU; bf16 runs there"
    if arm.name != "fp8":
        return None
    if on_cpu:
        return "FP8 needs a GPU of compute capability 8.9 (Ada) or 9.0 (Hopper) and later; this is a CPU run"
    if kind is not None and not find_gpu(kind).has_fp8:
        return (
            f"{kind} has no FP8 units: they begin with compute capability 8.9 (Ada) and 9.0 (Hopper), "
            "an A100 is 8.0 (NVIDIA Transformer Engine, support matrix)"
        )
    return "r1hpc trains in fp32, bf16 and fp16; FP8 by Transformer Engine is not built in"
