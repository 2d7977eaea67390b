"""`pytest bench/ --benchmark` times; without the flag the cases of this folder are left out."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="run and time the benchmarks of bench/")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--benchmark"):
        here = [item for item in items if item.path.parent == config.rootpath / "bench"]
        config.hook.pytest_deselected(items=here)
        items[:] = [item for item in items if item not in here]
