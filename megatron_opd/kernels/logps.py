"""Log-probabilities at given ids straight from hidden states and the sharded LM head; full logits never exist.

Knows tensor and sequence parallelism, so that nobody above does. Refuses to know what a divergence is: every sparse
objective is small-tensor autograd on the numbers that come out of this door.

Dimension key: T packed targets, C tokens of one chunk, K ids per target, N rests, M = 1 + N (all rows, then the rests),
D hidden size, v vocabulary rows of this rank.

With z = logits / temperature, L = log sum_j e^{z_j}, S_n the ids in the columns of rest n and L_n = log sum_{j not in S_n} e^{z_j}:

    log p(id_k) = z_{id_k} - L                  log rest_n = L_n - L                  entropy = L - sum_j p_j z_j
    dz_j = -G p_j + sum_k g_k 1[j = id_k] + sum_n g_n 1[j not in S_n] e^{z_j - L_n},    G = sum_k g_k + sum_n g_n

A rest is accumulated without the ids of S_n and under a maximum of its own, never as 1 - sum p: a rest of 1e-9 keeps its
relative precision.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_opd.kernels.logits import (
    LOG_ZERO,
    Implementation,
    Model,
    Plan,
    add_up,
    all_targets,
    best_ids,
    chunk_logits,
    count_targets,
    head_backward,
    head_products,
    kept_tokens,
    largest,
    largest_in_row,
    local_backward,
    log_sum_parts,
    stripes,
    true_rows,
)
from megatron_opd.kernels.products import TORCH, Products, wide
from megatron_opd.kernels.reference import logps_of, whole_logits
from megatron_opd.kernels.results import EMPTY_REST, TokenLogps
from megatron_opd.types import VocabShard


def logps(
    hidden: torch.Tensor,
    head: torch.Tensor,
    ids: torch.Tensor,
    shard: VocabShard,
    *,
    rows: torch.Tensor | None = None,
    rests: Sequence[slice] = (),
    moments: bool = False,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    implementation: Implementation = "chunked",
    products: Products = TORCH,
) -> TokenLogps:
    """Log-probabilities at `ids`, the log of the mass outside each of some sets of them, and what the whole vocabulary tells.

    All is the same on every rank of the group; each rank must call it and must derive the same loss from it. Forward and
    backward hold logits of `chunk_tokens` tokens.

    Args:
        hidden: [T, D], or [T / tp, D] when `shard.sequence_parallel`: gathered here, its gradient reduce-scattered.
        head: [stop - start, D] in the dtype of `hidden`; padding rows count for nothing and get a zero gradient.
        ids: [T, K] int64 in the whole vocabulary, duplicates allowed; one in the columns of a rest counts once.
        shard: the rows of this rank.
        rows: [T] bool, the targets that count; the others cost nothing and come back as 0 without gradient. None: all.
        rests: the columns of `ids` that each rest leaves out; they may overlap. Where they cover the vocabulary the log rest
            is `EMPTY_REST` with zero gradient.
        moments: whether the entropy and the best id are asked for.
        temperature: divides the logits.
        chunk_tokens: tokens whose logits exist at a time.
        implementation: "chunked" is torch, "triton" one kernel per pass, which wants rows of a multiple of 16 bytes; "reference" is
            plain autograd on the full logits of all ranks, "te" is "chunked" with FP8 `products`.
        products: what "te" multiplies with, see `fp8_products`.
    """
    num_targets = count_targets(hidden, shard)
    assert hidden.dtype == head.dtype, f"hidden is {hidden.dtype}, head is {head.dtype}: matmul wants one dtype"
    assert ids.shape[0] == num_targets, f"{ids.shape[0]} rows of ids for {num_targets} hidden states over all ranks"
    kept = None if rows is None else rows.nonzero()[:, 0]
    assert (implementation == "te") == (products is not TORCH), f"{implementation} with {products}: FP8 products are what te is"
    plan = Plan(
        shard=shard, kept=kept, temperature=temperature, chunk_tokens=chunk_tokens, implementation=implementation, products=products
    )
    ids_TK = ids if kept is None else ids[kept]
    if implementation == "reference":
        found = logps_of(whole_logits(hidden, head, plan), ids_TK, rests, moments)
        scores = found.logp, found.log_rest, found.entropy, found.best
    else:
        scores = _Logps.apply(hidden, head, ids_TK, plan, tuple(rests), moments)
    logp, log_rest, entropy, best = (all_targets(one, plan, num_targets) for one in scores)
    return TokenLogps(logp=logp, log_rest=log_rest, entropy=entropy, best=best)


class _Logps(torch.autograd.Function):
    """Forward keeps [T] sums; backward computes the logits anew."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, ids_TK: torch.Tensor, plan: Plan, rests: tuple[slice, ...], moments: bool
    ) -> tuple:
        student = kept_tokens(hidden, plan), true_rows(head, plan.shard)
        if plan.implementation == "triton":
            own = _Sums.of(_triton().local_sums(*student, ids_TK, rests, plan.shard, plan.temperature))
        else:
            own = _local_sums(*student, ids_TK, plan, rests, moments)
        max_TM = largest(own.max_TM, plan.shard)
        shift_TM = own.max_TM - max_TM
        moment_T = own.moment_T + shift_TM[:, 0] * own.sum_TM[:, 0]
        partial = torch.cat([own.picked_TK, own.sum_TM * shift_TM.exp(), (moment_T * shift_TM[:, 0].exp())[:, None]], 1)
        picked_TK, sum_TM, moment_T1 = add_up(partial, plan.shard).split([ids_TK.shape[1], 1 + len(rests), 1], 1)

        log_sum_TM = sum_TM.clamp_min(torch.finfo(sum_TM.dtype).tiny).log()
        norm_TM, empty_TN = max_TM + log_sum_TM, max_TM[:, 1:] <= LOG_ZERO
        logp_TK = picked_TK - norm_TM[:, :1]
        ctx.save_for_backward(hidden, head, ids_TK, norm_TM, empty_TN, logp_TK)
        ctx.plan, ctx.rests = plan, rests
        log_rest_TN = (norm_TM[:, 1:] - norm_TM[:, :1]).masked_fill(empty_TN, EMPTY_REST)
        if not moments:
            return logp_TK, log_rest_TN, None, None
        entropy_T = log_sum_TM[:, 0] - moment_T1[:, 0] / sum_TM[:, 0]
        best_T = best_ids(own.best_T, own.max_TM[:, 0], max_TM[:, 0], plan.shard)
        ctx.mark_non_differentiable(entropy_T, best_T)
        return logp_TK, log_rest_TN, entropy_T, best_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TK: torch.Tensor, grad_TN: torch.Tensor, *_: Any) -> tuple:
        hidden, head, ids_TK, norm_TM, empty_TN, logp_TK = ctx.saved_tensors
        grad_TN = grad_TN.masked_fill(empty_TN, 0)
        if ctx.plan.implementation == "triton":
            up = _triton().Upstream(logp_TK=logp_TK, norm_TM=norm_TM, grad_TK=grad_TK, grad_TN=grad_TN)

            def local(student: Model, rows_sum_vD: torch.Tensor | None, need_hidden: bool) -> torch.Tensor | None:
                plan = ctx.plan
                return _triton().local_gradients(*student, ids_TK, ctx.rests, up, plan.shard, plan.temperature, rows_sum_vD, need_hidden)

            return *local_backward(local, hidden, head, ctx.plan, ctx.needs_input_grad[:2]), None, None, None, None
        grad_sum_T = grad_TK.sum(1) + grad_TN.sum(1)

        def dlogits(t: slice, x_1rv: torch.Tensor) -> torch.Tensor:
            z_rv = x_1rv[0]
            local_rK, mine_rK = _locate(ids_TK[t], z_rv.shape[1], ctx.plan.shard)
            of_rests = [
                (outside_rv - norm_TM[t, n + 1, None]).exp_().mul_(grad_TN[t, n, None])
                for n, outside_rv in enumerate(_outside(z_rv, local_rK, mine_rK, ctx.rests))
            ]
            dz_rv = z_rv.sub_(norm_TM[t, :1]).exp_().mul_(-grad_sum_T[t, None])
            for one_rv in of_rests:
                dz_rv.add_(one_rv)
            return dz_rv.scatter_add_(1, local_rK, grad_TK[t] * mine_rK)

        return *head_backward(dlogits, [], hidden, head, ctx.plan, ctx.needs_input_grad[:2]), None, None, None, None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sums:
    """What one rank knows of each target before the ranks speak; a rank without true rows keeps the first values."""

    picked_TK: torch.Tensor  # logits at `ids`, 0 where another rank owns the id
    max_TM: torch.Tensor  # of z, or LOG_ZERO
    sum_TM: torch.Tensor  # of e^{z - max}
    moment_T: torch.Tensor  # sum of e^{z - max} (z - max) over all rows; 0 where no moments are asked for
    best_T: torch.Tensor  # id of the largest logit

    @classmethod
    def of(cls, sums: Sequence[torch.Tensor]) -> "_Sums":
        """From those in order."""
        return cls(**dict(zip((field.name for field in fields(cls)), sums, strict=True)))


def _local_sums(
    hidden_TD: torch.Tensor, rows_vD: torch.Tensor, ids_TK: torch.Tensor, plan: Plan, rests: tuple[slice, ...], moments: bool
) -> _Sums:
    num_tokens, new = ids_TK.shape[0], {"dtype": wide(hidden_TD.dtype), "device": hidden_TD.device}
    own = _Sums(
        picked_TK=torch.zeros(ids_TK.shape, **new),
        max_TM=torch.full((num_tokens, 1 + len(rests)), LOG_ZERO, **new),
        sum_TM=torch.zeros((num_tokens, 1 + len(rests)), **new),
        moment_T=torch.zeros(num_tokens, **new),
        best_T=torch.zeros(num_tokens, dtype=torch.int64, device=hidden_TD.device),
    )
    student = [(hidden_TD, rows_vD)]
    for c, (z_Cv,) in chunk_logits(student, head_products(student, plan), plan) if rows_vD.shape[0] else []:
        for r, (z_rv,) in stripes([z_Cv], plan, new["dtype"]):
            t = slice(c.start + r.start, c.start + r.stop)
            local_rK, mine_rK = _locate(ids_TK[t], rows_vD.shape[0], plan.shard)
            own.picked_TK[t] = z_rv.gather(1, local_rK) * mine_rK
            for n, outside_rv in enumerate(_outside(z_rv, local_rK, mine_rK, rests)):
                own.max_TM[t, n + 1], own.sum_TM[t, n + 1] = log_sum_parts(outside_rv)
            if moments:
                own.max_TM[t, 0], column_r = largest_in_row(z_rv)
                own.best_T[t] = column_r + plan.shard.start
            else:
                own.max_TM[t, 0] = z_rv.amax(-1)
            exp_rv = z_rv.sub_(own.max_TM[t, :1]).exp()
            own.sum_TM[t, 0] = exp_rv.sum(-1)
            if moments:
                own.moment_T[t] = exp_rv.mul_(z_rv).sum(-1)
    own.max_TM.clamp_min_(LOG_ZERO)
    return own


def _triton() -> ModuleType:
    """Imported by those who ask for it: a CPU build has no use for Triton."""
    from megatron_opd.kernels import triton_logps

    return triton_logps


def _locate(ids_CK: torch.Tensor, num_rows: int, shard: VocabShard) -> tuple[torch.Tensor, torch.Tensor]:
    """Row [C, K] of each id on this rank (a valid row even if another rank owns the id), and whether this rank owns it."""
    local_CK = ids_CK - shard.start
    return local_CK.clamp(0, num_rows - 1), (local_CK >= 0) & (local_CK < num_rows)


def _outside(z_Cv: torch.Tensor, local_CK: torch.Tensor, mine_CK: torch.Tensor, rests: tuple[slice, ...]) -> Iterator[torch.Tensor]:
    """For each rest in turn `z_Cv` itself, with e^z zero at the owned ids until the next one is asked for.

    What is left out is added to, because a foreign id points at some row of this rank as well; duplicates are put back alike.
    """
    for rest in rests:
        rows_CK = local_CK[:, rest]
        before_CK = z_Cv.gather(1, rows_CK)
        z_Cv.scatter_add_(1, rows_CK, mine_CK[:, rest] * torch.full_like(z_Cv[:, :1], 2 * LOG_ZERO))
        yield z_Cv
        z_Cv.scatter_(1, rows_CK, before_CK)
