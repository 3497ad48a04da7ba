"""Weights arrive bitwise at every receiver, and nobody waits longer than the timeout for a peer that fails."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron_opd.errors import WeightSyncError
from megatron_opd.types import Address, TensorSpec
from megatron_opd.weights import transport
from megatron_opd.weights.transport import BroadcastReceiver, BroadcastSender, report_loss

TIMEOUT_S = 2.0
MANIFEST = tuple(
    TensorSpec(name=f"w{i}", dtype=dtype, shape=(64, 8)) for i, dtype in enumerate(["float32", "bfloat16", "float32", "float32"])
)


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    return [(s.name, torch.randn(s.shape, generator=generator).to(getattr(torch, s.dtype))) for s in MANIFEST]


def sender(bucket_bytes=2048, delta=False):
    return BroadcastSender(host="127.0.0.1", device="cpu", bucket_bytes=bucket_bytes, timeout_s=TIMEOUT_S, delta=delta)


def receiver(address, rank=1, world_size=2):
    return BroadcastReceiver(address=address, rank=rank, world_size=world_size, device="cpu", timeout_s=TIMEOUT_S)


def receive(end, *versions):
    """Copies, since the next bucket may overwrite what came before."""
    return [[(name, tensor.clone()) for name, tensor in end.receive(end.announced(version))] for version in versions]


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


class Dropped:
    """A bucket that never left."""

    def wait(self, timeout_s, complaint):
        return None


def failing(pool, monkeypatch, damage):
    """Both ends' errors when the second bucket goes through `damage(buffer)` behind its digest; None drops it."""
    real, sent = transport._Flight, []

    def faulty(group, bucket, buffer):
        if group.rank() == 0:
            sent.append(1)
            if len(sent) == 2:
                if damage is None:
                    return Dropped()
                damage(buffer)
        return real(group, bucket, buffer)

    monkeypatch.setattr(transport, "_Flight", faulty)
    patient, start = 60, time.monotonic()
    source = BroadcastSender(host="127.0.0.1", device="cpu", bucket_bytes=2048, timeout_s=patient)
    end = BroadcastReceiver(address=source.listen(1), rank=1, world_size=2, device="cpu", timeout_s=patient)
    future = pool.submit(receive, end, 7)
    with pytest.raises(WeightSyncError) as at_sender:
        source.send(7, MANIFEST, weights(7))
    with pytest.raises(WeightSyncError) as at_receiver:
        future.result(2 * TIMEOUT_S)
    assert time.monotonic() - start < 5, "both ends know long before their time is over"
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


FROZEN = """
import sys, time
import torch
from megatron_opd.types import TensorSpec
from megatron_opd.weights.transport import BroadcastSender

def slow():
    yield "a", torch.ones(1024)
    yield "b", torch.ones(1024)
    print("on the way", flush=True)
    time.sleep(600)

sender = BroadcastSender(host="127.0.0.1", device="cpu", bucket_bytes=4096, timeout_s=600)
print(sender.listen(1).port, flush=True)
if sys.argv[1] == "amid":
    sender.send(1, [TensorSpec(name=name, dtype="float32", shape=(1024,)) for name in "abc"], slow())
time.sleep(600)
"""


@pytest.mark.engines
@pytest.mark.parametrize(("when", "message"), [("before", "announced nothing within 2 s"), ("amid", r"bucket 2 \(first tensor c\)")])
def test_a_sender_that_is_frozen_is_named_too(when, message):
    """Its connections stand, and nothing answers: torch's own waits have no limit then."""
    with subprocess.Popen([sys.executable, "-c", FROZEN, when], stdout=subprocess.PIPE, text=True) as sender:
        try:
            end = receiver(Address(host="127.0.0.1", port=int(sender.stdout.readline())))
            if when == "amid":
                tensors = end.receive(end.announced(1))
                assert [next(tensors)[0] for _ in range(2)] == ["a", "b"]
                assert "on the way" in sender.stdout.readline()
            sender.send_signal(signal.SIGSTOP)
            start = time.monotonic()
            with pytest.raises(WeightSyncError, match=rf"version 1.*{message}"):
                next(tensors) if when == "amid" else end.announced(1)
            assert time.monotonic() - start < 15
        finally:
            sender.kill()


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


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (MANIFEST[:-1], "holds w3, which is unknown to the model here"),
        ((*MANIFEST, TensorSpec(name="more", dtype="float32", shape=(1,))), "lacks more"),
        (
            (*MANIFEST[:-1], TensorSpec(name="w3", dtype="float32", shape=(8, 64))),
            r"w3 has shape \[64, 8\], the model here wants \[8, 64\]",
        ),
    ],
)
def test_an_update_that_is_not_the_receivers_model_is_refused_before_any_bucket(pool, wanted, message):
    source = BroadcastSender(host="127.0.0.1", device="cpu", bucket_bytes=2048, timeout_s=60)
    end = receiver(source.listen(1))
    future = pool.submit(lambda: end.announced(3, wanted))
    start = time.monotonic()
    with pytest.raises(WeightSyncError, match=f"rollout worker 1 .*version 3 .*{message}"):
        source.send(3, MANIFEST, weights(3))
    with pytest.raises(WeightSyncError, match=message):
        future.result(TIMEOUT_S)
    assert time.monotonic() - start < 5, "the sender hears of it at once, not when its time is over"


def moved(tensors, share, seed):
    """The tensors with a share of their numbers replaced."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors:
        chosen = torch.rand(tensor.shape, generator=generator) < share
        yield name, torch.where(chosen, torch.randn(tensor.shape, generator=generator).to(tensor.dtype), tensor)


def series(share=0.02):
    """Three versions, each a little different from the one before, and a fourth that has nothing to do with them."""
    versions = [weights(0)]
    for seed in (1, 2):
        versions.append(list(moved(versions[-1], share, seed)))
    return [*versions, weights(9)]


def assert_same(update, wanted):
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(update, wanted, strict=True))


@pytest.mark.parametrize("bucket_bytes", [1, 4096])
def test_changes_alone_make_the_same_weights(pool, bucket_bytes):
    source, versions = sender(bucket_bytes, delta=True), series()
    address = source.listen(2)
    ends = [receiver(address, rank, 3) for rank in (1, 2)]
    waiting = [pool.submit(receive, end, *range(4)) for end in ends]
    sizes = []
    for version, tensors in enumerate(versions):
        source.send(version, MANIFEST, tensors)
        sizes.append(source.sent_bytes)
    for future in waiting:
        for update, wanted in zip(future.result(TIMEOUT_S), versions, strict=True):
            assert_same(update, wanted)
    assert max(sizes[1:3]) < 0.25 * sizes[0] and sizes[0] <= sizes[3] < 1.1 * sizes[0]


@pytest.mark.parametrize("number", [2, 4, 6, 8])
def test_a_damaged_patch_brings_everything_again_by_itself(pool, monkeypatch, number):
    real, sent = transport._Flight, []

    def faulty(group, bucket, buffer):
        if group.rank() == 0:
            sent.append(buffer)
            if len(sent) == 4 + number:  # each of the four buckets travels whole first, then a head and a patch for each
                buffer[0] ^= 0xFF
        return real(group, bucket, buffer)

    monkeypatch.setattr(transport, "_Flight", faulty)
    source, versions = sender(delta=True), series()
    future = pool.submit(receive, receiver(source.listen(1)), 0, 1, 2)
    for version in range(3):
        source.send(version, MANIFEST, versions[version])
    first, second, third = future.result(TIMEOUT_S)
    assert_same(first, versions[0])
    assert_same(second[-len(MANIFEST) :], versions[1])
    assert_same(second[: -len(MANIFEST)], versions[1][: number // 2 - 1])
    assert_same(third, versions[2])


@pytest.mark.parametrize(("number", "word"), [(1, 0), (3, 1), (7, 0)])
def test_a_damaged_head_of_a_patch_ends_the_update_by_name(pool, monkeypatch, number, word):
    """How many bytes come behind it is not known any more."""
    real, sent = transport._Flight, []

    def faulty(group, bucket, buffer):
        if group.rank() == 0:
            sent.append(buffer)
            if len(sent) == 4 + number:
                buffer[word] ^= 4
        return real(group, bucket, buffer)

    monkeypatch.setattr(transport, "_Flight", faulty)
    source, versions = sender(delta=True), series()
    future = pool.submit(receive, receiver(source.listen(1)), 0, 1)
    source.send(0, MANIFEST, versions[0])
    told = rf"version 1, bucket {number // 2} .*the head of a patch reads .*damaged"
    with pytest.raises(WeightSyncError, match=told):
        source.send(1, MANIFEST, versions[1])
    with pytest.raises(WeightSyncError, match=told):
        future.result(TIMEOUT_S)


def test_a_patch_that_is_damaged_at_one_of_two_receivers_brings_everything_again_to_both(pool, monkeypatch):
    real, applied = transport.delta.apply, []

    def faulty(patch, width, old):
        applied.append(1)
        real(patch, width, old)
        if len(applied) == 1:
            old[0] ^= 0xFF

    monkeypatch.setattr(transport.delta, "apply", faulty)
    source, versions = sender(delta=True), series()
    address = source.listen(2)
    waiting = [pool.submit(receive, receiver(address, rank, 3), 0, 1, 2) for rank in (1, 2)]
    for version in range(3):
        source.send(version, MANIFEST, versions[version])
    for future in waiting:
        for update, wanted in zip(future.result(TIMEOUT_S), versions):
            assert_same(update[-len(MANIFEST) :], wanted)


def _send_and_die(connection):
    source = sender()
    address = source.listen(1)
    connection.send((address.host, address.port))

    def tensors():
        yield from weights(0)[:2]
        os._exit(1)

    source.send(0, MANIFEST, tensors())


def _receive_and_die(host, port):
    end = receiver(Address(host=host, port=port))
    for _ in end.receive(end.announced(0)):
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


@pytest.mark.parametrize("reached", ["nothing", "joined", "everything"])
def test_a_sender_that_is_told_of_a_loss_does_not_wait_for_the_lost(pool, reached):
    """Whatever the receiver had reached when it stopped to answer, its connection still stands."""
    source = BroadcastSender(host="127.0.0.1", device="cpu", bucket_bytes=2048, timeout_s=60)
    address = source.listen(1)
    end = None if reached == "nothing" else receiver(address)
    sending = pool.submit(source.send, 0, MANIFEST, weights(0))
    if reached == "everything":
        taken = end.receive(end.announced(0))
        for _ in MANIFEST:
            next(taken)  # the last bucket is verified; that this went well is never said
    time.sleep(0.1)
    start = time.monotonic()
    report_loss(address, "rollout 0 is gone")
    with pytest.raises(WeightSyncError, match=r"version 0.*rollout 0 is gone"):
        sending.result(10)
    assert time.monotonic() - start < TIMEOUT_S


def test_a_loss_may_be_told_to_nobody():
    source = sender()
    address = source.listen(1)
    source.close()
    report_loss(address, "rollout 0 is gone", timeout_s=0.5)
