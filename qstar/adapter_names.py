"""What an adapter says of itself, for a command line too, which does without torch."""

import functools
import json
from contextlib import suppress
from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"


def base_of(name: str | Path) -> str | None:
    """The model that an adapter, a folder's or the hub's, was made for; None where there is no adapter of that name.

    Raises:
        ValueError: the adapter does not name it.
    """
    folder = Path(name).expanduser()
    found = folder / ADAPTER_CONFIG
    if not folder.is_dir():
        found = config_of_hub(str(name))
    if found is None or not Path(found).is_file():
        return None
    base = json.loads(Path(found).read_bytes()).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{name} is an adapter that does not name its base; give the base, and this as its adapter")
    return base


@functools.cache  # the hub is asked once: a command looks at a name, takes its fingerprint and loads it
def config_of_hub(name: str) -> str | None:
    """The file that an adapter on the hub is described by; None where there is none, which loading says more of."""
    from transformers.utils import find_adapter_config_file

    with suppress(OSError, ValueError):
        return find_adapter_config_file(name)
    return None
