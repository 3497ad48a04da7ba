"""A divergence from the teacher over the whole vocabulary, from the hidden states and sharded LM heads of both.

Knows tensor and sequence parallelism, so that nobody above does; neither model's full logits ever exist. The teacher's head is
sharded as the student's is, so the logits of a token meet on the rank that owns them and only sums per token travel.

Dimension key: T packed targets, C tokens of one chunk, r tokens of one stripe, D hidden size of the student, E of the teacher,
v vocabulary rows of this rank, S ranks; 2 is (student, teacher).

With z, u the logits / temperature of student p and teacher q, all sums global and x_j = log p_j - log q_j:

    R = KL(p||q) = sum_j p_j x_j                     dR/dz_j = p_j (x_j - R)
    F = KL(q||p) = - sum_j q_j x_j                   dF/dz_j = p_j - q_j
    J = beta KL(q||m) + (1 - beta) KL(p||m)          dJ/dz_j = (1 - beta) p_j (log p_j - log m_j - KL(p||m))

The mixture m = beta q + (1 - beta) p of the generalised Jensen-Shannon divergence (arXiv 2306.13649) is known only once both
distributions are normalised, so J passes over a chunk's logits once more; log m_j - log p_j = log(beta e^{-x_j} + 1 - beta).
Equal logits have x_j = 0 exactly, hence R, F and their gradients are 0; those of J are 0 up to one rounding error.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from megatron_opd.kernels.logits import (
    LOG_ZERO,
    HeadGradients,
    Implementation,
    Model,
    Plan,
    add_up,
    all_targets,
    chunk_logits,
    count_targets,
    head_backward,
    head_products,
    kept_tokens,
    largest_in_row,
    local_backward,
    main_grad,
    side_by_side,
    side_by_side_soon,
    stripes,
    true_rows,
)
from megatron_opd.kernels.products import TORCH, HeadProducts, Products, wide
from megatron_opd.kernels.reference import divergence_of, whole_logits, whole_teacher_logits
from megatron_opd.kernels.results import DenseKL
from megatron_opd.types import Divergence, VocabShard

Schedule = Literal["forward", "recompute"]  # when gradients are made: beside the logits in forward, or from new ones in backward

FAR = 80.0  # nats: where p and q are further apart than this the smaller one counts for nothing, and e^gap is finite in float32


class Upstream:
    """The gradient that a divergence's targets get, as far as past calls have shown; owned by whoever calls again and again.

    While it is the same number for all targets, time after time, gradients are made in forward with that number: then the head's need no
    memory of their own, because they can go where Megatron adds them up. A number that turns out wrong is made good in backward.
    """

    def __init__(self) -> None:
        """The first guess is that losses are added up as they are."""
        self.number: float | None = 1.0
        self.even = True

    def arrived(self, number: float | None) -> None:
        """After each backward pass; None where targets got different ones."""
        self.even = number is not None
        self.number = number if self.number in (1.0, number) else None


def dense_kl(
    hidden: torch.Tensor,
    head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    shard: VocabShard,
    divergence: Divergence,
    *,
    rows: torch.Tensor | None = None,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    schedule: Schedule = "forward",
    upstream: Upstream | None = None,
    implementation: Implementation = "chunked",
    products: Products = TORCH,
) -> DenseKL:
    """The `divergence` between student and teacher per target, differentiable in the student alone, and what to watch beside it.

    All is the same on every rank of the group; each rank must call it and must derive the same loss from it. Two times the
    logits of `chunk_tokens` tokens exist at a time, four times over several ranks, whose sums travel while the next chunk's logits are
    made. The schedule "forward" multiplies each logit's row four times, and keeps the gradient of the head in float32 from forward to
    backward unless `upstream` spares it; it is for losses whose gradient is the same for all targets that count, a sum or a mean, and
    falls back to the other one, which multiplies six times and keeps numbers per token, elsewhere.

    Args:
        hidden: [T, D], or [T / tp, D] when `shard.sequence_parallel`: gathered here, its gradient reduce-scattered.
        head: [stop - start, D] in the dtype of `hidden`; padding rows count for nothing and get a zero gradient.
        teacher_hidden: [T, E] of all targets on every rank, whatever the student's are.
        teacher_head: [stop - start, E] in the dtype of `teacher_hidden`, the same rows of the vocabulary as `head`.
        shard: the rows of this rank.
        divergence: kind and weight.
        rows: [T] bool, the targets that count; the others cost nothing and come back as 0 without gradient. None: all.
        temperature: divides the logits of both.
        chunk_tokens: tokens whose logits exist at a time.
        schedule: when gradients are made; Triton knows "recompute" only, and takes it.
        upstream: what past calls have shown, for the schedule "forward". With it the head's gradient is added to Megatron's `main_grad` in
            forward already: every such call must be followed by its backward pass. None: any number may arrive.
        implementation: "chunked" is torch, "triton" one kernel per pass, which wants rows of a multiple of 16 bytes; "reference" is
            plain autograd on the full logits of all ranks, "te" is "chunked" with FP8 `products`.
        products: what "te" multiplies with, see `fp8_products`.
    """
    num_targets = count_targets(hidden, shard)
    assert hidden.dtype == head.dtype, f"hidden is {hidden.dtype}, head is {head.dtype}: matmul wants one dtype"
    assert teacher_hidden.dtype == teacher_head.dtype, f"teacher: hidden is {teacher_hidden.dtype}, head is {teacher_head.dtype}"
    assert teacher_hidden.shape[0] == num_targets, f"{teacher_hidden.shape[0]} hidden states of the teacher for {num_targets} targets"
    assert divergence.kind != "jsd" or 0 < divergence.weight < 1, f"jsd has no weight {divergence.weight}: take forward or reverse"
    kept = None if rows is None else rows.nonzero()[:, 0]
    assert (implementation == "te") == (products is not TORCH), f"{implementation} with {products}: FP8 products are what te is"
    plan = Plan(
        shard=shard, kept=kept, temperature=temperature, chunk_tokens=chunk_tokens, implementation=implementation, products=products
    )
    teacher_TE = teacher_hidden if kept is None else teacher_hidden[kept]
    schedule = schedule if torch.is_grad_enabled() and implementation != "triton" else "recompute"  # without grad nobody goes backward
    if upstream is not None and not upstream.even:
        schedule = "recompute"
    if implementation == "reference":
        found = divergence_of(whole_logits(hidden, head, plan), whole_teacher_logits(teacher_TE, teacher_head, plan), divergence)
        sums = found.divergence, found.kl, found.student_entropy, found.teacher_entropy, found.agree
    else:
        sums = _DenseKL.apply(hidden, head, teacher_TE, teacher_head, divergence, plan, schedule, upstream)
    loss, kl, student_entropy, teacher_entropy, agree = (all_targets(one, plan, num_targets) for one in sums)
    return DenseKL(divergence=loss, kl=kl, student_entropy=student_entropy, teacher_entropy=teacher_entropy, agree=agree)


_NONE = (None,) * 6  # gradients of what has none


class _DenseKL(torch.autograd.Function):
    """Forward keeps numbers per token and, in the schedule of that name, the gradients for an upstream gradient of 1 or as promised.

    Backward scales the former where all targets have the same upstream gradient; otherwise, and for what a promise lacks, it computes the
    logits of both anew.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        teacher_TE: torch.Tensor,
        teacher_head: torch.Tensor,
        divergence: Divergence,
        plan: Plan,
        schedule: Schedule,
        upstream: Upstream | None,
    ) -> tuple[torch.Tensor, ...]:
        student = kept_tokens(hidden, plan), true_rows(head, plan.shard)
        teacher = teacher_TE, true_rows(teacher_head, plan.shard)
        dtype, needs = wide(hidden.dtype), ctx.needs_input_grad[:2]
        heads = head_products([student, teacher], plan) if plan.implementation != "triton" else []
        gradients, main = None, main_grad(head)
        promise = upstream.number if upstream is not None and main is not None else None
        if schedule == "forward" and any(needs):
            head_sum, scale = (main, promise) if promise is not None else (None, 1.0)
            gradients = HeadGradients(student[0], heads[0], head, plan, needs, head_sum, scale)
        found_8T = torch.empty(8, student[0].shape[0], dtype=dtype, device=hidden.device)
        if plan.implementation == "triton":
            found_8T[:] = _triton_per_token(student, teacher, plan, divergence)
        for c, logits_2Cv, own_S52C in _chunks_with_sums([student, teacher], heads, plan, dtype) if heads else []:
            found_8T[:, c] = _per_token(own_S52C, partial(_to_mixture, logits_2Cv, plan), plan, divergence)
            if gradients is not None:
                for r, x_2rv in stripes(logits_2Cv, plan, dtype):
                    norm_2r, mean_r = found_8T[:2, c][:, r], found_8T[2, c][r]
                    logits_2Cv[0][r] = _gradient(x_2rv, norm_2r, mean_r, divergence)
                gradients.add(c, logits_2Cv[0])
        ctx.save_for_backward(hidden, head, teacher_TE, teacher_head, found_8T[:3].clone())
        ctx.divergence, ctx.plan, ctx.gradients, ctx.upstream, ctx.promise = divergence, plan, gradients, upstream, promise
        loss_T, *watched = (one_T.clone() for one_T in found_8T[3:])
        ctx.mark_non_differentiable(*watched)
        return loss_T, *watched

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: torch.Tensor, *_: Any) -> tuple:
        hidden, head, teacher_TE, teacher_head, found_3T = ctx.saved_tensors
        number = (grad_T[0].item() if (grad_T == grad_T[:1]).all() else None) if len(grad_T) else ctx.promise or 1.0
        if ctx.upstream is not None:
            ctx.upstream.arrived(number)
        given = None
        if ctx.gradients is not None and ctx.promise is not None:
            given, of_head = ctx.gradients.finish(hidden, head)
            if number == ctx.promise:
                return given, of_head, *_NONE
            grad_T = grad_T - ctx.promise
        elif ctx.gradients is not None and number is not None:
            return *ctx.gradients.finish(hidden, head, number), *_NONE

        if ctx.plan.implementation == "triton":
            plan, divergence, norm_T2 = ctx.plan, ctx.divergence, found_3T[:2].t()
            teacher = teacher_TE, true_rows(teacher_head, plan.shard)

            def local(student: Model, rows_sum_vD: torch.Tensor | None, need_hidden: bool) -> torch.Tensor | None:
                given = student, teacher, norm_T2, found_3T[2], grad_T, divergence, plan.temperature
                return _triton().local_gradients(*given, rows_sum_vD, need_hidden)

            return *local_backward(local, hidden, head, plan, ctx.needs_input_grad[:2]), *_NONE

        def dlogits(t: slice, x_2rv: torch.Tensor) -> torch.Tensor:
            return _gradient(x_2rv, found_3T[:2, t], found_3T[2, t], ctx.divergence).mul_(grad_T[t, None])

        teachers = [(teacher_TE, true_rows(teacher_head, ctx.plan.shard))]
        more, of_head = head_backward(dlogits, teachers, hidden, head, ctx.plan, ctx.needs_input_grad[:2])
        return more if given is None else more + given, of_head, *_NONE


def _chunks_with_sums(
    models: Sequence[Model], heads: Sequence[HeadProducts], plan: Plan, dtype: torch.dtype
) -> Iterator[tuple[slice, list[torch.Tensor], torch.Tensor]]:
    """Each chunk, its logits and the sums [S, 5, 2, C] of all ranks, which travel while the next chunk's logits are made."""
    alive = 1 if plan.shard.group is None else 2
    under_way: deque[tuple[slice, list[torch.Tensor], Callable[[], torch.Tensor]]] = deque()
    for c, logits_2Cv in chunk_logits(models, heads, plan, alive=alive):
        under_way.append((c, logits_2Cv, side_by_side_soon(_own_sums(logits_2Cv, plan, dtype), plan.shard)))
        if len(under_way) == alive:
            c, logits_2Cv, arrived = under_way.popleft()
            yield c, logits_2Cv, arrived()
    for c, logits_2Cv, arrived in under_way:
        yield c, logits_2Cv, arrived()


def _triton() -> ModuleType:
    """Imported by those who ask for it: a CPU build has no use for Triton."""
    from megatron_opd.kernels import triton_dense_kl

    return triton_dense_kl


def _triton_per_token(student: Model, teacher: Model, plan: Plan, divergence: Divergence) -> torch.Tensor:
    """All targets at once, with this rank's sums from Triton."""
    kernels = _triton()

    def mixture(norm_2T: torch.Tensor, beta: float) -> torch.Tensor:
        return kernels.local_to_mixture(student, teacher, norm_2T.t(), beta, plan.temperature).t()

    own_52T = torch.stack([one_T2.t().float() for one_T2 in kernels.local_sums(student, teacher, plan.shard, plan.temperature)])
    return _per_token(side_by_side(own_52T, plan.shard), mixture, plan, divergence)


def _per_token(
    own_S52C: torch.Tensor, mixture: Callable[[torch.Tensor, float], torch.Tensor], plan: Plan, divergence: Divergence
) -> torch.Tensor:
    """[8, C] over all ranks: log sum e^z and log sum e^u, the mean that the gradient needs, and the fields of `DenseKL`."""
    norm_2C, entropy_2C, forward_C, reverse_C, agree_C = _both_ways(own_S52C, plan)
    if divergence.kind == "jsd":
        mean_C, teacher_C = add_up(mixture(norm_2C, divergence.weight).contiguous(), plan.shard)
        loss_C = divergence.weight * teacher_C + (1 - divergence.weight) * mean_C
    else:
        share = _forward_share(divergence)
        mean_C, loss_C = reverse_C, share * forward_C + (1 - share) * reverse_C
    return torch.stack([*norm_2C, mean_C, loss_C, reverse_C, *entropy_2C, agree_C])


def _own_sums(logits_2Cv: list[torch.Tensor], plan: Plan, dtype: torch.dtype) -> torch.Tensor:
    """[5, 2, C] of both models on this rank: the largest logit, with x the logits less it the sums of e^x, e^x x and e^x times the gap
    between the student's x and the teacher's, and the id of the largest logit, as a number of `dtype`: float32 counts to 2^24.
    """
    own_52C = torch.zeros(5, 2, len(logits_2Cv[0]), dtype=dtype, device=logits_2Cv[0].device)
    own_52C[0] = LOG_ZERO
    for r, x_2rv in stripes(logits_2Cv, plan, dtype):
        max_2r, column_2r = (one.unflatten(0, (2, -1)) for one in largest_in_row(x_2rv.flatten(0, 1)))
        z_rv, u_rv = x_2rv.sub_(max_2r[..., None])
        gap_rv = z_rv - u_rv
        exp_2rv = x_2rv.exp()
        own_52C[..., r] = torch.stack(
            [max_2r, exp_2rv.sum(-1), x_2rv.mul_(exp_2rv).sum(-1), exp_2rv.mul_(gap_rv).sum(-1), column_2r + plan.shard.start]
        )

    return own_52C


def _both_ways(own_S52C: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, ...]:
    """L = log sum e^z and entropy of both models [2, C]; KL(q||p), KL(p||q) and whether the best ids agree [C]. Over all ranks.

    Every sum is moved to the maximum over all ranks once it has travelled.
    """
    own_max_S2C, sum_S2C, moment_S2C, gap_S2C, best_S2C = own_S52C.unbind(1)
    max_2C = own_max_S2C.amax(0)
    shift_S2C = own_max_S2C - max_2C
    moment_S2C = moment_S2C + shift_S2C * sum_S2C
    gap_S2C = gap_S2C + (shift_S2C[:, :1] - shift_S2C[:, 1:]) * sum_S2C
    sum_2C, moment_2C, gap_2C = ((one * shift_S2C.exp()).sum(0) for one in (sum_S2C, moment_S2C, gap_S2C))
    best_2C = best_S2C.masked_fill(shift_S2C < 0, plan.shard.vocab_size).amin(0)

    log_sum_2C = sum_2C.log()
    mean_gap_2C = gap_2C / sum_2C - (log_sum_2C[0] - log_sum_2C[1])  # of log p - log q under (p, q)
    agree_C = (best_2C[0] == best_2C[1]).to(own_S52C.dtype)
    return max_2C + log_sum_2C, log_sum_2C - moment_2C / sum_2C, -mean_gap_2C[1], mean_gap_2C[0], agree_C


def _to_mixture(logits_2Cv: list[torch.Tensor], plan: Plan, norm_2C: torch.Tensor, beta: float) -> torch.Tensor:
    """This rank's share of KL(p||m) and KL(q||m) [2, C]."""
    kl_2C = torch.zeros_like(norm_2C)
    for r, x_2rv in stripes(logits_2Cv, plan, norm_2C.dtype):
        logp_rv, logq_rv = x_2rv.sub_(norm_2C[:, r, None])
        gap_rv = (logp_rv - logq_rv).clamp_(-FAR, FAR)
        mixture_rv = _log_mixture(gap_rv, beta)
        p_rv, q_rv = x_2rv.exp_()
        kl_2C[0, r] = -p_rv.mul_(mixture_rv).sum(-1)
        kl_2C[1, r] = -q_rv.mul_(gap_rv.add_(mixture_rv)).sum(-1)
    return kl_2C


def _gradient(x_2rv: torch.Tensor, norm_2r: torch.Tensor, mean_r: torch.Tensor, divergence: Divergence) -> torch.Tensor:
    """Of the logits / temperature of the student [r, v], from those of both, which it writes to."""
    logp_rv, logq_rv = x_2rv.sub_(norm_2r[..., None])
    if divergence.kind == "forward":
        p_rv, q_rv = x_2rv.exp_()
        return p_rv.sub_(q_rv)
    gap_rv = logp_rv - logq_rv
    if divergence.kind == "jsd":
        mixture_rv = _log_mixture(gap_rv.clamp_(-FAR, FAR), divergence.weight)
        return mixture_rv.add_(mean_r[:, None]).mul_(logp_rv.exp_()).mul_(divergence.weight - 1)
    share, p_rv = _forward_share(divergence), logp_rv.exp_()
    gradient_rv = gap_rv.sub_(mean_r[:, None]).mul_(p_rv)
    return gradient_rv if not share else gradient_rv.mul_(1 - share).add_(p_rv.sub_(logq_rv.exp_()), alpha=share)


def _forward_share(divergence: Divergence) -> float:
    """The weight of the forward KL in a mix of the two."""
    return {"forward": 1.0, "reverse": 0.0, "skewed": divergence.weight}[divergence.kind]


def _log_mixture(gap_rv: torch.Tensor, beta: float) -> torch.Tensor:
    """log m - log p from log p - log q within `FAR`: log(beta e^-gap + 1 - beta)."""
    return gap_rv.neg().exp_().mul_(beta).add_(1 - beta).log_()
