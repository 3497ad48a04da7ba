import pytest
import torch

from megatron_opd.kernels import EMPTY_REST, logps, reference_logps
from megatron_opd.types import VocabShard
from tests.kernels.sharding import CUTS, V, groups, rows_of, split, tokens_of, whole_head_gradient, whole_hidden_gradient
from tests.ranks import run_ranks

T, D, K = 8, 5, 6
TAIL = (slice(2, 6),)
OVERLAPPING = (slice(2, 6), slice(0, 4))
WHOLE = VocabShard(start=0, stop=V, vocab_size=V)
PARTS = "logp", "log_rest", "entropy", "best", "hidden", "head"


def case(dtype=torch.float64, num_tokens=T, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, D, generator=g, dtype=torch.float64).to(dtype)
    head = torch.randn(V, D, generator=g, dtype=torch.float64).to(dtype)
    ids = torch.randint(V, (num_tokens, K), generator=g)
    ids[:, 1] = ids[:, 3]  # a duplicate across the border of a rest
    ids[0] = ids[0, 0]  # duplicates within
    ids[1] = torch.tensor([0, V - 1, 6, 7, V - 1, 300])  # first and last rows of shards
    grad = torch.randn(num_tokens, K + 2, generator=g, dtype=torch.float64)
    return hidden, head, ids, grad


def loss_of(scores, grad):
    all_in_one = torch.cat([scores.logp, scores.log_rest], 1)
    return (all_in_one * grad[:, : all_in_one.shape[1]].to(all_in_one.dtype)).sum()


def reference(rests, temperature, dtype=torch.float64):
    hidden, head, ids, grad = case(dtype)
    hidden.requires_grad_(), head.requires_grad_()
    scores = reference_logps(hidden, head, ids, rests=rests, moments=True, temperature=temperature)
    loss_of(scores, grad).backward()
    return scores.logp.detach(), scores.log_rest.detach(), scores.entropy, scores.best, hidden.grad, head.grad


def settings():
    """Rests, temperature, chunk_tokens."""
    return [((), 1.0, 3), ((), 0.7, 8), (TAIL, 0.7, 3), (OVERLAPPING, 1.0, 8), (OVERLAPPING, 1.3, 3), (TAIL, 1.0, 100)]


def only_some_rows(shard):
    """Rows that do not count are 0 without gradient, and the others are as if they were alone."""
    rows = torch.tensor([True, False, False, True, True, False, True, False])
    hidden, head, ids, grad = case()
    wanted_hidden, wanted_head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    wanted = reference_logps(wanted_hidden[rows], wanted_head, ids[rows], rests=OVERLAPPING, moments=True)
    loss_of(wanted, grad[rows]).backward()
    hidden, head = tokens_of(hidden, shard).clone().requires_grad_(), rows_of(head, shard).requires_grad_()
    scores = logps(hidden, head, ids, shard, rows=rows, rests=OVERLAPPING, moments=True, chunk_tokens=3)
    loss_of(scores, grad).backward()
    for name in ("logp", "log_rest", "entropy", "best"):
        assert not getattr(scores, name)[~rows].any(), name
        torch.testing.assert_close(getattr(scores, name)[rows], getattr(wanted, name))
    torch.testing.assert_close(whole_hidden_gradient(hidden.grad, shard), wanted_hidden.grad)
    torch.testing.assert_close(whole_head_gradient(head.grad, shard), wanted_head.grad)


def test_rows_that_do_not_count_cost_nothing_and_change_nothing():
    only_some_rows(WHOLE)
    hidden, head, ids, _ = case()
    hidden.requires_grad_()
    scores = logps(hidden, head, ids, WHOLE, rows=torch.zeros(T, dtype=torch.bool), rests=TAIL, moments=True)
    (scores.logp.sum() + scores.log_rest.sum()).backward()
    assert not hidden.grad.any() and not scores.entropy.any() and not scores.best.any()


def equal_logits(shard):
    """Small integers give many equal logits, exact in any order of sums: the lowest id is the best one."""
    hidden, head, ids, _ = case()
    hidden, head = hidden.sign(), head.round()
    best = logps(tokens_of(hidden, shard), rows_of(head, shard), ids, shard, moments=True, chunk_tokens=3).best
    logits = (hidden @ head.t()).tolist()
    assert best.tolist() == [row.index(max(row)) for row in logits] and any(row.count(max(row)) > 1 for row in logits)


def every_split_on_this_rank():
    group_of = groups()
    for sequence_parallel in (False, True):
        only_some_rows(split(CUTS[4][1][1], group_of[4], sequence_parallel))
    for tp, group in group_of.items():
        for name, cuts in CUTS[tp]:
            for sequence_parallel in [False, True] if tp > 1 else [False]:
                shard = split(cuts, group, sequence_parallel)
                equal_logits(shard)
                for rests, temperature, chunk in settings():
                    hidden, head, ids, grad = case()
                    hidden, head = tokens_of(hidden, shard).clone().requires_grad_(), rows_of(head, shard).requires_grad_()
                    options = dict(rests=rests, temperature=temperature, chunk_tokens=chunk)
                    scores = logps(hidden, head, ids, shard, moments=True, **options)
                    loss_of(scores, grad).backward()
                    grads = whole_hidden_gradient(hidden.grad, shard), whole_head_gradient(head.grad, shard)
                    got = scores.logp, scores.log_rest, scores.entropy, scores.best, *grads
                    where = f"tp {tp}, {name}, sequence parallel {sequence_parallel}, {options}"
                    for part, ours, theirs in zip(PARTS, got, reference(rests, temperature)):
                        assert torch.allclose(ours, theirs, rtol=1e-11, atol=1e-12), f"{part} differs with {where}"
    bfloat16_comes_close(split(CUTS[4][1][1], group_of[4], sequence_parallel=True))
    return 1


def bfloat16_comes_close(shard):
    hidden, head, ids, grad = case(torch.bfloat16)
    exact = [x.double().requires_grad_() for x in (hidden, head)]
    loss_of(reference_logps(*exact, ids, rests=TAIL), grad).backward()
    hidden, head = tokens_of(hidden, shard).clone().requires_grad_(), rows_of(head, shard).requires_grad_()
    loss_of(logps(hidden, head, ids, shard, rests=TAIL, chunk_tokens=3), grad).backward()
    assert torch.allclose(whole_hidden_gradient(hidden.grad, shard).double(), exact[0].grad, rtol=0.05, atol=0.05), "bfloat16 hidden"
    assert torch.allclose(whole_head_gradient(head.grad, shard).double(), exact[1].grad, rtol=0.05, atol=0.05), "bfloat16 head"


def test_splitting_the_vocabulary_the_sequence_or_the_chunks_changes_neither_value_nor_gradient():
    assert run_ranks(every_split_on_this_rank, 4) == [1] * 4


def test_gradients_agree_with_finite_differences():
    hidden, head, ids, _ = case(num_tokens=3)
    head, shard = head[:11].clone(), VocabShard(start=0, stop=11, vocab_size=9)
    ids = ids % 9

    def function(hidden, head):
        scores = logps(hidden, head, ids, shard, rests=OVERLAPPING, temperature=0.8, chunk_tokens=2)
        return scores.logp, scores.log_rest

    torch.autograd.gradcheck(function, (hidden.requires_grad_(), head.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tiny_rest_keeps_its_relative_precision(dtype):
    logits = torch.full((1, 40), -25.0, dtype=torch.float64)
    logits[0, :3] = torch.tensor([3.0, 2.5, 1.0])  # the 37 others together hold about 1e-10
    logits[0, 3:] += torch.linspace(0, 1, 37, dtype=torch.float64)
    hidden, head = logits.to(dtype), torch.eye(40, dtype=dtype).requires_grad_()
    shard = VocabShard(start=0, stop=40, vocab_size=40)
    log_rest = logps(hidden, head, torch.tensor([[0, 1, 2]]), shard, rests=[slice(0, 3)]).log_rest[:, 0]
    exact = logits.to(dtype).double().log_softmax(-1)[0, 3:].logsumexp(-1)
    assert exact < -20
    torch.testing.assert_close(log_rest[0].double().exp() / exact.exp(), torch.ones((), dtype=torch.float64), rtol=4e-6, atol=0)
    (grad,) = torch.autograd.grad(log_rest.sum(), head)  # of the logits, times the hidden state
    within = (logits.to(dtype).double()[0, 3:] - logits.to(dtype).double()[0, 3:].logsumexp(-1)).exp()
    torch.testing.assert_close(grad.sum(1)[3:].double() / hidden.double().sum(), within * (1 - exact.exp()), rtol=4e-6, atol=0)


def test_an_empty_rest_is_finite_and_has_no_gradient():
    hidden, head, _, _ = case(num_tokens=2)
    head = head[:7].clone()
    ids = torch.stack([torch.arange(7), torch.tensor([0, 1, 2, 3, 4, 5, 5])])  # the second row leaves out id 6
    shard = VocabShard(start=0, stop=7, vocab_size=7)
    hidden.requires_grad_(), head.requires_grad_()
    log_rest = logps(hidden, head, ids, shard, rests=[slice(0, 7)]).log_rest[:, 0]
    assert log_rest[0] == EMPTY_REST and log_rest[1] > EMPTY_REST
    grad_hidden, grad_head = torch.autograd.grad(log_rest[0], (hidden, head), retain_graph=True)
    assert grad_hidden.count_nonzero() == 0 and grad_head.count_nonzero() == 0
    expected = reference_logps(hidden, head, ids, rests=[slice(0, 7)]).log_rest[:, 0]
    torch.testing.assert_close(log_rest, expected)
    for ours, theirs in zip(torch.autograd.grad(log_rest.sum(), (hidden, head)), torch.autograd.grad(expected.sum(), (hidden, head))):
        torch.testing.assert_close(ours, theirs)


def test_probabilities_over_the_whole_vocabulary_sum_to_one():
    hidden, head, _, _ = case()
    logp = logps(hidden, head, torch.arange(V).expand(T, V), WHOLE).logp
    torch.testing.assert_close(logp.exp().sum(1), torch.ones(T, dtype=torch.float64))


@pytest.mark.parametrize("dtype, rtol, atol", [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 0.05, 0.05)])
def test_narrow_inputs_come_close_and_give_wide_outputs(dtype, rtol, atol):
    hidden, head, ids, grad = case(dtype)
    exact = [x.double().requires_grad_() for x in (hidden, head)]
    expected = reference_logps(*exact, ids, rests=TAIL, moments=True)
    loss_of(expected, grad).backward()
    hidden.requires_grad_(), head.requires_grad_()
    got = logps(hidden, head, ids, WHOLE, rests=TAIL, moments=True, chunk_tokens=3)
    loss_of(got, grad).backward()
    assert got.logp.dtype == got.log_rest.dtype == got.entropy.dtype == torch.float32
    assert hidden.grad.dtype == head.grad.dtype == dtype
    ours_and_grads = got.logp, got.log_rest, got.entropy, hidden.grad, head.grad
    for ours, theirs in zip(ours_and_grads, (expected.logp, expected.log_rest, expected.entropy, exact[0].grad, exact[1].grad)):
        torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_a_frozen_input_gets_no_gradient_and_changes_not_the_other(frozen):
    hidden, head, ids, grad = case()
    *_, hidden_grad, head_grad = reference(TAIL, 1.0)
    (hidden if frozen == "head" else head).requires_grad_()
    loss_of(logps(hidden, head, ids, WHOLE, rests=TAIL), grad).backward()
    torch.testing.assert_close(hidden.grad, hidden_grad if frozen == "head" else None)
    torch.testing.assert_close(head.grad, head_grad if frozen == "hidden" else None)


def test_no_tokens_give_empty_scores_and_zero_gradients():
    hidden, head, ids, grad = case(num_tokens=8)
    hidden, ids, head = hidden[:0].clone().requires_grad_(), ids[:0], head.requires_grad_()
    scores = logps(hidden, head, ids, WHOLE, rests=OVERLAPPING, moments=True)
    loss_of(scores, grad[:0]).backward()
    assert scores.logp.shape == (0, K) and scores.log_rest.shape == (0, 2) and scores.entropy.shape == scores.best.shape == (0,)
    assert head.grad.count_nonzero() == 0


def test_logits_of_one_chunk_are_all_that_exists_at_a_time(monkeypatch):
    rows = []

    def matmul(a, b, out=None):
        rows.append(len(a))
        return torch.mm(a, b, out=out)

    monkeypatch.setattr("megatron_opd.kernels.products.matmul", matmul)
    hidden, head, ids, grad = case()
    loss_of(logps(hidden.requires_grad_(), head, ids, WHOLE, rests=TAIL, chunk_tokens=3), grad).backward()
    assert rows == [3, 3, 2, 3, 3, 3, 3, 2, 2], "forward, then once more in backward with the step back"
