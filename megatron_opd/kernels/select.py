"""Which implementation serves a device, and what FP8 logits cost on it in truth."""

from typing import Literal

import torch

from megatron_opd.kernels.dense_kl import dense_kl
from megatron_opd.kernels.fp8 import AgainstBF16, FP8Products
from megatron_opd.kernels.logits import Implementation, gather_tokens
from megatron_opd.types import Divergence, VocabShard

HOPPER = 9  # compute capability that the Triton kernels are compiled and checked for, and up


def choose(wanted: Implementation | Literal["auto"], device: torch.device | str) -> Implementation:
    """What `wanted` is on `device`: "auto" is Triton on Hopper and later, else torch."""
    if wanted != "auto":
        return wanted
    on_hopper = torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device)[0] >= HOPPER
    return "triton" if on_hopper else "chunked"


@torch.no_grad()
def fp8_noise(
    hidden: torch.Tensor, head: torch.Tensor, shard: VocabShard, products: FP8Products, *, rows: torch.Tensor, chunk_tokens: int
) -> torch.Tensor:
    """KL(p_fp8 || p_bf16) [T] in nats, of the same hidden states and head with logits by `products` and in bfloat16; 0 where not `rows`.

    Arguments are those of `dense_kl`.
    """
    found = dense_kl(
        hidden,
        head,
        gather_tokens(hidden, shard),
        head,
        shard,
        Divergence(kind="reverse"),
        rows=rows,
        chunk_tokens=chunk_tokens,
        implementation="te",
        products=AgainstBF16(products=products),
    )
    return found.kl
