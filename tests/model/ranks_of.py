"""What the ranks of the model tests do: build, run through Megatron's schedule, bring results back in Hugging Face layout."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)

from megatron_opd.model.build import build, head_weight
from megatron_opd.model.convert import export_hf, global_parameters, load_hf
from megatron_opd.model.forward import forward_hidden
from megatron_opd.model.parallel import ParallelConfig, initialize, vocab_shard
from megatron_opd.types import MicroBatch
from tests.model import tiny


def loaded(folder: str, layout: dict, *, recompute: bool = False, dtype: torch.dtype = torch.float32):
    """(model in a data-parallel wrapper, config, parallel) on a fresh set of groups."""
    parallel = ParallelConfig(**layout)
    initialize(parallel, device="cpu", seed=1)
    hf_config = tiny.read_config(folder)
    model = build(hf_config, parallel, dtype=dtype, recompute=recompute)
    load_hf(model, folder, hf_config, parallel)
    model.config.finalize_model_grads_func = finalize_model_grads
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    return DistributedDataParallel(model.config, ddp_config, model), hf_config, parallel


def local_logits(hidden, model, shard) -> torch.Tensor:
    """[T, V / TP], columns of padding at -1e9."""
    if shard.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden)
    elif shard.group is not None:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    logits = hidden[:, 0] @ head_weight(model).T
    padding = torch.arange(shard.start, shard.stop) >= shard.vocab_size
    return logits.masked_fill(padding, -1e9)


def schedule(model, micro_batches: list[MicroBatch], loss, *, forward_only: bool, collect: bool = False):
    def forward_step(batches, model):
        micro_batch = next(batches)

        def read(hidden, non_loss_data=False):
            return loss(hidden, model, micro_batch)

        return forward_hidden(model, micro_batch), read

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(micro_batches),
        model=[model],
        num_microbatches=len(micro_batches),
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=collect,
    )


def logits(folder: str, layout: dict, batches: list[MicroBatch], **options) -> torch.Tensor | None:
    """[sum of T, V] on the ranks of the last stage."""
    model, hf_config, parallel = loaded(folder, layout, **options)
    shard = vocab_shard(hf_config.vocab_size, parallel)

    def whole(hidden, model, micro_batch):
        piece = local_logits(hidden, model, shard)
        pieces = [torch.empty_like(piece) for _ in range(parallel.tensor)]
        dist.all_gather(pieces, piece, group=parallel_state.get_tensor_model_parallel_group())
        return torch.cat(pieces, dim=1)[:, : shard.vocab_size]

    with torch.no_grad():
        out = schedule(model, batches, whole, forward_only=True, collect=True)
    return torch.cat(out).float() if parallel_state.is_pipeline_last_stage() else None


def backward(model, hf_config, parallel, batches: list[MicroBatch]) -> None:
    """Leaves the gradient of the mean cross-entropy over all ranks' batches in `main_grad`."""
    shard = vocab_shard(hf_config.vocab_size, parallel)

    def loss(hidden, model, micro_batch):
        piece = local_logits(hidden, model, shard).float()
        total = vocab_parallel_cross_entropy(piece[:, None], micro_batch.token.ids).sum()
        return total, torch.tensor(len(micro_batch.token_ids), dtype=torch.int), {"loss": total.detach().clone()}

    model.zero_grad_buffer()
    schedule(model, batches, loss, forward_only=False)


def gradients(folder: str, layout: dict, batches: list[MicroBatch], **options) -> dict[str, torch.Tensor]:
    """Gradient by Hugging Face name on rank 0; each replica takes its share of the batches."""
    model, hf_config, parallel = loaded(folder, layout, **options)
    backward(model, hf_config, parallel, batches[parallel_state.get_data_parallel_rank() :: parallel.data])
    with torch.no_grad():
        for _, parameter in global_parameters(model, parallel):
            parameter.copy_(parameter.main_grad)
    return {name: tensor.clone() for name, tensor in export_hf(model, hf_config, parallel, "float32")}
