"""The K most probable ids straight from hidden states and the sharded LM head; full logits never exist. No gradient.

Equal logits are common in bfloat16, so ties have a rule that no sharding can change: the lower id comes first.

Dimension key: T packed targets, C tokens of one chunk, k candidates of this rank, K ids asked for, D hidden size,
v vocabulary rows of this rank.
"""

import torch

from megatron_opd.kernels.logits import (
    LOG_ZERO,
    add_up,
    chunks,
    gather_tokens,
    largest,
    log_sum_parts,
    logits,
    side_by_side,
    true_rows,
)
from megatron_opd.kernels.products import wide
from megatron_opd.types import VocabShard


@torch.no_grad()
def top_k(
    hidden: torch.Tensor, head: torch.Tensor, k: int, shard: VocabShard, *, temperature: float = 1.0, chunk_tokens: int = 1024
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` most probable ids [T, k] int64 by falling probability and their log-probabilities [T, k], float32 (float64).

    The arguments are those of `logps`. Every rank of the group must call it, and gets the same answer.

    Raises:
        ValueError: k is not between 1 and the vocabulary size.
    """
    if not 1 <= k <= shard.vocab_size:
        raise ValueError(f"top_k={k} must lie between 1 and the vocabulary size {shard.vocab_size}")
    hidden_TD, rows_vD = gather_tokens(hidden, shard), true_rows(head, shard)
    num_tokens, num_rows, dtype = hidden_TD.shape[0], rows_vD.shape[0], wide(hidden.dtype)
    num_local = min(k, num_rows)
    z_TK = torch.full((num_tokens, k), LOG_ZERO, dtype=dtype, device=hidden.device)
    ids_TK = torch.full((num_tokens, k), shard.vocab_size, dtype=torch.int64, device=hidden.device)
    max_T = torch.full((num_tokens,), LOG_ZERO, dtype=dtype, device=hidden.device)
    sum_T = torch.zeros(num_tokens, dtype=dtype, device=hidden.device)
    for c in chunks(num_tokens, chunk_tokens) if num_rows else []:
        z_Cv = logits(hidden_TD[c], rows_vD, temperature)
        local_Ck = _largest(z_Cv, num_local)
        ids_TK[c, :num_local], z_TK[c, :num_local] = local_Ck + shard.start, z_Cv.gather(1, local_Ck)
        max_T[c], sum_T[c] = log_sum_parts(z_Cv)
    max_all_T = largest(max_T, shard)
    norm_T = max_all_T + add_up(sum_T * (max_T - max_all_T).exp(), shard).log()
    z_TK, ids_TK = (side_by_side(one_TK, shard).transpose(0, 1).flatten(1) for one_TK in (z_TK, ids_TK))  # by rank, so by rising rows
    z_TK, order_TK = z_TK.sort(dim=-1, descending=True, stable=True)  # equal ones stay by rank and row: by id
    ids_TK = ids_TK.gather(1, order_TK)
    return ids_TK[:, :k].contiguous(), z_TK[:, :k] - norm_T[:, None]


def _largest(z_Cv: torch.Tensor, k: int) -> torch.Tensor:
    """Columns [C, k] of the k largest per row, ascending; of equal ones at the edge the lowest columns."""
    edge_C1 = z_Cv.topk(k, -1).values[:, -1:]
    above_Cv, equal_Cv = z_Cv > edge_C1, z_Cv == edge_C1
    room_C1 = k - above_Cv.sum(-1, keepdim=True)
    chosen_Cv = above_Cv | (equal_Cv & (equal_Cv.cumsum(-1, dtype=torch.int32) <= room_C1))
    columns = chosen_Cv.nonzero()[:, 1]
    assert columns.numel() == z_Cv.shape[0] * k, "the logits hold NaN: no order is defined"
    return columns.view(-1, k)
