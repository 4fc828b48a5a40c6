"""Correct the loss for tokens that another policy sampled: importance weights and masks.

    weights, left_out = corrected(rl, policy, old, sampled, advantages, mask)

`sampled` are the log-probabilities of the distribution that drew the tokens (the behaviour's, mu), `old` the
trainer's before the first update on them, `policy` the trainer's now. mu differs from `old` because another
engine computed it, or because it is of an older version of the policy.

Sources: truncated importance sampling, Ionides 2008; for RL, Yao et al. 2025,
fengyao.notion.site/off-policy-rl; IcePop, Ring-1T, arXiv 2510.18855, section 3; DPPO, arXiv 2602.04879
(Binary-TV).
"""

import torch

from r1hpc.config.schema.rl import RlConfig


def corrected(
    rl: RlConfig,
    policy: torch.Tensor,
    old: torch.Tensor,
    sampled: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights of a micro batch's policy loss, and which tokens rl.importance_mask leaves out.

    A weight is min(pi_old / mu, rl.importance_cap), without a gradient; 0 on padding and for a token that is
    left out. All tensors are (rows, longest), in nats; `mask` is True on the completions' tokens.
    """
    ratio = importance_ratio(old, sampled, mask, rl.importance_level)
    kept = mask
    if rl.importance_mask == "ratio":
        kept = mask & (ratio >= rl.importance_low) & (ratio <= rl.importance_cap)
    elif rl.importance_mask == "trust":
        kept = mask & within_trust(policy, sampled, advantages, mask, rl.importance_trust)
    return torch.where(kept, ratio.clamp_max(rl.importance_cap), 0.0), mask & ~kept


def importance_ratio(
    trainer: torch.Tensor, sampler: torch.Tensor, mask: torch.Tensor, level: str
) -> torch.Tensor:
    """Return pi_trainer / pi_sampler without a gradient; 0 on padding.

    `level` token: of each token. sequence: the geometric mean over the completion's tokens, for all of them;
    the product would leave the cap within a few hundred tokens.
    """
    # Mask before the exponential: values on padding could overflow, and infinity x 0 is nan.
    difference = trainer.detach() - sampler
    if level == "sequence":
        total = torch.where(mask, difference, 0.0).sum(1)
        difference = (total / mask.sum(1).clamp_min(1))[:, None].expand_as(mask)
    return torch.exp(torch.where(mask, difference, -torch.inf))


def within_trust(
    policy: torch.Tensor, sampler: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, most: float
) -> torch.Tensor:
    """Return False where a token's probability has already moved by more than `most` in the direction that
    its advantage pushes: up for a positive one, down for a negative one."""
    moved = torch.exp(torch.where(mask, policy.detach(), -torch.inf))
    moved = moved - torch.exp(torch.where(mask, sampler, -torch.inf))
    return torch.where(advantages > 0, moved <= most, moved >= -most)
