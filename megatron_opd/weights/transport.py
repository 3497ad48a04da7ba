"""Weights from the learner to every rollout worker over a process group of their own. Knows tensors and names, no model.

A TCP store at the sender carries the small words (who joined, what comes, who got it); a broadcast over gloo (cpu) or
NCCL (cuda) carries the buckets. Rank 0 sends, ranks 1.. receive. Per update: the sender announces version and manifest in
the store, each receiver says that it begins or why not, the buckets follow, then the sender waits until each receiver has
written that all digests were right. Both ends hold two buckets: one is filled, sealed or read while the other travels.

With `delta` both ends keep the last update, and only the words that changed travel. The digest is that of the patched bucket;
a receiver for which it is wrong asks for everything again, and all get it within the same update.

Where several senders share a model, each has a store and a group of its own; the first one's store names the others' (`weights.stages`).

Whoever fails closes its end, which wakes the others; whoever vanishes is noticed when `timeout_s` is over at the latest, or as soon
as somebody who knows says so (`report_loss`).
After an error both ends are closed for good: a process group that lost a message cannot be mended.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from megatron_opd.errors import WeightSyncError
from megatron_opd.runtime.rendezvous import FarStore, bounded, listening_store
from megatron_opd.types import Address, TensorSpec
from megatron_opd.weights import buckets, delta
from megatron_opd.weights.buckets import Bucket

_RECEIVED = "received"
_LOOK_S = 0.25  # between two looks for a complaint
_LOST = "lost"  # key of the store: why a receiver will not answer any more
_BESIDE = "beside"  # key of the store: where the senders of the other stages listen
_AGAIN = "again: "  # begins the answer of a receiver whose patched bucket is wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What a sender announces."""

    version: int
    bucket_bytes: int
    patched: bool  # True: changes against the update before; False: every byte
    keep: bool  # the next one may be patched
    key: bytes  # of the digests
    manifest: tuple[TensorSpec, ...]

    def plan(self) -> tuple[Bucket, ...]:
        """The buckets that come, in order."""
        return buckets.plan(self.manifest, self.bucket_bytes)

    def encode(self) -> str:
        """JSON for the store."""
        return json.dumps(asdict(self) | {"key": self.key.hex()})

    @classmethod
    def decode(cls, text: str) -> "Update":
        """Inverse of `encode`."""
        words = json.loads(text)
        manifest = tuple(TensorSpec(name=w["name"], dtype=w["dtype"], shape=tuple(w["shape"])) for w in words["manifest"])
        return cls(**words | {"key": bytes.fromhex(words["key"]), "manifest": manifest})


class _Slots:
    """Buffers for buckets, kept from update to update: two that take turns, or with `keep` one for each bucket."""

    def __init__(self, device: str, *, keep: bool) -> None:
        self._device = device
        self._keep = keep
        self._buffers: dict[int, torch.Tensor] = {}

    def __getitem__(self, bucket: Bucket) -> torch.Tensor:
        """[bucket.size] uint8."""
        slot = bucket.index if self._keep else bucket.index % 2
        if slot not in self._buffers or self._buffers[slot].numel() < bucket.size:
            self._buffers[slot] = torch.zeros(bucket.size, dtype=torch.uint8, device=self._device)
        return self._buffers[slot][: bucket.size]


class _Flight:
    """One bucket on its way. Gloo keeps a connection open as long as anything refers to work on it, a traceback for instance."""

    def __init__(self, group: dist.ProcessGroup, bucket: Bucket, buffer: torch.Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        self.bucket = bucket
        self._done = threading.Event()
        self._work: dist.Work | None = group.broadcast([buffer], options)
        self._work.get_future().add_done_callback(lambda _: self._done.set())

    def wait(self, timeout_s: float, complaint: Callable[[], str]) -> None:
        """Returns when the bucket has left or arrived; looks every now and then whether the other end complains.

        Raises:
            RuntimeError: it is late, the connection broke, or there is a complaint.
        """
        deadline = time.monotonic() + timeout_s
        while not self._done.wait(min(_LOOK_S, timeout_s)):
            if said := complaint():
                raise RuntimeError(said)
            if time.monotonic() > deadline:
                raise RuntimeError("nothing came")
        self._work.wait(timedelta(seconds=timeout_s))

    def forget(self) -> None:
        """Lets the connection close."""
        self._work = None


class BroadcastSender:
    """Rank 0: the learner's end."""

    def __init__(self, *, host: str, device: str, bucket_bytes: int, timeout_s: float, delta: bool = False) -> None:
        """`host` is the address under which receivers reach this process; `device` ("cpu" | "cuda") holds the buckets."""
        self._host = host
        self._device = device
        self._bucket_bytes = bucket_bytes
        self._timeout_s = timeout_s
        self._delta = delta
        self._slots = _Slots(device, keep=False)
        self._kept = _Slots(device, keep=True)  # with delta: the last update
        self._kept_manifest: tuple[TensorSpec, ...] | None = None
        self._receivers = 0
        self._names: dict[int, str] = {}  # rank -> who it is
        self._updates = 0
        self._flight: _Flight | None = None  # the bucket that travels
        self._store: dist.TCPStore | None = None
        self._group: dist.ProcessGroup | None = None
        self.sent_bytes = 0  # by the last update, to each receiver

    def listen(self, receivers: int) -> Address:
        """Opens a rendezvous for `receivers` receivers on a free port and returns at once; an earlier one, with its group, is dropped."""
        self.close()
        self._receivers, self._names, self._updates, self._kept_manifest = receivers, {}, 0, None
        self._store = listening_store(self._host, self._timeout_s)
        self.name_others([])
        return Address(host=self._host, port=self._store.port)

    def name_others(self, addresses: Sequence[Address]) -> None:
        """Lets receivers that come here know where the senders of the model's other parts listen."""
        self._store.set(_BESIDE, json.dumps([asdict(address) for address in addresses]))

    def send(self, version: int, manifest: Sequence[TensorSpec], tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
        """Streams `tensors`, which must follow `manifest`, and returns when every receiver has verified them.

        Returns:
            seconds: "gather" (waiting for `tensors` and copying them), "digest", "broadcast" (waiting for what travels, and with
            `delta` looking for what changed), "acknowledge".

        Raises:
            WeightSyncError: a receiver is missing, late, dead or refused a bucket; or tensors and manifest differ.
        """
        if self._store is None:
            raise WeightSyncError(f"weights version {version}: the sender is closed or never listened; call listen() first")
        done = False
        try:
            for rank in range(1, self._receivers + 1):
                self._await(f"joined/{rank}", f"weights version {version}: receiver {rank} of {self._receivers} did not join")
                self._names[rank] = self._store.get(f"joined/{rank}").decode()
            update = self._announce(version, tuple(manifest), patched=self._delta and self._kept_manifest == tuple(manifest))
            self.sent_bytes = 0
            seconds = self._stream(update, tensors)
            start = time.perf_counter()
            again = self._await_answers(version)
            self._store.set(f"verdict/{self._updates}", _AGAIN if again else _RECEIVED)
            if again:
                self._stream_kept(self._announce(version, update.manifest, patched=False))
                self._await_answers(version)
            seconds["acknowledge"] = time.perf_counter() - start
            self._kept_manifest = update.manifest
            done = True
            return seconds
        finally:
            if not done:
                self.close()

    def close(self) -> None:
        """Drops group and store; receivers that still wait fail at once."""
        if self._flight is not None:
            self._flight.forget()
        if self._group is not None:
            self._group.abort()
        self._group = self._store = None

    def _announce(self, version: int, manifest: tuple[TensorSpec, ...], *, patched: bool) -> Update:
        """Says what comes, hears who is ready, and forms the group with them, once."""
        self._updates += 1
        update = Update(
            version=version,
            bucket_bytes=self._bucket_bytes,
            patched=patched,
            keep=self._delta,
            key=os.urandom(buckets.KEY_BYTES),
            manifest=manifest,
        )
        self._store.set(f"update/{self._updates}", update.encode())
        for rank, name in self._names.items():
            self._await(f"begun/{self._updates}/{rank}", f"weights version {version}: {name} did not begin the update")
        if complaint := self._complaint():
            raise WeightSyncError(complaint)
        if self._group is None:
            try:
                self._group = _group(self._store, self._host, 0, self._receivers + 1, self._device, self._timeout_s)
            except RuntimeError as error:
                reason = self._complaint() or _first_line(error)
                raise WeightSyncError(f"weights version {version}: no group with {self._silent()}: {reason}") from error
        return update

    def _stream(self, update: Update, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
        seconds = {"gather": 0.0, "digest": 0.0, "broadcast": 0.0}
        source = iter(tensors)
        for bucket in update.plan():
            times = [time.perf_counter()]
            buffer = self._slots[bucket] if update.patched or not self._delta else self._kept[bucket]
            for piece, view in buckets.views(buffer, bucket):
                _fill(view, piece.spec, next(source, None), update.version)
            times.append(time.perf_counter())
            buckets.seal(buffer, bucket, update.version, update.key)
            times.append(time.perf_counter())
            if update.patched:
                self._send_changes(update.version, bucket, buffer)
            else:
                self._launch(update.version, bucket, buffer)
            times.append(time.perf_counter())
            for part, start, stop in zip(seconds, times, times[1:]):
                seconds[part] += stop - start
        start = time.perf_counter()
        self._land(update.version)
        seconds["broadcast"] += time.perf_counter() - start
        if (extra := next(source, None)) is not None:
            raise WeightSyncError(
                f"weights version {update.version}: tensor {extra[0]} is not in the manifest of {len(update.manifest)} tensors"
            )
        return seconds

    def _stream_kept(self, update: Update) -> None:
        for bucket in update.plan():
            buckets.seal(self._kept[bucket], bucket, update.version, update.key)
            self._launch(update.version, bucket, self._kept[bucket])
        self._land(update.version)

    def _send_changes(self, version: int, bucket: Bucket, buffer: torch.Tensor) -> None:
        """What changed in `buffer` since the update before, which it replaces; the whole of it where a patch would not be shorter."""
        kept = self._kept[bucket]
        found = delta.changes(kept[: bucket.payload_bytes], buffer[: bucket.payload_bytes])
        patch, width = found or (buffer[: bucket.payload_bytes], 0)
        kept.copy_(buffer)
        self._launch(version, bucket, delta.header(patch.numel(), width).to(self._device))
        self._launch(version, bucket, torch.cat([patch, buffer[bucket.payload_bytes :]]))

    def _launch(self, version: int, bucket: Bucket, buffer: torch.Tensor) -> None:
        """Sends `buffer` on its way when the one before it has arrived."""
        self._land(version)
        try:
            self._flight = _Flight(self._group, bucket, buffer)
        except RuntimeError as error:
            raise self._lost(version, bucket, error) from error
        self.sent_bytes += buffer.nbytes

    def _land(self, version: int) -> None:
        if self._flight is None:
            return
        try:
            self._flight.wait(self._timeout_s, self._complaint)
        except RuntimeError as error:
            raise self._lost(version, self._flight.bucket, error) from error
        self._flight = None

    def _lost(self, version: int, bucket: Bucket, error: RuntimeError) -> WeightSyncError:
        return WeightSyncError(
            f"weights version {version}, bucket {bucket.index} (first tensor {bucket.first_name}): {self._silent()} is lost or later "
            f"than {self._timeout_s:g} s: {self._complaint() or _first_line(error)}"
        )

    def _await_answers(self, version: int) -> bool:
        """Waits for every receiver; whether one wants everything again."""
        for rank in range(1, self._receivers + 1):
            self._await(f"result/{self._updates}/{rank}", f"weights version {version}: {self._names[rank]} did not confirm the update")
        if complaint := self._complaint():
            raise WeightSyncError(complaint)
        return any(self._result(rank).startswith(_AGAIN) for rank in self._names)

    def _await(self, key: str, complaint: str) -> None:
        start = time.monotonic()
        while not self._store.check([key]):
            waited = time.monotonic() - start
            if self._store.check([_LOST]):
                raise WeightSyncError(f"{complaint}: {self._store.get(_LOST).decode()}")
            if waited > self._timeout_s:
                raise WeightSyncError(f"{complaint} within {self._timeout_s:g} s")
            time.sleep(min(_LOOK_S, 0.0005 + waited / 20))

    def _complaint(self) -> str:
        """What a receiver says went wrong, or somebody of one that cannot say so itself, or nothing."""
        if self._store.check([_LOST]):
            return self._store.get(_LOST).decode()
        for rank, name in self._names.items():
            result = self._result(rank)
            if result not in ("", _RECEIVED) and not result.startswith(_AGAIN):
                return f"{name}: {result}"
        return ""

    def _result(self, rank: int) -> str:
        key = f"result/{self._updates}/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else ""

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
        self._slots = _Slots(device, keep=False)
        self._kept = _Slots(device, keep=True)  # the last update, if the sender sends changes
        self._flight: _Flight | None = None  # the bucket that is to come
        self._sender = f"sender {address.host}:{address.port}"
        self._group: dist.ProcessGroup | None = None
        self._store: FarStore | None = None
        try:
            self._store, self._own_host = _store_at(address, timeout_s)
            self.others = _others(self._store)  # where the senders of the model's other parts listen
            self._store.set(f"joined/{rank}", f"rollout worker {rank} (pid {os.getpid()} on {socket.gethostname()})")
        except (OSError, RuntimeError) as error:
            raise WeightSyncError(f"receiver {rank} cannot reach the weight {self._sender}: {_first_line(error)}") from error

    def announced(self, version: int, wanted: Sequence[TensorSpec] | None = None) -> Update:
        """Waits for the sender's next update; `wanted` is what the model here is made of, in any order and dtype.

        Raises:
            WeightSyncError: the sender is late or dead, sends another version, or tensors that are not those of the model.
        """
        update = self.read(version)
        if wanted is not None and (found := difference(update.manifest, wanted)):
            self.refuse(version, f"weights version {version} from {self._sender}: {found}")
        self.begin()
        return update

    def read(self, version: int) -> Update:
        """The first half of `announced`: the sender waits for `begin` or `refuse`.

        Raises:
            WeightSyncError: the sender is late or dead, or sends another version.
        """
        if self._store is None:
            raise WeightSyncError(f"weights version {version}: receiver {self._rank} was closed by an earlier error; join again")
        number = self._updates + 1
        _await_key(self._store, f"update/{number}", self._timeout_s, f"weights version {version}: {self._sender} announced nothing")
        update = Update.decode(self._store.get(f"update/{number}").decode())
        if update.version != version:
            self.refuse(version, f"expected weights version {version}, {self._sender} sends version {update.version}")
        return update

    def begin(self) -> None:
        """Tells the sender to go on with what it announced."""
        self._store.set(f"begun/{self._updates + 1}/{self._rank}", "")

    def refuse(self, version: int, complaint: str) -> NoReturn:
        """Tells the sender what is wrong with what it announced, or with what others did.

        Raises:
            WeightSyncError: the complaint.
        """
        if self._store is not None:
            with suppress(RuntimeError):  # a sender that is gone need not be told
                self._answer(complaint, version)
                self.begin()
            self.close()
        raise WeightSyncError(f"receiver {self._rank}: {complaint}")

    def receive(self, update: Update) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the tensors of the update that was `announced`. Each is valid until the next one is asked for.

        If patched buckets turn out wrong, the tensors come once more from the first one on, and then all of them are right.

        Raises:
            WeightSyncError: a bucket is late, damaged or of another version, or the sender died.
        """
        done, version = False, update.version
        try:
            self.join(version)
            broken = yield from self._patched(update) if update.patched else self._whole(update)
            if update.patched and self._comes_again(broken, version):
                self._updates += 1
                yield from self._whole(self.announced(version))
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
        if self._flight is not None:
            self._flight.forget()
        if self._group is not None:
            self._group.abort()
        self._group = self._store = None

    def _whole(self, update: Update) -> Generator[tuple[str, torch.Tensor], None, None]:
        """While one bucket is verified and read, the next one arrives."""
        plan, slots = update.plan(), self._kept if update.keep else self._slots
        for bucket in plan[:1]:
            self._expect(update.version, bucket, slots[bucket])
        for bucket in plan:
            self._arrived(update.version)
            for following in plan[bucket.index + 1 : bucket.index + 2]:
                self._expect(update.version, following, slots[following])
            buckets.verify(slots[bucket], bucket, update.version, update.key, self._sender)
            for piece, tensor in buckets.views(slots[bucket], bucket):
                yield piece.spec.name, tensor

    def _patched(self, update: Update) -> Generator[tuple[str, torch.Tensor], None, str]:
        """Returns what is wrong; from there on buckets are taken off the wire and dropped."""
        broken = ""
        for bucket in update.plan():
            head = torch.empty(delta.HEADER_WORDS, dtype=torch.int64, device=self._device)
            self._expect(update.version, bucket, head)
            self._arrived(update.version)
            if (announced := delta.announced(head, bucket.payload_bytes)) is None:  # nobody knows how much comes: no resync on this group
                raise self._lost(update.version, bucket, RuntimeError(f"the head of a patch reads {head.tolist()}, which is damaged"))
            size, width = announced
            patch = torch.empty(size + buckets.TRAILER_BYTES, dtype=torch.uint8, device=self._device)
            self._expect(update.version, bucket, patch)
            self._arrived(update.version)
            kept = self._kept[bucket]
            if width:
                delta.apply(patch[:size], width, kept[: bucket.payload_bytes])
                kept[bucket.payload_bytes :] = patch[size:]
            else:
                kept.copy_(patch)
            if broken:
                continue
            try:
                buckets.verify(kept, bucket, update.version, update.key, self._sender)
            except WeightSyncError as error:
                broken = str(error)
                continue
            for piece, tensor in buckets.views(kept, bucket):
                yield piece.spec.name, tensor
        return broken

    def _comes_again(self, broken: str, version: int) -> bool:
        """Whether all receivers get everything again, because a patch came out wrong at one of them."""
        self._answer(_AGAIN + broken if broken else _RECEIVED, version)
        verdict = f"verdict/{self._updates + 1}"
        _await_key(self._store, verdict, self._timeout_s, f"weights version {version}: {self._sender} did not end the update")
        return self._store.get(verdict).decode() == _AGAIN

    def join(self, version: int) -> None:
        """Forms the group with the sender that has announced its first update, once; `receive` does it otherwise.

        Raises:
            WeightSyncError: the sender died, or is late.
        """
        if self._group is not None:
            return
        try:
            place = self._store.store, self._own_host, self._rank, self._world_size, self._device, self._timeout_s
            self._group = bounded(lambda: _group(*place), 2 * self._timeout_s)
        except RuntimeError as error:
            raise WeightSyncError(f"weights version {version}: no group with {self._sender}: {_first_line(error)}") from error

    def _expect(self, version: int, bucket: Bucket, buffer: torch.Tensor) -> None:
        try:
            self._flight = _Flight(self._group, bucket, buffer)
        except RuntimeError as error:
            raise self._lost(version, bucket, error) from error

    def _arrived(self, version: int) -> None:
        try:
            self._flight.wait(self._timeout_s, self._silence)
        except RuntimeError as error:
            raise self._lost(version, self._flight.bucket, error) from error

    def _lost(self, version: int, bucket: Bucket, error: RuntimeError) -> WeightSyncError:
        return WeightSyncError(
            f"weights version {version}, bucket {bucket.index} (first tensor {bucket.first_name}): {self._sender} is lost or later "
            f"than {self._timeout_s:g} s: {_first_line(error)}"
        )

    def _silence(self) -> str:
        """Nothing, as long as the sender's store answers; it raises when the sender is gone."""
        self._store.check(["update/1"])
        return ""

    def _answer(self, result: str, version: int) -> None:
        try:
            self._store.set(f"result/{self._updates + 1}/{self._rank}", result)
        except RuntimeError as error:
            if result == _RECEIVED:
                raise WeightSyncError(f"weights version {version}: {self._sender} is gone: {_first_line(error)}") from error


def report_loss(address: Address, reason: str, *, timeout_s: float = 5.0) -> None:
    """Tells the sender that listens at `address` and those beside it that a receiver died: they fail now instead of waiting.

    No sender there is no error.
    """
    with suppress(OSError, RuntimeError):
        store = _store_at(address, timeout_s)[0]
        store.set(_LOST, reason)
        for other in _others(store):
            _store_at(other, timeout_s)[0].set(_LOST, reason)


def _others(store: FarStore) -> list[Address]:
    return [Address(**words) for words in json.loads(store.get(_BESIDE))]


def _store_at(address: Address, timeout_s: float) -> tuple[FarStore, str]:
    """The sender's store, and the address of the interface here that leads to it. Where nobody listens that is told at once."""
    with socket.create_connection((address.host, address.port), timeout=timeout_s) as probe:
        own_host = probe.getsockname()[0]
    limit = timedelta(seconds=timeout_s)
    store = bounded(lambda: dist.TCPStore(address.host, address.port, is_master=False, timeout=limit), 2 * timeout_s)
    return FarStore(store, timeout_s), own_host


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


def _await_key(store: FarStore, key: str, timeout_s: float, complaint: str) -> None:
    try:
        store.wait([key])
    except RuntimeError as error:
        raise WeightSyncError(f"{complaint} within {timeout_s:g} s, or its connection broke: {_first_line(error)}") from error


def difference(manifest: Sequence[TensorSpec], wanted: Sequence[TensorSpec]) -> str:
    """The first thing in which an update is not the model, or nothing."""
    got, want = {spec.name: spec.shape for spec in manifest}, {spec.name: spec.shape for spec in wanted}
    for name, shape in got.items():
        if name not in want:
            return f"it holds {name}, which is unknown to the model here"
        if shape != want[name]:
            return f"{name} has shape {list(shape)}, the model here wants {list(want[name])}"
    missing = [name for name in want if name not in got]
    return f"it lacks {missing[0]} and {len(missing) - 1} more tensors of the model here" if missing else ""


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
