"""Logits of a few tokens on this rank's rows of the vocabulary, and the collectives that make the shards one distribution.

Knows sharding and padding; refuses to know what the logits are for.

Dimension key: T packed targets, C tokens of one chunk, D hidden size, v vocabulary rows of this rank without padding.
"""

import torch
import torch.distributed as dist

from megatron_opd.types import VocabShard

LOG_ZERO = -1e30  # stands for log 0 in maxima: unlike -inf it can be subtracted from itself


def true_rows(head: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """`head` [stop - start, D] without its padding rows -> [v, D], a view; v is 0 on a rank that holds padding only."""
    assert head.shape[0] == shard.stop - shard.start, f"the head has {head.shape[0]} rows, its shard [{shard.start}, {shard.stop})"
    return head[: max(0, min(shard.stop, shard.vocab_size) - shard.start)]


def gather_tokens(hidden: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """All tokens [T, D] on every rank, from [T / tp, D] when the sequence is split."""
    if shard.group is None or not shard.sequence_parallel:
        return hidden
    gathered = hidden.new_empty(hidden.shape[0] * shard.group.size(), hidden.shape[1])
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


def rescale(max_local: torch.Tensor, sum_local: torch.Tensor, shard: VocabShard) -> tuple[torch.Tensor, torch.Tensor]:
    """(maximum over all ranks, this rank's sum rescaled to it): sums are then ready to be added over the ranks."""
    max_all = max_local.clone()
    if shard.group is not None:
        dist.all_reduce(max_all, dist.ReduceOp.MAX, group=shard.group)
    return max_all, sum_local * (max_local - max_all).exp()


def add_up(partial: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """The sum over the ranks, in place."""
    if shard.group is not None:
        dist.all_reduce(partial, group=shard.group)
    return partial


def chunks(num_tokens: int, chunk_tokens: int) -> list[slice]:
    """Consecutive slices of at most `chunk_tokens` that cover all tokens."""
    return [slice(first, min(first + chunk_tokens, num_tokens)) for first in range(0, num_tokens, chunk_tokens)]
