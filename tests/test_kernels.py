"""The Triton kernels against the reference. Triton decides at its import whether it interprets, hence the process."""

import os
import subprocess
import sys
from pathlib import Path


def test_in_the_interpreter():
    """All tests of `kernels_interpreted.py`; their own report is printed."""
    file = Path(__file__).with_name("kernels_interpreted.py")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-s",
        "-W",
        "ignore::RuntimeWarning",
        "-p",
        "no:cacheprovider",
        file,
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=file.parents[1])
    print(run.stdout[-20000:], run.stderr[-5000:])
    assert run.returncode == 0
