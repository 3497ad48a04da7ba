import math

import pytest
import torch

from megatron_opd.kernels import dense_kl, products, reference_dense_kl
from megatron_opd.types import Divergence, VocabShard
from tests.kernels.sharding import CUTS, V, groups, rows_of, split, tokens_of, whole_head_gradient, whole_hidden_gradient
from tests.ranks import run_ranks

T, D, E = 8, 5, 7
WHOLE = VocabShard(start=0, stop=V, vocab_size=V)
SOME = torch.tensor([True, False, False, True, True, False, True, False])
ALL = torch.ones(T, dtype=torch.bool)
NONE = torch.zeros(T, dtype=torch.bool)
SCHEDULES = "forward", "recompute"
FORWARD, REVERSE = Divergence(kind="forward"), Divergence(kind="reverse")
MIXED = [Divergence(kind=kind, weight=weight) for kind in ("jsd", "skewed") for weight in (0.1, 0.5, 0.9)]
DIVERGENCES = [FORWARD, REVERSE, *MIXED]


def case(dtype=torch.float64, num_tokens=T, seed=0):
    """Student hidden states and head, the teacher's, and the gradient that arrives."""
    g = torch.Generator().manual_seed(seed)
    shapes = (num_tokens, D), (V, D), (num_tokens, E), (V, E)
    student_and_teacher = [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]
    return *student_and_teacher, torch.randn(num_tokens, generator=g, dtype=torch.float64)


def evenly(inputs):
    """The same case with one gradient for all targets, for which gradients made in forward are only scaled."""
    return *inputs[:-1], torch.full_like(inputs[-1], -0.7)


def fields(scores):
    return [getattr(scores, name) for name in ("divergence", "kl", "student_entropy", "teacher_entropy", "agree")]


def reference(divergence, temperature=1.0, inputs=None, rows=ALL):
    """What the slow twin says of all fields (0 where `rows` is False), and the gradients of hidden states and head."""
    hidden, head, teacher_hidden, teacher_head, grad = inputs or case()
    hidden, head = (x.double().clone().requires_grad_() for x in (hidden, head))
    scores = reference_dense_kl(hidden, head, teacher_hidden.double(), teacher_head.double(), divergence, temperature=temperature)
    (scores.divergence * grad * rows).sum().backward()
    return [one.detach() * rows for one in fields(scores)], hidden.grad, head.grad


def sharded(shard, divergence, inputs=None, **options):
    """The same from the kernel, gradients put together from all ranks."""
    hidden, head, teacher_hidden, teacher_head, grad = inputs or case()
    hidden, head = tokens_of(hidden, shard).clone().requires_grad_(), rows_of(head, shard).requires_grad_()
    scores = dense_kl(hidden, head, teacher_hidden, rows_of(teacher_head, shard), shard, divergence, **options)
    (scores.divergence * grad).sum().backward()
    return fields(scores), whole_hidden_gradient(hidden.grad, shard), whole_head_gradient(head.grad, shard)


def compare(got, wanted, where, rtol=1e-10, atol=1e-11):
    names = "divergence", "kl", "student entropy", "teacher entropy", "agree", "hidden", "head"
    for name, ours, theirs in zip(names, (*got[0], *got[1:]), (*wanted[0], *wanted[1:])):
        error = (ours - theirs).abs().max()
        assert torch.allclose(ours.double(), theirs, rtol=rtol, atol=atol), f"{name} differs by {error} with {where}"


def equal_models(shard):
    """The teacher is the student."""
    hidden, head, _, _, grad = case()
    for divergence in DIVERGENCES:
        (loss, kl, *_, agree), *grads = sharded(shard, divergence, (hidden, head, hidden, head, grad), chunk_tokens=3)
        for zero in (loss, kl, *grads):
            assert zero.abs().max() < 1e-12, f"{divergence}: {zero.abs().max()} where student and teacher are one"
        assert agree.all()


def equal_logits(shard):
    """Many logits are the largest at once: of the student 200 and 506, of the teacher {200, 400} or {400, 506}."""
    head, teacher_head = torch.zeros(V, 1), torch.zeros(V, 2)
    head[[200, 506]], teacher_head[[200, 400], 0], teacher_head[[400, 506], 1] = 1, 1, 1
    inputs = torch.ones(T, 1), head, torch.eye(2).repeat(T // 2, 1), teacher_head, torch.ones(T)
    (*_, agree), _, _ = sharded(shard, FORWARD, inputs)
    assert agree.tolist() == [1, 0] * (T // 2)


def exact_bfloat16(seed=2):
    """A teacher in bfloat16 whose logits are small integers, without rounding, beside a float32 student."""
    g = torch.Generator().manual_seed(seed)
    hidden, head, _, _, grad = case(torch.float32)
    teacher = [torch.randint(-1, 2, (n, E), generator=g).to(torch.bfloat16) for n in (T, V)]
    return hidden, head, *teacher, grad


SETTINGS = [(1.0, 3, None), (0.7, 100, SOME), (1.3, 1, None), (1.0, 2, NONE)]  # temperature, chunk_tokens, rows


def every_split_on_this_rank():
    wanted = {
        (divergence, temperature): reference(divergence, temperature, rows=ALL if rows is None else rows)
        for divergence in DIVERGENCES
        for temperature, _, rows in SETTINGS[:3]
    }
    even = {divergence: reference(divergence, 0.7, evenly(case()), SOME) for divergence in DIVERGENCES}
    narrow = {divergence: reference(divergence, inputs=exact_bfloat16()) for divergence in DIVERGENCES}
    for tp, group in groups().items():
        for name, cuts in CUTS[tp]:
            for sequence_parallel in [False, True] if tp > 1 else [False]:
                shard = split(cuts, group, sequence_parallel)
                for divergence in DIVERGENCES:
                    for temperature, chunk, rows in SETTINGS[:3]:
                        options = dict(temperature=temperature, chunk_tokens=chunk, rows=rows)
                        where = f"tp {tp}, {name}, sequence parallel {sequence_parallel}, {divergence}, {options}"
                        compare(sharded(shard, divergence, **options), wanted[divergence, temperature], where)
                    for schedule in SCHEDULES:
                        options = dict(temperature=0.7, chunk_tokens=3, rows=SOME, schedule=schedule)
                        where = f"one gradient for all, tp {tp}, {name}, sequence parallel {sequence_parallel}, {divergence}, {options}"
                        compare(sharded(shard, divergence, evenly(case()), **options), even[divergence], where)
                    where = f"a bfloat16 teacher, tp {tp}, {name}, {divergence}"
                    compare(sharded(shard, divergence, exact_bfloat16()), narrow[divergence], where, rtol=1e-4, atol=1e-5)
                equal_models(shard)
                equal_logits(shard)
    scores, *grads = sharded(shard, REVERSE, rows=NONE)
    assert not any(one.any() for one in (*scores, *grads)), "no target counts"
    return 1


def test_splitting_the_vocabulary_the_sequence_or_the_chunks_changes_neither_value_nor_gradient():
    assert run_ranks(every_split_on_this_rank, 4) == [1] * 4


def test_rows_that_do_not_count_cost_nothing_and_change_nothing():
    for divergence in DIVERGENCES:
        compare(sharded(WHOLE, divergence, rows=SOME), reference(divergence, rows=SOME), divergence)
        scores, *grads = sharded(WHOLE, divergence, rows=NONE)
        assert not any(one.any() for one in (*scores, *grads))


def test_a_student_that_is_its_teacher_has_no_divergence_and_no_gradient():
    equal_models(WHOLE)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_gradients_agree_with_finite_differences(divergence):
    hidden, head, teacher_hidden, teacher_head, _ = case(num_tokens=3)
    head, teacher_head, shard = head[:11].clone(), teacher_head[:11], VocabShard(start=0, stop=11, vocab_size=9)

    def function(hidden, head):
        options = dict(temperature=0.8, chunk_tokens=2)
        return dense_kl(hidden, head, teacher_hidden, teacher_head, shard, divergence, **options).divergence

    torch.autograd.gradcheck(function, (hidden.requires_grad_(), head.requires_grad_()))


def test_the_jensen_shannon_divergence_over_its_weight_tends_to_the_two_kls():
    small, (hidden, head, teacher_hidden, teacher_head, grad) = 1e-7, case()
    mild = hidden / 4, head, teacher_hidden / 4, teacher_head, grad  # the limit is near where small q / p and small p / q are
    (forward, *_), *forward_grads = sharded(WHOLE, FORWARD, mild)
    (reverse, *_), *reverse_grads = sharded(WHOLE, REVERSE, mild)
    (near_p, *_), *near_p_grads = sharded(WHOLE, Divergence(kind="jsd", weight=small), mild)  # m is almost p: beta KL(q||m) remains
    (near_q, *_), *near_q_grads = sharded(WHOLE, Divergence(kind="jsd", weight=1 - small), mild)
    for ours, theirs in zip((near_p, *near_p_grads, near_q, *near_q_grads), (forward, *forward_grads, reverse, *reverse_grads)):
        torch.testing.assert_close(ours / small, theirs, rtol=1e-4, atol=1e-5)


def test_the_skewed_divergence_ends_in_the_two_kls():
    for weight, end in ((1.0, FORWARD), (0.0, REVERSE)):
        compare(sharded(WHOLE, Divergence(kind="skewed", weight=weight)), sharded(WHOLE, end), weight, rtol=1e-13, atol=1e-14)


def test_the_teacher_gets_no_gradient_and_what_is_watched_has_none():
    hidden, head, teacher_hidden, teacher_head, _ = (x.requires_grad_() for x in case())
    scores = dense_kl(hidden, head, teacher_hidden, teacher_head, WHOLE, REVERSE, rows=SOME)
    scores.divergence.sum().backward()
    assert teacher_hidden.grad is None or not teacher_hidden.grad.any()
    assert teacher_head.grad is None
    assert hidden.grad.any() and head.grad.any()
    assert [one.requires_grad for one in fields(scores)] == [True, False, False, False, False]


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_distributions_peaked_sixty_nats_high_stay_finite_and_right(divergence):
    z, u = torch.zeros(3, 12), torch.zeros(3, 12)
    z[:, 2], u[0, 2], u[1, 9], u[2, 4] = 60, 60, 60, -60  # the same peak, another one, none
    eye, grad = torch.eye(12), torch.ones(3)
    hidden, head = z.clone().requires_grad_(), eye.clone().requires_grad_()
    scores = dense_kl(hidden, head, u, eye, VocabShard(start=0, stop=12, vocab_size=12), divergence)
    scores.divergence.sum().backward()
    wanted = reference(divergence, inputs=(z, eye, u, eye, grad), rows=torch.ones(3, dtype=torch.bool))
    compare((fields(scores), hidden.grad, head.grad), wanted, divergence, rtol=1e-5, atol=1e-4)
    assert scores.divergence[0].abs() < 1e-6 and hidden.grad[0].abs().max() < 1e-6
    if divergence.kind == "jsd":
        coin = -divergence.weight * math.log(divergence.weight) - (1 - divergence.weight) * math.log(1 - divergence.weight)
        assert scores.divergence[1].item() == pytest.approx(coin, abs=1e-5), "p and q share nothing"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 0.08)])
@pytest.mark.parametrize("divergence", [FORWARD, REVERSE, MIXED[1]], ids=str)
def test_narrow_inputs_come_close_and_give_wide_outputs(divergence, dtype, tolerance):
    hidden, head, teacher_hidden, teacher_head, grad = inputs = case(dtype)
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    scores = dense_kl(hidden, head, teacher_hidden, teacher_head, WHOLE, divergence, chunk_tokens=3)
    (scores.divergence * grad).sum().backward()
    assert {one.dtype for one in fields(scores)} == {torch.float32} and hidden.grad.dtype == head.grad.dtype == dtype
    compare((fields(scores), hidden.grad, head.grad), reference(divergence, inputs=inputs), divergence, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_a_frozen_input_gets_no_gradient_and_changes_not_the_other(frozen):
    hidden, head, teacher_hidden, teacher_head, grad = case()
    _, hidden_grad, head_grad = reference(REVERSE)
    (hidden if frozen == "head" else head).requires_grad_()
    (dense_kl(hidden, head, teacher_hidden, teacher_head, WHOLE, REVERSE).divergence * grad).sum().backward()
    torch.testing.assert_close(hidden.grad, hidden_grad if frozen == "head" else None)
    torch.testing.assert_close(head.grad, head_grad if frozen == "hidden" else None)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_each_schedule_gives_the_same_gradients_whether_the_upstream_one_is_even_or_not(divergence, schedule):
    for inputs in (case(), evenly(case())):
        options = dict(rows=SOME, temperature=0.7, chunk_tokens=3, schedule=schedule)
        compare(sharded(WHOLE, divergence, inputs, **options), reference(divergence, 0.7, inputs, SOME), options)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_going_backward_twice_gives_the_same_gradient_twice(schedule):
    hidden, head, teacher_hidden, teacher_head, _ = case()
    scores = dense_kl(hidden.requires_grad_(), head.requires_grad_(), teacher_hidden, teacher_head, WHOLE, REVERSE, schedule=schedule)
    once, again = (torch.autograd.grad(3 * scores.divergence.sum(), (hidden, head), retain_graph=True) for _ in range(2))
    for a, b in zip(once, again):
        assert torch.equal(a, b)


def product_sizes(monkeypatch):
    """A list that grows by the number of rows of every matrix product."""
    rows, matmul = [], products.matmul

    def counted(a, b, out=None):
        rows.append(len(a))
        return matmul(a, b, out=out)

    monkeypatch.setattr("megatron_opd.kernels.products.matmul", counted)
    return rows


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("divergence", [REVERSE, MIXED[0]], ids=str)
def test_logits_of_one_chunk_are_all_that_exists_at_a_time(monkeypatch, divergence, schedule):
    rows = product_sizes(monkeypatch)
    hidden, head, teacher_hidden, teacher_head, _ = case()
    hidden.requires_grad_()
    scores = dense_kl(hidden, head, teacher_hidden, teacher_head, WHOLE, divergence, chunk_tokens=3, schedule=schedule)
    forward = len(rows)
    scores.divergence.sum().backward()
    logits_of_both, and_back = [3, 3, 3, 3, 2, 2], [3, 3, 3, 3, 3, 3, 2, 2, 2]
    wanted = {"forward": (and_back, []), "recompute": (logits_of_both, and_back)}
    assert (rows[:forward], rows[forward:]) == wanted[schedule]


def test_without_gradients_nothing_but_logits_is_computed(monkeypatch):
    rows = product_sizes(monkeypatch)
    hidden, head, teacher_hidden, teacher_head, _ = case()
    with torch.no_grad():
        dense_kl(hidden.requires_grad_(), head.requires_grad_(), teacher_hidden, teacher_head, WHOLE, REVERSE, chunk_tokens=3)
    assert rows == [3, 3, 3, 3, 2, 2]
