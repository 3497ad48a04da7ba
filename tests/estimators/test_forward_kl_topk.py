import torch

from megatron_opd.estimators.forward_kl_topk import ForwardKLTopK
from tests.estimators.cases import forward_kl, logits, scores_for

T, V = 20, 12


def loss_of(k, p, q):
    estimator = ForwardKLTopK(top_k=k)
    return estimator(scores_for(estimator.needs, p, q, q)).loss


def test_it_rises_from_zero_or_more_to_the_full_forward_kl_as_ids_are_added():
    p, q = logits(T, V, 0), logits(T, V, 1)
    losses = torch.stack([loss_of(k, p, q) for k in range(1, V + 1)])
    assert (losses[0] >= 0).all()
    assert (losses.diff(dim=0) >= -1e-14).all()
    torch.testing.assert_close(losses[-1], forward_kl(p, q), rtol=1e-12, atol=1e-12)


def test_over_the_whole_vocabulary_the_gradient_is_p_minus_q():
    p, q = logits(T, V, 0).requires_grad_(), logits(T, V, 1)
    for k in (V - 1, V):  # one id in the rest is as good as named
        (grad,) = torch.autograd.grad(loss_of(k, p, q).sum(), p)
        torch.testing.assert_close(grad, (p.softmax(-1) - q.softmax(-1)).detach(), rtol=1e-11, atol=1e-13)


def test_outside_the_top_the_gradient_moves_mass_without_reshaping_it():
    p, q = logits(T, V, 0).requires_grad_(), logits(T, V, 1)
    (grad,) = torch.autograd.grad(loss_of(3, p, q).sum(), p)
    top = q.topk(3, -1).indices
    pull = (grad / p.softmax(-1)).detach()
    rest = torch.ones(T, V, dtype=torch.bool).scatter(1, top, False)
    q_rest, p_rest = ((x.softmax(-1).detach() * rest).sum(-1) for x in (q, p))
    torch.testing.assert_close(pull[rest].view(T, -1), (1 - q_rest / p_rest)[:, None].expand(T, V - 3))


def test_noise_in_the_rest_is_no_mass():
    """Sum q rounds to 1 or above while the student's tail is tiny but exact: neither loss nor gradient may notice."""
    q = torch.zeros(5, V)
    q[:, 0] = torch.tensor([15.0, 18.0, 22.0, 40.0, 90.0])
    for p in (q.clone(), q + torch.linspace(0, 1, V)):
        p.requires_grad_()
        loss = loss_of(4, p, q)
        (grad,) = torch.autograd.grad(loss.sum(), p)
        assert loss.isfinite().all() and (loss.abs() < 2e-5).all() and (grad.abs() < 1e-5).all()
