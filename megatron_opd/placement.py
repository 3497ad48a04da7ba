"""Which processes a run consists of, and where each runs: a pure function of the config."""

import itertools
from dataclasses import dataclass, replace

from megatron_opd.config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One operating-system process of a role."""

    role: str  # "controller" | "learner" | "rollout" | "teacher"
    index: int  # among the processes of that role
    replica: int  # which copy of the role
    rank: int  # inside the replica
    world_size: int  # of the replica
    cores: tuple[int, ...]  # CPU cores it is pinned to; () leaves it to the system
    devices: tuple[int, ...] = ()  # GPUs it sees

    @property
    def name(self) -> str:
        """Of its log file and in messages."""
        return f"{self.role}-{self.index}"


EVALUATION = Process(role="evaluate", index=0, replica=0, rank=0, world_size=1, cores=())  # after the others have ended


def place(config: Config, *, generation: bool) -> tuple[Process, ...]:
    """All processes of a run. vLLM makes its own workers, so a replica of it is one process here.

    GPUs are dealt out one after another: learner ranks first, then rollouts, then teachers.
    """
    learner, rollout, teacher = config.learner, config.rollout, config.teacher
    processes = [
        _process("controller", 0, 1, ()),
        *(_process("learner", i, learner.world_size, learner.cores) for i in range(learner.world_size)),
    ]
    widths = [0] + [1] * learner.world_size
    if generation:
        processes += [_process("rollout", i, 1, rollout.cores) for i in range(rollout.replicas)]
        widths += [rollout.tensor_parallel] * rollout.replicas
    if teacher.backend == "megatron":
        ranks = teacher.tensor_parallel * teacher.pipeline_parallel
        processes += [_process("teacher", i, ranks, teacher.cores) for i in range(teacher.replicas * ranks)]
        widths += [1] * teacher.replicas * ranks
    elif teacher.backend == "vllm":
        processes += [_process("teacher", i, 1, teacher.cores) for i in range(teacher.replicas)]
        widths += [teacher.tensor_parallel] * teacher.replicas
    if config.run.device == "cpu":
        return tuple(processes)
    ends = list(itertools.accumulate(widths))
    return tuple(replace(p, devices=tuple(range(end - width, end))) for p, width, end in zip(processes, widths, ends, strict=True))


def _process(role: str, index: int, world_size: int, cores: tuple[int, ...]) -> Process:
    replica, rank = divmod(index, world_size)
    pinned = (cores[index % len(cores)],) if cores else ()
    return Process(role=role, index=index, replica=replica, rank=rank, world_size=world_size, cores=pinned)
