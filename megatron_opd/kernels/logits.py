"""Logits of a few tokens on this rank's rows of the vocabulary, and the collectives that make the shards one distribution.

Knows sharding, padding and which targets count; refuses to know what the logits are for.

Dimension key: T packed targets, C tokens of one chunk, D hidden size, v vocabulary rows of this rank without padding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_opd.types import VocabShard

LOG_ZERO = -1e30  # stands for log 0 in maxima: unlike -inf it can be subtracted from itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which logits are computed, and how many at a time."""

    shard: VocabShard
    kept: torch.Tensor | None  # int64 indices of the targets that count; None: all
    temperature: float  # divides the logits
    chunk_tokens: int  # tokens whose logits exist at a time


# ------------------------------------------------------------------------------------------------- rows and targets
def true_rows(head: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """`head` [stop - start, D] without its padding rows -> [v, D], a view; v is 0 on a rank that holds padding only."""
    assert head.shape[0] == shard.stop - shard.start, f"the head has {head.shape[0]} rows, its shard [{shard.start}, {shard.stop})"
    return head[: max(0, min(shard.stop, shard.vocab_size) - shard.start)]


def gather_tokens(hidden: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """All tokens [T, D] on every rank, from [T / tp, D] when the sequence is split."""
    if shard.group is None or not shard.sequence_parallel:
        return hidden
    gathered = hidden.new_empty(count_targets(hidden, shard), hidden.shape[1])
    dist.all_gather_into_tensor(gathered, hidden.contiguous(), group=shard.group)
    return gathered


def reduce_tokens(grad_TD: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """The transpose of `gather_tokens` for partial gradients: summed over the ranks, split as the tokens came."""
    if shard.group is None:
        return grad_TD
    if not shard.sequence_parallel:
        dist.all_reduce(grad_TD, group=shard.group)
        return grad_TD
    own = grad_TD.new_empty(grad_TD.shape[0] // shard.group.size(), grad_TD.shape[1])
    dist.reduce_scatter_tensor(own, grad_TD, group=shard.group)
    return own


def count_targets(hidden: torch.Tensor, shard: VocabShard) -> int:
    """T, from hidden states that may be split over the ranks."""
    return hidden.shape[0] * (shard.group.size() if shard.group is not None and shard.sequence_parallel else 1)


def kept_tokens(hidden: torch.Tensor, plan: Plan) -> torch.Tensor:
    """The hidden states of the targets that count, from all ranks of a split sequence; from here on T counts only them."""
    hidden_TD = gather_tokens(hidden, plan.shard)
    return hidden_TD if plan.kept is None else hidden_TD[plan.kept]


def all_targets(kept: torch.Tensor | None, plan: Plan, num_targets: int) -> torch.Tensor | None:
    """The transpose of the choice in `kept_tokens`, differentiable: 0 for the targets that do not count. None stays None."""
    if kept is None or plan.kept is None:
        return kept
    return kept.new_zeros(num_targets, *kept.shape[1:]).index_copy(0, plan.kept, kept)


def chunks(num_tokens: int, chunk_tokens: int) -> list[slice]:
    """Consecutive slices of at most `chunk_tokens` that cover all tokens."""
    return [slice(first, min(first + chunk_tokens, num_tokens)) for first in range(0, num_tokens, chunk_tokens)]


# ------------------------------------------------------------------------------------------------ logits, their sums
def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and of accumulation: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` in the dtype of its inputs, as float32 (float64). A GPU keeps its float32 sums, a CPU rounds them to the input dtype."""
    if a.is_cuda and a.dtype != wide(a.dtype):
        return torch.mm(a, b, out_dtype=wide(a.dtype))
    return torch.mm(a, b).to(wide(a.dtype))


def logits(hidden_CD: torch.Tensor, rows_vD: torch.Tensor, temperature: float) -> torch.Tensor:
    """[C, v] float32 (float64), a fresh tensor that may be written to."""
    return matmul(hidden_CD, rows_vD.t()).div_(temperature)


def log_sum_parts(logits_Cv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's (m [C], sum of exp(z - m) [C]); (LOG_ZERO, 0) where nothing counts."""
    max_C = logits_Cv.amax(-1)
    sum_C = (logits_Cv - max_C[:, None]).exp_().sum(-1)
    return max_C, sum_C.masked_fill_(max_C <= LOG_ZERO, 0)


def add_up(partial: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """The sum over the ranks, in place."""
    if shard.group is not None:
        dist.all_reduce(partial, group=shard.group)
    return partial


def largest(max_local: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """The maximum over the ranks. Sums under the local one times exp(local - largest) are then ready to be added up."""
    max_all = max_local.clone()
    if shard.group is not None:
        dist.all_reduce(max_all, dist.ReduceOp.MAX, group=shard.group)
    return max_all


def best_ids(best_local: torch.Tensor, max_local: torch.Tensor, max_all: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """The id of the largest logit over the ranks, of equal ones the lowest, from each rank's own."""
    best = best_local.masked_fill(max_local < max_all, shard.vocab_size)
    if shard.group is not None:
        dist.all_reduce(best, dist.ReduceOp.MIN, group=shard.group)
    return best


# --------------------------------------------------------------------------------------------------------- backward
def head_backward(
    dlogits: Callable[[slice, torch.Tensor], torch.Tensor], hidden: torch.Tensor, head: torch.Tensor, plan: Plan, needs: Sequence[bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of `hidden` and `head`, None where `needs` says so; the logits are computed anew.

    `dlogits` makes the gradient [C, v] of a chunk's logits from its slice of the targets that count and its logits, which it
    may write to.
    """
    need_hidden, need_head = needs
    hidden_TD, rows_vD = kept_tokens(hidden, plan), true_rows(head, plan.shard)
    grad_hidden_TD = torch.zeros_like(hidden_TD, dtype=wide(hidden.dtype)) if need_hidden else None
    grad_head = torch.zeros_like(head, dtype=wide(head.dtype)) if need_head else None
    for c in chunks(hidden_TD.shape[0], plan.chunk_tokens) if rows_vD.shape[0] else []:
        dz_Cv = dlogits(c, logits(hidden_TD[c], rows_vD, plan.temperature)).div_(plan.temperature).to(head.dtype)
        if grad_hidden_TD is not None:
            grad_hidden_TD[c] = matmul(dz_Cv, rows_vD)
        if grad_head is not None:
            grad_head[: rows_vD.shape[0]] += matmul(dz_Cv.t(), hidden_TD[c])
    if grad_hidden_TD is not None:
        grad_hidden_TD = all_targets(grad_hidden_TD, plan, count_targets(hidden, plan.shard))
        grad_hidden_TD = reduce_tokens(grad_hidden_TD, plan.shard).to(hidden.dtype)
    return grad_hidden_TD, None if grad_head is None else grad_head.to(head.dtype)
