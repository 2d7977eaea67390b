"""New weights for the pair of a running engine: what is checked before anything is written.

An update is a folder as `save_pretrained` writes it, for π_θ, π_t or both. Its tensors must be those of the model that
the engine was started with, so that what can be wrong with a folder is found while the old weights are still whole.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

TORN = "the last update of the weights did not succeed; nothing is drawn until one does"
FIRST_VERSION = "0"  # of the weights that an engine is started with; an update without a name counts on


def shapes(name: str | Path) -> dict[str, list[int]]:
    """The tensors of a checkpoint in safetensors, by the headers of its files.

    Raises:
        ValueError: there are none, or one is torn.
    """
    folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(str(name), local_files_only=True))
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "np") as file:
                found |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
    if not found:
        raise ValueError(f"{name} has no weights in safetensors")
    return found


def check_update(pair: Any, folders: Mapping[str, str]) -> None:
    """Refuse folders that do not hold all the weights of the models that they are for.

    Args:
        pair: the engine's `EnginePair`, whose `names` are what it was started with.
        folders: those of the new weights, by side.

    Raises:
        ValueError: no side is named, or one has other tensors; the message names some.
    """
    if not folders or not folders.keys() <= pair.names.keys():
        raise ValueError(
            f"new weights are for {' or '.join(pair.names)}, not {', '.join(map(repr, folders)) or 'nothing'}"
        )
    for side, folder in folders.items():
        if not Path(folder).is_dir():
            raise ValueError(f"{folder} is no folder")
        tied = set(getattr(getattr(pair, side), "all_tied_weights_keys", None) or ())
        old, new = ({k: v for k, v in shapes(x).items() if k not in tied} for x in (pair.names[side], folder))
        if differing := [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]:
            shown = ", ".join(f"{key} {old.get(key, 'none')} / {new.get(key, 'none')}" for key in differing[:3])
            raise ValueError(f"{folder} is not for {side}: {len(differing)} tensors differ (engine / folder): {shown}")


class Versions:
    """The names of an engine's weights, one after the other.

    Attributes:
        now: of those that are loaded; None where the last update did not succeed.
        updates: how many were begun.
    """

    def __init__(self):
        self.now: str | None = FIRST_VERSION
        self.updates = 0

    def next(self, wanted: str | None) -> str:
        """The name of new weights: the one that is wanted, or the next number.

        Raises:
            ValueError: it is no name, or that of the weights that are to be replaced.
        """
        version = str(self.updates + 1) if wanted is None else wanted
        if not isinstance(version, str) or not version or len(version) > 256:
            raise ValueError(f"version is {wanted!r:.40}; it must be a text of 1 to 256 characters")
        if version == self.now:
            raise ValueError(f"version {version!r} is the one that is loaded; give the new weights a name of their own")
        return version

    @contextmanager
    def loading(self, version: str) -> Iterator[None]:
        """Inside, weights of that name are loaded.

        Raises:
            RuntimeError: that failed; then nothing is to be drawn.
        """
        self.now, self.updates = None, self.updates + 1
        try:
            yield
        except Exception as error:  # vLLM's workers raise all kinds
            raise RuntimeError(f"{TORN}: {' '.join(str(error).split())}") from error
        self.now = version
