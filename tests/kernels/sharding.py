"""A vocabulary split over ranks on purpose badly: unevenly, with padding rows full of large numbers, one rank of padding only."""

import torch
import torch.distributed as dist

from megatron_opd.types import VocabShard

CUTS = {  # tensor-parallel size -> where the shards of a vocabulary of V end, as fractions, and padding rows behind each shard's end
    1: [("padded", [0, 512])],
    2: [("even", [0, 256, 512]), ("uneven", [0, 301, 509])],
    4: [("even", [0, 128, 256, 384, 512]), ("uneven", [0, 7, 300, 491, 510]), ("a rank of padding", [0, 200, 400, 508, 512])],
}
V = 507


def groups():
    """{tensor-parallel size: the group this rank is in} in a world of four ranks."""
    pairs, _ = dist.new_subgroups(2)
    return {1: None, 2: pairs, 4: dist.group.WORLD}


def split(cuts, group, sequence_parallel=False):
    """This rank's shard under `cuts`."""
    rank = 0 if group is None else group.rank()
    return VocabShard(start=cuts[rank], stop=cuts[rank + 1], vocab_size=V, group=group, sequence_parallel=sequence_parallel)


def rows_of(head, shard):
    """This rank's rows of the whole head [V, D], padding filled with numbers that would win every maximum."""
    rows = torch.full((shard.stop - shard.start, head.shape[1]), 50.0, dtype=head.dtype)
    true = head[shard.start : shard.stop]
    rows[: len(true)] = true
    return rows


def tokens_of(hidden, shard):
    """This rank's tokens when the sequence is split."""
    return hidden.chunk(shard.group.size())[shard.group.rank()] if shard.sequence_parallel else hidden


def whole_head_gradient(grad, shard):
    """The gradient [V, D] put together from all ranks, after a check that padding rows got none."""
    assert grad[max(0, V - shard.start) :].count_nonzero() == 0, "padding rows have a gradient"
    whole = torch.zeros(V, grad.shape[1], dtype=grad.dtype)
    stop = min(shard.stop, V)
    whole[shard.start : stop] = grad[: max(0, stop - shard.start)]
    if shard.group is not None:
        dist.all_reduce(whole, group=shard.group)
    return whole


def whole_hidden_gradient(grad, shard):
    """The gradient [T, D] put together from all ranks."""
    if not shard.sequence_parallel:
        return grad
    parts = [torch.empty_like(grad) for _ in range(shard.group.size())]
    dist.all_gather(parts, grad.contiguous(), group=shard.group)
    return torch.cat(parts)
