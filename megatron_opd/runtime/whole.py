"""Appending to a file all or nothing, so that a full disk leaves no half of anything behind."""

import errno
import os
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
