"""Hugging Face model folders: safetensors read lazily by name, written whole or not at all. It knows no architecture."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_opd.errors import CheckpointError
from megatron_opd.types import TensorSpec

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}  # by their safetensors names; others are not weights
# What a folder holds beside config.json and weights: tokenizers of all kinds, chat templates, sampling defaults.
_COMPANIONS = (
    "tokenizer*",
    "*.tiktoken",
    "*.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)


class SafetensorsFolder:
    """The tensors of a model folder by name; nothing is read before it is asked for."""

    def __init__(self, folder: str | Path) -> None:
        """Opens the headers.

        Raises:
            CheckpointError: no weights, a file that the index names is missing, one is truncated, or two hold the same tensor.
        """
        self.folder = Path(folder)
        self._files: dict[str, Any] = {}  # those that are open
        self._place = self._read_index() if (self.folder / _INDEX).is_file() else self._read_single()

    def __enter__(self) -> "SafetensorsFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Unmaps the files, so that what was read leaves resident memory; the next read maps its file again."""
        self._files.clear()

    @property
    def names(self) -> frozenset[str]:
        """All tensors in the folder."""
        return frozenset(self._place)

    def get(self, name: str) -> Tensor:
        """The tensor, read now.

        Raises:
            CheckpointError: the folder does not hold it.
        """
        return self._holder(name).get_tensor(name)

    def spec(self, name: str) -> TensorSpec:
        """Its dtype and shape, from the header alone; a dtype that is not for weights keeps its safetensors name.

        Raises:
            CheckpointError: the folder does not hold it.
        """
        header = self._holder(name).get_slice(name)
        return TensorSpec(name=name, dtype=_DTYPES.get(header.get_dtype(), header.get_dtype()), shape=tuple(header.get_shape()))

    def check(self, manifest: Sequence[TensorSpec]) -> None:
        """Compares names and shapes with what a model needs; dtypes may differ.

        A head stored beside tied embeddings and rotary frequencies repeat what the config says and are passed over.

        Raises:
            CheckpointError: a tensor is missing, unknown or of another shape; names it and its file.
        """
        wanted = {spec.name: spec for spec in manifest}
        missing = [name for name in wanted if name not in self._place]
        if missing:
            raise CheckpointError(f"{self.folder} lacks {_some(missing)}; the folder is incomplete or config.json describes another model")
        extra = [name for name in sorted(self._place) if name not in wanted and not _repeats(name)]
        if extra:
            raise CheckpointError(
                f"{self.folder / self._place[extra[0]]} holds {_some(extra)}, unknown to the model that config.json describes"
            )
        for name, spec in wanted.items():
            shape = self.spec(name).shape
            if shape != spec.shape:
                raise CheckpointError(f"{self.folder / self._place[name]}: {name} has shape {list(shape)}, wanted {list(spec.shape)}")

    def _holder(self, name: str) -> Any:
        if name not in self._place:
            raise CheckpointError(f"{self.folder} does not hold {name}")
        return self._open(self._place[name])

    def _read_single(self) -> dict[str, str]:
        return dict.fromkeys(self._open(_SINGLE).keys(), _SINGLE)

    def _read_index(self) -> dict[str, str]:
        path = self.folder / _INDEX
        try:
            place = dict(json.loads(path.read_text())["weight_map"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not a safetensors index: {error}") from error
        held = {file: frozenset(self._open(file).keys()) for file in sorted(set(place.values()))}
        for name, file in place.items():
            if name not in held[file]:
                raise CheckpointError(f"{path} places {name} in {file}, which does not hold it")
        for file, names in held.items():
            for name in names:
                if place.get(name, file) != file:
                    raise CheckpointError(f"{self.folder} holds {name} twice: in {place[name]} and in {file}; remove one")
        return place

    def _open(self, file: str) -> Any:
        if file in self._files:
            return self._files[file]
        path = self.folder / file
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist; a model folder needs {_SINGLE}, or {_INDEX} with all files that it names")
        try:
            self._files[file] = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error
        return self._files[file]


def _repeats(name: str) -> bool:
    return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def write_folder(
    folder: str | Path,
    manifest: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    source: str | Path,
    shard_bytes: int = 5 << 30,
) -> None:
    """Writes `tensors`, which come in the manifest's order, with config and tokenizer of `source`; one is in memory at a time.

    The folder appears under its name only when it is complete.

    Raises:
        CheckpointError: the folder exists, or the tensors are not those of the manifest.
    """
    folder = Path(folder)
    if folder.exists():
        raise CheckpointError(f"{folder} exists already; name a new folder")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards, stream = shard_plan(manifest, shard_bytes), iter(tensors)
    for file, specs in shards.items():
        write_shard(partial / file, specs, stream)
    surplus = next(stream, None)
    if surplus is not None:
        raise CheckpointError(f"{surplus[0]} follows the last tensor of the manifest")
    complete(partial, shards, source=source)
    os.rename(partial, folder)


def shard_plan(manifest: Sequence[TensorSpec], shard_bytes: int = 5 << 30) -> dict[str, list[TensorSpec]]:
    """File name -> its tensors, each file at most `shard_bytes` unless one tensor alone is larger."""
    shards: list[list[TensorSpec]] = []
    room = 0
    for spec in manifest:
        if not shards or _bytes(spec) > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(spec)
        room -= _bytes(spec)
    if len(shards) == 1:
        return {_SINGLE: shards[0]}
    return {f"model-{number:05}-of-{len(shards):05}.safetensors": specs for number, specs in enumerate(shards, 1)}


def _bytes(spec: TensorSpec) -> int:
    return torch.Size(spec.shape).numel() * getattr(torch, spec.dtype).itemsize


def _next(stream: Iterator[tuple[str, Tensor]], spec: TensorSpec) -> Tensor:
    name, tensor = next(stream, ("the end", torch.empty(0)))
    got = (name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
    if got != (spec.name, spec.dtype, spec.shape):
        raise CheckpointError(f"expected tensor {(spec.name, spec.dtype, spec.shape)}, got {got}")
    return tensor.detach().cpu().contiguous()


def write_shard(path: Path, specs: Sequence[TensorSpec], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Writes the next `len(specs)` tensors as a safetensors file, one in memory at a time; it appears under its name when complete.

    Raises:
        CheckpointError: a tensor is not the one that `specs` names next.
    """
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(_header(specs))
        for spec in specs:
            file.write(_next(tensors, spec).reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(partial, path)


def _header(specs: Sequence[TensorSpec]) -> bytes:
    """The head of a safetensors file: its length and a JSON object of names, padded so that the data are aligned."""
    dtypes = {ours: theirs for theirs, ours in _DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        start, end = end, end + _bytes(spec)
        entries[spec.name] = {"dtype": dtypes[spec.dtype], "shape": spec.shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def complete(folder: Path, shards: Mapping[str, Sequence[TensorSpec]], *, source: str | Path) -> None:
    """Adds what makes a folder of shards a model: the index, and config and tokenizer of `source`."""
    if len(shards) > 1:
        _write_index(folder / _INDEX, shards)
    copy_companions(Path(source), folder, dtype=next(iter(shards.values()))[0].dtype)


def _write_index(path: Path, shards: Mapping[str, Sequence[TensorSpec]]) -> None:
    total = sum(_bytes(spec) for specs in shards.values() for spec in specs)
    places = {spec.name: file for file, specs in shards.items() for spec in specs}
    path.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2))


def copy_companions(source: Path, target: Path, *, dtype: str) -> None:
    """Copies config.json, which names `dtype` then, and tokenizer files."""
    config = json.loads((source / "config.json").read_text())
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            shutil.copy2(file, target / file.name)
