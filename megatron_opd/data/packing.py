"""Trajectories to micro-batches: which go where, and the one shift by one in the house.

Pure functions of their arguments: every rank that calls them gets the same answer. Before packing everything is aligned to
the R response tokens; afterwards to the T packed targets, target t being the token after input t. A sequence of P prompt
and R response tokens has P + R - 1 inputs, since its last token is nobody's input; response token r is the target of input
P - 1 + r. An empty response has no target and takes no place.

Dimension key: P prompt tokens, R response tokens, K ids per position, T packed targets, N sequences of a micro-batch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from operator import attrgetter

import numpy as np
import torch

from megatron_opd.data.draws import spread
from megatron_opd.errors import DataError
from megatron_opd.types import IdSet, MicroBatch, Needs, Rollout, Trajectory

Bins = list[list[int]]


# ------------------------------------------------------------------------------------------------------ which go where
def plan(lengths: Sequence[int], *, ranks: int, micro_batch_tokens: int) -> list[Bins]:
    """For each data-parallel rank its micro-batches, each a list of indices into `lengths`; the same number for every rank.

    Tokens are balanced over the ranks, longest sequence first to the rank with the least. No micro-batch exceeds
    `micro_batch_tokens` (before `pack` pads it) save one that holds a single longer sequence. A micro-batch is empty only
    where there are fewer sequences than ranks times micro-batches.
    """
    shares = _balance(range(len(lengths)), lengths, ranks)
    while True:
        packed = [_fill(share, lengths, micro_batch_tokens) for share in shares]
        count = max(len(bins) for bins in packed)
        poor = min(range(ranks), key=lambda rank: len(shares[rank]))
        rich = max(range(ranks), key=lambda rank: len(shares[rank]))
        if len(shares[poor]) >= count or len(shares[rich]) <= len(shares[poor]) + 1:
            return [_spread(bins, lengths, count) for bins in packed]
        shortest = min(shares[rich], key=lambda i: (lengths[i], i))
        shares[rich].remove(shortest)
        shares[poor].append(shortest)


def _balance(indices: Iterable[int], lengths: Sequence[int], num_bins: int) -> Bins:
    """Longest first into the bin with the fewest tokens, of equal ones the one with the fewest sequences."""
    bins: Bins = [[] for _ in range(num_bins)]
    loads = [0] * num_bins
    for i in _longest_first(indices, lengths):
        least = min(range(num_bins), key=lambda b: (loads[b], len(bins[b])))
        bins[least].append(i)
        loads[least] += lengths[i]
    return bins


def _fill(indices: Iterable[int], lengths: Sequence[int], capacity: int) -> Bins:
    """Best fit decreasing: longest first into the fullest bin that still has room, else into a new one."""
    bins: Bins = []
    rooms: list[int] = []
    for i in _longest_first(indices, lengths):
        fitting = [b for b, room in enumerate(rooms) if room >= lengths[i]]
        if fitting:
            best = min(fitting, key=lambda b: rooms[b])
            bins[best].append(i)
            rooms[best] -= lengths[i]
        else:
            bins.append([i])
            rooms.append(capacity - lengths[i])
    return bins


def _spread(bins: Bins, lengths: Sequence[int], count: int) -> Bins:
    """Splits the longest bins that can be split, then adds empty ones, until there are `count`; longest first."""

    def tokens(bin_: list[int]) -> int:
        return sum(lengths[i] for i in bin_)

    bins = list(bins)
    while len(bins) < count:
        largest = max((b for b in bins if len(b) > 1), key=tokens, default=None)
        if largest is None:
            bins.append([])
        else:
            bins.remove(largest)
            bins.extend(_balance(largest, lengths, 2))
    return sorted(bins, key=lambda b: (-tokens(b), b))


def _longest_first(indices: Iterable[int], lengths: Sequence[int]) -> list[int]:
    return sorted(indices, key=lambda i: (-lengths[i], i))


# ------------------------------------------------------------------------------------------------------- the one shift
def num_inputs(rollout: Rollout) -> int:
    """Inputs that a response takes in a micro-batch."""
    return len(rollout.prompt_ids) + len(rollout.response_ids) - 1 if len(rollout.response_ids) else 0


def pack(trajectories: Sequence[Trajectory], needs: Needs, *, pad_multiple: int = 1) -> MicroBatch:
    """Lays sequences end to end. Padding to a multiple of `pad_multiple` is one more sequence, masked out.

    No inputs at all give a micro-batch of `pad_multiple` masked tokens. What `needs` does not name is not packed, so
    `teacher` may be None where nothing is asked of a teacher.

    Raises:
        DataError: an array that `needs` asks for is missing or does not fit the response; a sequence has no prompt.
    """
    for trajectory in trajectories:
        _check(trajectory, needs)
    rollouts = [trajectory.rollout for trajectory in trajectories]
    lengths = [num_inputs(rollout) for rollout in rollouts if num_inputs(rollout)]
    num_targets = max(-(-sum(lengths) // pad_multiple), 1) * pad_multiple
    extents = [*lengths, num_targets - sum(lengths)] if num_targets > sum(lengths) else lengths
    where = _targets(rollouts)

    def lay(arrays: Sequence[np.ndarray], dtype: type = np.float32, *, empty: tuple[int, ...] = ()) -> torch.Tensor:
        """Response-aligned arrays at their targets, 0 elsewhere; of shape [T, *empty] if there are none."""
        shape = arrays[0].shape[1:] if arrays else empty
        laid: np.ndarray = np.zeros((num_targets, *shape), dtype)
        laid[where] = np.concatenate([np.empty((0, *shape), dtype), *arrays])
        return torch.from_numpy(laid)

    def column(name: str) -> list[np.ndarray]:
        """An array [R, ...] of each trajectory; the draws' columns are as many as the most distinct ones of any position."""
        arrays = [attrgetter(name)(one) for one in trajectories]
        if name not in _RAGGED:
            return arrays
        most = max((int(rollout.draw_sizes.max(initial=1)) for rollout in rollouts), default=1)
        return [spread(array, rollout.draw_sizes, most) for array, rollout in zip(arrays, rollouts, strict=True)]

    def lay_set(name: str, *, behaviour: bool, teacher: bool) -> IdSet:
        owner = "teacher" if name == "top" else "rollout"
        return IdSet(
            ids=lay(column(f"{owner}.{name}_ids"), np.int64, empty=(1,)),
            counts=lay(column("rollout.draw_counts"), empty=(1,)) if name == "draw" else None,
            behaviour_logp=lay(column(f"rollout.{name}_logp"), empty=(1,)) if behaviour else None,
            teacher_logp=lay(column(f"teacher.{name}_logp"), empty=(1,)) if teacher else None,
            teacher_log_rest=lay(column("teacher.head_log_rest")) if name == "head" and needs.head_rest else None,
        )

    def lay_column(array: str, *, wanted: bool, dtype: type = np.float32) -> torch.Tensor | None:
        return lay([attrgetter(array)(one)[:, None] for one in trajectories], dtype, empty=(1,)) if wanted else None

    token_ids = np.zeros(num_targets, np.int64)
    token_ids[: sum(lengths)] = np.concatenate([np.empty(0, np.int64), *(_inputs(rollout) for rollout in rollouts)])
    response_ids = lay_column("rollout.response_ids", wanted=True, dtype=np.int64)
    assert response_ids is not None, "every response has its own tokens"
    return MicroBatch(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(np.concatenate([np.arange(extent) for extent in extents])),
        boundaries=torch.from_numpy(np.cumsum([0, *extents], dtype=np.int32)),
        sequences=torch.from_numpy(np.repeat(np.arange(len(extents)), extents)),
        mask=lay([np.ones(len(rollout.response_ids), bool) for rollout in rollouts], bool),
        token=IdSet(
            ids=response_ids,
            behaviour_logp=lay_column("rollout.logp", wanted=needs.behaviour_logp),
            teacher_logp=lay_column("teacher.token_logp", wanted=needs.teacher_token),
        ),
        head=lay_set("head", behaviour=True, teacher=needs.teacher_head) if needs.head else None,
        draws=lay_set("draw", behaviour=True, teacher=needs.teacher_draws) if needs.draws else None,
        top=lay_set("top", behaviour=False, teacher=True) if needs.teacher_top else None,
        teacher_hidden=_lay_hidden(trajectories, lay) if needs.divergence else None,
        teacher_entropy=lay(column("teacher.entropy")) if needs.moments else None,
        teacher_best=lay(column("teacher.best_ids"), np.int64) if needs.moments else None,
    )


def _lay_hidden(trajectories: Sequence[Trajectory], lay: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Hidden states [T, D], or [T, 0] of no trajectories; bfloat16 travels as its bits, since numpy has no such type."""
    arrays = [one.teacher.hidden for one in trajectories if one.teacher is not None and one.teacher.hidden is not None]
    bits = bool(arrays) and arrays[0].dtype == np.uint16
    laid = lay(arrays, np.uint16 if bits else np.float32, empty=(0,))
    return laid.view(torch.bfloat16) if bits else laid


def to_device(batch: MicroBatch, device: str) -> MicroBatch:
    """The same micro-batch with every tensor on `device`."""

    def move(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        return replace(value, **{f.name: move(getattr(value, f.name)) for f in fields(value)}) if is_dataclass(value) else value

    return move(batch)


def unpack(values: np.ndarray, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
    """Values [n, ...] at the targets that count in the micro-batch that `pack` made of these trajectories -> [R, ...] each."""
    ends = np.cumsum([len(one.rollout.response_ids) for one in trajectories], dtype=np.int64)
    return np.split(values, ends)[: len(trajectories)]


def _targets(rollouts: Sequence[Rollout]) -> np.ndarray:
    """Packed positions of all response tokens in order: the last R inputs of each sequence."""
    ends = np.cumsum([num_inputs(rollout) for rollout in rollouts], dtype=np.int64)
    ranges = [np.arange(end - len(rollout.response_ids), end) for end, rollout in zip(ends, rollouts, strict=True)]
    return np.concatenate([np.empty(0, np.int64), *ranges])


def _inputs(rollout: Rollout) -> np.ndarray:
    """[P + R - 1] ids, or none where the response is empty."""
    return np.concatenate([rollout.prompt_ids, rollout.response_ids])[: num_inputs(rollout)]


# -------------------------------------------------------------------------------------------------------------- checks
_RAGGED = ("rollout.draw_ids", "rollout.draw_counts", "rollout.draw_logp", "teacher.draw_logp")
_ANY = -1  # of a shape: any length


def _shapes(needs: Needs, response: int, distinct: int) -> dict[str, tuple[int, ...]]:
    """Shape of every array that `needs` asks for, beside a response of that many tokens with that many distinct draws."""
    asked = {
        "rollout.response_ids": (True, (response,)),
        "rollout.logp": (needs.behaviour_logp, (response,)),
        "rollout.head_ids": (needs.head, (response, needs.head)),
        "rollout.head_logp": (needs.head, (response, needs.head)),
        "rollout.draw_ids": (needs.draws, (distinct,)),
        "rollout.draw_counts": (needs.draws, (distinct,)),
        "rollout.draw_logp": (needs.draws, (distinct,)),
        "rollout.draw_sizes": (needs.draws, (response,)),
        "teacher.token_logp": (needs.teacher_token, (response,)),
        "teacher.head_logp": (needs.teacher_head, (response, needs.head)),
        "teacher.head_log_rest": (needs.head_rest, (response,)),
        "teacher.draw_logp": (needs.teacher_draws, (distinct,)),
        "teacher.top_ids": (needs.teacher_top, (response, needs.teacher_top)),
        "teacher.top_logp": (needs.teacher_top, (response, needs.teacher_top)),
        "teacher.hidden": (needs.divergence is not None, (response, _ANY)),
        "teacher.entropy": (needs.moments, (response,)),
        "teacher.best_ids": (needs.moments, (response,)),
    }
    return {name: shape for name, (wanted, shape) in asked.items() if wanted}


def _check(trajectory: Trajectory, needs: Needs) -> None:
    rollout, teacher = trajectory.rollout, trajectory.teacher
    response, sizes = len(rollout.response_ids), rollout.draw_sizes
    if not len(rollout.prompt_ids):
        raise DataError(f"prompt {rollout.index} has no tokens, so nothing predicts its first response token; give it at least one")
    firsts = [segment.first_token for segment in rollout.segments]
    if firsts[:1] != [0] or firsts != sorted(firsts):
        raise DataError(f"rollout {rollout.index}: segments start at tokens {firsts}; wanted rising offsets from 0")
    if teacher is not None and teacher.index != rollout.index:
        raise DataError(f"rollout {rollout.index} came with the teacher scores of rollout {teacher.index}")
    for name, wanted in _shapes(needs, response, 0 if sizes is None else int(sizes.sum())).items():
        owner, field = name.split(".")
        array = getattr(getattr(trajectory, owner), field, None)
        got = None if array is None else array.shape
        if got is None or len(got) != len(wanted) or any(one not in (_ANY, other) for one, other in zip(wanted, got)):
            raise DataError(f"rollout {rollout.index}: {name} has shape {got}, wanted {wanted}; check what its maker was told to compute")
    if needs.draws and rollout.draw_counts is not None and rollout.draw_counts.sum() != needs.draws * response:
        raise DataError(f"rollout {rollout.index}: {rollout.draw_counts.sum()} draws at {response} positions, wanted {needs.draws} at each")
