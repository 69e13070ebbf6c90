"""The quantile Huber loss: worked by hand, against a naive loop, and where its gradient flows."""

import pytest
import torch

from vlmrb_torchrl.objectives import quantile_huber


@pytest.mark.parametrize(
    ("kappa", "expected"),
    [
        # δ = target − prediction. Prediction 0: δ = 1 and −1; prediction 2: δ = −1 and −3.
        # Huber with κ = 1 gives ½, ½ and ½, 3 − ½ = 2½.
        # Weights: τ = ¼ of prediction 0 is ¼ for δ = 1 and ¾ for δ = −1; τ = ¾ of prediction 2 is
        # |¾ − 1| = ¼ for both.  Prediction 0: (¼·½ + ¾·½)/2 = ¼; prediction 2: (¼·½ + ¼·2½)/2 = ⅜.
        (1.0, 0.25 + 0.375),
        # κ = 4 keeps every δ in the square part: ½, ½ and ½, 4½, then divided by 4.
        # Prediction 0: (¼·½ + ¾·½)/2/4 = 1/16; prediction 2: (¼·½ + ¼·4½)/2/4 = 5/32.
        (4.0, 1 / 16 + 5 / 32),
    ],
)
def test_loss_is_what_it_is_by_hand(kappa, expected):
    prediction, tau = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.25, 0.75]])
    target = torch.tensor([[1.0, -1.0]])
    loss = quantile_huber(prediction, tau, target, kappa)
    assert loss.tolist() == pytest.approx([expected])


def naive(prediction, tau, target, kappa):
    """Eq. 3 of the paper, one number at a time."""
    losses = []
    for b in range(len(prediction)):
        total = 0.0
        for i in range(len(prediction[b])):
            for j in range(len(target[b])):
                delta = target[b][j] - prediction[b][i]
                if abs(delta) <= kappa:
                    huber = 0.5 * delta**2
                else:
                    huber = kappa * (abs(delta) - 0.5 * kappa)
                below = 1.0 if delta < 0 else 0.0
                total += abs(tau[b][i] - below) * huber / kappa / len(target[b])
        losses.append(total)
    return losses


@pytest.mark.parametrize("kappa", [0.1, 1.0, 3.0])
def test_loss_equals_a_naive_loop_on_random_input(kappa):
    seed = torch.seed() % 2**31
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    batch, online, targets = torch.randint(1, 9, (3,), generator=generator).tolist()
    prediction = torch.randn(batch, online, generator=generator, dtype=torch.float64)
    tau = torch.rand(batch, online, generator=generator, dtype=torch.float64)
    target = torch.randn(batch, targets, generator=generator, dtype=torch.float64)
    loss = quantile_huber(prediction, tau, target, kappa)
    expected = naive(prediction.tolist(), tau.tolist(), target.tolist(), kappa)
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)


def test_gradient_flows_into_the_prediction_alone():
    """One pair, δ = 3 beyond κ = 1: the loss falls by τ for each unit of prediction."""
    prediction, target = torch.zeros(1, 1, requires_grad=True), torch.tensor([[3.0]])
    target.requires_grad_()
    tau = torch.tensor([[0.3]], requires_grad=True)
    quantile_huber(prediction, tau, target).sum().backward()
    assert prediction.grad.item() == pytest.approx(-0.3)
    assert target.grad is None


def test_loss_takes_any_number_of_batch_dimensions():
    prediction, tau, target = torch.randn(6, 3), torch.rand(6, 3), torch.randn(6, 5)
    flat = quantile_huber(prediction, tau, target)
    shaped = quantile_huber(prediction.view(2, 3, 3), tau.view(2, 3, 3), target.view(2, 3, 5))
    assert torch.equal(shaped, flat.view(2, 3))
