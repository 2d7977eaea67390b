"""A worker without models, for `bench.feeding`: it answers a part after a given time, with files as a part has them.

It imports next to nothing, so that many of them find room on one machine.
"""

import json
import os
import time
from pathlib import Path


class Stub:
    """In place of `qstar.run.cluster.Worker`.

    Args:
        seconds: that a part takes.
        folder: where its files are put, None for nowhere.
        content: of a part's file, by kind.
        summary: what is told of a part.
    """

    def __init__(self, seconds: float, folder: str | None, content: dict[str, bytes], summary: dict):
        self.seconds, self.folder, self.content, self.summary = seconds, folder, content, summary

    def __call__(self, batch: dict) -> dict[str, list[str]]:
        begun, part = time.time(), int(batch["part"][0])
        time.sleep(self.seconds)
        for kind, data in self.content.items() if self.folder else ():
            path = Path(self.folder) / kind / f"part-{part:06d}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{path}.tmp", "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{path}.tmp", path)
        result = {"part": part, "error": None, "begun": begun, "ended": time.time(), "failed": 0, "drafts": {}}
        return {"result": [json.dumps(result | {"summary": self.summary})]}
