"""One packed micro-batch through a model. It knows neither loss nor schedule.

Dimension key: T packed tokens, D hidden.
"""

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn

from megatron_opd.model.build import gpt_of
from megatron_opd.types import MicroBatch


def forward_hidden(model: nn.Module, micro_batch: MicroBatch) -> Tensor:
    """[T, 1, D], or [T / TP, 1, D] under sequence parallelism: on the last pipeline stage after the final norm.

    Earlier stages return what the next one takes in. T is a multiple of TP under sequence parallelism; padding is a
    sequence of its own and the last boundary is T.
    """
    output = model(micro_batch.token_ids[None], micro_batch.positions[None], None, packed_seq_params=packed(micro_batch.boundaries))
    # Where GPTModel would return logits it turns them batch first.
    return output.transpose(0, 1) if gpt_of(model).post_process else output


def packed(boundaries: Tensor) -> PackedSeqParams:
    """Megatron's description of sequences that lie end to end, from their [N + 1] int32 boundaries.

    `max_seqlen` is the length of the longest sequence and not T: with T, Megatron's rotary embedding would take the
    positions as running through the whole pack.
    """
    longest = int(boundaries.diff().max())
    boundaries = boundaries.to(torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, max_seqlen_q=longest, max_seqlen_kv=longest)
