import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_opd import types
from megatron_opd.errors import WireError
from megatron_opd.runtime import wire

ROLLOUT = types.Rollout(
    index=7,
    prompt_ids=np.arange(5, dtype=np.int32),
    response_ids=np.zeros(0, np.int32),
    head_logp=np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)[:, ::2],
    segments=(types.Segment(first_token=0, version=2), types.Segment(first_token=3, version=3)),
    finish_reason="stop",
)
TRAIN = types.Train(trajectories=(types.Trajectory(rollout=ROLLOUT, teacher=types.TeacherScores(index=7)),))


def same(a, b):
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize(
    "message",
    [
        TRAIN,
        types.Stop(),
        types.StepReport(
            version=1,
            loss=0.5,
            diagnostics={"kl": 0.1},
            kl_by_position={0: 0.2, 4: 0.1},
            grad_norm=1.0,
            learning_rate=1e-3,
            sequences=2,
            tokens=9,
            lags={0: 3, 2: 6},
            seconds={},
        ),
        types.JoinTransport(address=types.Address(host="h", port=1), first_rank=1, world_size=3),
    ],
)
def test_a_message_comes_back_as_it_went(message):
    assert same(wire.decode(*wire.encode(message)), message)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_wire_error(body):
    for name in (b"Train", b"StepReport", b"Rollout"):
        try:
            wire.decode(name, body)
        except WireError:
            continue


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_flipped_byte_never_crashes(position, value):
    name, body = wire.encode(TRAIN)
    body = bytearray(body)
    body[position % len(body)] = value
    try:
        wire.decode(name, bytes(body))
    except WireError:
        return


def test_nesting_without_end_is_refused():
    with pytest.raises(WireError, match="does not decode"):
        wire.decode(b"Rollout", b"\x91" * 1_000_000)


def test_unknown_messages_and_objects_are_refused():
    with pytest.raises(WireError, match="unknown kind"):
        wire.decode(b"os.system", b"")
    with pytest.raises(WireError, match="complex128"):
        wire.encode(dataclasses.replace(ROLLOUT, logp=np.zeros(1, np.complex128)))
    with pytest.raises(WireError, match="does not travel"):
        wire.encode(dataclasses.replace(ROLLOUT, finish_reason=object()))
