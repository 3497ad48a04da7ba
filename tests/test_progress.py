"""What is shown of a run may get lost; the run goes on."""

import errno

import pytest
from rich.console import Console

from megatron_opd.progress import tell


class Failing:
    """A file that takes nothing."""

    def __init__(self, number):
        self.number = number

    def write(self, text):
        raise OSError(self.number, "no")

    def flush(self):
        raise OSError(self.number, "no")


def test_a_line_that_finds_no_room_is_lost_and_another_error_is_not():
    tell(Console(file=Failing(errno.ENOSPC)), "step 1")
    with pytest.raises(OSError, match="no"):
        tell(Console(file=Failing(errno.EIO)), "step 1")
