"""Buckets: how the tensors of a weight update lie in flat byte buffers, and how damage is found. Knows no network and no model.

A bucket is a payload of tensors, each at a multiple of 64 bytes, and a trailer of 32 bytes: version (int64), bucket index
(int64), and the 128-bit BLAKE2b digest of payload, version and index. BLAKE2b is in the standard library, runs at about
1 GB/s per core without holding the interpreter lock, and a faster hash would be one more dependency.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_opd.errors import WeightSyncError
from megatron_opd.types import TensorSpec

ALIGNMENT = 64
TRAILER_BYTES = 32
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Where one tensor lies in its bucket."""

    spec: TensorSpec
    offset: int  # bytes, a multiple of ALIGNMENT
    size: int  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """One flat uint8 buffer on the wire."""

    index: int
    pieces: tuple[Piece, ...]
    payload_bytes: int  # a multiple of ALIGNMENT

    @property
    def size(self) -> int:
        """Bytes on the wire, trailer included."""
        return self.payload_bytes + TRAILER_BYTES

    @property
    def first_name(self) -> str:
        """What errors call this bucket by."""
        return self.pieces[0].spec.name


def dtype_of(spec: TensorSpec) -> torch.dtype:
    """The torch type that `spec.dtype` names.

    Raises:
        WeightSyncError: torch has no such type.
    """
    dtype = getattr(torch, spec.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise WeightSyncError(
            f"tensor {spec.name} has dtype {spec.dtype!r}, which torch does not know; use its short name, e.g. 'bfloat16'"
        )
    return dtype


def plan(manifest: Sequence[TensorSpec], bucket_bytes: int) -> tuple[Bucket, ...]:
    """Fills buckets in the order of the manifest up to `bucket_bytes` of payload; a larger tensor gets a bucket of its own."""
    buckets: list[Bucket] = []
    pieces: list[Piece] = []
    end = 0
    for spec in manifest:
        size = math.prod(spec.shape) * dtype_of(spec).itemsize
        if pieces and end + size > bucket_bytes:
            buckets.append(Bucket(index=len(buckets), pieces=tuple(pieces), payload_bytes=end))
            pieces, end = [], 0
        pieces.append(Piece(spec=spec, offset=end, size=size))
        end += -(-size // ALIGNMENT) * ALIGNMENT
    if pieces:
        buckets.append(Bucket(index=len(buckets), pieces=tuple(pieces), payload_bytes=end))
    return tuple(buckets)


def views(buffer: torch.Tensor, bucket: Bucket) -> Iterator[tuple[Piece, torch.Tensor]]:
    """Each piece with its tensor: a view of `buffer` ([bucket.size] uint8), for reading and for writing."""
    for piece in bucket.pieces:
        flat = buffer[piece.offset : piece.offset + piece.size]
        yield piece, flat.view(dtype_of(piece.spec)).view(piece.spec.shape)


def seal(buffer: torch.Tensor, bucket: Bucket, version: int) -> None:
    """Writes the trailer behind the payload."""
    buffer[bucket.payload_bytes :] = _trailer(buffer, bucket, version).to(buffer.device)


def verify(buffer: torch.Tensor, bucket: Bucket, version: int, sender: str) -> None:
    """Recomputes the trailer.

    Raises:
        WeightSyncError: with version, bucket, first tensor, sender, and what differs.
    """
    got = buffer[bucket.payload_bytes :].cpu()
    if torch.equal(got, _trailer(buffer, bucket, version)):
        return
    got_version, got_index = got[:16].clone().view(torch.int64).tolist()
    differences = [
        f"{what} is {found}, expected {wanted}"
        for what, found, wanted in (("version", got_version, version), ("bucket index", got_index, bucket.index))
        if found != wanted
    ]
    raise WeightSyncError(
        f"weights version {version}, bucket {bucket.index} (first tensor {bucket.first_name}) from {sender}: "
        + ("; ".join(differences) or "payload and digest do not belong together, bytes changed on the way")
    )


def _trailer(buffer: torch.Tensor, bucket: Bucket, version: int) -> torch.Tensor:
    header = torch.tensor([version, bucket.index], dtype=torch.int64).view(torch.uint8)
    digest = hashlib.blake2b(buffer[: bucket.payload_bytes].cpu().numpy(), digest_size=_DIGEST_BYTES)
    digest.update(header.numpy())
    return torch.cat([header, torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)])
