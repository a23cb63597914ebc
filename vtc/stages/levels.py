"""What leaves some blocks of a vision encoder, for modules that read several layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..hosts import Encoder, Vision
from ..hosts.host import Layout
from ..threads import ByThread

Found = dict[int, list[Tensor]]  # by layer, the states (rows, M, D) of each call of the encoder


class Levels:
    """Notes hidden states while `recording()`.

    layers  as indices of transformers' hidden_states: 0 is what enters the first block, n what leaves block
            n - 1, -1 what leaves the last
    Raises ValueError where the encoder has no such layers.
    """

    def __init__(self, vision: Vision, layers: tuple[int, ...], name: str):
        self.vision, self.layers = vision, layers
        self._encoders = list({id(e): e for e in (vision.encoder, vision.video_encoder)}.values())
        for encoder in self._encoders:
            depth = len(encoder.blocks)
            if not depth or not all(-depth - 1 <= layer <= depth for layer in layers):
                raise ValueError(
                    f"'{name}' reads the layers {layers} of the vision encoder, and that of "
                    f"{vision.host.name} has {depth} blocks: make it with other layers"
                )
        self._found: ByThread[Found] = ByThread()
        self._hooks: list[Any] = []

    def install(self) -> None:
        for encoder in self._encoders:
            for layer in dict.fromkeys(self.layers):
                self._hooks.append(self._hook(encoder, layer))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._found.clear()

    def _hook(self, encoder: Encoder, layer: int) -> Any:
        number = layer % (len(encoder.blocks) + 1)
        if number == 0:
            return encoder.blocks[0].register_forward_pre_hook(partial(self._enters, layer), with_kwargs=True)
        return encoder.blocks[number - 1].register_forward_hook(partial(self._leaves, layer))

    def _enters(self, layer: int, block: nn.Module, args: tuple, kwargs: dict) -> None:
        self._note(layer, args[0] if args else kwargs["hidden_states"])

    def _leaves(self, layer: int, block: nn.Module, args: tuple, output: Any) -> None:
        self._note(layer, output)

    def _note(self, layer: int, state: Any) -> None:
        found = self._found.get()
        if found is not None:
            state = state[0] if isinstance(state, tuple) else state
            rows = state[None] if state.dim() == 2 else state.flatten(1, -2)  # (rows, M, D), of maps too
            found.setdefault(layer, []).append(rows)

    @contextmanager
    def recording(self) -> Iterator[Found]:
        found: Found = {}
        self._found.set(found)
        try:
            yield found
        finally:
            self._found.pop()

    def of(self, found: Found, layouts: list[Layout]) -> list[list[Tensor]]:
        """For each image, for each of its tiles the states of its tokens, the mean over the patches of each:
        (layers, n, D)."""
        if any(layout.patches is None for layout in layouts):
            raise ValueError(f"tokens of {self.vision.host.name} have no patches whose layers could be read")
        states = [self._flat(found.get(layer, [])) for layer in self.layers]
        needed = 1 + max(int(patches.max()) for layout in layouts for patches in layout.patches)
        if len({state.shape for state in states}) > 1 or len(states[0]) < needed:
            raise ValueError(
                f"layers of the vision encoder of {self.vision.host.name} have the shapes "
                f"{[tuple(state.shape) for state in states]}, which are not those of its {needed} patches"
            )
        states = torch.stack(states)  # (layers, patches, D)
        return [
            [states[:, patches.to(states.device)].mean(2) for patches in layout.patches] for layout in layouts
        ]

    def _flat(self, states: list[Tensor]) -> Tensor:
        encoder = self.vision.encoder
        own = [x[:, encoder.prefix : x.shape[1] - encoder.suffix].flatten(0, 1) for x in states]
        return torch.cat(own) if own else torch.empty(0)  # (patches, D)
