"""Low-rank updates of the language model that go along with a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Adapter(nn.Module):
    """Adds a product of two small matrices to linear layers of a language model (LoRA, arXiv:2106.09685), so
    that it reads a module's tokens better. Its own weights stay as they are: hooks add what is learned, as
    long as the module is in the host, to prompts without images too.

    layers  paths from the decoder's stack of layers to its linear layers, and their (in, out) widths
    alpha   the product counts alpha / rank times; None: once

    A fresh one adds nothing.
    """

    def __init__(
        self, layers: Mapping[str, tuple[int, int]], rank: int = 16, alpha: float | None = None
    ) -> None:
        super().__init__()
        if type(rank) is not int or rank < 1:
            raise ValueError(f"the rank of an adapter is a whole number and at least 1, not {rank!r}")
        if alpha is not None and not alpha > 0:
            raise ValueError(f"the alpha of an adapter is a positive number, not {alpha!r}")
        self.layers = {name: tuple(widths) for name, widths in layers.items()}
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        self.down = nn.ParameterList(nn.Parameter(torch.empty(rank, i)) for i, _ in self.layers.values())
        self.up = nn.ParameterList(nn.Parameter(torch.zeros(o, rank)) for _, o in self.layers.values())
        for (width, _), weight in zip(self.layers.values(), self.down):
            nn.init.normal_(weight, std=width**-0.5)

    @classmethod
    def of(cls, decoder: nn.Module, rank: int = 16, alpha: float | None = None) -> Adapter:
        """One for all linear layers of a decoder. Raises ValueError where there are none."""
        found = {
            name.removesuffix(".base_layer"): (layer.in_features, layer.out_features)  # of PEFT's layers
            for name, layer in decoder.named_modules()
            if isinstance(layer, nn.Linear) and "lora_" not in name
        }
        if not found:
            raise ValueError(f"{type(decoder).__name__} has no linear layers: leave the adapter out")
        return cls(found, rank, alpha)

    def describe(self) -> dict[str, Any]:
        """What `Adapter(**...)` makes the same one of, as JSON has it."""
        layers = {name: list(widths) for name, widths in self.layers.items()}
        return {"layers": layers, "rank": self.rank, "alpha": self.alpha}

    def check(self, decoder: nn.Module) -> None:
        """Raises ValueError where a decoder does not have these layers."""
        modules = dict(decoder.named_modules())
        for name, widths in self.layers.items():
            layer = modules.get(name)
            there = (getattr(layer, "in_features", None), getattr(layer, "out_features", None))
            if there != widths:
                raise ValueError(
                    f"the module has an adapter for a language model with a layer {name} of widths {widths}, "
                    f"which {type(decoder).__name__} has not: use it with the host that it was trained on"
                )

    def install(self, decoder: nn.Module, resting: Callable[[], bool] = lambda: False) -> list[Any]:
        """The hooks, which whoever installs it removes: it may be in several hosts at a time.

        resting: tells at every call whether nothing is to be added.
        """
        modules = dict(decoder.named_modules())
        # A bound method, so that a deep copy of a host with this in it has weights of its own.
        return [
            modules[name].register_forward_hook(partial(self._add, number, resting))
            for number, name in enumerate(self.layers)
        ]

    def _add(
        self,
        number: int,
        resting: Callable[[], bool],
        layer: nn.Module,
        args: tuple[Tensor, ...],
        output: Tensor,
    ) -> Tensor:
        if resting():
            return output
        down, up = self.down[number], self.up[number]
        more = F.linear(F.linear(args[0].to(down.dtype), down), up)
        return output + (self.alpha / self.rank * more).to(output.dtype)
