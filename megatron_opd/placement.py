"""Which processes a run consists of, and where each runs: a pure function of the config and of what there is to run on.

The local launcher and SLURM use it alike. It knows nodes, devices and cores by number; it refuses to know addresses.
"""

from dataclasses import dataclass
from pathlib import Path

import msgspec

from megatron_opd.config import ClusterConfig, Config
from megatron_opd.errors import ConfigError

_FILE = "placement.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a run may use."""

    nodes: int
    gpus_per_node: int | None = None  # None: the run has no use for them
    cores_per_node: int | None = None  # None: they are not counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One operating-system process of a role."""

    role: str  # "controller" | "learner" | "rollout" | "teacher" | "evaluate"
    index: int  # among the processes of that role
    replica: int  # which copy of the role
    rank: int  # inside the replica
    world_size: int  # of the replica
    node: int = 0
    cores: tuple[int, ...]  # CPU cores of the node that it is pinned to; () leaves it to the system
    devices: tuple[int, ...] = ()  # GPUs of the node that it sees; () all

    @property
    def name(self) -> str:
        """Of its log file and in messages."""
        return f"{self.role}-{self.index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Processes of one role before they have a place."""

    role: str
    replicas: int
    world_size: int  # processes of a replica
    width: int  # devices of a process
    cores: tuple[int, ...]  # as configured

    @property
    def count(self) -> int:
        return self.replicas * self.world_size


def cluster_resources(config: Config) -> Resources:
    """What the config says of the cluster."""
    cluster = config.cluster
    if config.run.device == "cuda":
        return Resources(nodes=cluster.nodes, gpus_per_node=cluster.gpus_per_node)
    return Resources(nodes=cluster.nodes, cores_per_node=cluster.cores_per_node or None)


def place(config: Config, resources: Resources, *, generation: bool) -> tuple[Process, ...]:
    """All processes of a run, with their nodes and devices. vLLM makes its own workers, so a replica of it is one process here.

    GPUs (on CPU: counted cores) are dealt out one after another: learner ranks first, then rollouts, then teachers, each on
    the first of the role's nodes where the process fits. Controller and evaluation share what others have, and rollouts live in
    the learner's processes where `run.colocated` says so.

    Raises:
        ConfigError: they do not fit; the message holds the arithmetic.
    """
    per_node = resources.gpus_per_node if config.run.device == "cuda" else resources.cores_per_node
    unit = "GPUs" if config.run.device == "cuda" else "cores"
    parts = _parts(config, generation)
    arithmetic = _arithmetic(parts, resources, per_node, unit)
    processes = [Process(role="controller", index=0, replica=0, rank=0, world_size=1, cores=())]
    used = [0] * resources.nodes
    for part in parts:
        nodes = _nodes(config.cluster, part.role, resources)
        for index in range(part.count):
            fitting = [node for node in nodes if per_node is None or used[node] + part.width <= per_node]
            if not fitting:
                left = ", ".join(f"{per_node - used[node]} on node {node}" for node in nodes)
                raise ConfigError(
                    f"{part.role}-{index} wants {part.width} {unit} of one node, but left are {left} ({arithmetic}); "
                    f"lower replicas or parallel sizes, or give more nodes"
                )
            first, node = used[fitting[0]], fitting[0]
            used[node] += part.width
            dealt = tuple(range(first, first + part.width)) if per_node is not None else ()
            processes.append(_process(part, index, node, dealt, unit))
    for role in ("learner", "teacher"):
        _require_whole_tensor_groups(role, getattr(config, role).tensor_parallel, [one for one in processes if one.role == role])
    if config.eval.prompts:
        node = next((process.node for process in processes if process.role == "rollout"), 0)
        processes.append(Process(role="evaluate", index=0, replica=0, rank=0, world_size=1, node=node, cores=()))
    return tuple(processes)


def save(processes: tuple[Process, ...], folder: Path) -> None:
    """Writes down where everything runs, for the roles to read."""
    (folder / _FILE).write_bytes(msgspec.json.format(msgspec.json.encode(processes), indent=1))


def load(folder: Path) -> tuple[Process, ...]:
    """What `save` wrote.

    Raises:
        ConfigError: there is none; `folder` is no run directory.
    """
    try:
        return msgspec.json.decode((folder / _FILE).read_bytes(), type=tuple[Process, ...])
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{folder} holds no {_FILE} that can be read: {error}; `train` and `launch slurm` write it") from error


def _parts(config: Config, generation: bool) -> list[_Part]:
    learner, rollout, teacher = config.learner, config.rollout, config.teacher
    parts = [_Part(role="learner", replicas=1, world_size=learner.world_size, width=1, cores=learner.cores)]
    if generation and not config.run.colocated:
        parts.append(_Part(role="rollout", replicas=rollout.replicas, world_size=1, width=rollout.tensor_parallel, cores=rollout.cores))
    if teacher.backend == "megatron":
        ranks = teacher.tensor_parallel * teacher.pipeline_parallel
        parts.append(_Part(role="teacher", replicas=teacher.replicas, world_size=ranks, width=1, cores=teacher.cores))
    elif teacher.backend == "vllm":
        parts.append(_Part(role="teacher", replicas=teacher.replicas, world_size=1, width=teacher.tensor_parallel, cores=teacher.cores))
    return parts


def _nodes(cluster: ClusterConfig, role: str, resources: Resources) -> tuple[int, ...]:
    """A machine alone takes every role, wherever a cluster would have it."""
    return (0,) if resources.nodes == 1 else getattr(cluster, role) or tuple(range(resources.nodes))


def _process(part: _Part, index: int, node: int, dealt: tuple[int, ...], unit: str) -> Process:
    replica, rank = divmod(index, part.world_size)
    pinned = (part.cores[index % len(part.cores)],) if part.cores else dealt if unit == "cores" else ()
    devices = dealt if unit == "GPUs" else ()
    return Process(
        role=part.role, index=index, replica=replica, rank=rank, world_size=part.world_size, node=node, cores=pinned, devices=devices
    )


def _require_whole_tensor_groups(role: str, tensor: int, ranks: list[Process]) -> None:
    """Tensor-parallel ranks talk in every layer: they have to sit on one node. vLLM, one process with ranks of its own, always does."""
    if not ranks or ranks[0].world_size == 1:
        return
    for start in range(0, len(ranks), tensor):
        if len(nodes := {one.node for one in ranks[start : start + tensor]}) > 1:
            found = ", ".join(map(str, sorted(nodes)))
            raise ConfigError(
                f"{role} ranks {start} to {start + tensor - 1}, a tensor-parallel group, would sit on nodes {found}; "
                f"make {role}.tensor_parallel={tensor} divide what cluster.{role} leaves of each node"
            )


def _arithmetic(parts: list[_Part], resources: Resources, per_node: int | None, unit: str) -> str:
    wanted = " + ".join(f"{part.role} {part.replicas} x {part.world_size * part.width}" for part in parts)
    total = sum(part.count * part.width for part in parts)
    there = "uncounted" if per_node is None else f"{resources.nodes} nodes x {per_node} = {resources.nodes * per_node}"
    return f"wanted in all: {wanted} = {total} {unit}; there: {there}"
