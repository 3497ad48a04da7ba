"""Typed messages as bytes: MessagePack with numpy arrays as raw buffers. No pickle, no code in any message.

A message is named by its class and decoded against that class's annotations, so a wrong field never gets past here.
"""

import hashlib
from typing import Any

import msgspec
import msgspec.inspect
import numpy as np

from megatron_opd import types
from megatron_opd.errors import WireError

_DTYPES = {"i4": np.int32, "i8": np.int64, "f4": np.float32, "f8": np.float64, "u1": np.uint8, "u2": np.uint16}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_MESSAGES = {
    message.__name__: message
    for message in (
        types.Hello, types.Generate, types.Sample, types.Rollout, types.Score, types.TeacherScores, types.Train, types.StepReport,
        types.Address, types.HostTransport, types.JoinTransport, types.SendWeights, types.ReceiveWeights, types.Export, types.Stop,
        types.Done, types.SaveCheckpoint, types.FinishCheckpoint, types.Saved, types.LoadCheckpoint, types.SetAside,
    )
}  # fmt: skip

# Of all messages and their fields: two sides that differ in it would misread each other.
SCHEMA = hashlib.blake2b(repr(msgspec.inspect.multi_type_info(_MESSAGES.values())).encode(), digest_size=8).hexdigest().encode()


def encode(message: object) -> tuple[bytes, bytes]:
    """Class name and body of a message."""
    return type(message).__name__.encode(), _ENCODER.encode(message)


def decode(name: bytes, body: bytes) -> Any:
    """The message back.

    Raises:
        WireError: unknown name, malformed body or a field of the wrong type.
    """
    known = _MESSAGES.get(name.decode("ascii", "replace"))
    if known is None:
        raise WireError(f"message of unknown kind {name[:40]!r}; both sides must run the same version of megatron_opd")
    try:
        return msgspec.msgpack.decode(body, type=known, dec_hook=_from_wire)
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise WireError(f"{known.__name__} message of {len(body)} bytes does not decode: {error}") from error


def _to_wire(value: object) -> object:
    if isinstance(value, np.ndarray):
        name = _NAMES.get(value.dtype)
        if name is None:
            raise WireError(f"arrays of {value.dtype} do not travel; use one of {', '.join(map(str, _NAMES))}")
        return name, value.shape, np.ascontiguousarray(value).data.cast("B") if value.size else b""
    raise WireError(f"{type(value).__name__} does not travel")


def _from_wire(kind: type, value: object) -> object:
    if kind is not np.ndarray:
        raise WireError(f"{kind} does not travel")
    if not (isinstance(value, list) and len(value) == 3 and value[0] in _DTYPES and isinstance(value[2], bytes)):
        raise ValueError("an array must be (dtype, shape, bytes)")
    name, shape, data = value
    if not (isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)):
        raise ValueError(f"array shape {shape!r} is not a list of lengths")
    return np.frombuffer(data, _DTYPES[name]).reshape(shape)


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_to_wire)
