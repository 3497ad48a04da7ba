"""Weights from the learner to every rollout worker over a process group of their own. Knows tensors and names, no model.

A TCP store at the sender carries the small words (who joined, what comes, who got it); a broadcast over gloo (cpu) or
NCCL (cuda) carries the buckets. Rank 0 sends, ranks 1.. receive. Per update: the sender announces version and manifest in
the store, broadcasts the buckets, then waits until each receiver has written that all digests were right. Whoever fails
closes its end, which wakes the others; whoever vanishes is noticed when `timeout_s` is over at the latest. After an error
both ends are closed for good: a process group that lost a message cannot be mended.
"""

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_opd.errors import WeightSyncError
from megatron_opd.runtime.rendezvous import listening_store
from megatron_opd.types import Address, TensorSpec
from megatron_opd.weights import buckets
from megatron_opd.weights.buckets import Bucket

_RECEIVED = "received"


class BroadcastSender:
    """Rank 0: the learner's end."""

    def __init__(self, *, host: str, device: str, bucket_bytes: int, timeout_s: float) -> None:
        """`host` is the address under which receivers reach this process; `device` ("cpu" | "cuda") holds the buckets."""
        self._host = host
        self._device = device
        self._bucket_bytes = bucket_bytes
        self._timeout_s = timeout_s
        self._receivers = 0
        self._names: dict[int, str] = {}  # rank -> who it is
        self._updates = 0
        self._store: dist.TCPStore | None = None
        self._group: dist.ProcessGroup | None = None

    def listen(self, receivers: int) -> Address:
        """Opens the rendezvous for `receivers` receivers on a free port and returns at once."""
        self._receivers = receivers
        self._store = listening_store(self._host, self._timeout_s)
        return Address(host=self._host, port=self._store.port)

    def send(self, version: int, manifest: Sequence[TensorSpec], tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
        """Streams `tensors`, which must follow `manifest`, and returns when every receiver has verified them.

        Returns:
            seconds: "gather" (waiting for `tensors` and copying them), "digest", "broadcast", "acknowledge".

        Raises:
            WeightSyncError: a receiver is missing, late, dead or refused a bucket; or tensors and manifest differ.
        """
        if self._store is None:
            raise WeightSyncError(f"weights version {version}: the sender is closed or never listened; call listen() first")
        self._updates += 1
        done = False
        try:
            for rank in range(1, self._receivers + 1):
                self._await(f"joined/{rank}", f"weights version {version}: receiver {rank} of {self._receivers} did not join")
                self._names[rank] = self._store.get(f"joined/{rank}").decode()
            self._announce(version, manifest)
            seconds = self._stream(version, manifest, tensors)
            start = time.perf_counter()
            self._await_receivers(version)
            seconds["acknowledge"] = time.perf_counter() - start
            done = True
            return seconds
        finally:
            if not done:
                self.close()

    def close(self) -> None:
        """Drops group and store; receivers that still wait fail at once."""
        if self._group is not None:
            self._group.abort()
        self._group = None
        self._store = None

    def _announce(self, version: int, manifest: Sequence[TensorSpec]) -> None:
        """Says what comes, and forms the group with the receivers that this wakes, once."""
        words = {"version": version, "bucket_bytes": self._bucket_bytes, "manifest": [asdict(spec) for spec in manifest]}
        self._store.set(f"update/{self._updates}", json.dumps(words))
        if self._group is not None:
            return
        try:
            self._group = _group(self._store, self._host, 0, self._receivers + 1, self._device, self._timeout_s)
        except RuntimeError as error:
            reason = self._complaint() or _first_line(error)
            raise WeightSyncError(f"weights version {version}: no group with {self._silent()}: {reason}") from error

    def _stream(self, version: int, manifest: Sequence[TensorSpec], tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
        seconds = {"gather": 0.0, "digest": 0.0, "broadcast": 0.0}
        source = iter(tensors)
        for bucket in buckets.plan(manifest, self._bucket_bytes):
            times = [time.perf_counter()]
            buffer = torch.zeros(bucket.size, dtype=torch.uint8, device=self._device)
            for piece, view in buckets.views(buffer, bucket):
                _fill(view, piece.spec, next(source, None), version)
            times.append(time.perf_counter())
            buckets.seal(buffer, bucket, version)
            times.append(time.perf_counter())
            self._broadcast(version, bucket, buffer)
            times.append(time.perf_counter())
            for part, start, stop in zip(seconds, times, times[1:]):
                seconds[part] += stop - start
        if (extra := next(source, None)) is not None:
            raise WeightSyncError(f"weights version {version}: tensor {extra[0]} is not in the manifest of {len(manifest)} tensors")
        return seconds

    def _broadcast(self, version: int, bucket: Bucket, buffer: torch.Tensor) -> None:
        try:
            _broadcast(self._group, buffer, self._timeout_s)
        except RuntimeError as error:
            raise WeightSyncError(
                f"weights version {version}, bucket {bucket.index} (first tensor {bucket.first_name}): {self._silent()} is lost or later "
                f"than {self._timeout_s:g} s: {self._complaint() or _first_line(error)}"
            ) from error

    def _await_receivers(self, version: int) -> None:
        for rank in range(1, self._receivers + 1):
            self._await(f"result/{self._updates}/{rank}", f"weights version {version}: {self._names[rank]} did not confirm the update")
        if complaint := self._complaint():
            raise WeightSyncError(complaint)

    def _await(self, key: str, complaint: str) -> None:
        _await_key(self._store, key, self._timeout_s, complaint)

    def _complaint(self) -> str:
        """What a receiver says went wrong, or nothing."""
        for rank in range(1, self._receivers + 1):
            key = f"result/{self._updates}/{rank}"
            if self._store.check([key]) and (result := self._store.get(key).decode()) != _RECEIVED:
                return f"{self._names[rank]}: {result}"
        return ""

    def _silent(self) -> str:
        """Those that have not even begun this update, or if all have, those that have not confirmed it."""
        for step in ("begun", "result"):
            missing = [name for rank, name in self._names.items() if not self._store.check([f"{step}/{self._updates}/{rank}"])]
            if missing:
                return ", ".join(missing)
        return "a receiver"


class BroadcastReceiver:
    """Rank 1..: a rollout worker's end."""

    def __init__(self, *, address: Address, rank: int, world_size: int, device: str, timeout_s: float) -> None:
        """Joins the sender's rendezvous; the group forms at the first update.

        Raises:
            WeightSyncError: nobody listens at `address`.
        """
        self._address = address
        self._rank = rank
        self._world_size = world_size
        self._device = device
        self._timeout_s = timeout_s
        self._updates = 0  # received whole
        self._sender = f"sender {address.host}:{address.port}"
        self._group: dist.ProcessGroup | None = None
        self._store: dist.TCPStore | None = None
        try:
            with socket.create_connection((address.host, address.port), timeout=timeout_s) as probe:
                self._own_host = probe.getsockname()[0]  # of the interface that leads to the sender
            self._store = dist.TCPStore(address.host, address.port, is_master=False, timeout=timedelta(seconds=timeout_s))
            self._store.set(f"joined/{rank}", f"rollout worker {rank} (pid {os.getpid()} on {socket.gethostname()})")
        except (OSError, RuntimeError) as error:
            raise WeightSyncError(f"receiver {rank} cannot reach the weight {self._sender}: {_first_line(error)}") from error

    def announced(self, version: int) -> tuple[TensorSpec, ...]:
        """Waits for the sender's next update and returns its manifest.

        Raises:
            WeightSyncError: the sender is late or dead, or sends another version.
        """
        return self._announcement(version)[1]

    def receive(self, version: int, manifest: Sequence[TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the tensors of the sender's next update, whose manifest was `announced`.

        Each bucket lives in a buffer of its own, so the tensors may be kept.

        Raises:
            WeightSyncError: a bucket is late, damaged or of another version, or the sender died.
        """
        done = False
        try:
            bucket_bytes, announced = self._announcement(version)
            if tuple(manifest) != announced:
                raise WeightSyncError(f"weights version {version} from {self._sender}: the manifest is not the one that was announced")
            self._join(version)
            for bucket in buckets.plan(announced, bucket_bytes):
                buffer = self._next_buffer(version, bucket)
                buckets.verify(buffer, bucket, version, self._sender)
                for piece, tensor in buckets.views(buffer, bucket):
                    yield piece.spec.name, tensor
            self._answer(_RECEIVED, version)
            self._updates += 1
            done = True
        except WeightSyncError as error:
            if self._store is not None:
                self._answer(str(error), version)
            raise
        finally:
            if not done:
                self.close()

    def close(self) -> None:
        """Drops group and store; a sender that still sends fails at once."""
        if self._group is not None:
            self._group.abort()
        self._group = None
        self._store = None

    def _announcement(self, version: int) -> tuple[int, tuple[TensorSpec, ...]]:
        if self._store is None:
            raise WeightSyncError(f"weights version {version}: receiver {self._rank} was closed by an earlier error; join again")
        key = f"update/{self._updates + 1}"
        _await_key(self._store, key, self._timeout_s, f"weights version {version}: {self._sender} announced nothing")
        words = json.loads(self._store.get(key))
        self._store.set(f"begun/{self._updates + 1}/{self._rank}", "")
        if words["version"] != version:
            complaint = f"expected weights version {version}, {self._sender} sends version {words['version']}"
            self._answer(complaint, version)
            raise WeightSyncError(f"receiver {self._rank} {complaint}")
        manifest = tuple(TensorSpec(name=w["name"], dtype=w["dtype"], shape=tuple(w["shape"])) for w in words["manifest"])
        return words["bucket_bytes"], manifest

    def _join(self, version: int) -> None:
        """Forms the group with the sender that has announced its first update, once."""
        if self._group is not None:
            return
        try:
            self._group = _group(self._store, self._own_host, self._rank, self._world_size, self._device, self._timeout_s)
        except RuntimeError as error:
            raise WeightSyncError(f"weights version {version}: no group with {self._sender}: {_first_line(error)}") from error

    def _next_buffer(self, version: int, bucket: Bucket) -> torch.Tensor:
        buffer = torch.empty(bucket.size, dtype=torch.uint8, device=self._device)
        try:
            _broadcast(self._group, buffer, self._timeout_s)
        except RuntimeError as error:
            raise WeightSyncError(
                f"weights version {version}, bucket {bucket.index} (first tensor {bucket.first_name}): {self._sender} is lost or later "
                f"than {self._timeout_s:g} s: {_first_line(error)}"
            ) from error
        return buffer

    def _answer(self, result: str, version: int) -> None:
        try:
            self._store.set(f"result/{self._updates + 1}/{self._rank}", result)
        except RuntimeError as error:
            if result == _RECEIVED:
                raise WeightSyncError(f"weights version {version}: {self._sender} is gone: {_first_line(error)}") from error


def _group(store: dist.Store, host: str, rank: int, world_size: int, device: str, timeout_s: float) -> dist.ProcessGroup:
    """A process group outside torch's registry: it never meets the default group of learner or engine."""
    store = dist.PrefixStore("weights", store)
    timeout = timedelta(seconds=timeout_s)
    if device == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, world_size, options)
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    return dist.ProcessGroupGloo(store, rank, world_size, options)


def _broadcast(group: dist.ProcessGroup, buffer: torch.Tensor, timeout_s: float) -> None:
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    group.broadcast([buffer], options).wait(timedelta(seconds=timeout_s))


def _await_key(store: dist.Store, key: str, timeout_s: float, complaint: str) -> None:
    try:
        store.wait([key], timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise WeightSyncError(f"{complaint} within {timeout_s:g} s, or its connection broke: {_first_line(error)}") from error


def _fill(view: torch.Tensor, spec: TensorSpec, item: tuple[str, torch.Tensor] | None, version: int) -> None:
    if item is None:
        raise WeightSyncError(f"weights version {version}: tensor {spec.name} of the manifest never came")
    name, tensor = item
    if name != spec.name or tensor.dtype != view.dtype or tensor.shape != view.shape:
        raise WeightSyncError(
            f"weights version {version}: got tensor {name} {tensor.dtype} {tuple(tensor.shape)}, "
            f"the manifest says {spec.name} {view.dtype} {spec.shape}"
        )
    view.copy_(tensor.detach())


def _first_line(error: Exception) -> str:
    """What torch or the system says, without gloo's guesses and stack."""
    lines = str(error).split(". This is typically")[0].strip().splitlines()
    return lines[0] if lines else type(error).__name__
