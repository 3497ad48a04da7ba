"""A divergence from the teacher over the whole vocabulary, from the hidden states and sharded LM heads of both.

Knows tensor and sequence parallelism, so that nobody above does; neither model's full logits ever exist. The teacher's head is
sharded as the student's is, so the logits of a token meet on the rank that owns them and only sums per token travel.

Dimension key: T packed targets, C tokens of one chunk, D hidden size of the student, E of the teacher, v vocabulary rows of
this rank; [T, 2] is (student, teacher).

With z, u the logits / temperature of student p and teacher q, all sums global and x_j = log p_j - log q_j:

    R = KL(p||q) = sum_j p_j x_j                     dR/dz_j = p_j (x_j - R)
    F = KL(q||p) = - sum_j q_j x_j                   dF/dz_j = p_j - q_j
    J = beta KL(q||m) + (1 - beta) KL(p||m)          dJ/dz_j = (1 - beta) p_j (log p_j - log m_j - KL(p||m))

The mixture m = beta q + (1 - beta) p of the generalised Jensen-Shannon divergence (arXiv 2306.13649) is known only once both
distributions are normalised, so J passes over the vocabulary twice in forward; log m_j - log p_j = log(beta e^{-x_j} + 1 - beta).
Equal logits have x_j = 0 exactly, hence R, F and their gradients are 0; those of J are 0 up to one rounding error.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_opd.kernels.logits import (
    LOG_ZERO,
    Plan,
    add_up,
    all_targets,
    best_ids,
    chunks,
    count_targets,
    head_backward,
    kept_tokens,
    largest,
    logits,
    true_rows,
    wide,
)
from megatron_opd.types import Divergence, VocabShard

_Model = tuple[torch.Tensor, torch.Tensor]  # hidden states of the targets that count, true rows of the head


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseKL:
    """What `dense_kl` knows of each target, in nats, float32 (float64 for a float64 student); 0 for targets that do not count."""

    divergence: torch.Tensor  # [T] differentiable in the student
    kl: torch.Tensor  # [T] KL(p||q) whatever the divergence, no gradient
    student_entropy: torch.Tensor  # [T] no gradient
    teacher_entropy: torch.Tensor  # [T]
    agree: torch.Tensor  # [T] 1 where the largest logits of both, of equal ones the lowest id, are of one id, else 0


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
) -> DenseKL:
    """The `divergence` between student and teacher per target, differentiable in the student alone, and what to watch beside it.

    All is the same on every rank of the group; each rank must call it and must derive the same loss from it. Forward and
    backward hold about five times the logits of `chunk_tokens` tokens.

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
    """
    num_targets = count_targets(hidden, shard)
    assert hidden.dtype == head.dtype, f"hidden is {hidden.dtype}, head is {head.dtype}: matmul wants one dtype"
    assert teacher_hidden.dtype == teacher_head.dtype, f"teacher: hidden is {teacher_hidden.dtype}, head is {teacher_head.dtype}"
    assert teacher_hidden.shape[0] == num_targets, f"{teacher_hidden.shape[0]} hidden states of the teacher for {num_targets} targets"
    assert divergence.kind != "jsd" or 0 < divergence.weight < 1, f"jsd has no weight {divergence.weight}: take forward or reverse"
    kept = None if rows is None else rows.nonzero()[:, 0]
    plan = Plan(shard=shard, kept=kept, temperature=temperature, chunk_tokens=chunk_tokens)
    teacher_TE = teacher_hidden if kept is None else teacher_hidden[kept]
    sums = _DenseKL.apply(hidden, head, teacher_TE, teacher_head, divergence, plan)
    loss, kl, student_entropy, teacher_entropy, agree = (all_targets(one, plan, num_targets) for one in sums)
    return DenseKL(divergence=loss, kl=kl, student_entropy=student_entropy, teacher_entropy=teacher_entropy, agree=agree)


class _DenseKL(torch.autograd.Function):
    """Forward keeps [T] sums; backward computes the logits of both anew."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        teacher_TE: torch.Tensor,
        teacher_head: torch.Tensor,
        divergence: Divergence,
        plan: Plan,
    ) -> tuple[torch.Tensor, ...]:
        student = kept_tokens(hidden, plan), true_rows(head, plan.shard)
        teacher = teacher_TE, true_rows(teacher_head, plan.shard)
        norm_T2, entropy_T2, forward_T, reverse_T, agree_T = _both_ways(student, teacher, plan)
        if divergence.kind == "jsd":
            mean_T, teacher_T = _to_mixture(student, teacher, plan, norm_T2, divergence.weight).unbind(1)
            loss_T = divergence.weight * teacher_T + (1 - divergence.weight) * mean_T
        else:
            share = _forward_share(divergence)
            mean_T, loss_T = reverse_T, share * forward_T + (1 - share) * reverse_T
        ctx.save_for_backward(hidden, head, teacher_TE, teacher_head, norm_T2, mean_T)
        ctx.divergence, ctx.plan = divergence, plan
        watched = reverse_T.clone(), *entropy_T2.unbind(1), agree_T
        ctx.mark_non_differentiable(*watched)
        return loss_T, *watched

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: torch.Tensor, *_: Any) -> tuple:
        hidden, head, teacher_TE, teacher_head, norm_T2, mean_T = ctx.saved_tensors
        divergence, plan = ctx.divergence, ctx.plan
        teacher_rows_vE = true_rows(teacher_head, plan.shard)

        def dlogits(c: slice, z_Cv: torch.Tensor) -> torch.Tensor:
            u_Cv = logits(teacher_TE[c], teacher_rows_vE, plan.temperature).to(z_Cv.dtype)
            logp_Cv, logq_Cv = z_Cv.sub_(norm_T2[c, :1]), u_Cv.sub_(norm_T2[c, 1:])
            gap_Cv = logp_Cv - logq_Cv
            p_Cv = logp_Cv.exp_()
            if divergence.kind == "jsd":
                dz_Cv = p_Cv.mul_(_log_mixture(gap_Cv, divergence.weight).add_(mean_T[c, None]).mul_(divergence.weight - 1))
            else:
                share = _forward_share(divergence)
                dz_Cv = p_Cv.mul_(gap_Cv.sub_(mean_T[c, None]).mul_(1 - share).add_(share)).sub_(logq_Cv.exp_().mul_(share))
            return dz_Cv.mul_(grad_T[c, None])

        return *head_backward(dlogits, hidden, head, plan, ctx.needs_input_grad[:2]), None, None, None, None


def _forward_share(divergence: Divergence) -> float:
    """The weight of the forward KL in a mix of the two."""
    return {"forward": 1.0, "reverse": 0.0, "skewed": divergence.weight}[divergence.kind]


def _logit_pairs(student: _Model, teacher: _Model, plan: Plan) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """The chunks with the logits [C, v] of both models, in the dtype of the student's; none on a rank of padding only."""
    (hidden_TD, rows_vD), (teacher_TE, teacher_rows_vE) = student, teacher
    for c in chunks(hidden_TD.shape[0], plan.chunk_tokens) if rows_vD.shape[0] else []:
        z_Cv = logits(hidden_TD[c], rows_vD, plan.temperature)
        yield c, z_Cv, logits(teacher_TE[c], teacher_rows_vE, plan.temperature).to(z_Cv.dtype)


def _both_ways(student: _Model, teacher: _Model, plan: Plan) -> tuple[torch.Tensor, ...]:
    """L = log sum e^z and entropy of both models [T, 2]; KL(q||p), KL(p||q) and whether the best ids agree [T]. Over all ranks.

    Every sum is taken of logits less their maximum, and moved from this rank's maximum to that of all ranks before it travels.
    """
    num_tokens, new = student[0].shape[0], {"dtype": wide(student[0].dtype), "device": student[0].device}
    own_max_T2 = torch.full((num_tokens, 2), LOG_ZERO, **new)
    sum_T2, moment_T2, gap_T2 = torch.zeros((3, num_tokens, 2), **new).unbind()  # of e^x, e^x x and e^x (z - u), for x in (z, u)
    own_best_T2 = torch.zeros((num_tokens, 2), dtype=torch.int64, device=student[0].device)
    for c, z_Cv, u_Cv in _logit_pairs(student, teacher, plan):
        for i, x_Cv in enumerate((z_Cv, u_Cv)):
            own_max_T2[c, i], row_C = x_Cv.max(-1)
            own_best_T2[c, i] = row_C + plan.shard.start
            x_Cv.sub_(own_max_T2[c, i, None])
        gap_Cv = z_Cv - u_Cv
        for i, x_Cv in enumerate((z_Cv, u_Cv)):
            exp_Cv = x_Cv.exp()
            sum_T2[c, i] = exp_Cv.sum(-1)
            moment_T2[c, i] = x_Cv.mul_(exp_Cv).sum(-1)
            gap_T2[c, i] = exp_Cv.mul_(gap_Cv).sum(-1)

    max_T2 = largest(own_max_T2, plan.shard)
    shift_T2 = own_max_T2 - max_T2
    moment_T2 = moment_T2 + shift_T2 * sum_T2
    gap_T2 = gap_T2 + (shift_T2[:, :1] - shift_T2[:, 1:]) * sum_T2
    sum_T2, moment_T2, gap_T2 = add_up(torch.stack([sum_T2, moment_T2, gap_T2]) * shift_T2.exp(), plan.shard).unbind()
    best_T2 = best_ids(own_best_T2, own_max_T2, max_T2, plan.shard)

    log_sum_T2 = sum_T2.log()
    mean_gap_T2 = gap_T2 / sum_T2 - (log_sum_T2[:, :1] - log_sum_T2[:, 1:])  # of log p - log q under (p, q)
    agree_T = (best_T2[:, 0] == best_T2[:, 1]).to(sum_T2.dtype)
    return max_T2 + log_sum_T2, log_sum_T2 - moment_T2 / sum_T2, -mean_gap_T2[:, 1], mean_gap_T2[:, 0], agree_T


def _to_mixture(student: _Model, teacher: _Model, plan: Plan, norm_T2: torch.Tensor, beta: float) -> torch.Tensor:
    """KL(p||m) and KL(q||m) [T, 2] over all ranks."""
    kl_T2 = torch.zeros_like(norm_T2)
    for c, z_Cv, u_Cv in _logit_pairs(student, teacher, plan):
        logp_Cv, logq_Cv = z_Cv.sub_(norm_T2[c, :1]), u_Cv.sub_(norm_T2[c, 1:])
        gap_Cv = logp_Cv - logq_Cv
        mixture_Cv = _log_mixture(gap_Cv, beta)
        kl_T2[c, 0] = -logp_Cv.exp_().mul_(mixture_Cv).sum(-1)
        kl_T2[c, 1] = -logq_Cv.exp_().mul_(gap_Cv.add_(mixture_Cv)).sum(-1)
    return add_up(kl_T2, plan.shard)


def _log_mixture(gap_Cv: torch.Tensor, beta: float) -> torch.Tensor:
    """log m - log p from log p - log q, precise where p and q are close and finite where they are far apart."""
    return torch.logaddexp(math.log(beta) - gap_Cv, gap_Cv.new_full((), math.log1p(-beta)))
