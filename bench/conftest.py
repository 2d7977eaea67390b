"""`pytest bench/ --benchmark` times, and saves what it finds in bench/results/; without the flag nothing here runs."""

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

PACKAGES = ("torch", "triton", "transformers", "flashinfer-python", "vllm", "qstar")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="run and time the benchmarks of bench/")
    parser.addoption(
        "--pair", nargs=2, metavar=("THETA", "T"), help="time decoding on this pair too, beside the demo pair"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--benchmark"):
        config.option.benchmark_autosave = f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
        if config.option.benchmark_storage == "file://./.benchmarks":  # the plugin's default
            config.option.benchmark_storage = f"file://{Path(__file__).with_name('results')}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--benchmark"):
        here = [item for item in items if item.path.parent == Path(__file__).parent]
        config.hook.pytest_deselected(items=here)
        items[:] = [item for item in items if item not in here]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """What the figures depend on, and nothing that tells whose machine it is."""
    cpu = machine_info.get("cpu", {})
    machine_info.clear()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    machine_info |= {
        "cpu": " ".join(str(cpu.get("brand_raw") or platform.processor() or platform.machine()).split()),
        "cores": cpu.get("count"),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict:
    """The commit that was measured."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", ":/"], capture_output=True, text=True).stdout
    return {"id": commit or "unknown", "dirty": any(not line.startswith("??") for line in changed.splitlines())}


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
