"""Reading a checkpoint that somebody else may have written: torch's own reader would execute what
its pickles say. Here they may name torch's own few classes, tensors and plain values only."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, ReadItem
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

METADATA = "torch.distributed.checkpoint.metadata"
ALLOWED = {(METADATA, name) for name in (
    "Metadata", "StorageMeta", "MetadataIndex", "BytesStorageMetadata", "TensorStorageMetadata",
    "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING")} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch", "Size"),
    ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"), ("pathlib", "WindowsPath"),
    ("collections", "OrderedDict")}


def get_member(enum: Any, name: str) -> Any:
    """`getattr` for the one enum of a checkpoint's metadata. Raises ValueError for others."""
    if enum is not _MEM_FORMAT_ENCODING or name not in enum.__members__:
        raise ValueError(".metadata calls getattr, which no checkpoint needs: refused")
    return enum[name]


class MetadataUnpickler(pickle.Unpickler):
    """Of a checkpoint's file `.metadata`."""
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in ALLOWED or is_dtype:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):  # by which Python 3.11.2 pickles an enum
            return get_member
        raise ValueError(f".metadata names {module}.{name}, which no checkpoint has: refused")


class SafeReader(FileSystemReader):
    """The reader of a directory, with the metadata read as above."""
    def read_metadata(self, *args, **kwargs) -> Metadata:
        """Raises ValueError if the file is not what a run writes."""
        try:
            found = MetadataUnpickler(io.BytesIO(Path(self.path, ".metadata").read_bytes())).load()
        except ValueError:
            raise
        except Exception as error:  # a damaged pickle may raise anything
            raise ValueError(f".metadata is damaged ({type(error).__name__})") from error
        if not isinstance(found, Metadata):
            raise ValueError(".metadata is not that of a checkpoint")
        found.storage_meta.load_id = self.load_id
        return found


class SafePlanner(DefaultLoadPlanner):
    """The planner, with objects (the optimizer's settings) read as torch reads tensors."""
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Raises ValueError if the object is more than plain values."""
        try:
            torch.load(value, weights_only=True)
        except Exception as error:
            raise ValueError(f"{read_item.storage_index.fqn} is no plain value: refused") from error
        value.seek(0)
        super().load_bytes(read_item, value)
