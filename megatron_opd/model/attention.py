"""Causal attention over packed sequences for devices without Transformer Engine. It knows no weights and no positions.

Dimension key: T packed tokens, R tokens of one sequence, h query heads and g key-value heads of this rank, d head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn


class PackedAttention(nn.Module):
    """Megatron's `core_attention` for the 'thd' layout: each sequence attends to itself, causally, in some layers through a window.

    Megatron's local DotProductAttention refuses packed sequences, and its Transformer Engine one needs a GPU.
    """

    def __init__(self, *, config: TransformerConfig, layer_number: int = 1, softmax_scale: float | None = None, **_unused: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else None  # tokens that one attends to, itself included

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
        outs = []
        for q, k, v in zip(*split, strict=True):
            mask = self._mask(q)
            out = F.scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=gqa
            )
            outs.append(out[0])
        return torch.cat(outs, dim=1).transpose(0, 1).flatten(1)

    def _mask(self, query_hRd: Tensor) -> Tensor | None:
        """[R, R], true where a token attends; None where the window hides nothing."""
        length = query_hRd.shape[1]
        if self.window is None or length <= self.window:
            return None
        return torch.ones(length, length, dtype=torch.bool, device=query_hRd.device).tril().triu(1 - self.window)
