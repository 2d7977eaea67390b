"""What a model must be for its rows to be decoded together, tried on the model itself before anything is drawn."""

from weakref import WeakSet

import torch
from torch import Tensor
from transformers import DynamicCache

from qstar.cache import Side, check_mode, kept, own_cache

# What a `Side` can hold, by transformers' names: keys and values, states, both, or nothing where a layer has those of
# another one. A subclass keeps something else.
LAYERS = {
    "DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer", "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer",
}  # fmt: skip
LONG, SHORT, NEW = 12, 2, 4  # tokens of two prompts and of what follows each
# Relative errors that rounding alone does not reach, in 32 bits and in 16: of two passes of one shape, which round
# nearly alike, and of others, where a deep mixture of experts that sends a token elsewhere for a tie comes to 0.1 in 16
# bits. What a model does wrong changes its logits by a tenth and by half of their size, or more.
SAME_SHAPE, OTHER_SHAPE = {4: 0.001, 2: 0.05}, {4: 0.01, 2: 0.3}

_sound: WeakSet[torch.nn.Module] = WeakSet()


def check_model(model: torch.nn.Module, name: str) -> None:
    """Refuse a model that is not a causal language model with a plain cache, or minds its neighbours in a batch.

    The configuration tells some; others show in a few short forward passes: tokens of left-padded rows, read through
    the cache, must have the logits of a plain pass over their row alone. A model that has passed is not tried again.

    Args:
        model: on its device; on the meta device only its configuration is looked at.
        name: what messages call it.

    Raises:
        ValueError: one line that says what the model does; it is in training mode.
    """
    kind = f"{name} ({model.config.model_type})"
    if model.config.is_encoder_decoder:
        raise ValueError(f"{kind} is an encoder-decoder model; a decoder-only causal language model is needed")
    check_mode(model, name)
    if model in _sound:
        return
    try:
        with torch.inference_mode():
            reason = _state(model) or _behaviour(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises that takes other inputs, or another cache
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{kind} cannot be decoded with a plain cache: {message}") from error
    if reason is not None:
        raise ValueError(f"{kind} {reason}; a causal language model with a plain cache is needed")
    _sound.add(model)


def _state(model: torch.nn.Module) -> str | None:
    """What the model's layers remember beside keys and values; None if nothing."""
    names = [type(layer).__name__ for layer in DynamicCache(config=model.config).layers]
    other = next((name for name in names if name not in LAYERS), None)
    if other:
        return f"keeps more than keys, values and states by row ({other})"
    if "states" not in kept(model):
        return "keeps states in a form of its own" if getattr(model, "_is_stateful", False) else None
    if not model.get_input_embeddings().weight.is_meta and own_cache(model) is None:
        return "keeps states in itself, and in no cache"
    return None


def _behaviour(model: torch.nn.Module) -> str | None:
    """What the model does wrong with rows of unlike length in one batch, read through the cache; None if nothing."""
    weight = model.get_input_embeddings().weight
    if weight.is_meta:  # of a model that another engine runs
        return None
    settings = model.config.to_dict() | model.config.get_text_config().to_dict()
    special = [v for k, v in settings.items() if k.endswith(("token_id", "token_index"))]  # an image's wants an image
    special = {i for v in special for i in (v if isinstance(v, list) else [v])}
    ids = [i for i in range(len(weight)) if i not in special]
    count = LONG + SHORT + 2 * NEW
    ids = [ids[i * len(ids) // count] for i in range(count)]
    long, short = ids[: LONG + NEW], ids[LONG + NEW :]

    def plain(row: list[int]) -> Tensor:
        return model(input_ids=torch.tensor([row], device=weight.device), use_cache=False).logits[0]

    def cached(*rows: list[int]) -> list[Tensor]:
        """Logits [NEW + 1, V] from the end of each row's prompt on: prompts in one batch, and the last once more in its
        own, which joins them."""
        side = Side(model, 0, ("theta",))
        (of_prompts,) = side.prefill([row[:-NEW] for row in rows])
        if not side.has_states and not side.cache.get_seq_length():
            raise ValueError("it leaves the cache empty")
        (of_last,) = side.prefill([rows[-1][:-NEW]])
        new = torch.tensor([row[-NEW:] for row in (*rows, rows[-1])])
        # layers with states go other ways for one token and for several
        blocks = new.split([1, NEW - 1], 1) if side.has_states else [new]
        of_new = [logits for block in blocks for logits in side.advance(block)]
        return list(torch.cat([torch.cat([of_prompts, of_last]), *of_new], 1))

    def behind(other: list[int]) -> Tensor:
        return plain([*short[:-NEW], *other])[:SHORT]

    wanted = [plain(row)[-NEW - 1 :] for row in (long, short)]
    size = min(wanted[0].dtype.itemsize, weight.dtype.itemsize, 4)  # some turn logits of 16 bits into 32
    if (error := relative_error(behind(long[:NEW]), behind(short[-NEW:]))) > SAME_SHAPE[size]:
        return f"lets a token see those behind it, which change its logits {_by(error)}"
    if (error := max(map(relative_error, cached(long), [wanted[0]] * 2))) > OTHER_SHAPE[size]:
        return f"has logits through a cache that differ {_by(error)} from those without"
    if (error := max(map(relative_error, cached(long, short), [*wanted, wanted[1]]))) > OTHER_SHAPE[size]:
        return f"has logits of a left-padded row that differ {_by(error)} from those of the row alone"
    return None


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Relative error of a row's logits [K, V], of the first column and in the median of all: a mixture of experts may
    send a token elsewhere for a tie. Logits that are wanted to be infinite or NaN do not count."""
    valid = wanted.isfinite()
    found, wanted = (x.double().where(valid, 0.0) for x in (found, wanted))
    spread = (wanted - wanted.mean(-1, keepdim=True)).square().mean(-1)
    errors = ((found - wanted).square().mean(-1) / spread.clamp(min=1e-60)).sqrt().nan_to_num(nan=torch.inf)
    return max(errors[0], errors.median()).item()


def _by(error: float) -> str:
    return "to NaN" if error == torch.inf else f"by {error:.1%}"
