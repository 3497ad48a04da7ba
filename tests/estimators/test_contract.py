"""What every estimator in the registry must keep, found by its `needs` alone."""

from dataclasses import replace

import pytest
import torch

from megatron_opd.estimators import REGISTRY, build
from megatron_opd.learner.scores import score
from tests.estimators.cases import dense_scores, logits, micro_batch, sample, scores_for, with_arrays
from tests.kernels.sharding import CUTS, V, groups, rows_of, split, tokens_of, whole_head_gradient, whole_hidden_gradient
from tests.ranks import run_ranks

T, D = 8, 6
MASK = torch.tensor([True, True, False, True, True, False, True, True])
SETS = ("token", "head", "draws", "top")
WITH_TEACHER = [name for name in REGISTRY if build(name, {}).needs.teacher]
every_estimator = pytest.mark.parametrize("name", REGISTRY)


def case(name):
    estimator = build(name, {})
    g = torch.Generator().manual_seed(3)
    hidden, head = (torch.randn(n, D, generator=g, dtype=torch.float64) for n in (T, V))
    q_logits = hidden @ head.t() + logits(T, V, 4, scale=0.5)
    b_logits = hidden @ head.t() + logits(T, V, 5, scale=0.2)
    return estimator, hidden, head, micro_batch(estimator.needs, q_logits, b_logits, *sample(estimator.needs, b_logits), mask=MASK)


def total(estimate):
    return torch.where(MASK, estimate.loss, 0.0).sum()


def every_split_on_this_rank():
    group_of = groups()
    for name in REGISTRY:
        estimator, hidden, head, batch = case(name)
        hidden.requires_grad_(), head.requires_grad_()
        expected = estimator(dense_scores(hidden @ head.t(), batch))
        grads = torch.autograd.grad(total(expected), (hidden, head))
        for tp, group in group_of.items():
            for cuts_name, cuts in CUTS[tp]:
                shard = split(cuts, group, sequence_parallel=tp > 1 and cuts_name != "even")
                mine = tokens_of(hidden.detach(), shard).clone().requires_grad_(), rows_of(head.detach(), shard).requires_grad_()
                estimate = estimator(score(*mine, batch, estimator.needs, shard, chunk_tokens=3))
                total(estimate).backward()
                got = (estimate.loss[MASK], whole_hidden_gradient(mine[0].grad, shard), whole_head_gradient(mine[1].grad, shard))
                for part, ours, theirs in zip(("loss", "hidden gradient", "head gradient"), got, (expected.loss[MASK], *grads)):
                    assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12), f"{name}: {part} differs with tp {tp}, {cuts_name}"
                for key, value in estimate.diagnostics.items():
                    assert torch.allclose(value[MASK], expected.diagnostics[key][MASK]), f"{name}: {key} differs with tp {tp}, {cuts_name}"
    return sorted(REGISTRY)


def test_splitting_the_vocabulary_changes_no_loss_and_no_gradient():
    assert run_ranks(every_split_on_this_rank, 4) == [sorted(REGISTRY)] * 4


@every_estimator
def test_the_estimate_is_one_finite_number_per_token_and_diagnostics_carry_no_gradient(name):
    estimator, hidden, head, batch = case(name)
    estimate = estimator(dense_scores(hidden @ head.requires_grad_().t(), batch))
    assert estimate.loss.shape == (T,) and estimate.loss.requires_grad and estimate.loss.isfinite().all()
    for value in estimate.diagnostics.values():
        assert value.shape == (T,) and not value.requires_grad and value.isfinite().all()
    assert ("ratio" in estimate.diagnostics) == estimator.needs.behaviour_logp
    assert ("kl" in estimate.diagnostics) == estimator.needs.teacher


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_student_equal_to_teacher_has_no_loss_and_no_gradient(name):
    estimator = build(name, {})
    same, b_logits = logits(T, V, 7).requires_grad_(), logits(T, V, 8)
    loss = estimator(scores_for(estimator.needs, same, same.detach(), b_logits)).loss
    (grad,) = torch.autograd.grad(loss.sum(), same)
    assert loss.abs().max() < 1e-12 and grad.abs().max() < 1e-12


@every_estimator
@pytest.mark.parametrize("junk", [0.0, -1e4, 1e4])
def test_masked_rows_may_hold_any_numbers(name, junk):
    estimator, hidden, head, batch = case(name)
    z = (hidden @ head.t()).requires_grad_()
    clean = dense_scores(z, batch)

    signs = {"student_logp": 1, "behaviour_logp": -1, "teacher_logp": -1}  # so that differences are large too
    spoilt = with_arrays(clean, lambda field, values: torch.where(MASK[:, None], values, signs[field] * junk))
    if clean.top_log_tail is not None:
        spoilt = replace(spoilt, top_log_tail=torch.where(MASK, clean.top_log_tail, junk))
    estimate, expected = estimator(spoilt), estimator(clean)
    for value in (estimate.loss, *estimate.diagnostics.values()):
        assert value.isfinite().all()
    assert torch.equal(total(estimate), total(expected))
    (grad,) = torch.autograd.grad(total(estimate), z, retain_graph=True)
    (expected_grad,) = torch.autograd.grad(total(expected), z)
    assert torch.equal(grad, expected_grad)


@every_estimator
def test_a_token_does_not_see_its_neighbours(name):
    estimator, hidden, head, batch = case(name)
    whole = estimator(dense_scores(hidden @ head.t(), batch))

    kept = torch.tensor([6, 0, 3])
    part = with_arrays(batch, lambda field, values: values[kept])
    part = replace(part, mask=batch.mask[kept], **{n: replace(one, ids=one.ids[kept]) for n in SETS if (one := getattr(part, n))})
    alone = estimator(dense_scores((hidden @ head.t())[kept], part))
    torch.testing.assert_close(alone.loss, whole.loss[kept], rtol=1e-13, atol=1e-14)


@every_estimator
def test_at_lag_zero_every_ratio_is_one(name):
    estimator = build(name, {})
    p = logits(T, V, 9)
    estimate = estimator(scores_for(estimator.needs, p, logits(T, V, 10), p))
    ratios = estimate.diagnostics.get("ratio", torch.ones(T, dtype=torch.float64))
    torch.testing.assert_close(ratios, torch.ones_like(ratios), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_float32_scores_of_nearly_certain_tokens_stay_near_the_exact_loss(name):
    """Almost all mass on one id: 1 - sum q is rounding noise in float32, the student's tail is not."""
    estimator = build(name, {})
    peak = torch.zeros(T, V, dtype=torch.float64)
    peak[torch.arange(T), torch.arange(T)] = torch.linspace(15, 60, T, dtype=torch.float64)
    p, q, b = (peak + logits(T, V, seed, scale=0.3) for seed in (11, 12, 13))
    batch = micro_batch(estimator.needs, q, b, *sample(estimator.needs, b))
    results = []
    for dtype in (torch.float64, torch.float32):
        narrow = with_arrays(batch, lambda field, values: values.to(dtype))  # noqa: B023
        z = p.to(dtype).requires_grad_()
        loss = estimator(dense_scores(z, narrow)).loss
        (grad,) = torch.autograd.grad(loss.sum(), z)
        results.append((loss.double(), grad.double()))
    (exact, exact_grad), (loss, grad) = results
    torch.testing.assert_close(loss, exact, rtol=1e-4, atol=5e-5)
    torch.testing.assert_close(grad, exact_grad, rtol=1e-4, atol=2e-5)
