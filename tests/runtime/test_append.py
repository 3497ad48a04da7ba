"""What a full disk would cut short is not there at all, and can be written again."""

import resource
import signal

import pytest

from megatron_opd.runtime.append import append


@pytest.fixture
def short_files():
    """Files end at 100 bytes: the system writes what fits and says how much that was, as a full disk does."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("sync", [False, True])
def test_all_or_nothing(tmp_path, short_files, sync):
    with (tmp_path / "file").open("ab", buffering=0) as file:
        append(file, b"x" * 80, sync=sync)
        for _ in range(2):
            with pytest.raises(OSError):
                append(file, b"y" * 80, sync=sync)
            assert (tmp_path / "file").read_bytes() == b"x" * 80
        append(file, b"z" * 20, sync=sync)
    assert (tmp_path / "file").read_bytes() == b"x" * 80 + b"z" * 20
