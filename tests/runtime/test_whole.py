"""What a full disk would cut short is not there at all, and can be written again."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opd.runtime.whole import write

IN_A_PROCESS_OF_ITS_OWN = """
import resource, signal, sys
from megatron_opd.runtime.whole import append

path, sync = sys.argv[1], sys.argv[2] == "True"
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # the system writes what fits and says how much that was, as a full disk does
read = lambda: open(path, "rb").read()
with open(path, "ab", buffering=0) as file:
    append(file, b"x" * 80, sync=sync)
    for _ in range(2):
        try:
            append(file, b"y" * 80, sync=sync)
        except OSError:
            assert read() == b"x" * 80
        else:
            raise AssertionError("80 bytes do not fit behind 80 of 100")
    append(file, b"z" * 20, sync=sync)
assert read() == b"x" * 80 + b"z" * 20
"""


@pytest.mark.parametrize("sync", [False, True])
def test_all_or_nothing(tmp_path, sync):
    """The limit on files would hold for this process's own output too."""
    command = [sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN, str(tmp_path / "file"), str(sync)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


def test_a_file_is_replaced_at_once_or_stays_as_it_was(tmp_path, monkeypatch):
    write(tmp_path / "a.json", b"old")

    def crash(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_bytes() == b"old"
    monkeypatch.undo()
    write(tmp_path / "a.json", b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"] and (tmp_path / "a.json").read_bytes() == b"new"
