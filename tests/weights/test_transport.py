"""Weights arrive bitwise at every receiver, and nobody waits longer than the timeout for a peer that fails."""

import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron_opd.errors import WeightSyncError
from megatron_opd.types import Address, TensorSpec
from megatron_opd.weights import transport
from megatron_opd.weights.transport import BroadcastReceiver, BroadcastSender

TIMEOUT_S = 2.0
MANIFEST = tuple(
    TensorSpec(name=f"w{i}", dtype=dtype, shape=(64, 8)) for i, dtype in enumerate(["float32", "bfloat16", "float32", "float32"])
)


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    return [(s.name, torch.randn(s.shape, generator=generator).to(getattr(torch, s.dtype))) for s in MANIFEST]


def sender(bucket_bytes=2048):
    return BroadcastSender(host="127.0.0.1", device="cpu", bucket_bytes=bucket_bytes, timeout_s=TIMEOUT_S)


def receiver(address, rank=1, world_size=2):
    return BroadcastReceiver(address=address, rank=rank, world_size=world_size, device="cpu", timeout_s=TIMEOUT_S)


def receive(end, *versions):
    return [list(end.receive(version, end.announced(version))) for version in versions]


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as threads:
        yield threads


@pytest.fixture(autouse=True)
def bounded():
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 4 * TIMEOUT_S + 8


@pytest.mark.parametrize("receivers", [1, 2])
@pytest.mark.parametrize("bucket_bytes", [1, 4096, 1 << 20])
def test_two_updates_arrive_bitwise_at_every_receiver(pool, receivers, bucket_bytes):
    source = sender(bucket_bytes)
    address = source.listen(receivers)
    ends = [receiver(address, rank, receivers + 1) for rank in range(1, receivers + 1)]
    waiting = [pool.submit(receive, end, 5, 6) for end in ends]
    for version in (5, 6):
        seconds = source.send(version, MANIFEST, weights(version))
        assert set(seconds) == {"gather", "digest", "broadcast", "acknowledge"}
    for future in waiting:
        for version, update in zip((5, 6), future.result(TIMEOUT_S)):
            assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(update, weights(version), strict=True))
    for end in [source, *ends]:
        end.close()


def test_kept_tensors_survive_the_next_update(pool):
    source = sender()
    future = pool.submit(receive, receiver(source.listen(1)), 0, 1)
    source.send(0, MANIFEST, weights(0))
    source.send(1, MANIFEST, weights(1))
    first, second = future.result(TIMEOUT_S)
    assert torch.equal(first[0][1], weights(0)[0][1]) and not torch.equal(first[0][1], second[0][1])


def failing(pool, monkeypatch, damage):
    """Both ends' errors when the second bucket goes through `damage(buffer)` behind its digest; None drops it."""
    real, sent = transport._broadcast, []

    def faulty(group, buffer, timeout_s):
        sending = group.rank() == 0
        if sending:
            sent.append(1)
        if sending and len(sent) == 2:
            if damage is None:
                return
            damage(buffer)
        real(group, buffer, timeout_s)

    monkeypatch.setattr(transport, "_broadcast", faulty)
    source = sender()
    future = pool.submit(receive, receiver(source.listen(1)), 7)
    with pytest.raises(WeightSyncError) as at_sender:
        source.send(7, MANIFEST, weights(7))
    with pytest.raises(WeightSyncError) as at_receiver:
        future.result(2 * TIMEOUT_S)
    return str(at_sender.value), str(at_receiver.value)


def test_a_flipped_byte_is_detected_at_the_receiver_and_told_to_the_sender(pool, monkeypatch):
    def flip(buffer):
        buffer[100] ^= 1

    at_sender, at_receiver = failing(pool, monkeypatch, flip)
    assert "version 7, bucket 1" in at_receiver and "first tensor w1" in at_receiver and "bytes changed" in at_receiver
    assert "rollout worker 1" in at_sender and ("bytes changed" in at_sender or "lost" in at_sender)


def test_a_dropped_bucket_is_detected(pool, monkeypatch):
    same = tuple(TensorSpec(name=f"w{i}", dtype="float32", shape=(64, 8)) for i in range(4))
    monkeypatch.setitem(globals(), "MANIFEST", same)
    at_sender, at_receiver = failing(pool, monkeypatch, None)
    assert "bucket index is 2, expected 1" in at_receiver
    assert "version 7" in at_sender


def test_a_wrong_version_is_detected_before_any_bucket(pool):
    source = sender()
    future = pool.submit(receive, receiver(source.listen(1)), 8)
    with pytest.raises(WeightSyncError, match="version 7"):
        source.send(7, MANIFEST, weights(7))
    with pytest.raises(WeightSyncError, match=r"expected weights version 8, sender 127.0.0.1:[0-9]+ sends version 7"):
        future.result(TIMEOUT_S)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda: weights(0)[:-1], "w3 of the manifest never came"),
        (lambda: [*weights(0), ("extra", torch.zeros(1))], "extra is not in the manifest"),
        (lambda: weights(0)[::-1], "got tensor w3 .* the manifest says w0"),
    ],
)
def test_tensors_that_differ_from_the_manifest_fail_both_ends(pool, tensors, message):
    source = sender()
    future = pool.submit(receive, receiver(source.listen(1)), 0)
    with pytest.raises(WeightSyncError, match=message):
        source.send(0, MANIFEST, tensors())
    if "extra" not in message:
        with pytest.raises(WeightSyncError):
            future.result(2 * TIMEOUT_S)


def test_a_missing_receiver_is_named():
    source = sender()
    receiver(source.listen(2), 1, 3)
    with pytest.raises(WeightSyncError, match="version 1: receiver 2 of 2 did not join within 2 s"):
        source.send(1, MANIFEST, weights(1))


def test_a_silent_sender_is_named():
    source = sender()
    end = receiver(source.listen(1))
    with pytest.raises(WeightSyncError, match=r"version 1: sender 127.0.0.1:[0-9]+ announced nothing within 2 s"):
        receive(end, 1)


def test_nobody_at_the_address_is_an_error():
    with pytest.raises(WeightSyncError, match=r"receiver 1 cannot reach the weight sender 127.0.0.1:1"):
        receiver(Address(host="127.0.0.1", port=1))


def test_a_closed_end_says_so(pool):
    source = sender()
    end = receiver(source.listen(1))
    end.close()
    source.close()
    with pytest.raises(WeightSyncError, match="join again"):
        receive(end, 1)
    with pytest.raises(WeightSyncError, match="call listen"):
        source.send(1, MANIFEST, weights(1))


def _send_and_die(connection):
    source = sender()
    address = source.listen(1)
    connection.send((address.host, address.port))

    def tensors():
        yield from weights(0)[:2]
        os._exit(1)

    source.send(0, MANIFEST, tensors())


def _receive_and_die(host, port):
    for _ in receiver(Address(host=host, port=port)).receive(0, MANIFEST):
        os._exit(1)


def test_a_sender_that_dies_between_buckets_is_noticed():
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send_and_die, args=(theirs,), daemon=True)
    process.start()
    assert ours.poll(60)
    host, port = ours.recv()
    start = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"version 0, bucket [12] .first tensor w[12].: sender .* is lost"):
        receive(receiver(Address(host=host, port=port)), 0)
    assert time.monotonic() - start < 2 * TIMEOUT_S
    process.join(10)


def test_a_receiver_that_dies_between_buckets_is_noticed(monkeypatch):
    source = BroadcastSender(host="127.0.0.1", device="cpu", bucket_bytes=2048, timeout_s=20)
    address = source.listen(1)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_receive_and_die, args=(address.host, address.port), daemon=True)
    process.start()

    def slowly():
        for item in weights(0):
            yield item
            time.sleep(0.3)

    start = time.monotonic()
    with pytest.raises(WeightSyncError, match="version 0"):
        source.send(0, MANIFEST, slowly())
    assert time.monotonic() - start < 20
    process.join(10)
