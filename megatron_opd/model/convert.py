"""Weights into and out of Megatron modules under their Hugging Face names. It knows ranks; `weights.mapping` knows names."""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from megatron_opd.model.build import gpt_of
from megatron_opd.model.parallel import ParallelConfig, place
from megatron_opd.types import TensorSpec, VocabShard
from megatron_opd.weights.architectures import architecture
from megatron_opd.weights.files import SafetensorsFolder
from megatron_opd.weights.mapping import Rule, by_megatron_name, hf_manifest, manifest, rules, to_hf, to_megatron


def load_hf(model: nn.Module, folder: str | Path, hf_config: Any, parallel: ParallelConfig) -> None:
    """Fills this rank's parameters from a Hugging Face folder; every rank reads for itself, one parameter at a time.

    Call it before the optimizer is built, which copies the weights into its masters.

    Raises:
        CheckpointError: the folder's tensors are not those that `hf_config` describes.
    """
    rule_of = by_megatron_name(rules(architecture(hf_config)))
    with SafetensorsFolder(folder) as files:
        files.check(hf_manifest(hf_config, "float32"))
        for name, parameter in global_parameters(model, parallel):
            shard = to_megatron(files.get, rule_of[name], tensor_rank=place().tensor, tensor_size=parallel.tensor)
            assert shard.shape == parameter.shape, f"{name} is {tuple(parameter.shape)} in the model and {tuple(shard.shape)} by its rule"
            with torch.no_grad():
                parameter.copy_(shard)


def load_head(folder: str | Path, hf_config: Any, shard: VocabShard, dtype: str) -> Tensor:
    """[stop - start, D]: a foreign model's LM head at this rank's vocabulary range; rows that it lacks are 0.

    Raises:
        CheckpointError: the folder's tensors are not those that `hf_config` describes.
    """
    with SafetensorsFolder(folder) as files:
        files.check(hf_manifest(hf_config, "float32"))
        rows = files.get("model.embed_tokens.weight" if architecture(hf_config).tied else "lm_head.weight")[shard.start : shard.stop]
    head = rows.new_zeros(shard.stop - shard.start, rows.shape[1], dtype=getattr(torch, dtype))
    head[: len(rows)] = rows
    return head


def export_hf(
    model: nn.Module, hf_config: Any, parallel: ParallelConfig, dtype: str, *, by_stage: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Full tensors in the order and dtype of `hf_manifest(hf_config, dtype)`: yielded on global rank 0, on other ranks nothing.
    With `by_stage` each pipeline stage yields its own on its first rank, in the order of `stage_manifest` and at its own pace.

    A collective over the ranks that share the first set of experts, without experts those of the first replica: each must run
    the iterator to its end, at the pace of the rank that it yields on, which holds one parameter at a time. Other ranks end
    at once. A tensor may be a view of a live parameter: use it before the next optimizer step.
    """
    here = place()
    if here.data != here.expert:
        return
    arch = architecture(hf_config)
    stages = arch.stages(parallel.pipeline, parallel.layers)
    parameters = dict(global_parameters(model, parallel))
    for rule in rules(arch):
        stage, part = arch.stage_of(rule.layer, stages), arch.expert_rank(rule.expert, parallel.expert)
        tensors: list[tuple[str, Tensor]] = []
        if (here.pipeline, here.expert) == (stage, part):
            shards = _gather(_parameter(parameters, rule).detach().to(getattr(torch, dtype)), parallel.tensor)
            tensors = to_hf(rule, shards) if shards else []
        if here.tensor == 0 and here.pipeline == stage and part > 0:
            tensors = _to_first(parallel_state.get_expert_model_parallel_group(), part, tensors, rule, dtype)
        if here.tensor == here.expert == 0 and stage > 0 and not by_stage:
            tensors = _to_first(parallel_state.get_pipeline_model_parallel_group(), stage, tensors, rule, dtype)
        if here.tensor == here.expert == 0 and (by_stage or here.pipeline == 0):
            yield from tensors


def stage_manifest(hf_config: Any, parallel: ParallelConfig, dtype: str, stage: int) -> tuple[TensorSpec, ...]:
    """What `export_hf` yields by stage, on the first rank of this one."""
    arch = architecture(hf_config)
    stages = arch.stages(parallel.pipeline, parallel.layers)
    return manifest((rule for rule in rules(arch) if arch.stage_of(rule.layer, stages) == stage), dtype)


def global_parameters(model: nn.Module, parallel: ParallelConfig) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's parameters, layers counted over all pipeline stages and experts over all ranks that share them."""
    gpt, here = gpt_of(model), place()
    first_layer = get_transformer_layer_offset(gpt.config)
    first_expert = here.expert * ((gpt.config.num_moe_experts or 0) // parallel.expert)
    for name, parameter in gpt.named_parameters():
        name = re.sub(r"(?<=^decoder\.layers\.)\d+", lambda match: str(int(match[0]) + first_layer), name)
        yield re.sub(r"(?<=\.local_experts\.)\d+", lambda match: str(int(match[0]) + first_expert), name), parameter


def _parameter(parameters: dict[str, nn.Parameter], rule: Rule) -> nn.Parameter:
    held = [parameters[name] for name in rule.megatron if name in parameters]
    assert held, f"this stage should hold {rule.megatron[0]}"
    return held[0]


def _gather(shard: Tensor, size: int) -> list[Tensor]:
    """All shards on the first tensor-parallel rank, nothing on the others."""
    if size == 1:
        return [shard]
    group = parallel_state.get_tensor_model_parallel_group()
    first = dist.get_process_group_ranks(group)[0]
    shards = [torch.empty_like(shard) for _ in range(size)] if dist.get_rank() == first else None
    dist.gather(shard.contiguous(), shards, dst=first, group=group)
    return shards or []


def _to_first(group: dist.ProcessGroup, source: int, tensors: list[tuple[str, Tensor]], rule: Rule, dtype: str) -> list[tuple[str, Tensor]]:
    """Sends from rank `source` of the group to its first, which returns what came; the others stand by."""
    ranks = dist.get_process_group_ranks(group)
    if dist.get_rank() == ranks[source]:
        for _, tensor in tensors:
            dist.send(tensor.contiguous(), dst=ranks[0], group=group)
    elif dist.get_rank() == ranks[0]:
        empty = partial(torch.empty, dtype=getattr(torch, dtype), device=torch.cuda.current_device())
        tensors = [(name, empty(shape)) for name, shape in zip(rule.hf, rule.shapes, strict=True)]
        for _, tensor in tensors:
            dist.recv(tensor, src=ranks[source], group=group)
    return tensors
