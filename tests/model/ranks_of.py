"""What the ranks of the model tests do: build, run through Megatron's schedule, bring results back in Hugging Face layout."""

from typing import Any

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
from megatron_opd.model.checkpoint import load_megatron
from megatron_opd.model.convert import export_hf, global_parameters, load_hf, stage_manifest
from megatron_opd.model.forward import forward_hidden
from megatron_opd.model.parallel import ParallelConfig, initialize, place, vocab_shard
from megatron_opd.types import MicroBatch
from tests.model import tiny


class Loaded:
    """A model from a folder in a data-parallel wrapper, after `initialize`."""

    def __init__(
        self,
        folder: str,
        parallel: ParallelConfig,
        *,
        recompute: bool = False,
        dtype: torch.dtype = torch.float32,
        checkpoint: str | None = None,  # weights come from here, not from the folder
        **data_parallel: Any,
    ) -> None:
        self.parallel = parallel
        self.hf_config = tiny.read_config(folder)
        model = build(self.hf_config, self.parallel, dtype=dtype, recompute=recompute)
        if checkpoint is None:
            load_hf(model, folder, self.hf_config, self.parallel)
        else:
            load_megatron(model, checkpoint)
        model.config.finalize_model_grads_func = finalize_model_grads
        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, **data_parallel)
        self.model = DistributedDataParallel(model.config, settings, model)
        self.shard = vocab_shard(self.hf_config.vocab_size, self.parallel)

    def export(self, dtype: str = "float32", **options: Any) -> dict[str, torch.Tensor]:
        """Weights by Hugging Face name on rank 0, nothing elsewhere."""
        return {name: tensor.clone() for name, tensor in export_hf(self.model, self.hf_config, self.parallel, dtype, **options)}

    def part(self) -> dict[str, torch.Tensor]:
        """Weights of each pipeline stage on its first rank, in the order of its manifest."""
        part, here = self.export(by_stage=True), place()
        manifest = stage_manifest(self.hf_config, self.parallel, "float32", here.pipeline)
        assert list(part) == ([spec.name for spec in manifest] if here.tensor == here.data == 0 else [])
        return part

    def logits(self, batches: list[MicroBatch]) -> torch.Tensor | None:
        """[sum of T, V] on the ranks of the last stage."""
        with torch.no_grad():
            out = self._schedule(batches, self._whole_logits, forward_only=True, collect_non_loss_data=True)
        return torch.cat(out).float() if parallel_state.is_pipeline_last_stage() else None

    def backward(self, batches: list[MicroBatch]) -> None:
        """Leaves the gradient of the mean cross-entropy over all replicas in `main_grad`; each takes its share of the batches."""
        self.model.zero_grad_buffer()
        self._schedule(batches[parallel_state.get_data_parallel_rank() :: self.parallel.data], self._loss, forward_only=False)

    def gradients(self, batches: list[MicroBatch]) -> dict[str, torch.Tensor]:
        """Gradients by Hugging Face name on rank 0; they take the place of the weights."""
        self.backward(batches)
        with torch.no_grad():
            for _, parameter in global_parameters(self.model, self.parallel):
                parameter.copy_(parameter.main_grad)
        return self.export()

    def _schedule(self, batches: list[MicroBatch], loss, **options):
        def forward_step(batches, model):
            batch = next(batches)
            return forward_hidden(model, batch), lambda hidden, non_loss_data=False: loss(hidden, batch)

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[self.model],
            num_microbatches=len(batches),
            seq_length=1,
            micro_batch_size=1,
            **options,
        )

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, V / TP], columns of padding at -1e9."""
        if self.shard.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden)
        elif self.shard.group is not None:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        padding = torch.arange(self.shard.start, self.shard.stop) >= self.shard.vocab_size
        return (hidden[:, 0] @ head_weight(self.model).T).masked_fill(padding, -1e9)

    def _whole_logits(self, hidden: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        piece = self._logits(hidden)
        pieces = [torch.empty_like(piece) for _ in range(self.parallel.tensor)]
        dist.all_gather(pieces, piece, group=parallel_state.get_tensor_model_parallel_group())
        return torch.cat(pieces, dim=1)[:, : self.shard.vocab_size]

    def _loss(self, hidden: torch.Tensor, batch: MicroBatch):
        total = vocab_parallel_cross_entropy(self._logits(hidden).float()[:, None], batch.token.ids).sum()
        return total, torch.tensor(len(batch.token_ids), dtype=torch.int), {"loss": total.detach().clone()}


def everything(folders: dict[str, str], layouts: list[dict]) -> list[dict]:
    """All that a test asks of each model, by layout; one launch of the ranks serves all tests."""
    return [_everything(folders, **layout) for layout in layouts]


def _everything(folders: dict[str, str], *, recompute: bool = False, **sizes) -> dict:
    parallel = ParallelConfig(**sizes)
    initialize(parallel, device="cpu", seed=1)
    results = {}
    for name, folder in folders.items():
        loaded = Loaded(folder, parallel, recompute=recompute)
        results[name] = {
            "weights": loaded.export(),
            "half": loaded.export("bfloat16"),
            "part": loaded.part(),
            "logits": loaded.logits(tiny.BATCHES),
        }
        calls = tiny.count_layers(loaded.model.module)
        results[name] |= {"gradients": loaded.gradients(tiny.BATCHES), "layers_run": len(calls)}
    return results
