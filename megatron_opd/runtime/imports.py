"""Objects named in settings: `package.module:name` or `path/to/file.py:name`."""

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from megatron_opd.errors import ConfigError


def load_object(reference: str, setting: str) -> Any:
    """The named object.

    Raises:
        ConfigError: the reference is malformed, or leads nowhere; names the setting that holds it.
    """
    place, _, name = reference.rpartition(":")
    if not place or not name:
        raise ConfigError(f"{setting}={reference!r} is not of the form package.module:name or file.py:name")
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # the user's own file may raise anything
        raise ConfigError(f"{setting}={reference!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise ConfigError(f"{setting}={reference!r}: {place} has no {name!r}")
    return getattr(module, name)


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    name = f"_user_file_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"  # shadows no module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, f"{path} ends in .py, so a loader exists"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up there
    spec.loader.exec_module(module)
    return module
