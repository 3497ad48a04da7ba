"""What the sampler knew beside the token it chose: the head and draws from the tail, kept until they are asked for.

A logits processor of vLLM's V1 model runner that changes nothing. It declares itself argmax-invariant, so vLLM shows it the
logits that it samples from, temperature applied: b = softmax(logits). For each request that carries a key it records, per
step, the K largest b and m independent draws from b restricted to the ids outside those K (all ids where K = 0), with
their log b over the whole vocabulary. Rows are stored by position len(output), so a request that is preempted and
re-prefilled under other weights overwrites exactly the rows of the tokens that it samples anew. The draws of a row follow
from its request's seed and its position alone, whatever runs beside it.

Dimension key: n rows of this step, V vocabulary, K head, m draws, C = K + m.
"""

from dataclasses import dataclass

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

KEY = "megatron_opd_key"  # in SamplingParams.extra_args; also the section of VllmConfig.additional_config with the two counts
NAME = "megatron_opd.rollout.draws:DrawRecorder"
_ABSENT = -1  # in ids: no step has written this row


@dataclass(frozen=True, slots=True)
class _Request:
    key: str
    seed: int
    output: list[int]  # vLLM's own growing list


class DrawRecorder(LogitsProcessor):
    """Records head and tail draws of running requests.

    Memory is rows * longest response * C * 8 bytes on the sampler's device. Rows are those running and those finished but
    not yet taken, at most four times `max_num_seqs`; past that the oldest one that does not run, which its caller has given up, is dropped.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        counts = vllm_config.additional_config[KEY]
        self._head, self._draws = counts["head"], counts["draws"]
        self._device = device
        self._most_rows = 4 * vllm_config.scheduler_config.max_num_seqs
        self._requests: dict[int, _Request] = {}  # by row of the batch
        self._rows: dict[str, int] = {}  # key -> row of the store, oldest first
        self._free: list[int] = []
        self._ids = torch.empty(0, 64, self._head + self._draws, dtype=torch.int32, device=device)
        self._logp = torch.empty(0, 64, self._head + self._draws, dtype=torch.float32, device=device)

    def is_argmax_invariant(self) -> bool:
        """True: nothing changes, and vLLM calls it behind the temperature."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follows vLLM's batch: removed, then added, then moved."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._requests.pop(index, None)
        for index, params, _, output in batch_update.added:
            self._requests.pop(index, None)
            if params.extra_args and (key := params.extra_args.get(KEY)):
                assert params.seed is not None, "a request with a key has a seed"
                self._requests[index] = _Request(key, params.seed, output)
                self._claim(key)
        for source, target, how in batch_update.moved:
            moved, replaced = self._requests.pop(source, None), self._requests.pop(target, None)
            if moved is not None:
                self._requests[target] = moved
            if how == MoveDirectionality.SWAP and replaced is not None:
                self._requests[source] = replaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Records one step and returns `logits` [n, V] untouched."""
        live = [
            (index, self._rows[request.key], len(request.output), request.seed)
            for index, request in self._requests.items()
            if request.key in self._rows
        ]
        if not live:
            return logits
        indices, rows, positions, seeds = torch.tensor(live).T
        self._reserve(int(positions.max()) + 1)
        logp_nV = logits[indices.to(self._device)].log_softmax(-1, dtype=torch.float32)
        uniform_nm = uniform(seeds.tolist(), positions.tolist(), self._draws).to(self._device)
        ids_nC, logp_nC = head_and_draws(logp_nV, self._head, uniform_nm)
        where = (rows.to(self._device), positions.to(self._device))
        self._ids[where] = ids_nC.to(torch.int32)
        self._logp[where] = logp_nC
        return logits

    def take(self, keys: list[str], lengths: list[int]) -> bytes:
        """Returns and forgets the first `lengths[i]` positions of `keys[i]`: see `decode`.

        Raises:
            KeyError: a key was never seen, already taken, or dropped.
        """
        blobs = []
        for key, length in zip(keys, lengths, strict=True):
            row = self._rows.pop(key)
            self._free.append(row)
            blobs += [self._ids[row, :length].cpu().numpy().tobytes(), self._logp[row, :length].cpu().numpy().tobytes()]
        return b"".join(blobs)

    def _claim(self, key: str) -> None:
        if key in self._rows:  # preempted before; its earlier positions stay
            return
        if not self._free and len(self._rows) >= self._most_rows:
            running = {request.key for request in self._requests.values()}
            self._free.append(self._rows.pop(next(old for old in self._rows if old not in running)))
        if not self._free:
            self._grow(max(8, 2 * self._ids.shape[0]), self._ids.shape[1])
        row = self._free.pop()
        self._ids[row] = _ABSENT
        self._rows[key] = row

    def _reserve(self, positions: int) -> None:
        if positions > self._ids.shape[1]:
            self._grow(self._ids.shape[0], max(positions, 2 * self._ids.shape[1]))

    def _grow(self, rows: int, positions: int) -> None:
        old_rows, old_positions, width = self._ids.shape
        ids = self._ids.new_full((rows, positions, width), _ABSENT)
        logp = self._logp.new_zeros((rows, positions, width))
        ids[:old_rows, :old_positions] = self._ids
        logp[:old_rows, :old_positions] = self._logp
        self._ids, self._logp = ids, logp
        self._free += range(old_rows, rows)


def uniform(seeds: list[int], positions: list[int], draws: int) -> torch.Tensor:
    """Numbers in [0, 1) [n, m] that follow from seed and position of each row alone: Philox with the one as key, the other as counter."""
    rows = [
        np.random.Generator(np.random.Philox(key=seed, counter=position << 64)).random(draws, np.float32)
        for seed, position in zip(seeds, positions, strict=True)
    ]
    return torch.from_numpy(np.stack(rows))


def head_and_draws(logp_nV: torch.Tensor, head: int, uniform_nm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The `head` largest entries per row by falling value, then one draw from the rest for each number in [0, 1); ids and log-probs [n, C].

    Where the head holds nearly all mass the draws still follow the shape of the tail: its probabilities are taken relative
    to the tail's largest one, so they do not underflow together.
    """
    head_logp_nK, head_ids_nK = logp_nV.topk(head)
    if uniform_nm.shape[1] == 0:
        return head_ids_nK, head_logp_nK
    tail_nV = logp_nV.scatter(-1, head_ids_nK, float("-inf"))
    sums_nV = (tail_nV - tail_nV.amax(-1, keepdim=True)).exp_().cumsum_(-1)
    total_n1 = sums_nV[:, -1:]
    marks_nm = torch.minimum(uniform_nm * total_n1, total_n1.nextafter(torch.zeros_like(total_n1)))  # rounding must not reach the total
    draw_ids_nm = torch.searchsorted(sums_nV, marks_nm, right=True)  # the first sum above the mark: never an id without mass
    ids_nC = torch.cat([head_ids_nK, draw_ids_nm], dim=-1)
    return ids_nC, torch.cat([head_logp_nK, logp_nV.gather(-1, draw_ids_nm)], dim=-1)


def decode(blob: bytes, lengths: list[int], width: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Inverse of `take`: per request ids [R, C] int32 and log-probs [R, C] float32.

    Raises:
        ValueError: the blob has another length, or a position was never recorded.
    """
    wanted = sum(lengths) * width * 8
    if len(blob) != wanted:
        raise ValueError(f"draws of {len(lengths)} requests take {wanted} bytes, got {len(blob)}")
    decoded, start = [], 0
    for length in lengths:
        count = length * width
        ids = np.frombuffer(blob, np.int32, count, start).reshape(length, width)
        logp = np.frombuffer(blob, np.float32, count, start + 4 * count).reshape(length, width)
        if (ids == _ABSENT).any():
            raise ValueError(
                f"positions {np.flatnonzero((ids == _ABSENT).any(-1)).tolist()} of a response of {length} tokens were never recorded"
            )
        decoded.append((ids, logp))
        start += 8 * count
    return decoded
