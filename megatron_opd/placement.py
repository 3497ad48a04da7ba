"""Which processes a run consists of, and where each runs: a pure function of the config."""

from dataclasses import dataclass

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

    @property
    def name(self) -> str:
        """Of its log file and in messages."""
        return f"{self.role}-{self.index}"


EVALUATION = Process(role="evaluate", index=0, replica=0, rank=0, world_size=1, cores=())  # after the others have ended


def place(config: Config, *, generation: bool) -> tuple[Process, ...]:
    """All processes of a run. vLLM makes its own workers, so a replica of it is one process here."""
    learner = config.learner
    processes = [_process("controller", 0, 1, ())]
    processes += [_process("learner", i, learner.world_size, learner.cores) for i in range(learner.world_size)]
    if generation:
        processes += [_process("rollout", i, 1, config.rollout.cores) for i in range(config.rollout.replicas)]
    if config.teacher.backend != "none":
        ranks = config.teacher.tensor_parallel * config.teacher.pipeline_parallel if config.teacher.backend == "megatron" else 1
        processes += [_process("teacher", i, ranks, config.teacher.cores) for i in range(config.teacher.replicas * ranks)]
    return tuple(processes)


def _process(role: str, index: int, world_size: int, cores: tuple[int, ...]) -> Process:
    replica, rank = divmod(index, world_size)
    pinned = (cores[index % len(cores)],) if cores else ()
    return Process(role=role, index=index, replica=replica, rank=rank, world_size=world_size, cores=pinned)
