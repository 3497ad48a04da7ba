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
from megatron_opd.data.draws import filled
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
        batches = [pack([trajectories[i] for i in group], Needs(head=self._needs.head, draws=self._needs.draws)) for group in groups]
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
        hidden_nD, needs = hidden.squeeze(1)[batch.mask], self._needs
        found = self._at_ids(hidden_nD, batch)
        if needs.teacher_top:
            ids_nK, logp_nK = top_k(hidden_nD, head_weight(self._model), needs.teacher_top, self._shard, chunk_tokens=_CHUNK_TOKENS)
            found |= {"top_ids": ids_nK.int(), "top_logp": logp_nK.float()}
        arrays = {name: array.cpu().numpy() for name, array in found.items()}
        if needs.divergence:
            hidden_nD = hidden_nD.cpu()
            arrays["hidden"] = (hidden_nD.view(torch.uint16) if hidden_nD.dtype == torch.bfloat16 else hidden_nD).numpy()
        return arrays

    def _at_ids(self, hidden_nD: torch.Tensor, batch: MicroBatch) -> dict[str, torch.Tensor]:
        """Log-probabilities at given ids, and moments, by one call of the kernel door."""
        needs = self._needs
        sets = {"token_logp": (needs.teacher_token, batch.token), "head_logp": (needs.teacher_head, batch.head)}
        sets["draw_logp"] = (needs.teacher_draws, batch.draws)
        asked = {name: one.ids[batch.mask] for name, (wanted, one) in sets.items() if wanted and one is not None}
        if not asked and not needs.moments:
            return {}
        ids_nK = torch.cat([batch.token.ids[batch.mask][:, :0], *asked.values()], 1)
        first = 1 if needs.teacher_token else 0
        rests = [slice(first, first + needs.head)] if needs.head_rest else []
        found = logps(
            hidden_nD, head_weight(self._model), ids_nK, self._shard, rests=rests, moments=needs.moments, chunk_tokens=_CHUNK_TOKENS
        )
        scores = dict(zip(asked, found.logp.float().split([ids.shape[1] for ids in asked.values()], 1), strict=True))
        if needs.head_rest:
            scores["head_log_rest"] = found.log_rest[:, 0].float()
        if needs.moments:
            assert found.entropy is not None and found.best is not None, "asked for"
            scores |= {"entropy": found.entropy.float(), "best_ids": found.best.int()}
        return scores

    def _unpack(self, trajectories: Sequence[Trajectory], arrays: Mapping[str, np.ndarray]) -> list[TeacherScores]:
        responses = {name: unpack(packed, trajectories) for name, packed in arrays.items()}
        if "token_logp" in responses:
            responses["token_logp"] = [one[:, 0] for one in responses["token_logp"]]
        if "draw_logp" in responses:
            drawn = zip(responses["draw_logp"], [one.rollout.draw_sizes for one in trajectories], strict=True)
            responses["draw_logp"] = [one[filled(sizes, one.shape[1])] for one, sizes in drawn]
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
