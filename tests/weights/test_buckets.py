"""Buckets hold every byte where the manifest says, and any damage is found and named."""

import pytest
import torch

from megatron_opd.errors import WeightSyncError
from megatron_opd.types import TensorSpec
from megatron_opd.weights import buckets

KEY = bytes(range(16))
MANIFEST = (
    TensorSpec(name="embed", dtype="float32", shape=(7, 5)),
    TensorSpec(name="norm", dtype="bfloat16", shape=(3,)),
    TensorSpec(name="huge", dtype="float32", shape=(100, 3)),
    TensorSpec(name="scalar", dtype="float64", shape=()),
    TensorSpec(name="empty", dtype="float32", shape=(0, 4)),
    TensorSpec(name="head", dtype="uint8", shape=(65,)),
)


def tensors():
    torch.manual_seed(0)
    return {s.name: (torch.randn(s.shape) * 50).to(getattr(torch, s.dtype)) for s in MANIFEST}


def packed(bucket, values, version=3):
    buffer = torch.zeros(bucket.size, dtype=torch.uint8)
    for piece, view in buckets.views(buffer, bucket):
        view.copy_(values[piece.spec.name])
    buckets.seal(buffer, bucket, version, KEY)
    return buffer


@pytest.mark.parametrize("bucket_bytes", [1, 64, 300, 1 << 20])
def test_every_tensor_comes_out_bitwise_and_in_order(bucket_bytes):
    values, seen = tensors(), []
    for bucket in buckets.plan(MANIFEST, bucket_bytes):
        buffer = packed(bucket, values)
        buckets.verify(buffer, bucket, 3, KEY, "sender")
        for piece, view in buckets.views(buffer, bucket):
            assert piece.offset % buckets.ALIGNMENT == 0
            assert torch.equal(view, values[piece.spec.name])
            seen.append(piece.spec)
    assert tuple(seen) == MANIFEST


def test_a_bucket_is_larger_than_asked_only_for_one_large_tensor():
    plan = buckets.plan(MANIFEST, 300)
    assert [b.index for b in plan] == list(range(len(plan)))
    assert all(b.payload_bytes <= 320 or len(b.pieces) == 1 for b in plan)
    assert [p.spec.name for b in plan if len(b.pieces) == 1 for p in b.pieces] == ["huge"]


def test_nothing_to_send_needs_no_bucket():
    assert buckets.plan((), 64) == ()


@pytest.mark.parametrize("where", [0, 139, -1, -32, -24])
def test_any_flipped_bit_is_found_and_named(where):
    bucket = buckets.plan(MANIFEST, 256)[0]
    buffer = packed(bucket, tensors())
    buffer[where] ^= 16
    with pytest.raises(WeightSyncError, match=r"version 3, bucket 0 \(first tensor embed\) from sender: "):
        buckets.verify(buffer, bucket, 3, KEY, "sender")


def test_exchanged_words_and_another_key_are_found():
    bucket = buckets.plan(MANIFEST, 256)[0]
    buffer = packed(bucket, tensors())
    swapped = buffer.clone()
    swapped[0:16], swapped[16:32] = buffer[16:32], buffer[0:16]
    for damaged, key in ((swapped, KEY), (buffer, KEY[::-1])):
        with pytest.raises(WeightSyncError, match="payload and digest"):
            buckets.verify(damaged, bucket, 3, key, "sender")


def test_the_error_says_what_differs():
    first, second = buckets.plan(MANIFEST, 256)[:2]
    values = tensors()
    with pytest.raises(WeightSyncError, match=r"version is 4, expected 3$"):
        buckets.verify(packed(first, values, version=4), first, 3, KEY, "s")
    wrong = packed(second, values)[-buckets.TRAILER_BYTES :]
    buffer = packed(first, values)
    buffer[-buckets.TRAILER_BYTES :] = wrong
    with pytest.raises(WeightSyncError, match=r"bucket index is 1, expected 0$"):
        buckets.verify(buffer, first, 3, KEY, "s")
    buffer = packed(first, values)
    buffer[4] ^= 1
    with pytest.raises(WeightSyncError, match=r"bytes changed on the way$"):
        buckets.verify(buffer, first, 3, KEY, "s")


def test_an_unknown_dtype_is_named():
    with pytest.raises(WeightSyncError, match="tensor x has dtype 'manual_seed'"):
        buckets.plan((TensorSpec(name="x", dtype="manual_seed", shape=(1,)),), 64)
