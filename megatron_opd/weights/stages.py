"""Updates that come in parts, one from each pipeline stage of the learner, all at the same time. Knows no model and no network."""

from collections.abc import Generator, Sequence
from contextlib import suppress

import torch

from megatron_opd.errors import WeightSyncError
from megatron_opd.types import Address, TensorSpec
from megatron_opd.weights.transport import BroadcastReceiver, Update, difference

Stream = Generator[tuple[str, torch.Tensor], None, None]


class StagedReceiver:
    """A receiver at each stage's sender, as if they were one: an update is whole when all parts are, and fails when one does."""

    def __init__(self, *, address: Address, rank: int, world_size: int, device: str, timeout_s: float) -> None:
        """Joins the first sender's rendezvous, and those that it names; see `BroadcastReceiver`.

        Raises:
            WeightSyncError: nobody listens there.
        """
        settings = {"rank": rank, "world_size": world_size, "device": device, "timeout_s": timeout_s}
        self._parts = [BroadcastReceiver(address=address, **settings)]
        beside = f" and {len(self._parts[0].others)} beside it" if self._parts[0].others else ""
        self._sender = f"sender {address.host}:{address.port}{beside}"
        try:
            for other in self._parts[0].others:
                self._parts.append(BroadcastReceiver(address=other, **settings))
        except WeightSyncError:
            self.close()
            raise

    def announced(self, version: int, wanted: Sequence[TensorSpec] | None = None) -> tuple[Update, ...]:
        """Waits until every sender has announced its part; `wanted` is what the model here is made of, in any order and dtype.

        Raises:
            WeightSyncError: a sender is late or dead, sends another version, or together they send what is not the model.
        """
        try:
            updates = tuple(part.read(version) for part in self._parts)
            manifest = [spec for update in updates for spec in update.manifest]
            if wanted is not None and (found := difference(manifest, wanted)):
                raise WeightSyncError(f"weights version {version} from {self._sender}: {found}")
            for part in self._parts:
                part.begin()
        except WeightSyncError as error:
            self._refuse(version, str(error))
            raise
        return updates

    def receive(self, updates: Sequence[Update]) -> Stream:
        """The tensors of all parts in turn, so that all travel at once. Each is valid until the next one is asked for.

        Raises:
            WeightSyncError: a part failed; the others are given up.
        """
        streams = [part.receive(update) for part, update in zip(self._parts, updates, strict=True)]
        try:
            for part, update in zip(self._parts, updates, strict=True):
                part.join(update.version)  # before any bucket: who has joined notices at once when another part fails
            yield from _in_turn(streams)
        except (WeightSyncError, GeneratorExit) as error:
            self._refuse(updates[0].version, str(error) or "the receiver gave the update up")
            raise
        finally:
            for stream in streams:
                stream.close()

    def close(self) -> None:
        """Drops all groups and stores; senders that still send fail at once."""
        for part in self._parts:
            part.close()

    def _refuse(self, version: int, reason: str) -> None:
        """Tells all senders, and leaves them."""
        for part in self._parts:
            with suppress(WeightSyncError):
                part.refuse(version, reason)


def _in_turn(streams: Sequence[Stream]) -> Stream:
    """One of each, again and again; receivers that take the same parts in the same order never wait for one another in a circle."""
    open_ = list(streams)
    while open_:
        for stream in list(open_):
            item = next(stream, None)
            if item is None:
                open_.remove(stream)
            else:
                yield item
