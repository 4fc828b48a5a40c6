"""Add a critic to the policy for PPO: its network, the advantages from its values, and its loss.

Sources: PPO arXiv 1707.06347; GAE arXiv 1506.02438 eq. 16. The clipped surrogate is GRPO's: update.py.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from r1hpc.config.schema.run import RunConfig
from r1hpc.train.model.placement import Placement
from r1hpc.train.parallel.engine import Parameters
from r1hpc.train.rl.rollout import Floats
from r1hpc.train.rollout.policy import build_policy


class ActorCritic(nn.Module):
    """The policy and PPO's critic, a second backbone with one number per token: (logits, values).

    They share one engine, so one checkpoint holds both and their optimizer states.
    """

    def __init__(self, policy: Any, critic: nn.Module) -> None:
        """`critic` has its own body: a shared one would be pulled by a loss of another scale."""
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.value_head = nn.Linear(policy.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(
        self, input_ids: torch.Tensor, logits_to_keep: int, *, of_policy: bool = True, of_critic: bool = True
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Map (rows, seq_len) to logits (rows, kept, vocab) and values (rows, kept) of the last positions;
        None for a network that is not used."""
        logits = values = None
        if of_policy:
            logits = self.policy(input_ids=input_ids, logits_to_keep=logits_to_keep).logits
        if of_critic:
            hidden = self.critic(input_ids=input_ids).last_hidden_state[:, -logits_to_keep:]
            values = self.value_head(hidden)[..., 0]
        return logits, values

    def parameter_groups(self, config: RunConfig) -> Parameters:
        """Return the policy at train.lr and the critic at rl.critic_lr, both on train's schedule."""
        critic = [*self.critic.parameters(), *self.value_head.parameters()]
        return [
            {"params": [p for p in self.policy.parameters() if p.requires_grad], "lr_scale": 1.0},
            {"params": critic, "lr_scale": config.rl.critic_lr / config.train.lr},
        ]


def build_actor_critic(config: RunConfig, hf_config: dict[str, Any], place: Placement) -> ActorCritic:
    """Return the policy and a critic with the same initial weights. These are loaded or drawn twice, because
    sharded weights cannot be copied."""
    policy = build_policy(config, hf_config, place)
    network = ActorCritic(policy, build_policy(config, hf_config, place).base_model)
    place.put_rest(network)
    return network


def gae(
    rewards: Floats, values: Floats, lengths: npt.NDArray[np.int32], gamma: float, lam: float
) -> tuple[Floats, Floats]:
    """Return (advantages, returns) per token of completions (n, longest); 0 beyond each one's length.

    delta_t = r_t + gamma V_t+1 - V_t and A_t = delta_t + gamma lambda A_t+1 (1506.02438, eq. 16 as a
    recursion). The critic's targets are the returns A_t + V_t. After the last token V and A are 0, also for a
    truncated completion.

    Args:
        rewards: (n,), given at the last token.
        values: (n, longest), the critic's estimate before each token.
    """
    n, longest = values.shape
    advantages = np.zeros((n, longest))
    running, after = np.zeros(n), np.zeros(n)  # A and V of the token after t
    for t in range(longest - 1, -1, -1):
        is_last, inside = t == lengths - 1, t < lengths
        delta = np.where(is_last, rewards, 0.0) + gamma * np.where(is_last, 0.0, after) - values[:, t]
        running = np.where(inside, delta + gamma * lam * np.where(is_last, 0.0, running), 0.0)
        after = values[:, t]
        advantages[:, t] = running
    inside = np.arange(longest)[None, :] < lengths[:, None]
    return advantages, np.where(inside, advantages + values, 0.0)


def whiten(values: Floats, mask: npt.NDArray[np.bool_]) -> Floats:
    """Scale to mean 0 and standard deviation 1 over the masked entries; 0 elsewhere. It covers the whole
    rollout, not a micro batch, so it does not depend on how rows are dealt to ranks."""
    inside = values[mask]
    return np.where(mask, (values - inside.mean()) / (inside.std() + 1e-8), 0.0)


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, weights: torch.Tensor, clip: float
) -> torch.Tensor:
    """Return the critic's clipped squared error, weighted and summed (PPO's reference implementation)."""
    bounded = old_values + (values - old_values).clamp(-clip, clip)
    worst = torch.maximum((values - returns) ** 2, (bounded - returns) ** 2)
    return 0.5 * (worst * weights).sum()
