"""From hidden states to what an estimator sees: one call of the kernel door for all ids of a micro-batch.

Knows which id columns stand where; refuses to know Megatron, and what the scores are for.

Dimension key: T packed targets, K ids per target of one set, D hidden size.
"""

import torch

from megatron_opd.kernels import logps
from megatron_opd.types import IdScores, IdSet, MicroBatch, Needs, TokenScores, VocabShard


def score(
    hidden: torch.Tensor, head: torch.Tensor, micro_batch: MicroBatch, needs: Needs, shard: VocabShard, *, chunk_tokens: int
) -> TokenScores:
    """The current student at every id of the micro-batch beside the cached log-probabilities; tensor parallelism ends here.

    Args:
        hidden: [T, D] last hidden states, or [T / tp, D] when `shard.sequence_parallel`.
        head: [stop - start, D] rows of the LM head on this rank.
        micro_batch: on the device of `hidden`, packed for `needs`.
        needs: of the estimator; the tail mass outside the teacher's ids is computed if `needs.teacher_top`.
        shard: this rank's rows of the vocabulary.
        chunk_tokens: tokens whose logits exist at a time.
    """
    named = {"token": micro_batch.token, "head": micro_batch.head, "draws": micro_batch.draws, "top": micro_batch.top}
    asked = {"token": True, "head": needs.head > 0, "draws": needs.tail_draws > 0, "top": needs.teacher_top > 0}
    wrong = [name for name in named if asked[name] != (named[name] is not None)]
    assert not wrong, f"the micro-batch was not packed for {needs}: see {', '.join(wrong)}"
    sets = {name: one for name, one in named.items() if one is not None}

    columns = _columns(sets)
    ids_TK = torch.cat([one.ids for one in sets.values()], 1)
    student_TK, log_tail_T = logps(
        hidden, head, ids_TK, shard, rows=micro_batch.mask, tail_columns=columns.get("top"), chunk_tokens=chunk_tokens
    )
    scores = {
        name: IdScores(
            ids=one.ids, student_logp=student_TK[:, columns[name]], behaviour_logp=one.behaviour_logp, teacher_logp=one.teacher_logp
        )
        for name, one in sets.items()
    }
    return TokenScores(mask=micro_batch.mask, top_log_tail=log_tail_T, **scores)


def _columns(sets: dict[str, IdSet]) -> dict[str, slice]:
    """Where each set stands when all are laid side by side."""
    columns, first = {}, 0
    for name, one in sets.items():
        columns[name] = slice(first, first + one.ids.shape[1])
        first += one.ids.shape[1]
    return columns
