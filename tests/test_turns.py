import numpy as np
import torch

from megatron_opd.turns import Turns
from megatron_opd.types import (
    Address,
    Done,
    HostTransport,
    JoinTransport,
    Prompt,
    ReceiveWeights,
    Rollout,
    Sample,
    Segment,
    SendWeights,
    Stop,
    TensorSpec,
    Train,
)


class Device:
    """Learner, rollout and ranks at once; keeps a diary of who did what."""

    world_size = 1

    def __init__(self):
        self.diary = []
        self.turns = Turns(self, self, self.answer, self, dtype="float32")

    def take(self, message):
        return list(self.turns.take(message))

    def answer(self, message):
        self.diary.append(type(message).__name__)
        return [Done()]

    def manifest(self, dtype):
        return [TensorSpec(name=name, dtype=dtype, shape=(2,)) for name in ("a", "b")]

    def weights(self, dtype):
        yield from [("a", torch.zeros(2)), ("b", torch.ones(2))]

    def broadcast_tensor(self, tensor, spec):
        return tensor

    def park(self):
        self.diary.append("park")

    def unpark(self):
        self.diary.append("unpark")

    def sleep(self):
        self.diary.append("sleep")

    def load(self, version, tensors):
        self.diary.append((version, {name: tensor.tolist() for name, tensor in tensors}))
        return {"swap": 0.5}

    def generate(self, prompts):
        self.diary.append("generate")
        for prompt in reversed(prompts):
            start = Segment(first_token=0, version=0)
            yield Rollout(
                index=prompt.index, prompt_ids=prompt.token_ids, response_ids=prompt.token_ids, segments=(start,), finish_reason="stop"
            )


def test_one_holds_the_device_at_a_time():
    device = Device()
    prompts = tuple(Prompt(index=i, token_ids=np.array([i], np.int32)) for i in range(3))
    assert [rollout.index for rollout in device.take(Sample(prompts=prompts))] == [2, 1, 0]
    assert device.take(Train(trajectories=())) == [Done()]
    assert device.diary == ["park", "generate", "sleep", "unpark", "Train"]


def test_weights_change_hands_once_for_each_version_whichever_end_is_asked_first():
    device = Device()
    for first, second in ((SendWeights, ReceiveWeights), (ReceiveWeights, SendWeights)):
        for version in (0, 1):
            assert device.take(first(version=version)) == [Done(seconds={"swap": 0.5})]
            assert device.take(second(version=version)) == [Done()]
        device.turns._handed_over = None
    assert device.diary == [(version, {"a": [0, 0], "b": [1, 1]}) for version in (0, 1, 0, 1)]


def test_nobody_connects_and_the_rest_is_the_learners():
    device = Device()
    assert device.take(HostTransport(receivers=1)) == [Address(host="", port=0)]
    assert device.take(JoinTransport(address=Address(host="", port=0), first_rank=1, world_size=2)) == [Done()]
    assert device.take(Stop()) == [Done()] and device.diary == ["Stop"]
