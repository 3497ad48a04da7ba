import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_opd.model.attention import PackedAttention


def _slow(query_Thd, key_Tgd, value_Tgd, lengths):
    """The definition, one mask over the whole pack."""
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = (sequence[:, None] == sequence) & torch.ones(len(sequence), len(sequence), dtype=torch.bool).tril()
    repeats = query_Thd.shape[1] // key_Tgd.shape[1]
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key_Tgd, value_Tgd))
    scores = torch.einsum("thd,shd->hts", query_Thd, key) / query_Thd.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, value).flatten(1)


@pytest.mark.parametrize(("lengths", "heads", "groups"), [((5, 1, 9), 6, 2), ((7,), 3, 3), ((1, 1), 4, 1)])
def test_packed_attention_is_masked_attention_in_value_and_gradient(lengths, heads, groups):
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), count, 10) for count in (heads, groups, groups)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries)
    got, want = PackedAttention()(*inputs, None, packed_seq_params=params), _slow(*inputs, lengths)
    torch.testing.assert_close(got, want)
    weights = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    for fast, slow in zip(
        torch.autograd.grad((got * weights).sum(), inputs), torch.autograd.grad((want * weights).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(fast, slow)
