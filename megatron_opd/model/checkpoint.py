"""Megatron's distributed checkpoints into Megatron modules, by Megatron's own loader; and whether what they compute is right."""

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from megatron_opd.model.build import build, gpt_of, head_weight
from megatron_opd.model.forward import forward_hidden
from megatron_opd.model.parallel import ParallelConfig, initialize
from megatron_opd.types import IdSet, MicroBatch


def load_megatron(model: nn.Module, folder: str | Path) -> None:
    """Fills this rank's parameters from a checkpoint, whatever the layout that wrote it; a collective over all ranks."""
    gpt = gpt_of(model)
    state = gpt.sharded_state_dict()
    loaded = dist_checkpointing.load(state, str(folder))
    gpt.load_state_dict({name: loaded[name] for name in state})


def logits_gap(hf_folder: str, config_folder: str, megatron_folder: str, *, tokens: int = 16) -> tuple[float, float]:
    """The largest logit, and the largest difference between those by `transformers` and by Megatron-Core on random tokens, float32, CPU.

    It takes a process for itself: Megatron's groups live as long as that. One of the two models is in memory at a time.
    """
    disable_progress_bar()
    hf_config = AutoConfig.from_pretrained(config_folder)
    ids = torch.randint(hf_config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float32)(ids[None]).logits[0]
        return float(wanted.abs().max()), float((_megatron_logits(megatron_folder, hf_config, ids) - wanted).abs().max())


def _megatron_logits(folder: str, hf_config: AutoConfig, ids: Tensor) -> Tensor:
    """[T, V]."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    initialize(ParallelConfig(), device="cpu", seed=0)
    model = build(hf_config, ParallelConfig(), dtype=torch.float32)
    load_megatron(model, folder)
    batch = MicroBatch(
        token_ids=ids,
        positions=torch.arange(len(ids)),
        boundaries=torch.tensor([0, len(ids)], dtype=torch.int32),
        sequences=torch.zeros_like(ids),
        mask=torch.ones(len(ids), dtype=torch.bool),
        token=IdSet(ids=ids[:, None], behaviour_logp=None, teacher_logp=None),
    )
    return forward_hidden(model, batch)[:, 0] @ head_weight(model).T
