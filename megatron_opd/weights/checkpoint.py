"""Megatron's distributed checkpoints (torch_dist): parameters by key, read in part, written one at a time. It knows no architecture.

The format is that of torch.distributed.checkpoint with two small files beside it. Megatron's own writer wants the whole state
dict in memory; here the same torch writer asks for one tensor after the other, so that memory does not grow with the model.
"""

import io
import json
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_opd.errors import CheckpointError
from megatron_opd.runtime import whole
from megatron_opd.types import TensorSpec
from megatron_opd.weights.mapping import Parameter

_BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
_OTHERS = ("optimizer.", "chained_", "rng_state", "rerun_state_machine")  # keys of a training checkpoint beside the model's


class DistributedCheckpoint:
    """The tensors of a checkpoint by key; nothing is read before it is asked for.

    A checkpoint's index is a pickle, as torch writes it; it is read with the few classes that an index is made of and no others.
    """

    def __init__(self, folder: str | Path) -> None:
        """Reads the index.

        Raises:
            CheckpointError: not such a checkpoint, of another format, or a file is missing or truncated.
        """
        self.folder = Path(folder)
        self._reader = FileSystemReader(self.folder)
        self._metadata = self._read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._require_whole_files()
        self._tensors = {key: held for key, held in self._metadata.state_dict_metadata.items() if isinstance(held, TensorStorageMetadata)}

    @property
    def keys(self) -> frozenset[str]:
        """All tensors of the model; the optimizer's are not among them."""
        return frozenset(key for key in self._tensors if not key.startswith(_OTHERS))

    def spec(self, key: str) -> TensorSpec:
        """Dtype and shape of all that a key holds.

        Raises:
            CheckpointError: the checkpoint does not hold it.
        """
        if key not in self._tensors:
            raise CheckpointError(f"{self.folder} does not hold {key}")
        held = self._tensors[key]
        return TensorSpec(name=key, dtype=str(held.properties.dtype).removeprefix("torch."), shape=tuple(held.size))

    def check(self, parameters: Sequence[Parameter]) -> None:
        """Compares keys and shapes with what a model needs; rows that pad the vocabulary may stand beyond its end.

        Raises:
            CheckpointError: a tensor is missing, unknown or of another shape; names it.
        """
        wanted = {parameter.key: parameter for parameter in parameters}
        for key, parameter in wanted.items():
            if key not in self._tensors:
                raise CheckpointError(f"{self.folder} lacks {key}; it is incomplete or config.json describes another model")
            got, want = self.spec(key).shape, parameter.stored_shape
            padded = not parameter.stack and len(got) == len(want) == 2 and got[0] >= want[0] and got[1] == want[1]
            if got != want and not padded:
                raise CheckpointError(f"{self.folder}: {key} has shape {list(got)}, wanted {list(want)}")
        unknown = sorted(self.keys - wanted.keys())
        if unknown:
            raise CheckpointError(f"{self.folder} holds {unknown[0]}, unknown to the model that config.json describes")

    def get(self, parameter: Parameter) -> Tensor:
        """The full parameter, read now; beside it one stored block is in memory.

        Raises:
            CheckpointError: the stored blocks do not cover it, or do not load.
        """
        box, dtype = _box(parameter, [0] * len(parameter.shape), parameter.shape), getattr(torch, self.spec(parameter.key).dtype)
        items = create_read_items_for_chunk_list(parameter.key, self._tensors[parameter.key], [box])
        if sum(math.prod(item.lengths) for item in items) != math.prod(box.sizes):
            raise CheckpointError(f"{self.folder}: the stored blocks of {parameter.key} do not make up the whole tensor")
        target = torch.empty(box.sizes, dtype=dtype)
        try:
            self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{self.folder}: {parameter.key} does not load: {error}") from error
        return target.reshape(parameter.shape)

    def _read_metadata(self) -> Metadata:
        path = self.folder / "metadata.json"
        if not path.is_file() or not (self.folder / ".metadata").is_file():
            raise CheckpointError(f"{self.folder} is no distributed checkpoint: it lacks metadata.json or .metadata")
        backend = json.loads(path.read_text()).get("sharded_backend")
        if backend != _BACKEND["sharded_backend"]:
            raise CheckpointError(f"{self.folder} has the format {backend!r}; only torch_dist is supported, save it again in that")
        try:
            return _Plain(io.BytesIO((self.folder / ".metadata").read_bytes())).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"{self.folder / '.metadata'} does not load: {error}") from error

    def _require_whole_files(self) -> None:
        ends: dict[str, int] = {}
        for info in self._metadata.storage_data.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for file, end in ends.items():
            path = self.folder / file
            if not path.is_file():
                raise CheckpointError(f"{path} does not exist; the checkpoint is incomplete")
            if path.stat().st_size < end:
                raise CheckpointError(f"{path} is truncated: {path.stat().st_size} bytes, wanted {end}")


_INDEX_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {  # Megatron leaves the ranks' plans in its index
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
    },
    "torch.distributed.checkpoint.storage": {"WriteResult"},
    "pathlib": {"PosixPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip


class _Plain(pickle.Unpickler):
    """Builds what describes tensors and files, and refuses everything else: no code of a file's choosing is run."""

    def find_class(self, module: str, name: str) -> Any:
        """The class, if it is one of those."""
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and name not in _INDEX_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no index is made of")
        return super().find_class(module, name)


class _Into(DefaultLoadPlanner):
    """Reads what is asked for into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._target

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("only tensors are read")


def write_checkpoint(
    folder: Path,
    parameters: Sequence[Parameter],
    get: Callable[[Parameter], Tensor],
    *,
    dtype: str,
    objects: Sequence[str],
    file_bytes: int = 4 << 30,
) -> None:
    """Writes into a folder what `get` answers, one parameter in memory at a time; `objects` become keys that hold None.

    A file that an earlier call with the same arguments has finished is kept, so an interrupted call can be repeated.
    """
    planner = _OneByOne(parameters, get)
    plans = [_plan(group, dtype) for group in _groups(parameters, getattr(torch, dtype).itemsize, file_bytes)]
    plans.append(SavePlan([WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in objects]))
    writer = FileSystemWriter(folder)
    writer.set_up_storage_writer(is_coordinator=True)
    plans, metadata = planner.create_global_plan(plans)
    results = [
        _write_once(folder / f".{number}.done", writer, plan, planner) for number, plan in enumerate(writer.prepare_global_plan(plans))
    ]
    torch.save({"checkpoint_version": 3.0, "iteration": 0}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(_BACKEND))
    writer.finish(metadata, results)
    for record in folder.glob(".*.done"):
        record.unlink()


def _write_once(record: Path, writer: FileSystemWriter, plan: SavePlan, planner: DefaultSavePlanner) -> list[Any]:
    """What the writer says of the plan's file, now or when it was finished; `record` appears after the file."""
    if not record.exists():
        whole.write(record, pickle.dumps(writer.write_data(plan, planner).wait()))
    return _Plain(io.BytesIO(record.read_bytes())).load()


class _OneByOne(DefaultSavePlanner):
    """Answers the writer's wish for a block; blocks of one parameter are wished for one after the other."""

    def __init__(self, parameters: Sequence[Parameter], get: Callable[[Parameter], Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self._get = get
        self._parameter = {(parameter.key, parameter.place): parameter for parameter in parameters}
        self._stacked = {parameter.key: len(parameter.stack) for parameter in parameters}  # axes that are no part of a parameter
        self._held: tuple[Parameter, Tensor] | None = None

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            content = io.BytesIO()
            torch.save([None], content)
            return content
        assert write_item.tensor_data is not None and write_item.index.offset is not None
        chunk = write_item.tensor_data.chunk
        stacked = self._stacked[write_item.index.fqn]
        block = self._full(self._parameter[write_item.index.fqn, tuple(chunk.offsets[:stacked])])
        for axis, (start, length) in enumerate(zip(chunk.offsets[stacked:], chunk.sizes[stacked:], strict=True)):
            block = block.narrow(axis, start, length)
        return block.reshape(chunk.sizes)

    def _full(self, parameter: Parameter) -> Tensor:
        if self._held is None or self._held[0] is not parameter:
            self._held = None  # let go before the next one is read
            self._held = parameter, self._get(parameter)
        return self._held[1]


def _groups(parameters: Sequence[Parameter], itemsize: int, file_bytes: int) -> Iterator[list[Parameter]]:
    """Parameters that share a file, in order; one that is larger than `file_bytes` has its own."""
    group: list[Parameter] = []
    room = file_bytes
    for parameter in parameters:
        size = math.prod(parameter.shape) * itemsize
        if group and size > room:
            yield group
            group, room = [], file_bytes
        group.append(parameter)
        room -= size
    if group:
        yield group


def _plan(parameters: Sequence[Parameter], dtype: str) -> SavePlan:
    return SavePlan(
        [
            WriteItem(
                index=MetadataIndex(parameter.key, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk, properties=TensorProperties(dtype=getattr(torch, dtype)), size=torch.Size(parameter.stored_shape)
                ),
            )
            for parameter in parameters
            for chunk in _chunks(parameter)
        ]
    )


def _chunks(parameter: Parameter) -> Iterator[ChunkStorageMetadata]:
    """The blocks, as boxes in `stored_shape`."""
    start = 0
    for block in torch.empty(parameter.shape, device="meta").chunk(parameter.blocks, parameter.axis):
        offsets = [0] * len(parameter.shape)
        offsets[parameter.axis] = start
        start += block.shape[parameter.axis]
        yield _box(parameter, offsets, block.shape)


def _box(parameter: Parameter, offsets: Sequence[int], sizes: Sequence[int]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size([*parameter.place, *offsets]), sizes=torch.Size([1 for _ in parameter.place] + [*sizes]))
