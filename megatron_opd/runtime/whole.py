"""Files all or nothing: neither a full disk nor a crash leaves half of anything behind."""

import errno
import os
from pathlib import Path
from typing import BinaryIO


def append(file: BinaryIO, data: bytes, *, sync: bool = False) -> None:
    """Writes `data` behind the end of a file that was opened unbuffered; with `sync` it survives the machine when this returns.

    Raises:
        OSError: it could not be written whole, and the file is as it was; the call may be repeated.
    """
    end = file.seek(0, os.SEEK_END)
    try:
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
        if sync:
            os.fsync(file.fileno())
    except OSError:
        file.truncate(end)
        raise


def write(file: Path, data: bytes) -> None:
    """Makes or replaces a file; who reads it meanwhile sees the old one or the new one."""
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("wb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())
    partial.rename(file)
