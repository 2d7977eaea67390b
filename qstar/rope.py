"""Rotary frequencies that depend on the length of the sequence: LongRoPE, and dynamic NTK.

A LongRoPE model (Phi-3, Phi-4-mini, …) has short frequencies for sequences of up to `original_max_position_embeddings`
tokens, and long ones, at all positions, for longer sequences. transformers goes by the largest position in a forward
pass: rows of a batch then share one set, and pieces of a prompt do not. Here each row has the set of its own length, so
that the distribution of the token after n others is what a plain forward pass over those n gives, be they prompt or
answer. What is cached of a row that outgrows the short set is computed again (`qstar.cache.Side`).

Dynamic NTK has other frequencies at every length beyond `max_position_embeddings`, and in transformers they depend on
what was run before. Up to there it is a plain rope, and rows end there.
"""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.nn.functional import pad


class Ropes:
    """What of a model's rotary frequencies depends on the length of a sequence.

    Attributes:
        switch: tokens up to which a sequence has the short frequencies of LongRoPE; None without it.
        limit: tokens that a sequence may have because of dynamic NTK; None without it.

    Raises:
        ValueError: the model has LongRoPE of its own kind, or of several.
    """

    def __init__(self, model: torch.nn.Module):
        self.modules: list[torch.nn.Module] = []
        switches, limits = set(), set()
        embeddings = [m for m in model.modules() if isinstance(getattr(m, "rope_type", None), (str, dict))]
        for module in embeddings:
            kinds = module.rope_type if isinstance(module.rope_type, dict) else {None: module.rope_type}
            for layer_type, kind in kinds.items():
                if kind == "longrope":
                    parameters = module.config.rope_parameters
                    parameters = parameters if layer_type is None else parameters[layer_type]
                    switches.add(parameters["original_max_position_embeddings"])
                    self.modules += [module] if module not in self.modules else []
                elif kind == "dynamic":
                    limits.add(module.original_max_seq_len)
        if not embeddings:  # of a checkpoint's own code
            config = model.config.get_text_config()
            parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
            kind = parameters.get("rope_type", parameters.get("type"))
            if kind in ("longrope", "su"):
                raise ValueError("its own LongRoPE does not let rows of unlike length be told apart")
            if kind == "dynamic":
                limits.add(config.max_position_embeddings)
        if len(switches) > 1:
            raise ValueError(f"its layers have LongRoPE that switches at {sorted(switches)} tokens; it must be at one")
        self.switch, self.limit = max(switches, default=None), min(limits, default=None)

    def is_long(self, length: int) -> bool:
        """Whether a sequence of so many tokens has the long frequencies."""
        return self.switch is not None and length > self.switch

    def of_rows(self, long: list[bool]) -> AbstractContextManager[None]:
        """Forward passes inside give each row the long frequencies or the short ones."""
        return self._hooked(long) if self.modules else nullcontext()

    @contextmanager
    def _hooked(self, long: list[bool]) -> Iterator[None]:
        order = sorted(range(len(long)), key=long.__getitem__)  # the short rows first
        back = sorted(range(len(long)), key=order.__getitem__)
        groups = [group for group in (order[: long.count(False)], order[long.count(False) :]) if group]

        def hook(module: torch.nn.Module, args: tuple, kwargs: dict, _) -> Tensor | tuple[Tensor, ...]:
            call = inspect.signature(module.forward).bind(*args, **kwargs)
            positions = call.arguments["position_ids"]
            if positions.shape[:-1] != (len(long),):
                raise ValueError(f"LongRoPE at positions {list(positions.shape)}; they must be [rows, columns]")
            found = []
            for rows in groups:
                # the module goes by the largest position of all: that of a column behind the others
                last = self.switch if long[rows[0]] else self.switch - 1
                call.arguments["position_ids"] = pad(positions[rows], (0, 1), value=last)
                out = module.forward(*call.args, **call.kwargs)
                found.append(out if isinstance(out, tuple) else (out,))
            out = tuple(torch.cat(parts)[back, :-1] for parts in zip(*found, strict=True))
            return out if len(out) > 1 else out[0]

        with ExitStack() as stack:
            for module in self.modules:
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield
