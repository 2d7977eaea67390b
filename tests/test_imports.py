"""The house: who may import whom, and that nobody imports in a circle. Imports inside functions count too."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the ground up: a module imports from its own floor and those below. What is named by no floor is a command's, or
# the loop's.
FLOORS = (
    ("qstar_kernels",),
    ("qstar.demo",),
    ("qstar",),  # the loop
    ("qstar.integrations",),  # the loop in other people's trainers
    ("qstar.vllm",),
    ("qstar.backends",),
    ("qstar.data",),
    ("qstar.run",),
    ("qstar.diagnostics",),
    tuple(f"qstar.{command}" for command in ("generate", "score", "serve", "merge", "plan", "analyze", "report")),
    ("qstar.experiments",),
    ("qstar.__main__",),
)
PACKAGES = ("qstar_kernels", "qstar", "bench", "theory")
# Programs that stand in the folder of what they are about
PROGRAMS = {"qstar.demo.evaluate", "qstar.demo.train"}


def modules() -> dict[str, Path]:
    """All modules of the packages by name, without the faces of packages, which only hand names on."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: set[str]) -> set[str]:
    """The modules among the known ones that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names}
    return found & known


def floor(name: str) -> int:
    """That of the longest prefix which a floor names."""
    named = [
        (len(prefix), i) for i, floor in enumerate(FLOORS) for prefix in floor if f"{name}.".startswith(f"{prefix}.")
    ]
    return max(named)[1]


def test_nothing_imports_in_a_circle():
    found = modules()
    faces = {"qstar", "qstar_kernels"}  # import what they hand on
    TopologicalSorter({name: imported(path, set(found)) - faces for name, path in found.items()}).prepare()


def test_nothing_imports_upwards():
    found = {name: path for name, path in modules().items() if name.startswith("qstar") and name not in PROGRAMS}
    upwards = {
        f"{name} imports {other}"
        for name, path in found.items()
        for other in imported(path, set(found))
        if floor(other) > floor(name)
    }
    assert upwards == set()


def test_trainers_are_imported_by_name_only():
    """Nothing of the package needs peft, trl or verl to be imported, and the integrations nothing but their own."""
    code = (
        "import sys, qstar, qstar.backends, qstar.generate, qstar.serve, qstar.integrations.trl;"
        "print(*(name for name in ('peft', 'trl', 'verl', 'openai', 'vllm') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (done.stdout.split(), done.returncode) == ([], 0), done.stderr
