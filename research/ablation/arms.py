"""The ablations: what is compared with what, each arm as settings of an ordinary run.

    ablation = ABLATIONS["reward"]
    arms = choose_arms(ablation, None, base)     # all that this hardware can run; the others with the reason

An arm that changes the cold start has one of its own; the others of a seed share theirs. What the arms leave
open comes from the stages `traces`, `sft` and `rl` of a chain file, jobs/r1.yaml unless another is given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest, printable
from r1hpc.config.schema.run import RunConfig
from r1hpc.plan.topology.gpus import find_gpu

Settings = Mapping[str, object]
"""Values by dotted key."""


@dataclass(frozen=True)
class Arm:
    """One of the things compared: settings of the stage rl, and of the cold start where it changes that."""

    name: str
    words: str
    rl: Settings
    sft: Settings = field(default_factory=dict)


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


def _everywhere(name: str, words: str, key: str) -> Arm:
    """An arm that is named after the value of one key, in cold start and RL."""
    return Arm(name, words, rl={key: name}, sft={key: name})


def _attention(name: str, words: str) -> Arm:
    return _everywhere(name, words, "model.attn_implementation")


def _precision(name: str, words: str) -> Arm:
    return _everywhere(name, words, "train.precision")


def _rewards(**weights: float) -> Settings:
    every = {"accuracy": 0.0, "format": 0.0, "efficiency_tokens": 0.0, "diversity": 0.0}
    return {f"reward.terms.{term}": weight for term, weight in {**every, **weights}.items()}


def _composite(alpha: float, beta: float, gamma: float) -> Arm:
    """The article's weighted sum; its FLOPs per token is the length of the answer here (terms.py)."""
    return Arm(
        "_".join(f"{weight:g}" for weight in (alpha, beta, gamma)),
        f"{alpha:g} accuracy + {beta:g} efficiency (length) + {gamma:g} diversity",
        rl=_rewards(accuracy=alpha, efficiency_tokens=beta, diversity=gamma),
    )


def _algorithm(name: str, words: str, **settings: object) -> Arm:
    """GRPO as in the preset r1, but for what is said."""
    grpo = {
        "algorithm": "grpo",
        "loss_level": "sequence",
        "scale_advantage": True,
        "baseline": "group",
        "objective": "clip",
        "ratio": "token",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "kl_coef": 0.0,
        "mask_truncated": False,
        "max_resamples": 0,
    }
    return Arm(name, words, rl={f"rl.{key}": value for key, value in {**grpo, **settings}.items()})


# The section `rl` of the presets, all without a KL term; batch, rate and reward are those of the job, so
# DAPO's punishment of overlong answers is left out. The critic begins at 0 and has few steps: the preset's
# 1e-5 would leave it there. Clips and ratios matter from a rollout's second update on: with one alone gspo
# is grpo.
_ALGORITHMS = (
    _algorithm("grpo", "configs/rl/r1: advantage over sigma, mean of each answer's mean"),
    _algorithm(
        "dr_grpo",
        "configs/rl/dr_grpo: no division by sigma, nor by the answer's length",
        scale_advantage=False,
        loss_level="constant",
    ),
    _algorithm(
        "ppo",
        "configs/rl/seed: a critic and GAE, lambda 0.95",
        algorithm="ppo",
        loss_level="token",
        gae_lambda=0.95,
        critic_lr=1e-3,
    ),
    _algorithm(
        "dapo",
        "configs/rl/dapo: mean over tokens, clip-higher, groups without variance replaced",
        loss_level="token",
        clip_high=0.28,
        mask_truncated=True,
        max_resamples=3,
    ),
    _algorithm(
        "gspo",
        "configs/rl/gspo: the ratio of whole sequences, clipped closely",
        ratio="sequence",
        clip_low=3e-4,
        clip_high=4e-4,
    ),
    _algorithm(
        "cispo",
        "configs/rl/cispo: weights clipped, not gradients; groups without variance replaced",
        objective="cispo",
        loss_level="token",
        clip_high=4.0,
        max_resamples=3,
    ),
    _algorithm(
        "rloo",
        "configs/rl/rloo: the mean of the others as baseline, no division",
        baseline="leave_one_out",
        scale_advantage=False,
        loss_level="constant",
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
                Arm("rule", "1 accuracy + 0.1 format", _rewards(accuracy=1.0, format=0.1)),
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
                _precision("fp32", "fp32"),
                _precision("bf16", "bf16 with fp32 master weights"),
                _precision("fp16", "fp16 with dynamic loss scaling"),
                _precision("fp8", "fp8"),
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
    return "train.precision=fp8 is for the stages pretrain and sft, and an ablation trains by RL too"
