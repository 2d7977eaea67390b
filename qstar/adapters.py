"""Adapters on one base: π_θ and π_t as one set of weights with and without an adapter, or with two of them.

peft puts an adapter into its base in place, so that the base alone is no other model than the adapted one. `Adapted`
says which adapter each row of a batch has. Where peft mixes adapters in a batch (LoRA) both sides of a pair go through
one forward pass; otherwise the adapter is switched for each.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from qstar.cache import kept
from qstar.probe import OTHER_SHAPE, relative_error
from qstar.rope import Ropes

BASE = "__base__"  # peft's name for no adapter
MERGED = "an adapter is merged into the base, which is then not the base; call unmerge_adapter()"


@contextmanager
def in_evaluation(*models: torch.nn.Module) -> Iterator[None]:
    """Models are in evaluation mode inside, and each of their modules in the mode that it was in before afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def is_peft(model: torch.nn.Module) -> bool:
    """Whether it is a peft model; without importing peft."""
    return "peft" in sys.modules and isinstance(model, sys.modules["peft"].PeftModel)


def are_one_model(theta: torch.nn.Module, t: torch.nn.Module) -> bool:
    """Whether two sides have the same numbers without saying so: all the weights of one are among the other's."""
    if theta is t:
        return is_peft(theta)
    if isinstance(theta, Adapted) and isinstance(t, Adapted) and theta.peft is t.peft:
        return theta.names == t.names
    weights_theta, weights_t = ({id(p) for p in model.parameters()} for model in (theta, t))
    shared = len(weights_theta & weights_t)
    return shared > 0 and shared == min(len(weights_theta), len(weights_t))


class Adapted(torch.nn.Module):
    """A peft model whose rows have these adapters in turn, whichever is active in it.

    Args:
        peft: a causal language model with adapters inside its layers; it is used as it is, and not copied.
        *names: of an adapter each, or `__base__` for none. Rows i, i + len(names), … have the i-th.

    Attributes:
        mixes: whether peft takes rows with different adapters in one forward pass.

    Raises:
        ValueError: an adapter is not there, is merged, or changes more than its layers' outputs; while reading: the
            adapters are switched off, or several are asked for where peft does not mix them.
    """

    def __init__(self, peft: torch.nn.Module, *names: str):
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        super().__init__()
        self.peft, self.names = peft, names
        self.training = False  # of this module alone, which has nothing that minds
        check_adapters(peft, names)
        self._tuned = [m for m in peft.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
        kinds = {str(getattr(peft.peft_config[name].peft_type, "value", "")) for name in names if name != BASE}
        # other kinds do not look at the names
        self.mixes = kinds <= {"LORA"} and self._tried()

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "peft":  # while it is being made or copied
                raise
            return getattr(self.peft, name)

    def get_base_model(self) -> torch.nn.Module:
        """The causal language model that the adapters are in."""
        return self.peft.get_base_model()

    def forward(self, input_ids: Tensor, **inputs):
        """The forward pass of the model inside, int64 [B, L], each row with its adapter."""
        if not self.peft.has_active_enabled_adapter or any(layer.disable_adapters for layer in self._tuned):
            raise ValueError("the adapters are switched off (disable_adapter); q* is drawn outside of that")
        if any(getattr(layer, "merged", False) for layer in self._tuned):
            raise ValueError(MERGED)
        if self.mixes:
            times, rest = divmod(len(input_ids), len(self.names))
            if rest:
                raise ValueError(f"{len(input_ids)} rows for {len(self.names)} adapters in turn; give as many of each")
            with mixed(self._tuned, [*self.names] * times):
                return self.peft(input_ids=input_ids, **inputs)
        (name,) = self.names
        with switched(self.peft, name):
            return self.peft(input_ids=input_ids, **inputs)

    @torch.inference_mode()
    def _tried(self) -> bool:
        """Whether rows of one batch have the logits that each has where its adapter is switched to."""
        names = [*dict.fromkeys((*self.names, BASE))]
        device = self.peft.get_input_embeddings().weight.device
        ids = torch.tensor([[1, 2, 3, 4]] * len(names), device=device)
        with in_evaluation(self.peft):
            try:
                with mixed(self._tuned, names):
                    found = self.peft(input_ids=ids).logits
            except (ValueError, TypeError, NotImplementedError):  # DoRA, and layers that do not know of it
                return False
            for row, name in zip(found, names, strict=True):
                with switched(self.peft, name):
                    wanted = self.peft(input_ids=ids[:1]).logits[0]
                if relative_error(row, wanted) > OTHER_SHAPE[min(wanted.dtype.itemsize, 4)]:
                    return False
        return True


def check_adapters(peft: torch.nn.Module, names: tuple[str, ...]) -> None:
    """Refuse adapters that are not there, or beside which the base is no longer the base.

    Raises:
        ValueError: one line that says which, and why.
    """
    if any(getattr(module, "merged", False) is True for module in peft.modules()):
        raise ValueError(MERGED)
    for name in names:
        if name == BASE:
            continue
        if name not in peft.peft_config:
            raise ValueError(f"there is no adapter {name!r}; there are {', '.join(peft.peft_config)}")
        config = peft.peft_config[name]
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise ValueError(f"adapter {name!r} puts tokens in front of the prompt; adapters of layers are accepted")
        if getattr(config, "alora_invocation_tokens", None):
            raise ValueError(f"adapter {name!r} begins in the middle of a prompt (aLoRA); others are accepted")
    for name, config in peft.peft_config.items():
        if getattr(config, "bias", "none") not in ("none", False):
            raise ValueError(f"adapter {name!r} changes the biases of its base, so that there is no base beside it")


@contextmanager
def mixed(layers: list[torch.nn.Module], names: list[str]) -> Iterator[None]:
    """Inside, row i of every tuned layer's input has the adapter `names[i]`.

    peft's own way to say it (`adapter_names` of the forward pass) leaves its hooks behind where a pass fails, and takes
    the tokens that an expert was sent for rows where they are as many.
    """

    def hook(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if not args or (args[0].is_floating_point() and args[0].ndim < 3):
            raise ValueError(f"{type(module).__name__} gets tokens of several rows at once")
        return args, kwargs | {"adapter_names": names}

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def switched(peft: torch.nn.Module, name: str) -> Iterator[None]:
    """Inside, the peft model has this adapter alone, or none; afterwards it is as before, and so is what is trained."""
    active, trained = peft.active_adapter, [(p, p.requires_grad) for p in peft.parameters()]
    try:
        if name == BASE:
            with peft.disable_adapter():
                yield
        else:
            peft.set_adapter(name)
            yield
    finally:
        if peft.active_adapter != active:
            peft.set_adapter(active)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def in_one_pass(theta: torch.nn.Module, t: torch.nn.Module) -> Adapted | None:
    """The module that goes forward for both sides at once, rows of π_θ and π_t in turn; None where there is none.

    A row of a LongRoPE model, or one with states, may be read again by itself, and would then have the wrong adapter.
    """
    if not (isinstance(theta, Adapted) and isinstance(t, Adapted) and theta.peft is t.peft and theta is not t):
        return None
    if not (theta.mixes and t.mixes) or "states" in kept(theta) or Ropes(theta).switch is not None:
        return None
    return Adapted(theta.peft, *theta.names, *t.names)


def with_adapters(base: torch.nn.Module, adapters: dict[str, tuple[str | Path, str | None]]) -> torch.nn.Module:
    """Load adapters onto a base: the peft model, in evaluation mode, its adapters called by these names.

    Args:
        base: a causal language model; it is changed.
        adapters: the name or folder of each, and its revision.

    Raises:
        ValueError: peft is not installed, or an adapter does not fit the base.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise ValueError("an adapter needs peft: pip install 'qstar[peft]'") from None

    model = None
    for name, (folder, revision) in adapters.items():
        options = {"adapter_name": name, "is_trainable": False, "revision": revision}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*missing adapter keys")
                if model is None:
                    model = PeftModel.from_pretrained(base, str(folder), **options)
                else:
                    model.load_adapter(str(folder), **options)
        except (ValueError, KeyError, RuntimeError, UserWarning) as error:
            message = " ".join(str(error).split())
            raise ValueError(f"the adapter {folder} cannot be put on its base: {message[:300]}") from error
    return model.eval()
