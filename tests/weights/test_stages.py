"""Parts of one update from several senders at once: whole at every receiver, or refused and given up everywhere."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron_opd.errors import WeightSyncError
from megatron_opd.types import TensorSpec
from megatron_opd.weights import transport
from megatron_opd.weights.stages import StagedReceiver
from megatron_opd.weights.transport import BroadcastSender, report_loss

TIMEOUT_S = 20.0
SOON_S = 5.0  # long before that time is over
PARTS = [[(64, 8)] * 5, [(7, 3)] * 2, [(300, 9), (1,)]]  # shapes of what each stage holds
MANIFESTS = [
    tuple(TensorSpec(name=f"stage{stage}.w{number}", dtype="bfloat16", shape=shape) for number, shape in enumerate(shapes))
    for stage, shapes in enumerate(PARTS)
]
WHOLE = [spec for manifest in MANIFESTS for spec in manifest]


def weights(stage, version):
    generator = torch.Generator().manual_seed(100 * stage + version)
    return [(spec.name, torch.randn(spec.shape, generator=generator).bfloat16()) for spec in MANIFESTS[stage]]


def senders(receivers, delta=False):
    """One for each stage, and the address that receivers get."""
    found = [BroadcastSender(host="127.0.0.1", device="cpu", bucket_bytes=2048, timeout_s=TIMEOUT_S, delta=delta) for _ in PARTS]
    first, *others = (one.listen(receivers) for one in found)
    found[0].name_others(others)
    return found, first


def receiver(address, rank=1, world_size=2):
    return StagedReceiver(address=address, rank=rank, world_size=world_size, device="cpu", timeout_s=TIMEOUT_S)


def receive(end, *versions, wanted=WHOLE):
    return [{name: tensor.clone() for name, tensor in end.receive(end.announced(version, wanted))} for version in versions]


def send(pool, sources, version, weights=weights):
    return [pool.submit(one.send, version, MANIFESTS[stage], weights(stage, version)) for stage, one in enumerate(sources)]


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as threads:
        yield threads


@pytest.fixture(autouse=True)
def bounded():
    start = time.monotonic()
    yield
    assert time.monotonic() - start < SOON_S


@pytest.mark.parametrize("delta", [False, True])
def test_parts_from_all_senders_make_the_same_weights_at_every_receiver(pool, delta):
    sources, address = senders(receivers=2, delta=delta)
    ends = [receiver(address, rank, 3) for rank in (1, 2)]
    waiting = [pool.submit(receive, end, 5, 6) for end in ends]
    for version in (5, 6):
        for sending in send(pool, sources, version):
            sending.result(SOON_S)
    for future in waiting:
        for version, update in zip((5, 6), future.result(SOON_S), strict=True):
            wanted = {name: tensor for stage in range(len(PARTS)) for name, tensor in weights(stage, version)}
            assert update.keys() == wanted.keys() and all(torch.equal(update[name], tensor) for name, tensor in wanted.items())


def test_all_senders_are_on_their_way_before_the_first_has_ended(pool):
    sources, address = senders(receivers=1)
    end = receiver(address)
    sending = send(pool, sources, 1)
    stream = end.receive(end.announced(1))
    assert [next(stream)[0] for _ in PARTS] == ["stage0.w0", "stage1.w0", "stage2.w0"]
    assert not any(one.done() for one in sending)
    assert len(list(stream)) == len(WHOLE) - len(PARTS)
    for one in sending:
        one.result(SOON_S)


def test_a_receiver_that_gives_up_tells_all_senders(pool):
    sources, address = senders(receivers=1)
    end = receiver(address)
    sending = send(pool, sources, 1)
    stream = end.receive(end.announced(1))
    next(stream)
    stream.close()
    for one in sending:
        with pytest.raises(WeightSyncError, match="version 1"):
            one.result(SOON_S)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (WHOLE[:-1], "it holds stage2.w1, which is unknown to the model here"),
        ([*WHOLE, TensorSpec(name="head", dtype="bfloat16", shape=(3,))], "it lacks head"),
    ],
)
def test_parts_that_are_not_the_model_together_are_refused_to_all_senders_before_any_bucket(pool, wanted, message):
    sources, address = senders(receivers=1)
    sending = send(pool, sources, 3)
    with pytest.raises(WeightSyncError, match=rf"version 3 from sender 127\.0\.0\.1:[0-9]+ and 2 beside it: {message}"):
        receive(receiver(address), 3, wanted=wanted)
    for one in sending:
        with pytest.raises(WeightSyncError, match=message):
            one.result(SOON_S)


def test_a_part_of_another_version_is_refused_and_the_other_senders_hear_why(pool):
    sources, address = senders(receivers=1)
    sending = [pool.submit(one.send, 4 + (stage == 1), MANIFESTS[stage], weights(stage, 4)) for stage, one in enumerate(sources)]
    with pytest.raises(WeightSyncError, match=r"expected weights version 4, .* sends version 5"):
        receive(receiver(address), 4)
    for one in sending:
        with pytest.raises(WeightSyncError, match="sends version 5"):
            one.result(SOON_S)


def test_a_part_that_fails_ends_the_update_at_once_on_all_ends(pool):
    def weights_but_one(stage, version):
        yield from weights(stage, version)[: 1 if stage == 2 else None]

    sources, address = senders(receivers=1)
    sending = send(pool, sources, 7, weights_but_one)
    end = receiver(address)
    with pytest.raises(WeightSyncError, match="version 7"):
        receive(end, 7)
    for one in sending[2:]:
        with pytest.raises(WeightSyncError, match=r"stage2\.w1 of the manifest never came"):
            one.result(SOON_S)
    for one in sending[:2]:
        assert one.exception(SOON_S) is None or "version 7" in str(one.exception())  # a part may have gone through before
    with pytest.raises(WeightSyncError, match="closed by an earlier error; join again"):
        end.announced(8)


def test_a_flipped_byte_in_any_part_is_found(pool, monkeypatch):
    real = transport._Flight

    def faulty(group, bucket, buffer):
        if group.rank() == 0 and bucket.first_name == "stage1.w0":
            buffer[1] ^= 1
        return real(group, bucket, buffer)

    monkeypatch.setattr(transport, "_Flight", faulty)
    sources, address = senders(receivers=1)
    sending = send(pool, sources, 2)
    with pytest.raises(WeightSyncError, match=r"version 2, bucket 0 .first tensor stage1.w0.* bytes changed"):
        receive(receiver(address), 2)
    assert "stage1.w0" in str(sending[1].exception(SOON_S))
    for one in sending:
        assert one.exception(SOON_S) is None or "version 2" in str(one.exception())


def test_a_loss_that_is_told_to_the_first_sender_reaches_all(pool):
    sources, address = senders(receivers=1)
    sending = send(pool, sources, 0)
    time.sleep(0.2)
    report_loss(address, "rollout 0 is gone")
    for one in sending:
        with pytest.raises(WeightSyncError, match="rollout 0 is gone"):
            one.result(SOON_S)
