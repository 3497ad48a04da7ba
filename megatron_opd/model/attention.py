"""Causal attention over packed sequences for devices without Transformer Engine. It knows no weights and no positions.

Dimension key: T packed tokens, h query heads and g key-value heads of this rank, d head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn


class PackedAttention(nn.Module):
    """Megatron's `core_attention` for the 'thd' layout: each sequence attends to itself, causally.

    Megatron's local DotProductAttention refuses packed sequences, and its Transformer Engine one needs a GPU.
    """

    def __init__(self, *, softmax_scale: float | None = None, **_unused: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_Thd: Tensor,
        key_Tgd: Tensor,
        value_Tgd: Tensor,
        attention_mask: None,
        *,
        packed_seq_params: PackedSeqParams,
        **_unused: Any,
    ) -> Tensor:
        """[T, h * d], like Megatron's own."""
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        gqa = query_Thd.shape[1] != key_Tgd.shape[1]
        split = (tensor.transpose(0, 1).split(lengths, dim=1) for tensor in (query_Thd, key_Tgd, value_Tgd))
        outs = [
            F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=self.softmax_scale, enable_gqa=gqa)[0]
            for q, k, v in zip(*split, strict=True)
        ]
        return torch.cat(outs, dim=1).transpose(0, 1).flatten(1)
