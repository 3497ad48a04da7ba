"""Exact expectations of the sampled estimators: every outcome of the draw is one row, weighted by its probability."""

import itertools

import pytest
import torch

from megatron_opd.estimators.head_tail_reverse_kl import HeadTailReverseKL
from megatron_opd.estimators.sampled_reverse_kl import SampledReverseKL
from tests.estimators.cases import dense_scores, largest, logits, micro_batch, outside, reverse_kl, scores_for


def policies(vocab, seed):
    """Student, teacher and a stale behaviour policy [1, V]."""
    return logits(1, vocab, seed), logits(1, vocab, seed + 100), logits(1, vocab, seed + 200)


def near_policies(vocab, seed):
    """The same with a student that has moved a little from b, and a teacher that is not far."""
    p = logits(1, vocab, seed)
    return p, p + logits(1, vocab, seed + 100, scale=0.7), p + logits(1, vocab, seed + 200, scale=0.2)


def outcomes(estimator, q, b):
    """(probability, tokens, draws) of every way in which the samples of one position can fall."""
    vocab, needs = q.shape[1], estimator.needs
    b_logp = b.log_softmax(-1)
    if not needs.draws:
        return b_logp.exp()[0], torch.arange(vocab)[:, None], None
    rest = outside(b_logp, largest(b_logp, needs.head))[0]
    draws = torch.tensor(list(itertools.product(rest.nonzero()[:, 0].tolist(), repeat=needs.draws)))
    return rest[draws].prod(-1), torch.zeros(len(draws), 1, dtype=torch.int64), draws


def gradients(estimator, p, q, b):
    """(probability [n], value [n], gradient over the student's logits [n, V]) of every outcome."""
    weight, tokens, draws = outcomes(estimator, q, b)
    n = len(tokens)
    z = p.expand(n, -1).clone().requires_grad_()
    estimate = estimator(dense_scores(z, micro_batch(estimator.needs, q.expand(n, -1), b.expand(n, -1), tokens, draws), estimator.needs))
    (grad,) = torch.autograd.grad(estimate.loss.sum(), z)
    torch.testing.assert_close(weight.sum().item(), 1.0)
    return weight, estimate, grad


SIZES = [(1, 1, 12), (3, 1, 12), (3, 2, 12), (7, 2, 9), (1, 2, 5), (2, 3, 7)]  # head, draws, vocabulary
UNBIASED = [(SampledReverseKL(), 12), (SampledReverseKL(draws=1), 12), (SampledReverseKL(draws=2), 9), (SampledReverseKL(draws=3), 6)] + [
    (HeadTailReverseKL(head=head, draws=m), vocab) for head, m, vocab in SIZES
]


@pytest.mark.parametrize("estimator, vocab", UNBIASED, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_value_and_gradient_are_those_of_the_reverse_kl_in_expectation(estimator, vocab, seed):
    p, q, b = policies(vocab, seed)
    weight, estimate, grad = gradients(estimator, p, q, b)
    p.requires_grad_()
    exact = reverse_kl(p, q)
    (exact_grad,) = torch.autograd.grad(exact.sum(), p)
    torch.testing.assert_close((weight[:, None] * grad).sum(0), exact_grad[0], rtol=0, atol=1e-10)
    torch.testing.assert_close((weight * estimate.diagnostics["kl"]).sum(), exact[0].detach(), rtol=0, atol=1e-10)
    assert exact_grad.abs().max() > 1e-2


def variance(estimator, p, q, b):
    weight, _, grad = gradients(estimator, p, q, b)
    mean = (weight[:, None] * grad).sum(0)
    return (weight[:, None] * (grad - mean) ** 2).sum()


def test_the_variance_falls_as_one_over_the_number_of_draws():
    p, q, b = policies(9, 5)
    one, two, three = (variance(HeadTailReverseKL(head=3, draws=m, baseline=False), p, q, b) for m in (1, 2, 3))
    torch.testing.assert_close(two, one / 2)
    torch.testing.assert_close(three, one / 3)


def test_the_baseline_takes_variance_away():
    T, V = 3000, 60
    p, q, b = (torch.cat(parts) for parts in zip(*(near_policies(V, seed) for seed in range(T))))
    p.requires_grad_()
    (exact,) = torch.autograd.grad(reverse_kl(p, q).sum(), p)
    deviations = []
    for baseline in (True, False):
        estimator = HeadTailReverseKL(head=8, draws=8, baseline=baseline)
        (grad,) = torch.autograd.grad(estimator(scores_for(estimator.needs, p, q, b)).loss.sum(), p)
        deviations.append((grad - exact).square().sum(-1).mean())
    assert deviations[0] < 0.9 * deviations[1]


def test_head_and_tail_vary_less_than_as_many_draws():
    p, q, b = near_policies(12, 6)
    of_four_draws = variance(SampledReverseKL(), p, q, b) / 4
    assert variance(HeadTailReverseKL(head=2, draws=2), p, q, b) < of_four_draws


def test_a_head_over_the_whole_vocabulary_is_the_exact_reverse_kl_whatever_was_drawn():
    T, V = 9, 12
    p, q, b = logits(T, V, 1).requires_grad_(), logits(T, V, 2), logits(T, V, 3)
    estimator = HeadTailReverseKL(head=V, draws=2)
    estimate = estimator(scores_for(estimator.needs, p, q, b))
    exact = reverse_kl(p, q)
    torch.testing.assert_close(estimate.loss, exact, rtol=1e-12, atol=1e-13)
    (grad,), (exact_grad,) = torch.autograd.grad(estimate.loss.sum(), p), torch.autograd.grad(exact.sum(), p)
    torch.testing.assert_close(grad, exact_grad, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(estimate.diagnostics["support_mass"], torch.ones(T, dtype=torch.float64))
    assert estimate.diagnostics["behaviour_tail_mass"].count_nonzero() == 0


def test_draws_that_b_cannot_make_are_harmless_when_the_head_holds_all_of_b():
    p, q = logits(3, 8, 1).float().requires_grad_(), logits(3, 8, 2).float()
    b = torch.full((3, 8), -torch.inf)
    b[:, :4] = logits(3, 4, 3).float()
    estimator = HeadTailReverseKL(head=4, draws=2)
    draws = torch.tensor([[5, 6]] * 3)
    estimate = estimator(dense_scores(p, micro_batch(estimator.needs, q, b, torch.zeros(3, 1, dtype=torch.int64), draws), estimator.needs))
    (grad,) = torch.autograd.grad(estimate.loss.sum(), p)
    assert estimate.loss.isfinite().all() and grad.isfinite().all()


def test_diagnostics_name_the_masses_of_head_and_tail():
    T, V = 6, 12
    p, q, b = logits(T, V, 1), logits(T, V, 2), logits(T, V, 3)
    estimator = HeadTailReverseKL(head=4, draws=3)
    found = estimator(scores_for(estimator.needs, p, q, b)).diagnostics
    ids = b.topk(4, -1).indices
    torch.testing.assert_close(found["support_mass"], p.softmax(-1).gather(1, ids).sum(-1))
    torch.testing.assert_close(found["behaviour_tail_mass"], 1 - b.softmax(-1).gather(1, ids).sum(-1))


def test_the_advantage_is_a_constant_of_the_gradient():
    """The gradient is -rho A grad log p, with A of the current student and not of the stale policy."""
    p, q, b = policies(12, 8)
    _, _, grad = gradients(SampledReverseKL(), p, q, b)
    p, q, b = (x.log_softmax(-1)[0] for x in (p, q, b))
    advantage, ratio = q - p, (p - b).exp()
    scores = torch.eye(12, dtype=torch.float64) - p.exp()  # row a: gradient of log p(a) over the logits
    torch.testing.assert_close(grad, -(ratio * advantage)[:, None] * scores)
