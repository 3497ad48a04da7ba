"""The ranks of one role as a group: bytes from the first rank to all, and from all to the first. No pickle."""

from datetime import timedelta
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist

from megatron_opd.runtime import wire
from megatron_opd.runtime.rendezvous import listening_store
from megatron_opd.runtime.rpc import await_address, publish_address
from megatron_opd.types import Address, TensorSpec

_IDLE = timedelta(days=30)  # a rank may wait this long for work; a dead peer closes its sockets and is seen at once


class Ranks:
    """The default process group of a role (gloo or nccl) and a gloo group beside it for control messages."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._control = dist.new_group(backend="gloo", timeout=_IDLE)

    @classmethod
    def connect(cls, *, file: Path, rank: int, world_size: int, host: str, device: str, timeout_s: float) -> Self:
        """Makes the default group; the first rank listens on a free port and writes where to `file`."""
        timeout = timedelta(seconds=timeout_s)
        if rank == 0:
            store = listening_store(host, timeout_s)
            publish_address(file, Address(host=host, port=store.port))
        else:
            address = await_address(file, timeout_s)
            store = dist.TCPStore(address.host, address.port, world_size, is_master=False, timeout=timeout)
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        return cls()

    def broadcast(self, data: bytes | None) -> bytes:
        """The first rank's bytes, on every rank."""
        if self.world_size == 1:
            assert data is not None, "the first rank has the data"
            return data
        size = torch.tensor([len(data) if data is not None else 0])
        dist.broadcast(size, src=0, group=self._control)
        buffer = torch.empty(int(size), dtype=torch.uint8)
        if data:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if int(size):
            dist.broadcast(buffer, src=0, group=self._control)
        return buffer.numpy().tobytes()

    def share(self, message: object | None) -> object:
        """The first rank's message, on every rank; the others give None."""
        if self.world_size == 1:
            return message
        frame = None
        if message is not None:
            name, body = wire.encode(message)
            frame = len(name).to_bytes(1, "big") + name + body
        frame = self.broadcast(frame)
        end = 1 + frame[0]
        return wire.decode(frame[1:end], frame[end:])

    def broadcast_tensor(self, tensor: torch.Tensor | None, spec: TensorSpec) -> torch.Tensor:
        """The first rank's tensor, on every rank, on the device of the default group."""
        if self.world_size == 1:
            assert tensor is not None, "the first rank has the tensor"
            return tensor
        if tensor is None:
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            tensor = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device)
        tensor = tensor.contiguous()
        dist.broadcast(tensor, src=0)
        return tensor

    def gather(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, on every rank, in order of rank."""
        if self.world_size == 1:
            return [data]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(data)]), group=self._control)
        longest = max(int(size) for size in sizes)
        mine = torch.zeros(longest, dtype=torch.uint8)
        mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else mine[:0]
        buffers = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(buffers, mine, group=self._control)
        return [buffer[: int(size)].numpy().tobytes() for buffer, size in zip(buffers, sizes, strict=True)]

    def close(self) -> None:
        """Leaves the groups."""
        dist.destroy_process_group()
