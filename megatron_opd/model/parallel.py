"""How a model is split over ranks, and who this rank is in that split. It knows process groups, not modules."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.tensor_parallel.utils import VocabUtility

from megatron_opd.errors import ConfigError
from megatron_opd.runtime import megatron_cpu
from megatron_opd.types import VocabShard


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """Sizes of the split; the product of tensor, pipeline and data is the world size."""

    tensor: int = 1  # ranks that share each weight matrix
    pipeline: int = 1  # ranks that share the layers
    layers: tuple[int, ...] = ()  # of each pipeline stage; (): as even as they get
    data: int = 1  # replicas
    expert: int = 1  # consecutive replicas that share one set of experts, each holding its part
    sequence_parallel: bool = False  # norms and residuals are split over the tensor ranks along T

    def __post_init__(self) -> None:
        if self.data % self.expert:
            raise ConfigError(
                f"expert_parallel={self.expert} does not divide data_parallel={self.data}, whose ranks share the experts; make it divide"
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ConfigError("sequence_parallel=true splits tokens over tensor-parallel ranks; set tensor > 1 or switch it off")

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.tensor * self.pipeline * self.data

    def megatron_sizes(self) -> dict[str, int]:
        """Those that Megatron's groups and its models are built of, by its names."""
        return {
            "tensor_model_parallel_size": self.tensor,
            "pipeline_model_parallel_size": self.pipeline,
            "expert_model_parallel_size": self.expert,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """This rank's coordinates in a `ParallelConfig`."""

    tensor: int
    pipeline: int
    data: int
    expert: int  # data modulo `ParallelConfig.expert`


def initialize(parallel: ParallelConfig, *, device: torch.device | str, seed: int) -> None:
    """Builds Megatron's process groups out of the default group and seeds; on CPU, installs the CPU answers first.

    A second call replaces the groups of the first. On CUDA the role sets CUDA_DEVICE_MAX_CONNECTIONS=1 before torch
    starts, or tensor parallelism loses its overlap.

    Raises:
        ConfigError: the default group's size is not tensor * pipeline * data.
    """
    if dist.get_world_size() != parallel.world_size:
        sizes = f"tensor={parallel.tensor} * pipeline={parallel.pipeline} * data={parallel.data}"
        raise ConfigError(f"{sizes} is {parallel.world_size}, but {dist.get_world_size()} ranks were started; make them equal")
    device = torch.device(device)
    if device.type == "cpu":
        megatron_cpu.install()
    else:
        torch.cuda.set_device(device.index or 0)  # a role sees only its own devices
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**parallel.megatron_sizes())
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def place() -> Place:
    """Where this rank stands; after `initialize`."""
    return Place(
        tensor=parallel_state.get_tensor_model_parallel_rank(),
        pipeline=parallel_state.get_pipeline_model_parallel_rank(),
        data=parallel_state.get_data_parallel_rank(),
        expert=parallel_state.get_expert_model_parallel_rank(),
    )


def padded_vocab(vocab_size: int, tensor: int) -> int:
    """The smallest size that splits evenly over the tensor ranks.

    No rounding to 128 * tensor, which buys GEMM alignment on GPUs: published vocabularies are aligned already, and padding
    that depends on little makes what a rank holds easy to predict on any device.
    """
    return -(-vocab_size // tensor) * tensor


def vocab_shard(vocab_size: int, parallel: ParallelConfig) -> VocabShard:
    """The rows of the LM head that this rank holds, for the kernels; `vocab_size` is the true size."""
    start, stop = VocabUtility.vocab_range_from_global_vocab_size(
        padded_vocab(vocab_size, parallel.tensor), parallel_state.get_tensor_model_parallel_rank(), parallel.tensor
    )
    group = parallel_state.get_tensor_model_parallel_group() if parallel.tensor > 1 else None
    return VocabShard(start=start, stop=stop, vocab_size=vocab_size, group=group, sequence_parallel=parallel.sequence_parallel)
