"""PPO's critic: a backbone of its own with one number per token, beside the policy in one engine.

One engine, so one checkpoint holds both and their optimizer states; the critic's rate is a parameter
group's own (rl.critic_lr).
"""

import copy
from typing import Any

import torch
from torch import nn

from r1hpc.config.schema import RunConfig
from r1hpc.train.engine import Parameters


class ActorCritic(nn.Module):
    """The policy and its critic: forward gives (logits, values)."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy
        # A copy: a critic that shares the policy's body pulls at it with a loss of another scale.
        self.critic = copy.deepcopy(policy.base_model)
        self.value_head = nn.Linear(policy.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, seq_len) -> logits (rows, kept, vocab) and values (rows, kept) of the last positions."""
        logits = self.policy(input_ids=input_ids, logits_to_keep=logits_to_keep).logits
        hidden = self.critic(input_ids=input_ids).last_hidden_state[:, -logits_to_keep:]
        return logits, self.value_head(hidden)[..., 0]

    def parameter_groups(self, config: RunConfig) -> Parameters:
        """The policy at train.lr, the critic at rl.critic_lr, both on the schedule of train."""
        critic = [*self.critic.parameters(), *self.value_head.parameters()]
        return [
            {"params": [p for p in self.policy.parameters() if p.requires_grad], "lr_scale": 1.0},
            {"params": critic, "lr_scale": config.rl.critic_lr / config.train.lr},
        ]
