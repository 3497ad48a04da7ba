"""What every estimator in the registry must keep, found by its `needs` alone."""

from dataclasses import replace

import pytest
import torch

from megatron_opd.learner.scores import Heads, Settings, score
from megatron_opd.types import TokenScores
from tests.estimators.cases import (
    ARMS,
    BY_SEQUENCE,
    FROZEN,
    NO_DIVERGENCE,
    SUPERVISED,
    VARIANTS,
    dense_scores,
    logits,
    micro_batch,
    sample,
    scores_for,
    variant,
    with_arrays,
)
from tests.kernels.sharding import CUTS, V, groups, rows_of, split, tokens_of, whole_head_gradient, whole_hidden_gradient
from tests.ranks import run_ranks

T, D, D_TEACHER = 8, 6, 5
MASK = torch.tensor([True, True, False, True, True, False, True, True])
SETS = ("token", "head", "draws", "top")
WITH_TEACHER = [name for name in VARIANTS if name not in SUPERVISED]
every_estimator = pytest.mark.parametrize("name", VARIANTS)


class Case:
    """One micro-batch for an estimator, from hidden states and LM heads of student and teacher."""

    def __init__(self, name):
        self.estimator = variant(name)
        self.needs = self.estimator.needs
        g = torch.Generator().manual_seed(3)
        self.hidden, self.head = (torch.randn(n, D, generator=g, dtype=torch.float64) for n in (T, V))
        self.teacher_hidden, self.teacher_head = (torch.randn(n, D_TEACHER, generator=g, dtype=torch.float64) for n in (T, V))
        self.q_logits = self.teacher_hidden @ self.teacher_head.t()
        b_logits = self.hidden @ self.head.t() + logits(T, V, 5, scale=0.2)
        samples = sample(self.needs, b_logits)
        self.batch = micro_batch(self.needs, self.q_logits, b_logits, *samples, mask=MASK, teacher_hidden=self.teacher_hidden)

    def scores(self, student_logits):
        return dense_scores(student_logits, self.batch, self.needs, self.q_logits)


def total(estimate):
    return torch.where(MASK, estimate.loss, 0.0).sum()


def every_split_on_this_rank():
    group_of = groups()
    for name in VARIANTS:
        case = Case(name)
        estimator, hidden, head = case.estimator, case.hidden.requires_grad_(), case.head.requires_grad_()
        expected = estimator(case.scores(hidden @ head.t()))
        grads = torch.autograd.grad(total(expected), (hidden, head))
        for tp, group in group_of.items():
            for cuts_name, cuts in CUTS[tp]:
                shard = split(cuts, group, sequence_parallel=tp > 1 and cuts_name != "even")
                mine = tokens_of(hidden.detach(), shard).clone().requires_grad_(), rows_of(head.detach(), shard).requires_grad_()
                heads = Heads(student=mine[1], teacher=rows_of(case.teacher_head, shard), shard=shard)
                estimate = estimator(score(mine[0], heads, case.batch, case.needs, Settings(chunk_tokens=3))[0])
                total(estimate).backward()
                got = (estimate.loss[MASK], whole_hidden_gradient(mine[0].grad, shard), whole_head_gradient(mine[1].grad, shard))
                for part, ours, theirs in zip(("loss", "hidden gradient", "head gradient"), got, (expected.loss[MASK], *grads)):
                    assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12), f"{name}: {part} differs with tp {tp}, {cuts_name}"
                for key, value in estimate.diagnostics.items():
                    assert torch.allclose(value[MASK], expected.diagnostics[key][MASK]), f"{name}: {key} differs with tp {tp}, {cuts_name}"
    return len(VARIANTS)


def test_splitting_the_vocabulary_changes_no_loss_and_no_gradient():
    assert run_ranks(every_split_on_this_rank, 4) == [len(VARIANTS)] * 4


@every_estimator
def test_the_estimate_is_one_finite_number_per_token_and_diagnostics_carry_no_gradient(name):
    case = Case(name)
    estimate = case.estimator(case.scores(case.hidden @ case.head.requires_grad_().t()))
    assert estimate.loss.shape == (T,) and estimate.loss.requires_grad and estimate.loss.isfinite().all()
    for value in estimate.diagnostics.values():
        assert value.shape == (T,) and not value.requires_grad and value.isfinite().all()
    assert ("kl" in estimate.diagnostics) == case.needs.teacher


@pytest.mark.parametrize("name", [name for name in WITH_TEACHER if name not in (*FROZEN, *NO_DIVERGENCE)])
def test_student_equal_to_teacher_has_no_loss_and_no_gradient(name):
    estimator = variant(name)
    same, b_logits = logits(T, V, 7).requires_grad_(), logits(T, V, 8)
    loss = estimator(scores_for(estimator.needs, same, same.detach(), b_logits)).loss
    (grad,) = torch.autograd.grad(loss.sum(), same)
    assert loss.abs().max() < 1e-12 and grad.abs().max() < 1e-12


@pytest.mark.parametrize("name", NO_DIVERGENCE)
def test_a_truncated_sum_pulls_even_where_student_and_teacher_agree(name):
    estimator = variant(name)
    same = logits(T, V, 7).requires_grad_()
    (grad,) = torch.autograd.grad(estimator(scores_for(estimator.needs, same, same.detach(), same.detach())).loss.sum(), same)
    assert grad.abs().max() > 1e-3


@every_estimator
@pytest.mark.parametrize("junk", [0.0, -1e4, 1e4])
def test_masked_rows_may_hold_any_numbers(name, junk):
    case = Case(name)
    z = (case.hidden @ case.head.t()).requires_grad_()
    clean = case.scores(z)

    signs = {"student_logp": 1, "student_log_rest": 1}  # so that differences to the cached ones are large too

    def spoil(field, values):
        return torch.where(MASK if values.dim() == 1 else MASK[:, None], values, signs.get(field, -1) * junk)

    spoilt: TokenScores = with_arrays(clean, spoil)
    if clean.dense is not None:
        spoilt = replace(spoilt, dense=replace(clean.dense, divergence=spoil("student_logp", clean.dense.divergence)))
    estimate, expected = case.estimator(spoilt), case.estimator(clean)
    for value in (estimate.loss, *estimate.diagnostics.values()):
        assert value.isfinite().all()
    assert torch.equal(total(estimate), total(expected))
    (grad,) = torch.autograd.grad(total(estimate), z, retain_graph=True)
    (expected_grad,) = torch.autograd.grad(total(expected), z)
    assert torch.equal(grad, expected_grad)


@every_estimator
def test_a_sequence_does_not_see_its_neighbours_nor_a_token_those_beside_it(name):
    case = Case(name)
    z = case.hidden @ case.head.t()
    whole = case.estimator(case.scores(z))

    kept = torch.tensor([4, 5, 6, 7] if name in BY_SEQUENCE else [6, 0, 3])
    part = with_arrays(case.batch, lambda field, values: values[kept])
    sets = {
        n: replace(one, ids=one.ids[kept], counts=None if one.counts is None else one.counts[kept])
        for n in SETS
        if (one := getattr(part, n))
    }
    part = replace(part, mask=MASK[kept], sequences=torch.zeros(len(kept), dtype=torch.int64), **sets)
    alone = case.estimator(dense_scores(z[kept], part, case.needs, case.q_logits[kept]))
    torch.testing.assert_close(alone.loss[MASK[kept]], whole.loss[kept][MASK[kept]], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", [*ARMS, "frozen"])
def test_at_lag_zero_every_arm_is_the_plain_estimator(name):
    p, q = logits(T, V, 9).requires_grad_(), logits(T, V, 10)
    needs = variant("sampled_reverse_kl").needs
    losses = [variant(one)(scores_for(needs, p, q, p.detach())).loss for one in ("sampled_reverse_kl", name)]
    (wanted,), (got,) = (torch.autograd.grad(loss.sum(), p) for loss in losses)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_float32_scores_of_nearly_certain_tokens_stay_near_the_exact_loss(name):
    """Almost all mass on one id: 1 - sum q is rounding noise in float32, the student's rest is not."""
    estimator = variant(name)
    peak = torch.zeros(T, V, dtype=torch.float64)
    peak[torch.arange(T), torch.arange(T)] = torch.linspace(15, 60, T, dtype=torch.float64)
    p, q, b = (peak + logits(T, V, seed, scale=0.3) for seed in (11, 12, 13))
    batch = micro_batch(estimator.needs, q, b, *sample(estimator.needs, b))
    results = []
    for dtype in (torch.float64, torch.float32):
        narrow = with_arrays(batch, lambda field, values: values.to(dtype))  # noqa: B023
        z = p.to(dtype).requires_grad_()
        loss = estimator(dense_scores(z, narrow, estimator.needs, q.to(dtype))).loss
        (grad,) = torch.autograd.grad(loss.sum(), z)
        results.append((loss.double(), grad.double()))
    (exact, exact_grad), (loss, grad) = results
    torch.testing.assert_close(loss, exact, rtol=1e-4, atol=5e-5)
    torch.testing.assert_close(grad, exact_grad, rtol=1e-4, atol=2e-5)
