"""The house's floors: a room imports rooms below it only, and each heavy guest is met in its own rooms only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "megatron_opd"
FLOORS = [
    {"types", "errors"},
    {"config", "interfaces", "runtime"},
    {"kernels", "estimators", "data", "store", "metrics", "guard"},
    {"weights"},
    {"model"},
    {"rollout", "teacher", "learner"},
    {"fleet", "recovery"},
    {"preflight", "controller", "placement", "turns", "progress", "summary"},
    {"roles", "launch", "convert", "plan"},
    {"slurm"},
    {"cli"},
]
GUESTS = {
    "megatron": {"model", "learner", "teacher/megatron.py", "runtime/megatron_cpu.py"},
    "vllm": {"rollout", "teacher/vllm.py"},
    "triton": {"kernels"},
    "transformer_engine": {"model", "kernels/te.py"},
    "transformer_engine_torch": {"kernels/te.py"},
    "zmq": {"runtime"},
    "omegaconf": {"config", "estimators"},
    "rich": {"progress", "summary", "cli", "convert", "plan/show.py"},
}


def rooms():
    return {room: floor for floor, names in enumerate(FLOORS) for room in names}


def room_of(path):
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imports(path):
    """Absolute names of everything a file imports, also inside functions; not what is for type checkers only."""
    tree = ast.parse(path.read_text())
    checked_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in checked_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = sorted(path for path in ROOT.rglob("*.py") if path.name not in {"__main__.py"} and path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_rooms_below_it(path):
    floor_of, room = rooms(), room_of(path)
    assert room in floor_of, f"{room} stands on no floor"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "megatron_opd" or len(parts) < 2 or parts[1] == room:
            continue
        assert parts[1] in floor_of, f"{path} imports {name}"
        assert floor_of[parts[1]] < floor_of[room] or floor_of[parts[1]] == floor_of[room] == 1, (
            f"{room} imports {name}, which is not below it"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_guest_is_met_only_in_its_rooms(path):
    relative = str(path.relative_to(ROOT))
    for name in imports(path):
        guest = name.split(".")[0]
        allowed = GUESTS.get(guest)
        if allowed is not None:
            assert relative in allowed or room_of(path) in allowed, (
                f"{relative} imports {name}; {guest} lives in {', '.join(sorted(allowed))}"
            )


def test_estimators_know_neither_kernels_nor_processes():
    for path in (ROOT / "estimators").glob("*.py"):
        assert not [n for n in imports(path) if n.startswith(("megatron_opd.kernels", "torch.distributed", "megatron."))]


def test_weights_know_no_modules():
    for path in (ROOT / "weights").glob("*.py"):
        assert not [n for n in imports(path) if n.startswith(("torch.nn", "megatron."))]
