"""Pairs made from a pair: nearer or farther apart, and with a costlier π_t."""

import copy

import torch


def shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: x.shape for name, x in model.state_dict().items()}


def moved(theta: torch.nn.Module, t: torch.nn.Module, distance: float) -> torch.nn.Module:
    """π_θ + distance · (π_t − π_θ), parameter by parameter, of two models of one shape."""
    model, of_theta = copy.deepcopy(t), theta.state_dict()
    model.load_state_dict({n: of_theta[n] + distance * (x - of_theta[n]) for n, x in t.state_dict().items()})
    return model


def enlarged(model: torch.nn.Module, times: int) -> torch.nn.Module:
    """A Llama that computes the same and costs `times` as much: the new layers add nothing to the residual stream."""
    config = copy.deepcopy(model.config)
    layers = config.num_hidden_layers
    config.num_hidden_layers = layers * times
    large = type(model)(config).eval().to(model.device, model.dtype)
    large.load_state_dict(model.state_dict(), strict=False)
    for layer in large.model.layers[layers:]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    large.generation_config = model.generation_config
    return large
