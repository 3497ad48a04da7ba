"""Buckets: how the tensors of a weight update lie in flat byte buffers, and how damage is found. Knows no network and no model.

A bucket is a payload of tensors, each at a multiple of 64 bytes, and a trailer of 32 bytes: version (int64), bucket index
(int64), and a 128-bit tag of all three. The tag is AES-GMAC (NIST SP 800-38D) under a key that the sender draws for each
update: a universal hash, so any change of bytes, their order included, goes unnoticed once in about 2^100 times. With the
processor's own AES it runs at 10 GB/s and more on one core, where cryptographic hashes run at 1 to 5.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from megatron_opd.errors import WeightSyncError
from megatron_opd.types import TensorSpec

ALIGNMENT = 64
TRAILER_BYTES = 32
KEY_BYTES = 16
_STRIDE = 1 << 18  # bytes that are hashed at a time: they fit a core's cache, and other threads get their turn in between


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


def seal(buffer: torch.Tensor, bucket: Bucket, version: int, key: bytes) -> None:
    """Writes the trailer behind the payload."""
    buffer[bucket.payload_bytes :] = _trailer(buffer, bucket, version, key).to(buffer.device)


def verify(buffer: torch.Tensor, bucket: Bucket, version: int, key: bytes, sender: str) -> None:
    """Recomputes the trailer.

    Raises:
        WeightSyncError: with version, bucket, first tensor, sender, and what differs.
    """
    got = buffer[bucket.payload_bytes :].cpu()
    if torch.equal(got, _trailer(buffer, bucket, version, key)):
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


def _trailer(buffer: torch.Tensor, bucket: Bucket, version: int, key: bytes) -> torch.Tensor:
    """The nonce is version and index, so a key may serve for all buckets of one update."""
    header = torch.tensor([version, bucket.index], dtype=torch.int64).view(torch.uint8)
    nonce = version.to_bytes(8, "little", signed=True) + bucket.index.to_bytes(4, "little")
    mac = Cipher(algorithms.AES(key), modes.GCM(nonce)).encryptor()
    payload = memoryview(buffer[: bucket.payload_bytes].cpu().numpy())
    for start in range(0, len(payload), _STRIDE):
        mac.authenticate_additional_data(payload[start : start + _STRIDE])
    mac.finalize()
    return torch.cat([header, torch.frombuffer(bytearray(mac.tag), dtype=torch.uint8)])
