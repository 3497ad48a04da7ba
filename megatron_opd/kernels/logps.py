"""Log-probabilities at given ids straight from hidden states and the sharded LM head; full logits never exist.

Knows tensor and sequence parallelism, so that nobody above does. Refuses to know what a divergence is: every sparse
objective is small-tensor autograd on the numbers that come out of this door.

Dimension key: T packed targets, C tokens of one chunk, K ids per target, D hidden size, v vocabulary rows of this rank.

With z = logits / temperature, L = log sum_j e^{z_j}, S the ids in the tail columns and L_tail = log sum_{j not in S} e^{z_j}:

    log p(id_k) = z_{id_k} - L                  log tail = L_tail - L
    dz_j = -G p_j + sum_k g_k 1[j = id_k] + g_tail 1[j not in S] e^{z_j - L_tail},    G = sum_k g_k + g_tail

The tail is accumulated without the ids of S and under a maximum of its own, never as 1 - sum p: a tail of 1e-9 keeps its
relative precision.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_opd.kernels.logits import (
    LOG_ZERO,
    add_up,
    chunks,
    gather_tokens,
    log_sum_parts,
    logits,
    matmul,
    reduce_tokens,
    rescale,
    true_rows,
    wide,
)
from megatron_opd.types import VocabShard

EMPTY_TAIL = -1e3  # log tail where the tail columns cover the vocabulary: its exp is 0 and a rounding error times it is small


def logps(
    hidden: torch.Tensor,
    head: torch.Tensor,
    ids: torch.Tensor,
    shard: VocabShard,
    *,
    rows: torch.Tensor | None = None,
    tail_columns: slice | None = None,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities [T, K] at `ids`, and with `tail_columns` the log of the mass [T] outside `ids[:, tail_columns]`.

    Both are float32 (float64 for float64 inputs), in nats, differentiable, and the same on every rank of the group; each
    rank must call it and must derive the same loss from it. Forward and backward hold logits of `chunk_tokens` tokens.

    Args:
        hidden: [T, D], or [T / tp, D] when `shard.sequence_parallel`: gathered here, its gradient reduce-scattered.
        head: [stop - start, D] in the dtype of `hidden`; padding rows count for nothing and get a zero gradient.
        ids: [T, K] int64 in the whole vocabulary, duplicates allowed; one in the tail columns counts once.
        shard: the rows of this rank.
        rows: [T] bool, the targets that count; the others cost nothing and come back as 0 without gradient. None: all.
        tail_columns: the columns of `ids` that the tail leaves out. Where they cover the vocabulary the log tail is
            `EMPTY_TAIL` with zero gradient.
        temperature: divides the logits.
        chunk_tokens: tokens whose logits exist at a time.
    """
    assert hidden.dtype == head.dtype, f"hidden is {hidden.dtype}, head is {head.dtype}: matmul wants one dtype"
    split = shard.group.size() if shard.group is not None and shard.sequence_parallel else 1
    assert ids.shape[0] == hidden.shape[0] * split, f"{ids.shape[0]} rows of ids for {hidden.shape[0]} x {split} hidden states"
    kept = None if rows is None else rows.nonzero()[:, 0]
    call = _Call(shard=shard, kept=kept, tail_columns=tail_columns, temperature=temperature, chunk_tokens=chunk_tokens)
    logp, log_tail = _Logps.apply(hidden, head, ids if kept is None else ids[kept], call)
    if kept is None:
        return logp, log_tail
    full = logp.new_zeros(ids.shape).index_copy(0, kept, logp)
    return full, None if log_tail is None else log_tail.new_zeros(ids.shape[0]).index_copy(0, kept, log_tail)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """The arguments that have no gradient."""

    shard: VocabShard
    kept: torch.Tensor | None  # indices of the targets that count
    tail_columns: slice | None
    temperature: float
    chunk_tokens: int


class _Logps(torch.autograd.Function):
    """Forward keeps [T] sums; backward computes the logits anew."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, ids_TK: torch.Tensor, call: _Call) -> tuple:
        picked_TK, max_T2, sum_T2 = _local_sums(_kept_tokens(hidden, call), true_rows(head, call.shard), ids_TK, call)
        max_T2, sum_T2 = rescale(max_T2, sum_T2, call.shard)
        picked_TK, sum_T2 = add_up(torch.cat([picked_TK, sum_T2], 1), call.shard).split([ids_TK.shape[1], 2], 1)
        empty_T = max_T2[:, 1] <= LOG_ZERO
        norm_T, tail_norm_T = (max_T2 + sum_T2.clamp_min(torch.finfo(sum_T2.dtype).tiny).log()).unbind(1)
        ctx.save_for_backward(hidden, head, ids_TK, norm_T, tail_norm_T, empty_T)
        ctx.call = call
        log_tail_T = None if call.tail_columns is None else (tail_norm_T - norm_T).masked_fill(empty_T, EMPTY_TAIL)
        return picked_TK - norm_T[:, None], log_tail_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TK: torch.Tensor, grad_tail_T: torch.Tensor | None) -> tuple:
        hidden, head, ids_TK, norm_T, tail_norm_T, empty_T = ctx.saved_tensors
        call: _Call = ctx.call
        need_hidden, need_head = ctx.needs_input_grad[:2]
        hidden_TD, rows_vD = _kept_tokens(hidden, call), true_rows(head, call.shard)
        grad_hidden_TD = torch.zeros_like(hidden_TD, dtype=wide(hidden.dtype)) if need_hidden else None
        grad_head = torch.zeros_like(head, dtype=wide(head.dtype)) if need_head else None
        grad_tail_T = torch.zeros_like(norm_T) if grad_tail_T is None else grad_tail_T.masked_fill(empty_T, 0)

        for c in chunks(ids_TK.shape[0], call.chunk_tokens) if rows_vD.shape[0] else []:
            z_Cv = logits(hidden_TD[c], rows_vD, call.temperature)
            local_CK, mine_CK = _locate(ids_TK[c], rows_vD.shape[0], call.shard)
            dz_Cv = (z_Cv - norm_T[c, None]).exp_().mul_(-(grad_TK[c].sum(1) + grad_tail_T[c])[:, None])
            dz_Cv.scatter_add_(1, local_CK, grad_TK[c] * mine_CK)
            if call.tail_columns is not None:
                _leave_out(z_Cv, local_CK[:, call.tail_columns], mine_CK[:, call.tail_columns])
                dz_Cv.add_((z_Cv - tail_norm_T[c, None]).exp_().mul_(grad_tail_T[c, None]))
            dz_Cv = dz_Cv.div_(call.temperature).to(head.dtype)
            if grad_hidden_TD is not None:
                grad_hidden_TD[c] = matmul(dz_Cv, rows_vD)
            if grad_head is not None:
                grad_head[: rows_vD.shape[0]] += matmul(dz_Cv.t(), hidden_TD[c])

        if grad_hidden_TD is not None:
            grad_hidden_TD = reduce_tokens(_all_tokens(grad_hidden_TD, hidden, call), call.shard).to(hidden.dtype)
        return grad_hidden_TD, None if grad_head is None else grad_head.to(head.dtype), None, None


def _kept_tokens(hidden: torch.Tensor, call: _Call) -> torch.Tensor:
    """The hidden states of the targets that count, from all ranks of a split sequence; from here on T counts only them."""
    hidden_TD = gather_tokens(hidden, call.shard)
    return hidden_TD if call.kept is None else hidden_TD[call.kept]


def _all_tokens(grad_TD: torch.Tensor, hidden: torch.Tensor, call: _Call) -> torch.Tensor:
    """The transpose of the choice in `_kept_tokens`."""
    if call.kept is None:
        return grad_TD
    split = call.shard.group.size() if call.shard.group is not None and call.shard.sequence_parallel else 1
    return grad_TD.new_zeros(hidden.shape[0] * split, hidden.shape[1]).index_copy_(0, call.kept, grad_TD)


def _local_sums(hidden_TD: torch.Tensor, rows_vD: torch.Tensor, ids_TK: torch.Tensor, call: _Call) -> tuple[torch.Tensor, ...]:
    """This rank's logits at `ids` [T, K] (0 where another rank owns the id), and (maximum, sum) over all rows and over the tail."""
    num_tokens, dtype = ids_TK.shape[0], wide(hidden_TD.dtype)
    picked_TK = torch.zeros(ids_TK.shape, dtype=dtype, device=hidden_TD.device)
    max_T2 = torch.full((num_tokens, 2), LOG_ZERO, dtype=dtype, device=hidden_TD.device)
    sum_T2 = torch.zeros((num_tokens, 2), dtype=dtype, device=hidden_TD.device)
    for c in chunks(num_tokens, call.chunk_tokens) if rows_vD.shape[0] else []:
        z_Cv = logits(hidden_TD[c], rows_vD, call.temperature)
        local_CK, mine_CK = _locate(ids_TK[c], rows_vD.shape[0], call.shard)
        picked_TK[c] = z_Cv.gather(1, local_CK) * mine_CK
        max_T2[c, 0], sum_T2[c, 0] = log_sum_parts(z_Cv)
        if call.tail_columns is not None:
            _leave_out(z_Cv, local_CK[:, call.tail_columns], mine_CK[:, call.tail_columns])
            max_T2[c, 1], sum_T2[c, 1] = log_sum_parts(z_Cv)
    return picked_TK, max_T2.clamp_min_(LOG_ZERO), sum_T2


def _locate(ids_CK: torch.Tensor, num_rows: int, shard: VocabShard) -> tuple[torch.Tensor, torch.Tensor]:
    """Row [C, K] of each id on this rank (a valid row even if another rank owns the id), and whether this rank owns it."""
    local_CK = ids_CK - shard.start
    return local_CK.clamp(0, num_rows - 1), (local_CK >= 0) & (local_CK < num_rows)


def _leave_out(z_Cv: torch.Tensor, local_CK: torch.Tensor, mine_CK: torch.Tensor) -> None:
    """Makes e^z zero at the owned ids, in place. Adding, because a foreign id points at some row of this rank as well."""
    z_Cv.scatter_add_(1, local_CK, mine_CK * torch.full_like(z_Cv[:, :1], 2 * LOG_ZERO))
