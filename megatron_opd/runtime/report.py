"""What a role tells the process that started it: that it is ready, what it dies of, whom it wants replaced, what the user should know.

It goes through a pipe, so that a full disk hides nothing.
"""

import json
import os
import time

from megatron_opd.errors import OPDError

REPORT_FD = "MEGATRON_OPD_REPORT_FD"  # the pipe's number, where a launcher listens
READY, REPLACE, NOTICE = "ready", "replace", "notice"  # kinds of reports that are no deaths


def has_launcher() -> bool:
    """Whether anybody listens."""
    return REPORT_FD in os.environ


def report_death(error: BaseException) -> None:
    """Tells the launcher why this process ends, if there is one."""
    message = str(error) if isinstance(error, OPDError) else f"{type(error).__name__}: {error}"
    _write({"kind": type(error).__name__, "message": message[:3000]})


def report_ready() -> None:
    """Tells the launcher that this process has all that it needs for its work."""
    _write({"kind": READY})


def ask_for_replacement(pid: int, reason: str) -> None:
    """Tells the launcher that a process is of no use any more: it is to be ended, if it still lives, and its replica started anew."""
    _write({"kind": REPLACE, "pid": pid, "message": reason[:3000]})


def notify(message: str) -> None:
    """Tells the launcher what its user is to read at once."""
    _write({"kind": NOTICE, "message": message[:3000]})


def _write(words: dict[str, object]) -> None:
    if has_launcher():
        line = json.dumps(words | {"time": time.time()}).encode() + b"\n"
        os.write(int(os.environ[REPORT_FD]), line)  # at most 4096 bytes, which a pipe takes whole or not at all
