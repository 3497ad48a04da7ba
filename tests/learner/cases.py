"""Trajectories with every array that any estimator asks for, from random but proper distributions."""

import numpy as np

from megatron_opd.data.draws import merge
from megatron_opd.types import Needs, Rollout, Segment, TeacherScores, Trajectory

TEACHER_HIDDEN = 24  # of the teacher whose LM head turns hidden states into q
LENGTHS = ((3, 9), (1, 1), (5, 0), (4, 6), (2, 13), (7, 2), (3, 4), (6, 1))  # (prompt, response): awkward on purpose


def trajectories(needs: Needs, *, vocab: int, seed: int = 0, lengths: tuple[tuple[int, int], ...] = LENGTHS) -> list[Trajectory]:
    rng = np.random.default_rng(seed)
    return [_trajectory(index, prompt, response, needs, vocab, rng) for index, (prompt, response) in enumerate(lengths)]


def _trajectory(index: int, prompt: int, response: int, needs: Needs, vocab: int, rng: np.random.Generator) -> Trajectory:
    logb, logq = _distributions(response, vocab, rng), _distributions(response, vocab, rng)
    tokens = rng.integers(vocab, size=response).astype(np.int32)
    head = np.argsort(-logb, 1)[:, : needs.head].astype(np.int32)
    outside = np.argsort(-logb, 1)[:, needs.head :]
    few = max(1, outside.shape[1] // 40)  # so that some ids are drawn more than once
    draws = np.take_along_axis(outside, rng.integers(few, size=(response, needs.draws)), 1).astype(np.int32)
    top = np.argsort(-logq, 1)[:, : needs.teacher_top].astype(np.int32)

    def log_outside(logp: np.ndarray, ids: np.ndarray) -> np.ndarray:
        return np.log(1 - np.exp(np.take_along_axis(logp, ids, 1)).sum(1)).astype(np.float32)

    def at(logp: np.ndarray, ids: np.ndarray) -> np.ndarray:
        return np.take_along_axis(logp, ids, 1).astype(np.float32)

    drawn = merge(draws, at(logb, draws)) if needs.draws else (None,) * 4
    rollout = Rollout(
        index=index,
        prompt_ids=rng.integers(vocab, size=prompt).astype(np.int32),
        response_ids=tokens,
        logp=at(logb, tokens[:, None])[:, 0] if needs.behaviour_logp else None,
        head_ids=head if needs.head else None,
        head_logp=at(logb, head) if needs.head else None,
        draw_ids=drawn[0],
        draw_counts=drawn[1],
        draw_sizes=drawn[2],
        draw_logp=drawn[3],
        segments=(Segment(first_token=0, version=0),),
        finish_reason="stop",
    )
    if not needs.teacher:
        return Trajectory(rollout=rollout, teacher=None)
    scores = TeacherScores(
        index=index,
        token_logp=at(logq, tokens[:, None])[:, 0] if needs.teacher_token else None,
        head_logp=at(logq, head) if needs.teacher_head else None,
        head_log_rest=log_outside(logq, head) if needs.head_rest else None,
        draw_logp=merge(draws, at(logq, draws))[3] if needs.teacher_draws else None,
        top_ids=top if needs.teacher_top else None,
        top_logp=at(logq, top) if needs.teacher_top else None,
        hidden=rng.normal(size=(response, TEACHER_HIDDEN)).astype(np.float32) if needs.divergence else None,
    )
    return Trajectory(rollout=rollout, teacher=scores)


def _distributions(rows: int, vocab: int, rng: np.random.Generator) -> np.ndarray:
    logits = rng.normal(size=(rows, vocab)) * 2
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))
