"""A Megatron-Core teacher: forward only, on ranks of its own, at any ids. It knows nothing of the student's weights.

Dimension key: T packed targets, n response targets among them, R response, K ids per position, D hidden.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import msgspec
import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from transformers import PretrainedConfig

from megatron_opd.config import TeacherConfig
from megatron_opd.data.packing import pack, plan, to_device, unpack
from megatron_opd.kernels import logps, top_k
from megatron_opd.model import parallel
from megatron_opd.model.build import build, head_weight
from megatron_opd.model.convert import load_hf
from megatron_opd.model.forward import forward_hidden
from megatron_opd.runtime import wire
from megatron_opd.runtime.collective import Ranks
from megatron_opd.types import MicroBatch, Needs, Rollout, TeacherScores, Trajectory

_CHUNK_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherModel:
    """Which model scores, and over which tokens."""

    hf_config: PretrainedConfig
    vocab_size: int  # of the student: q is normalised over its ids, and what else the teacher's head holds counts for nothing
    device: str  # "cpu" | "cuda"
    seed: int


class MegatronTeacher:
    """Scores rollouts in lockstep on all its ranks; every rank returns the same scores."""

    def __init__(self, model: TeacherModel, settings: TeacherConfig, needs: Needs, ranks: Ranks) -> None:
        self._settings = settings
        self._needs = needs
        self._ranks = ranks
        self._device = model.device
        split = parallel.ParallelConfig(tensor=settings.tensor_parallel, pipeline=settings.pipeline_parallel)
        parallel.initialize(split, device=model.device, seed=model.seed)
        self._model = build(model.hf_config, split, dtype=getattr(torch, settings.dtype), device=model.device).eval()
        load_hf(self._model, settings.path, model.hf_config, split)
        self._shard = replace(parallel.vocab_shard(model.hf_config.vocab_size, split), vocab_size=model.vocab_size)
        self._forward_only = partial(get_forward_backward_func(), forward_only=True, collect_non_loss_data=True, micro_batch_size=1)

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        """Log-probabilities of what the estimator needs, aligned with each response."""
        trajectories = [Trajectory(rollout=rollout, teacher=None) for rollout in rollouts]
        lengths = [len(r.prompt_ids) + len(r.response_ids) - 1 for r in rollouts]
        (groups,) = plan(lengths, ranks=1, micro_batch_tokens=self._settings.batch_tokens)
        batches = [
            pack([trajectories[i] for i in group], Needs(head=self._needs.head, tail_draws=self._needs.tail_draws)) for group in groups
        ]
        with torch.no_grad():
            columns = self._forward_only(
                forward_step_func=self._forward,
                data_iterator=iter(batches),
                model=[self._model],
                num_microbatches=len(batches),
                seq_length=self._settings.batch_tokens,
            )
        scores = [self._unpack([trajectories[i] for i in group], arrays) for group, arrays in zip(groups, columns)]
        order = [i for group in groups for i in group]
        found = self._from_last_stage([one for part in scores for one in part])
        return [one for _, one in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]

    def close(self) -> None:
        """Nothing to give back: the role closes the ranks."""

    def _forward(self, batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, partial]:
        batch = to_device(next(batches), self._device)
        return forward_hidden(model, batch), partial(self._score, batch=batch)

    def _score(self, hidden: torch.Tensor, *, batch: MicroBatch, non_loss_data: bool) -> dict[str, np.ndarray]:
        """All that the needs ask for, at the response targets in packed order."""
        hidden_nD, head = hidden.squeeze(1)[batch.mask], head_weight(self._model)
        sets = {"token_logp": (self._needs.teacher_token, batch.token), "head_logp": (self._needs.teacher_head, batch.head)}
        sets["draw_logp"] = (self._needs.teacher_draws, batch.draws)
        asked = {name: one.ids[batch.mask] for name, (wanted, one) in sets.items() if wanted}
        found: dict[str, torch.Tensor] = {}
        if asked:
            logp_nK, _ = logps(hidden_nD, head, torch.cat(list(asked.values()), 1), self._shard, chunk_tokens=_CHUNK_TOKENS)
            found |= dict(zip(asked, logp_nK.float().split([ids.shape[1] for ids in asked.values()], 1), strict=True))
        if self._needs.teacher_top:
            ids_nK, logp_nK = top_k(hidden_nD, head, self._needs.teacher_top, self._shard, chunk_tokens=_CHUNK_TOKENS)
            found |= {"top_ids": ids_nK.int(), "top_logp": logp_nK.float()}
        return {name: array.cpu().numpy() for name, array in found.items()}

    def _unpack(self, trajectories: Sequence[Trajectory], arrays: Mapping[str, np.ndarray]) -> list[TeacherScores]:
        responses = {name: unpack(packed, trajectories) for name, packed in arrays.items()}
        if "token_logp" in responses:
            responses["token_logp"] = [one[:, 0] for one in responses["token_logp"]]
        return [
            TeacherScores(index=trajectory.rollout.index, **{name: parts[i] for name, parts in responses.items()})
            for i, trajectory in enumerate(trajectories)
        ]

    def _from_last_stage(self, scores: list[TeacherScores]) -> list[TeacherScores]:
        """What the last stage found, on every rank."""
        if self._ranks.world_size == 1:
            return scores
        speaks = bool(scores) and parallel.place().tensor == 0
        bodies = [wire.encode(one)[1] for one in scores] if speaks else []
        parts = self._ranks.gather(msgspec.msgpack.encode(bodies))
        return [wire.decode(b"TeacherScores", body) for part in parts for body in msgspec.msgpack.decode(part, type=list[bytes])]
