"""PPO's arithmetic against numbers worked by hand; the steps are in the comments."""

import math

import pytest
import torch

from alignment.methods.ppo_losses import (
    advantages_and_returns,
    explained_variance,
    next_kl_coef,
    policy_losses,
    token_rewards,
    value_losses,
    whiten,
)

MASK = torch.tensor([[True, True, True], [True, True, False]])


def close(tensor, expected):
    torch.testing.assert_close(tensor, torch.tensor(expected, dtype=tensor.dtype))


def test_every_token_pays_its_kl_and_the_last_one_gets_the_score():
    log_ratio = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, 9.0]])  # 9 lies outside the mask
    rewards = token_rewards(log_ratio, torch.tensor([3.0, -2.0]), MASK, kl_coef=0.1)
    # -0.1 * 0.5, -0.1 * -1, 3 - 0.1 * 2;  -0.1 * 1, -2 - 0.1 * 0
    close(rewards, [[-0.05, 0.1, 2.8], [-0.1, -2.0, 0.0]])


def test_k3_is_never_negative_and_close_to_half_the_square():
    log_ratio = torch.tensor([[0.1, -0.1, 1.0]])
    rewards = token_rewards(log_ratio, torch.zeros(1), torch.ones(1, 3, dtype=torch.bool), 1.0, "k3")
    # exp(-0.1) - 1 + 0.1 = 0.0048374, exp(0.1) - 1 - 0.1 = 0.0051709, exp(-1) - 1 + 1 = 0.3678794
    close(rewards, [[-0.0048374, -0.0051709, -0.3678794]])


def test_gae_by_hand():
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 2.0, 0.0]])
    values = torch.tensor([[0.5, 0.2, 0.4], [1.0, 0.5, 7.0]])  # 7 lies outside the mask
    advantages, returns = advantages_and_returns(rewards, values, MASK, gamma=0.9, lam=0.5)
    # Row 0: delta_2 = 1 - 0.4 = 0.6;  delta_1 = 0.9 * 0.4 - 0.2 = 0.16;  delta_0 = 0.9 * 0.2 - 0.5 = -0.32
    #        A_2 = 0.6;  A_1 = 0.16 + 0.45 * 0.6 = 0.43;  A_0 = -0.32 + 0.45 * 0.43 = -0.1265
    # Row 1: delta_1 = 2 - 0.5 = 1.5 (nothing follows the last token);  delta_0 = 0.9 * 0.5 - 1 = -0.55
    #        A_1 = 1.5;  A_0 = -0.55 + 0.45 * 1.5 = 0.125
    close(advantages, [[-0.1265, 0.43, 0.6], [0.125, 1.5, 0.0]])
    close(returns, [[0.3735, 0.63, 1.0], [1.125, 2.0, 0.0]])


def test_gae_with_lambda_1_is_the_return_minus_the_value_and_with_0_the_td_error():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand((2, 3), generator=generator) * MASK
    values = torch.rand((2, 3), generator=generator)
    advantages, returns = advantages_and_returns(rewards, values, MASK, gamma=1.0, lam=1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1) * MASK
    torch.testing.assert_close(returns, to_go)
    torch.testing.assert_close(advantages, (to_go - values) * MASK)
    advantages, _ = advantages_and_returns(rewards, values, MASK, gamma=1.0, lam=0.0)
    assert advantages[0, 0].item() == pytest.approx((rewards[0, 0] + values[0, 1] - values[0, 0]).item())


def test_whitening_looks_at_the_mask_only():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 100.0]])
    # Mean 3, variance (4 + 1 + 0 + 1 + 4) / 4 = 2.5, standard deviation 1.5811388
    close(whiten(values, MASK), [[-1.2649111, -0.6324555, 0.0], [0.6324555, 1.2649111, 0.0]])
    close(whiten(values, MASK, shift_mean=False), [[1.7350889, 2.3675445, 3.0], [3.6324555, 4.2649111, 0.0]])
    assert whiten(torch.tensor([[5.0]]), torch.tensor([[True]])).item() == 5.0


def test_the_policy_loss_is_clipped_only_where_that_makes_it_worse():
    old = torch.zeros(4)
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5])
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0])
    losses, clipped = policy_losses(ratios.log(), old, advantages, clip=0.2)
    # 1.5, A > 0: max(-3, -2.4) = -2.4, clipped.   1.5, A < 0: max(3, 2.4) = 3.
    # 0.5, A > 0: max(-1, -1.6) = -1.              0.5, A < 0: max(1, 1.6) = 1.6, clipped.
    close(losses, [-2.4, 3.0, -1.0, 1.6])
    assert clipped.tolist() == [True, False, False, True]


def test_a_clipped_token_gives_no_gradient():
    log_probs = torch.tensor([math.log(1.5), math.log(1.1)], requires_grad=True)
    losses, _ = policy_losses(log_probs, torch.zeros(2), torch.ones(2), clip=0.2)
    losses.sum().backward()
    close(log_probs.grad, [0.0, -1.1])  # d/dx of -exp(x) at log 1.1


def test_the_value_loss_takes_the_worse_of_the_new_and_the_clipped_value():
    old, returns = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([2.0, 2.0, 0.0])
    values = torch.tensor([1.1, 1.9, 1.5])
    losses, clipped = value_losses(values, old, returns, clip=0.2)
    # 1.1 is within 0.2 of 1: 0.5 * 0.9^2.  1.9 is kept at 1.2: 0.5 * max(0.1^2, 0.8^2), clipped.
    # 1.5 is kept at 1.2: 0.5 * max(1.5^2, 1.2^2), not clipped.
    close(losses, [0.405, 0.32, 1.125])
    assert clipped.tolist() == [False, True, False]


def test_the_adaptive_coefficient_follows_the_kl():
    # 12 / 6 - 1 = 1 is cut to 0.2: 0.1 * (1 + 0.2 * 64 / 640) = 0.102;  5.4 / 6 - 1 = -0.1: 0.1 * (1 - 0.1 * 0.1) = 0.099
    assert next_kl_coef(0.1, 12.0, 6.0, answers=64, horizon=640) == pytest.approx(0.102)
    assert next_kl_coef(0.1, 5.4, 6.0, answers=64, horizon=640) == pytest.approx(0.099)
    assert next_kl_coef(0.1, 6.0, 6.0, answers=64, horizon=640) == pytest.approx(0.1)


def test_explained_variance():
    returns = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 99.0]])
    assert explained_variance(returns, returns, MASK) == pytest.approx(1.0)
    assert explained_variance(torch.full((2, 3), 3.0), returns, MASK) == pytest.approx(0.0)
    # Errors 0.5, -0.5, 0.5, -0.5, 0 have variance 1 / 4 = 0.25; the returns' is 2.5.
    off = returns - torch.tensor([[0.5, -0.5, 0.5], [-0.5, 0.0, 0.0]])
    assert explained_variance(off, returns, MASK) == pytest.approx(0.9)
    assert math.isnan(explained_variance(returns, torch.ones(2, 3), MASK))
