"""What must not be trained on: responses and scores that are empty, too long, out of the vocabulary or not numbers."""

from dataclasses import dataclass

import numpy as np

from megatron_opd.types import Rollout, TeacherScores

_BY_DRAW = ("draw_ids", "draw_counts", "draw_logp")  # a row for each distinct draw, not for each token
_MAY_BE_NO_MASS = ("head_log_rest",)  # the logarithm of nothing is a fact there, not a fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the student's vocabulary and the run's settings allow."""

    vocab_size: int
    response_tokens: int


def fault_of(made: Rollout | TeacherScores, rollout: Rollout, limits: Limits) -> str | None:
    """What is wrong with a rollout or with its scores, or None."""
    tokens, draws = len(rollout.response_ids), 0 if rollout.draw_ids is None else len(rollout.draw_ids)
    if isinstance(made, Rollout):
        if not 1 <= tokens <= limits.response_tokens:
            return f"the response has {tokens} tokens, wanted 1 to {limits.response_tokens} (rollout.max_response_tokens)"
    for name in made.__slots__:
        array = getattr(made, name)
        if not isinstance(array, np.ndarray):
            continue
        rows = draws if name in _BY_DRAW else tokens
        if len(array) != rows and name != "prompt_ids":
            return f"{name} has {len(array)} rows, wanted {rows} for a response of {tokens} tokens"
        if fault := _fault(name, array, limits):
            return fault
    return None


def _fault(name: str, array: np.ndarray, limits: Limits) -> str | None:
    if name.endswith("_ids") and array.size:
        low, high = int(array.min()), int(array.max())
        return None if 0 <= low <= high < limits.vocab_size else f"{name} from {low} to {high} in a vocabulary of {limits.vocab_size}"
    if name == "hidden" and array.dtype == np.uint16:  # bfloat16
        array = (array.astype(np.uint32) << 16).view(np.float32)
    if array.dtype.kind != "f":
        return None
    bad = np.isnan(array) | (array == np.inf) | ((array == -np.inf) & (name not in _MAY_BE_NO_MASS))
    if not bad.any():
        return None
    return f"{name} holds {array[bad].flat[0]} in row {int(np.argwhere(bad)[0][0])}"
