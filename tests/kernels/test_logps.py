import pytest
import torch

from megatron_opd.kernels import EMPTY_TAIL, logps, reference_logps
from megatron_opd.types import VocabShard
from tests.kernels.sharding import CUTS, V, groups, rows_of, split, tokens_of, whole_head_gradient, whole_hidden_gradient
from tests.ranks import run_ranks

T, D, K = 8, 5, 6
TAIL = slice(2, 6)
WHOLE = VocabShard(start=0, stop=V, vocab_size=V)


def case(dtype=torch.float64, num_tokens=T, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, D, generator=g, dtype=torch.float64).to(dtype)
    head = torch.randn(V, D, generator=g, dtype=torch.float64).to(dtype)
    ids = torch.randint(V, (num_tokens, K), generator=g)
    ids[:, 1] = ids[:, 3]  # a duplicate across the border of the tail columns
    ids[0] = ids[0, 0]  # duplicates within
    ids[1] = torch.tensor([0, V - 1, 6, 7, V - 1, 300])  # first and last rows of shards
    grad = torch.randn(num_tokens, K + 1, generator=g, dtype=torch.float64)
    return hidden, head, ids, grad


def loss_of(logp, log_tail, grad):
    loss = (logp * grad[:, :K].to(logp.dtype)).sum()
    return loss if log_tail is None else loss + (log_tail * grad[:, K].to(logp.dtype)).sum()


def reference(tail_columns, temperature, dtype=torch.float64):
    hidden, head, ids, grad = case(dtype)
    hidden.requires_grad_(), head.requires_grad_()
    logp, tail = reference_logps(hidden, head, ids, tail_columns=tail_columns, temperature=temperature)
    loss_of(logp, tail, grad).backward()
    return logp.detach(), None if tail is None else tail.detach(), hidden.grad, head.grad


def settings():
    return [(None, 1.0, 3), (None, 0.7, 8), (TAIL, 0.7, 3), (TAIL, 1.0, 8), (TAIL, 1.0, 100)]


def only_some_rows(shard):
    """Rows that do not count are 0 without gradient, and the others are as if they were alone."""
    rows = torch.tensor([True, False, False, True, True, False, True, False])
    hidden, head, ids, grad = case()
    wanted_hidden, wanted_head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    wanted = reference_logps(wanted_hidden[rows], wanted_head, ids[rows], tail_columns=TAIL)
    loss_of(*wanted, grad[rows]).backward()
    hidden, head = tokens_of(hidden, shard).clone().requires_grad_(), rows_of(head, shard).requires_grad_()
    logp, tail = logps(hidden, head, ids, shard, rows=rows, tail_columns=TAIL, chunk_tokens=3)
    assert not logp[~rows].any() and not tail[~rows].any()
    loss_of(logp, tail, grad).backward()
    torch.testing.assert_close((logp[rows], tail[rows]), wanted)
    torch.testing.assert_close(whole_hidden_gradient(hidden.grad, shard), wanted_hidden.grad)
    torch.testing.assert_close(whole_head_gradient(head.grad, shard), wanted_head.grad)


def test_rows_that_do_not_count_cost_nothing_and_change_nothing():
    only_some_rows(WHOLE)
    hidden, head, ids, _ = case()
    hidden.requires_grad_()
    logp, tail = logps(hidden, head, ids, WHOLE, rows=torch.zeros(T, dtype=torch.bool), tail_columns=TAIL)
    (logp.sum() + tail.sum()).backward()
    assert not hidden.grad.any()


def every_split_on_this_rank():
    group_of = groups()
    for sequence_parallel in (False, True):
        only_some_rows(split(CUTS[4][1][1], group_of[4], sequence_parallel))
    for tp, group in group_of.items():
        for name, cuts in CUTS[tp]:
            for sequence_parallel in [False, True] if tp > 1 else [False]:
                for tail_columns, temperature, chunk in settings():
                    shard = split(cuts, group, sequence_parallel)
                    hidden, head, ids, grad = case()
                    hidden, head = tokens_of(hidden, shard).clone().requires_grad_(), rows_of(head, shard).requires_grad_()
                    options = dict(tail_columns=tail_columns, temperature=temperature, chunk_tokens=chunk)
                    logp, tail = logps(hidden, head, ids, shard, **options)
                    loss_of(logp, tail, grad).backward()
                    got = (logp, tail, whole_hidden_gradient(hidden.grad, shard), whole_head_gradient(head.grad, shard))
                    where = f"tp {tp}, {name}, sequence parallel {sequence_parallel}, {options}"
                    for part, ours, theirs in zip(("logp", "tail", "hidden", "head"), got, reference(tail_columns, temperature)):
                        close = theirs is None or torch.allclose(ours, theirs, rtol=1e-11, atol=1e-12)
                        assert close, f"{part} differs with {where}"
    bfloat16_comes_close(split(CUTS[4][1][1], group_of[4], sequence_parallel=True))
    return 1


def bfloat16_comes_close(shard):
    hidden, head, ids, grad = case(torch.bfloat16)
    exact = [x.double().requires_grad_() for x in (hidden, head)]
    loss_of(*reference_logps(*exact, ids, tail_columns=TAIL), grad).backward()
    hidden, head = tokens_of(hidden, shard).clone().requires_grad_(), rows_of(head, shard).requires_grad_()
    loss_of(*logps(hidden, head, ids, shard, tail_columns=TAIL, chunk_tokens=3), grad).backward()
    assert torch.allclose(whole_hidden_gradient(hidden.grad, shard).double(), exact[0].grad, rtol=0.05, atol=0.05), "bfloat16 hidden"
    assert torch.allclose(whole_head_gradient(head.grad, shard).double(), exact[1].grad, rtol=0.05, atol=0.05), "bfloat16 head"


def test_splitting_the_vocabulary_the_sequence_or_the_chunks_changes_neither_value_nor_gradient():
    assert run_ranks(every_split_on_this_rank, 4) == [1] * 4


def test_gradients_agree_with_finite_differences():
    hidden, head, ids, _ = case(num_tokens=3)
    head, shard = head[:11].clone(), VocabShard(start=0, stop=11, vocab_size=9)
    ids = ids % 9

    def function(hidden, head):
        return logps(hidden, head, ids, shard, tail_columns=TAIL, temperature=0.8, chunk_tokens=2)

    torch.autograd.gradcheck(function, (hidden.requires_grad_(), head.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tiny_tail_keeps_its_relative_precision(dtype):
    logits = torch.full((1, 40), -25.0, dtype=torch.float64)
    logits[0, :3] = torch.tensor([3.0, 2.5, 1.0])  # the 37 others together hold about 1e-10
    logits[0, 3:] += torch.linspace(0, 1, 37, dtype=torch.float64)
    hidden, head = logits.to(dtype), torch.eye(40, dtype=dtype).requires_grad_()
    shard = VocabShard(start=0, stop=40, vocab_size=40)
    _, log_tail = logps(hidden, head, torch.tensor([[0, 1, 2]]), shard, tail_columns=slice(0, 3))
    exact = logits.to(dtype).double().log_softmax(-1)[0, 3:].logsumexp(-1)
    assert exact < -20
    torch.testing.assert_close(log_tail[0].double().exp() / exact.exp(), torch.ones((), dtype=torch.float64), rtol=4e-6, atol=0)
    (grad,) = torch.autograd.grad(log_tail.sum(), head)  # of the logits, times the hidden state
    within = (logits.to(dtype).double()[0, 3:] - logits.to(dtype).double()[0, 3:].logsumexp(-1)).exp()
    torch.testing.assert_close(grad.sum(1)[3:].double() / hidden.double().sum(), within * (1 - exact.exp()), rtol=4e-6, atol=0)


def test_an_empty_tail_is_finite_and_has_no_gradient():
    hidden, head, _, _ = case(num_tokens=2)
    head = head[:7].clone()
    ids = torch.stack([torch.arange(7), torch.tensor([0, 1, 2, 3, 4, 5, 5])])  # the second row leaves out id 6
    shard = VocabShard(start=0, stop=7, vocab_size=7)
    hidden.requires_grad_(), head.requires_grad_()
    _, log_tail = logps(hidden, head, ids, shard, tail_columns=slice(0, 7))
    assert log_tail[0] == EMPTY_TAIL and log_tail[1] > EMPTY_TAIL
    grad_hidden, grad_head = torch.autograd.grad(log_tail[0], (hidden, head), retain_graph=True)
    assert grad_hidden.count_nonzero() == 0 and grad_head.count_nonzero() == 0
    _, expected = reference_logps(hidden, head, ids, tail_columns=slice(0, 7))
    torch.testing.assert_close(log_tail, expected)
    for ours, theirs in zip(torch.autograd.grad(log_tail.sum(), (hidden, head)), torch.autograd.grad(expected.sum(), (hidden, head))):
        torch.testing.assert_close(ours, theirs)


def test_probabilities_over_the_whole_vocabulary_sum_to_one():
    hidden, head, _, _ = case()
    logp, _ = logps(hidden, head, torch.arange(V).expand(T, V), WHOLE)
    torch.testing.assert_close(logp.exp().sum(1), torch.ones(T, dtype=torch.float64))


@pytest.mark.parametrize("dtype, rtol, atol", [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 0.05, 0.05)])
def test_narrow_inputs_come_close_and_give_wide_outputs(dtype, rtol, atol):
    hidden, head, ids, grad = case(dtype)
    exact = [x.double().requires_grad_() for x in (hidden, head)]
    expected = reference_logps(*exact, ids, tail_columns=TAIL)
    loss_of(*expected, grad).backward()
    hidden.requires_grad_(), head.requires_grad_()
    got = logps(hidden, head, ids, WHOLE, tail_columns=TAIL, chunk_tokens=3)
    loss_of(*got, grad).backward()
    assert got[0].dtype == got[1].dtype == torch.float32
    assert hidden.grad.dtype == head.grad.dtype == dtype
    for ours, theirs in zip((*got, hidden.grad, head.grad), (*expected, exact[0].grad, exact[1].grad)):
        torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_a_frozen_input_gets_no_gradient_and_changes_not_the_other(frozen):
    hidden, head, ids, grad = case()
    _, _, hidden_grad, head_grad = reference(TAIL, 1.0)
    (hidden if frozen == "head" else head).requires_grad_()
    loss_of(*logps(hidden, head, ids, WHOLE, tail_columns=TAIL), grad).backward()
    torch.testing.assert_close(hidden.grad, hidden_grad if frozen == "head" else None)
    torch.testing.assert_close(head.grad, head_grad if frozen == "hidden" else None)


def test_no_tokens_give_empty_scores_and_zero_gradients():
    hidden, head, ids, grad = case(num_tokens=8)
    hidden, ids, head = hidden[:0].clone().requires_grad_(), ids[:0], head.requires_grad_()
    logp, tail = logps(hidden, head, ids, WHOLE, tail_columns=TAIL)
    loss_of(logp, tail, grad[:0]).backward()
    assert logp.shape == (0, K) and tail.shape == (0,) and head.grad.count_nonzero() == 0


def test_logits_of_one_chunk_are_all_that_exists_at_a_time(monkeypatch):
    rows = []

    def matmul(a, b):
        rows.append(len(a))
        return a @ b

    monkeypatch.setattr("megatron_opd.kernels.logits.matmul", matmul)
    hidden, head, ids, grad = case()
    loss_of(*logps(hidden.requires_grad_(), head, ids, WHOLE, tail_columns=TAIL, chunk_tokens=3), grad).backward()
    assert rows == [3, 3, 2] * 2, "forward, then once more in backward"
