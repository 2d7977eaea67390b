"""What a model must be for its rows to be decoded together, tried on the model itself before anything is drawn."""

from weakref import WeakSet

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from qstar.cache import Side

PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)  # a subclass keeps something else beside its keys
LONG, SHORT, NEW = 12, 2, 4  # tokens of two prompts and of what follows each
# Relative errors that rounding alone does not reach. What goes wrong changes logits by half of their size and more;
# in 16 bits a deep mixture of experts that sends a token elsewhere for a tie comes to 0.1.
TOLERANCE, HALF_TOLERANCE = 0.01, 0.3
CAUSAL_TOLERANCE = 0.003  # of two passes of one shape, which round alike

_sound: WeakSet[torch.nn.Module] = WeakSet()


def check_model(model: torch.nn.Module, name: str) -> None:
    """Refuse a model that is not a causal language model with a plain KV cache, or minds its neighbours in a batch.

    The configuration tells some; others show in a few short forward passes: tokens of left-padded rows, read through
    the cache, must have the logits of a plain pass over their row alone. A model that has passed is not tried again.

    Args:
        model: on its device, in evaluation mode.
        name: what messages call it.

    Raises:
        ValueError: one line that says what the model does.
    """
    if model in _sound:
        return
    kind = f"{name} ({model.config.model_type})"
    if model.config.is_encoder_decoder:
        raise ValueError(f"{kind} is an encoder-decoder model; a decoder-only causal language model is needed")
    if not getattr(model.config, "is_decoder", True):
        raise ValueError(f"{kind} has is_decoder=False in its configuration: its tokens see those behind them")
    layers = DynamicCache(config=model.config).layers
    other = next((type(layer) for layer in layers if type(layer) not in PLAIN_LAYERS), None)
    if getattr(model, "_is_stateful", False) or hasattr(other, "update_recurrent_state"):
        raise ValueError(
            f"{kind} keeps recurrent state; only models whose layers all have a plain KV cache are supported"
        )
    if other is not None:
        raise ValueError(
            f"{kind} keeps more than keys and values ({other.__name__}); "
            "only models whose layers all have a plain KV cache are supported"
        )
    try:
        with torch.inference_mode():
            reason = _what_is_wrong(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises that takes other inputs, or another cache
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{kind} cannot be decoded with a plain KV cache: {message}") from error
    if reason is not None:
        training = "; it is in training mode" if model.training else ""
        raise ValueError(f"{kind} {reason}; a causal language model with a plain KV cache is needed{training}")
    _sound.add(model)


def _what_is_wrong(model: torch.nn.Module) -> str | None:
    """What the model does with rows of unlike length in one batch, read through the cache; None if all is right."""
    vocab_size = model.get_input_embeddings().weight.shape[0]
    special = {v for k, v in model.config.get_text_config().to_dict().items() if k.endswith("token_id")}
    ids = [i for i in range(vocab_size // 3, vocab_size) if i not in special]
    ids = ids[:: max(1, len(ids) // (LONG + SHORT + 2 * NEW))]
    long, short = ids[: LONG + NEW], ids[LONG + NEW :][: SHORT + NEW]
    side = Side(model, 0, ("theta",))

    def plain(row: list[int]) -> Tensor:
        return model(input_ids=torch.tensor([row], device=side.device), use_cache=False).logits[0]

    def cached(*rows: list[int]) -> list[Tensor]:
        """Logits [NEW + 1, V] from the end of each row's prompt on: prompts in one batch, and the last once more in its
        own, which joins them."""
        first, (of_prompts,) = side.prefill([row[:-NEW] for row in rows])
        second, (of_last,) = side.prefill([rows[-1][:-NEW]])
        first.join(second)
        (of_new,) = first.advance(torch.tensor([row[-NEW:] for row in (*rows, rows[-1])]))
        return list(torch.cat([torch.cat([of_prompts, of_last]), of_new], 1))

    def behind(other: list[int]) -> Tensor:
        return plain([*short[:-NEW], *other])[:SHORT]

    if (error := _error(behind(long[:NEW]), behind(short[-NEW:]))) > CAUSAL_TOLERANCE:
        return f"lets a token see those behind it (they change its logits by {error:.1%})"
    wanted = [plain(row)[-NEW - 1 :] for row in (long, short)]
    tolerance = TOLERANCE if wanted[0].dtype.itemsize >= 4 else HALF_TOLERANCE
    if (error := max(map(_error, cached(long), [wanted[0]] * 2))) > tolerance:
        return f"gives a sequence other logits through a KV cache than without (by {error:.1%})"
    if (error := max(map(_error, cached(long, short), [*wanted, wanted[1]]))) > tolerance:
        return f"gives a row other logits where it is padded on its left (by {error:.1%})"
    return None


def _error(found: Tensor, wanted: Tensor) -> float:
    """Relative error of a row's logits [K, V]: of the first column, and in the median of all. Columns that are NaN
    either way do not count."""
    found, wanted = (x.double() - x.double().mean(-1, keepdim=True) for x in (found, wanted.to(found.device)))
    errors = ((found - wanted).square().mean(-1) / wanted.square().mean(-1).clamp(min=1e-60)).sqrt()
    errors = errors.nan_to_num(nan=torch.inf)[wanted.isfinite().all(-1)]
    return max(errors[0], errors.median()).item() if len(errors) else 0.0
