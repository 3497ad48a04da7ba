"""What each rank of a split model holds: the real Megatron model, built on the meta device under a fake process group.

It needs neither the machines nor the memory of the split, and cannot drift from what a learner builds. It replaces the
process's default group, so it refuses to run beside one.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PretrainedConfig

from megatron_opd.model.build import build
from megatron_opd.model.parallel import ParallelConfig
from megatron_opd.runtime import megatron_cpu


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCount:
    """One pipeline stage of a model, on each of its tensor- and data-parallel ranks alike."""

    stage: int
    layers: int
    parameters: int  # of one rank
    expert_parameters: int = 0  # of those: of experts that are split over ranks, so that fewer replicas share their optimizer


def count_stages(hf_config: PretrainedConfig, parallel: ParallelConfig) -> list[StageCount]:
    """The stages in order; the layer specs are those of the CPU, which hold the same parameters as Transformer Engine's.

    Raises:
        ConfigError: the model does not split as `parallel` says.
    """
    plain = copy.deepcopy(hf_config)
    plain.rope_parameters = {"rope_type": "default", "rope_theta": hf_config.rope_parameters["rope_theta"]}  # holds no parameters
    ranks_per_stage = parallel.tensor * parallel.data  # Megatron numbers ranks tensor, data, pipeline
    return [_count(plain, parallel, stage, stage * ranks_per_stage) for stage in range(parallel.pipeline)]


def _count(hf_config: PretrainedConfig, parallel: ParallelConfig, stage: int, rank: int) -> StageCount:
    with _pretended(parallel, rank), torch.device("meta"):
        assert parallel_state.get_pipeline_model_parallel_rank() == stage, "Megatron numbers its ranks in another way"
        model = build(hf_config, parallel, dtype=torch.bfloat16, device="meta")
        return StageCount(
            stage=stage,
            layers=len(model.decoder.layers),
            parameters=sum(p.numel() for p in model.parameters()),
            expert_parameters=sum(p.numel() for p in model.parameters() if not getattr(p, "allreduce", True)),
        )


@contextmanager
def _pretended(parallel: ParallelConfig, rank: int) -> Iterator[None]:
    assert not dist.is_initialized(), "a process that has a group cannot pretend to be another one's rank"
    megatron_cpu.install()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=parallel.world_size)
    try:
        parallel_state.initialize_model_parallel(**parallel.megatron_sizes(), create_gloo_process_groups=False)
        model_parallel_cuda_manual_seed(0, force_reset_rng=True)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
