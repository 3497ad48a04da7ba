"""From hidden states to what an estimator sees: one call of each kernel door for all ids of a micro-batch.

Knows which id columns stand where; refuses to know Megatron, and what the scores are for.

Dimension key: T packed targets, K ids per target of one set, D hidden size.
"""

from dataclasses import dataclass, field

import torch

from megatron_opd.kernels import TORCH, Implementation, Products, Schedule, Upstream, dense_kl, logps
from megatron_opd.types import DenseScores, Divergence, IdScores, IdSet, MicroBatch, Needs, TokenScores, VocabShard


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Rows of the LM heads on this rank, over one range of the vocabulary."""

    student: torch.Tensor  # [stop - start, D]
    teacher: torch.Tensor | None = None  # [stop - start, D of the teacher]; only where a divergence over the vocabulary is asked for
    shard: VocabShard


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the kernel doors are called."""

    chunk_tokens: int  # tokens whose logits exist at a time
    moments: bool = False  # whether they are asked for
    schedule: Schedule = "forward"
    upstream: Upstream = field(default_factory=Upstream)  # of a divergence over the vocabulary
    implementation: Implementation = "chunked"
    products: Products = TORCH  # of the implementation "te"


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """What whole distributions look like, for diagnostics. No gradient; what is not known is None."""

    student_entropy: torch.Tensor | None = None  # [T] nats
    teacher_entropy: torch.Tensor | None = None  # [T] nats
    agreement: torch.Tensor | None = None  # [T] 1 where student and teacher have the same most probable id


def score(hidden: torch.Tensor, heads: Heads, micro_batch: MicroBatch, needs: Needs, settings: Settings) -> tuple[TokenScores, Moments]:
    """The current student at every id of the micro-batch beside the cached log-probabilities; tensor parallelism ends here.

    Args:
        hidden: [T, D] last hidden states, or [T / tp, D] when `heads.shard.sequence_parallel`.
        heads: of student and teacher on this rank.
        micro_batch: on the device of `hidden`, packed for `needs`.
        needs: what the micro-batch was packed for.
        settings: of the kernels.
    """
    named = {"token": micro_batch.token, "head": micro_batch.head, "draws": micro_batch.draws, "top": micro_batch.top}
    asked = {"token": True, "head": needs.head > 0, "draws": needs.draws > 0, "top": needs.teacher_top > 0}
    wrong = [name for name in named if asked[name] != (named[name] is not None)]
    assert not wrong, f"the micro-batch was not packed for {needs}: see {', '.join(wrong)}"
    sets = {name: one for name, one in named.items() if one is not None}
    with_rest = [name for name, wanted in (("head", needs.head_rest), ("top", needs.top_rest)) if wanted]
    if needs.divergence and not needs.behaviour_logp and sets.keys() == {"token"}:
        sets = {}  # nobody looks at the generated token

    scores: dict[str, IdScores] = {}
    seen = Moments()
    if sets:
        scores, seen = _at_ids(hidden, heads, micro_batch, sets, with_rest, settings)
    dense = None
    if needs.divergence:
        dense, seen = _over_vocabulary(hidden, heads, micro_batch, needs.divergence, settings)
    everything = TokenScores(mask=micro_batch.mask, sequences=micro_batch.sequences, dense=dense, **{"token": None, **scores})
    return everything, seen if settings.moments else Moments()


def _at_ids(
    hidden: torch.Tensor,
    heads: Heads,
    micro_batch: MicroBatch,
    sets: dict[str, IdSet],
    with_rest: list[str],
    settings: Settings,
) -> tuple[dict[str, IdScores], Moments]:
    columns = _columns(sets)
    found = logps(
        hidden,
        heads.student,
        torch.cat([one.ids for one in sets.values()], 1),
        heads.shard,
        rows=micro_batch.mask,
        rests=[columns[name] for name in with_rest],
        moments=settings.moments and micro_batch.teacher_hidden is None,  # else the divergence knows them
        chunk_tokens=settings.chunk_tokens,
        implementation=settings.implementation,
        products=settings.products,
    )
    scores = {
        name: IdScores(
            ids=one.ids,
            counts=one.counts,
            student_logp=found.logp[:, columns[name]],
            behaviour_logp=one.behaviour_logp,
            teacher_logp=one.teacher_logp,
            student_log_rest=found.log_rest[:, with_rest.index(name)] if name in with_rest else None,
            teacher_log_rest=one.teacher_log_rest,
        )
        for name, one in sets.items()
    }
    best = micro_batch.teacher_best
    agreement = (found.best == best).to(found.logp.dtype) if found.best is not None and best is not None else None
    return scores, Moments(student_entropy=found.entropy, teacher_entropy=micro_batch.teacher_entropy, agreement=agreement)


def _over_vocabulary(
    hidden: torch.Tensor, heads: Heads, micro_batch: MicroBatch, divergence: Divergence, settings: Settings
) -> tuple[DenseScores, Moments]:
    assert heads.teacher is not None and micro_batch.teacher_hidden is not None, "needs ask for them"
    teacher_hidden = micro_batch.teacher_hidden
    if not teacher_hidden.shape[1]:  # a micro-batch without a response
        teacher_hidden = heads.teacher.new_zeros(len(teacher_hidden), heads.teacher.shape[1])
    found = dense_kl(
        hidden,
        heads.student,
        teacher_hidden,
        heads.teacher,
        heads.shard,
        divergence,
        rows=micro_batch.mask,
        chunk_tokens=settings.chunk_tokens,
        schedule=settings.schedule,
        upstream=settings.upstream,
        implementation=settings.implementation,
        products=settings.products,
    )
    moments = Moments(student_entropy=found.student_entropy, teacher_entropy=found.teacher_entropy, agreement=found.agree)
    return DenseScores(divergence=found.divergence, kl=found.kl), moments


def _columns(sets: dict[str, IdSet]) -> dict[str, slice]:
    """Where each set stands when all are laid side by side."""
    columns, first = {}, 0
    for name, one in sets.items():
        columns[name] = slice(first, first + one.ids.shape[1])
        first += one.ids.shape[1]
    return columns
