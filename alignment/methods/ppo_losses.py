"""PPO's arithmetic as functions of tensors: rewards, advantages, clipped losses, KL.

Sources: PPO (arXiv 1707.06347, equations 7 and 9), GAE (arXiv 1506.02438, equation 16), RLHF's rewards and adaptive KL
(arXiv 1909.08593, equation 2 and section 2.2). Shapes: B answers, T tokens of the longest; `mask` is (B, T), true on the
tokens that were sampled, which start at column 0. Values outside the mask are ignored, and are 0 in results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def token_rewards(
    log_ratio: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor, kl_coef: float, estimator: str = "k1"
) -> torch.Tensor:
    """(B, T): -kl_coef * KL at every token, and the answer's score on top of it at the last one.

    Args:
        log_ratio: (B, T), log pi(token) - log ref(token) in nats.
        scores: (B,), what the reward functions gave to the whole answers.
        estimator: k1 is the log ratio itself; k3 is exp(-log_ratio) - 1 + log_ratio, never negative and with less variance.
    """
    import torch

    kl = log_ratio if estimator == "k1" else torch.expm1(-log_ratio) + log_ratio
    rewards = -kl_coef * kl * mask
    last = mask.sum(1) - 1
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    return rewards


def advantages_and_returns(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimates and the critic's targets, both (B, T).

    delta_t = r_t + gamma * V_{t+1} - V_t and A_t = delta_t + gamma * lam * A_{t+1}, with V = A = 0 after the last token;
    the target is A_t + V_t.
    """
    import torch

    values = values * mask
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        next_value = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(following)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        advantages[:, t] = following
    return advantages, (advantages + values) * mask


def whiten(values: torch.Tensor, mask: torch.Tensor, *, shift_mean: bool = True) -> torch.Tensor:
    """Values scaled to variance 1 over the mask, and to mean 0 unless `shift_mean` is off; one value alone stays as it is."""
    import torch

    inside = values[mask.bool()]
    if inside.numel() < 2:
        return values * mask
    mean, variance = inside.mean(), inside.var()
    out = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (out if shift_mean else out + mean) * mask


def policy_losses(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, advantages: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per token: the clipped surrogate loss max(-A ratio, -A clamp(ratio, 1 - clip, 1 + clip)), and whether it was clipped."""
    import torch

    ratio = torch.exp(log_probs - old_log_probs)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(plain, clipped), clipped > plain


def value_losses(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per token: half of the larger squared error of V and of V kept within `clip` of its old value, and whether the latter."""
    import torch

    kept = old_values + (values - old_values).clamp(-clip, clip)
    plain, clipped = (values - returns) ** 2, (kept - returns) ** 2
    return 0.5 * torch.maximum(plain, clipped), clipped > plain


def next_kl_coef(kl_coef: float, kl: float, target: float, answers: int, horizon: int) -> float:
    """The adaptive controller: the coefficient rises while the KL per answer lies above its target, and falls below it."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * answers / horizon)


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1 - Var[returns - V] / Var[returns] over the mask: 1 is a perfect critic, 0 an ignorant one; may be NaN."""
    inside = mask.bool()
    spread = returns[inside].var()
    return float(1 - (returns - values)[inside].var() / spread) if spread > 0 else float("nan")
