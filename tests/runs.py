"""Files of runs, and runs that are killed at random moments."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_through_kills(run: Callable[[], int], written: list[Path], kills: int) -> None:
    """Start `run` in forked children, kill -9 the first `kills` of them at random moments, let the last one finish.

    `written` are the files that show how far it is. Fails if fewer kills than asked for were struck, or all of them
    before anything was written.
    """
    seed = int(os.environ.get("QSTAR_TEST_SEED", "0"))
    rng = random.Random(seed)
    print(f"seed {seed}")

    def size() -> int:
        return sum(path.stat().st_size for path in written if path.exists())

    struck, sizes = 0, []
    while True:
        child = os.fork()
        if child == 0:
            code = 99
            try:
                code = run()
            finally:
                os._exit(code)
        if struck < kills:
            # wait for nothing (a kill while it starts) or for a few writes, which come in groups, then strike somewhere
            # between two of them
            deadline = time.time() + 60
            for _ in range(rng.choice((0, 1, 1, 2, 2))):
                seen = size()
                while size() <= seen and time.time() < deadline:
                    time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        struck += 1
        sizes.append(written[0].stat().st_size if written[0].exists() else 0)
    print(f"{struck} kills, {sum(size > 0 for size in sizes)} of them with samples on disk")
    assert struck >= 5 * kills // 6
    assert len(set(sizes)) > kills // 5, "the kills must fall into the run, not before it"
