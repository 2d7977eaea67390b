"""The JSON of an experiment: every cell's numbers for every seed, their means and spreads, and what they were made on.

The file is written again after every cell, so that a run that was killed goes on with the next one.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qstar.run.output import explained, json_line, replacing

PACKAGES = ("torch", "transformers", "trl", "numpy")


class ResultsError(ValueError):
    """A results file that cannot be gone on with; the message is one line."""


def machine() -> dict[str, Any]:
    """What times depend on, and nothing that tells whose machine it is."""
    name = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
    }


def load(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        ResultsError: it cannot be read as one.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(results, dict) or not {"settings", "cells", "seconds"} <= results.keys():
        raise ResultsError(f"{path} is no results file of qstar.experiments; give another --output")
    return results


def run(
    path: Path,
    cells: dict[str, Callable[[int], dict]],
    seeds: int,
    settings: dict[str, Any],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Run the cells that the file does not have yet, seed by seed, and return all of its results.

    Raises:
        ResultsError: the file is of other settings, or is none.
        OutputError: it cannot be written.
    """
    settings = json.loads(json.dumps(settings))
    results = {"settings": settings, "machine": machine(), "seconds": {}, "cells": {name: {} for name in cells}}
    if path.exists():
        results = load(path)
        if results["settings"] != settings:
            raise ResultsError(f"{path} holds results of other settings; give another --output, or delete it")
    for seed in range(seeds):
        for name, cell in cells.items():
            of_cell = results["cells"].setdefault(name, {})
            if str(seed) in of_cell:
                continue
            start = time.perf_counter()
            of_cell[str(seed)] = cell(seed)
            seconds = time.perf_counter() - start
            results["seconds"].setdefault(name, {})[str(seed)] = round(seconds, 2)
            results["summary"] = summary(results["cells"])
            with explained(path), replacing(path) as file:
                file.write(json_line(results))
            say(f"{path.stem}: {name}, seed {seed}: {seconds:.1f} s")
    return results


def summary(cells: dict[str, dict[str, dict]]) -> dict[str, dict[str, dict]]:
    """Mean, standard deviation and number of the seeds of every number of every cell; lists entry by entry."""
    return {
        name: {key: spread([numbers.get(key) for numbers in seeds.values()]) for key in next(iter(seeds.values()))}
        for name, seeds in cells.items()
        if seeds
    }


def spread(values: list) -> dict[str, Any] | list:
    """{mean, std, n} of the numbers among the values; of lists a list of that."""
    lists = [v for v in values if isinstance(v, list)]
    if lists:
        return [spread(list(entries)) for entries in zip(*lists, strict=True)]
    numbers = [float(v) for v in values if v is not None]
    return {
        "mean": statistics.fmean(numbers) if numbers else None,
        "std": statistics.stdev(numbers) if len(numbers) > 1 else None,
        "n": len(numbers),
    }
