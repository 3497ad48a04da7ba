"""Variables that engines read when they start, only while the tests of a module run: imported by the folders that start engines."""

import pytest

from megatron_opd.runtime.environment import environment


@pytest.fixture(scope="module", autouse=True)
def engine_environment():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment("cpu").items():
            patch.setenv(name, value)
        yield
