from types import SimpleNamespace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_opd.model.attention import PackedAttention


def _slow(query_Thd, key_Tgd, value_Tgd, lengths, window):
    """The definition, one mask over the whole pack."""
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(len(sequence))[:, None] - torch.arange(len(sequence))
    seen = (sequence[:, None] == sequence) & (distance >= 0) & (distance < window)
    repeats = query_Thd.shape[1] // key_Tgd.shape[1]
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key_Tgd, value_Tgd))
    scores = torch.einsum("thd,shd->hts", query_Thd, key) / query_Thd.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, value).flatten(1)


def _attention(window, layer_number=1):
    """Megatron's config says how far back one sees beside itself, and in which layers."""
    return PackedAttention(
        config=SimpleNamespace(window_size=window and (window - 1, 0), window_attn_skip_freq=window and [1, 0]), layer_number=layer_number
    )


@pytest.mark.parametrize("window", [None, 1, 4, 5, 100])
@pytest.mark.parametrize(("lengths", "heads", "groups"), [((5, 1, 9), 6, 2), ((7,), 3, 3), ((1, 1), 4, 1)])
def test_packed_attention_is_masked_attention_in_value_and_gradient(lengths, heads, groups, window):
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), count, 10) for count in (heads, groups, groups)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries)
    got, want = _attention(window)(*inputs, None, packed_seq_params=params), _slow(*inputs, lengths, window or sum(lengths))
    torch.testing.assert_close(got, want)
    weights = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    for fast, slow in zip(
        torch.autograd.grad((got * weights).sum(), inputs), torch.autograd.grad((want * weights).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(fast, slow)


def test_a_window_holds_in_its_layers_only():
    assert _attention(4, layer_number=1).window == 4
    assert _attention(4, layer_number=2).window is None
