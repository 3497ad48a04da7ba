"""Trajectories to micro-batches: which go where, and the one shift by one in the house.

Pure functions of their arguments: every rank that calls them gets the same answer. Before packing everything is aligned to
the R response tokens; afterwards to the T packed targets, target t being the token after input t. A sequence of P prompt
and R response tokens has P + R - 1 inputs, since its last token is nobody's input; response token r is the target of input
P - 1 + r. An empty response has no target and takes no place.

Dimension key: P prompt tokens, R response tokens, K ids per position, T packed targets, N sequences of a micro-batch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from operator import attrgetter

import numpy as np
import torch

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
    shapes = _shapes(needs)
    for trajectory in trajectories:
        _check(trajectory, shapes)
    rollouts = [trajectory.rollout for trajectory in trajectories]
    lengths = [num_inputs(rollout) for rollout in rollouts if num_inputs(rollout)]
    num_targets = max(-(-sum(lengths) // pad_multiple), 1) * pad_multiple
    extents = [*lengths, num_targets - sum(lengths)] if num_targets > sum(lengths) else lengths
    where = _targets(rollouts)

    def lay(arrays: Sequence[np.ndarray], shape: tuple[int, ...], dtype: type, fill: int = 0) -> torch.Tensor:
        """Response-aligned arrays at their targets, `fill` elsewhere."""
        laid: np.ndarray = np.full((num_targets, *shape), fill, dtype)
        laid[where] = np.concatenate([np.empty((0, *shape), dtype), *(array.reshape(-1, *shape) for array in arrays)])
        return torch.from_numpy(laid)

    def lay_field(name: str) -> torch.Tensor | None:
        if name not in shapes:
            return None
        width = shapes[name] or (1,)
        return lay([attrgetter(name)(one) for one in trajectories], width, np.int64 if name.endswith("_ids") else np.float32)

    def lay_set(ids: str, behaviour: str, teacher: str) -> IdSet | None:
        ids_TK = lay_field(ids)
        return None if ids_TK is None else IdSet(ids=ids_TK, behaviour_logp=lay_field(behaviour), teacher_logp=lay_field(teacher))

    token = lay_set("rollout.response_ids", "rollout.logp", "teacher.token_logp")
    assert token is not None, "every response has its own tokens"
    token_ids = np.zeros(num_targets, np.int64)
    token_ids[: sum(lengths)] = np.concatenate([np.empty(0, np.int64), *(_inputs(rollout) for rollout in rollouts)])
    return MicroBatch(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(np.concatenate([np.arange(extent) for extent in extents])),
        boundaries=torch.from_numpy(np.cumsum([0, *extents], dtype=np.int32)),
        mask=lay([np.ones(len(rollout.response_ids), bool) for rollout in rollouts], (), bool),
        lag_origin=lay([_versions(rollout) for rollout in rollouts], (), np.int64, fill=-1),
        token=token,
        head=lay_set("rollout.head_ids", "rollout.head_logp", "teacher.head_logp"),
        draws=lay_set("rollout.draw_ids", "rollout.draw_logp", "teacher.draw_logp"),
        top=lay_set("teacher.top_ids", "no behaviour", "teacher.top_logp"),
    )


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


def _versions(rollout: Rollout) -> np.ndarray:
    """[R] policy version that sampled each response token."""
    firsts = [segment.first_token for segment in rollout.segments]
    versions = np.array([segment.version for segment in rollout.segments], np.int64)
    return versions[np.searchsorted(firsts, np.arange(len(rollout.response_ids)), side="right") - 1]


# -------------------------------------------------------------------------------------------------------------- checks
def _shapes(needs: Needs) -> dict[str, tuple[int, ...]]:
    """Shape behind R of every array that `needs` asks for."""
    asked = {
        "rollout.response_ids": (True, ()),
        "rollout.logp": (needs.behaviour_logp, ()),
        "rollout.head_ids": (needs.head, (needs.head,)),
        "rollout.head_logp": (needs.head, (needs.head,)),
        "rollout.draw_ids": (needs.tail_draws, (needs.tail_draws,)),
        "rollout.draw_logp": (needs.tail_draws, (needs.tail_draws,)),
        "teacher.token_logp": (needs.teacher_token, ()),
        "teacher.head_logp": (needs.teacher_head, (needs.head,)),
        "teacher.draw_logp": (needs.teacher_draws, (needs.tail_draws,)),
        "teacher.top_ids": (needs.teacher_top, (needs.teacher_top,)),
        "teacher.top_logp": (needs.teacher_top, (needs.teacher_top,)),
    }
    return {name: shape for name, (wanted, shape) in asked.items() if wanted}


def _check(trajectory: Trajectory, shapes: dict[str, tuple[int, ...]]) -> None:
    rollout, teacher = trajectory.rollout, trajectory.teacher
    if not len(rollout.prompt_ids):
        raise DataError(f"prompt {rollout.index} has no tokens, so nothing predicts its first response token; give it at least one")
    firsts = [segment.first_token for segment in rollout.segments]
    if firsts[:1] != [0] or firsts != sorted(firsts):
        raise DataError(f"rollout {rollout.index}: segments start at tokens {firsts}; wanted rising offsets from 0")
    if teacher is not None and teacher.index != rollout.index:
        raise DataError(f"rollout {rollout.index} came with the teacher scores of rollout {teacher.index}")
    for name, shape in shapes.items():
        owner, field = name.split(".")
        array = getattr(getattr(trajectory, owner), field, None)
        wanted = (len(rollout.response_ids), *shape)
        got = None if array is None else array.shape
        if got != wanted:
            raise DataError(f"rollout {rollout.index}: {name} has shape {got}, wanted {wanted}; check what its maker was told to compute")
