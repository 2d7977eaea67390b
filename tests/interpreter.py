"""Conditions to run kernels in: fresh memory full of nonsense, and Triton's interpreter without its idle work."""

from contextlib import contextmanager

import torch


@contextmanager
def poisoned():
    """Fresh memory holds NaN or nonsense, so that an element which no kernel writes fails a test."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(torch.nan if x.is_floating_point() else -77777)

    torch.empty = lambda *args, **kwargs: poison(empty(*args, **kwargs))
    torch.empty_like = lambda *args, **kwargs: poison(empty_like(*args, **kwargs))
    try:
        yield
    finally:
        torch.empty, torch.empty_like = empty, empty_like


def interpret_quickly() -> None:
    """The interpreter patches the language again at every call of a device function: half of all the time."""
    from triton.runtime import interpreter

    patch_language, patched = interpreter._patch_lang, set()

    def call_device_function(self, *args, **kwargs):
        if id(self.fn.__globals__) not in patched:
            patch_language(self.fn)
            patched.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call_device_function
