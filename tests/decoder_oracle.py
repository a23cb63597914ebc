"""What a compressed model must equal: its bare decoder over prompts shortened by hand, one row at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tiny import Inputs
from torch import Tensor, nn

from vtc.hosts import open_host

PER_TOKEN = ("per_layer_inputs", "ple_input_ids", "moe_mm_token_type_ids", "mm_token_type_ids")


@dataclass
class Row:
    """One prompt after shortening: the columns (L,) that stay, and what the bare decoder makes of them."""

    stay: Tensor
    hidden: Tensor  # (K, D)


class Watch:
    """Notes what the family's own code gives its decoder, and what the decoder returns.

    Its first hook must come before those of compress(), its second behind them: enter, compress, `listen()`.
    """

    def __init__(self, model: nn.Module):
        self.decoder = open_host(model).decoder

    def __enter__(self) -> Watch:
        self.hooks = [self.decoder.register_forward_pre_hook(self._before, with_kwargs=True)]
        return self

    def listen(self) -> None:
        self.hooks.append(self.decoder.register_forward_hook(self._behind))

    def __exit__(self, *exception: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.given = {**kwargs}  # full length, dropped tokens are rows of NaN

    def _behind(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.hidden = output[0].detach()  # (B, L, D)


@torch.no_grad()
def shortened_rows(
    model: nn.Module, inputs: Inputs, given: dict[str, Any], repack: bool = False
) -> list[Row]:
    """Each prompt of `inputs` cut by hand to the tokens that are neither padding nor dropped."""
    decoder, x = open_host(model).decoder, given["inputs_embeds"]
    length, rows, dropped = x.shape[1], [], marked(given)
    for row in range(len(x)):
        real = inputs["attention_mask"][row].bool()
        stay = real & ~dropped[row]
        positions = given.get("position_ids")
        positions = torch.arange(length)[None] if positions is None else positions
        positions = positions[..., row : row + 1, :] if positions.shape[-2] > 1 else positions
        if repack:
            gone = [int((real & ~stay)[:column].sum()) for column in range(length)]
            positions = positions - torch.tensor(gone)
        out = _bare(
            decoder,
            inputs_embeds=x[row : row + 1, stay],
            position_ids=positions[..., stay],
            attention_mask=cut_mask(given.get("attention_mask"), row, stay, decoder.config),
            use_cache=False,
            **{name: given[name][row : row + 1, stay] for name in PER_TOKEN if given.get(name) is not None},
            **cut_deepstack(given, row, stay),
        )
        rows.append(Row(stay, out.last_hidden_state[0]))
    return rows


def marked(given: dict[str, Any]) -> Tensor:
    """Which tokens are rows of NaN (B, L): in the prompt, or in features that only early layers get."""
    dropped = given["inputs_embeds"][..., 0].isnan()
    if given.get("vision_mask") is not None:
        first, *_ = given["deepstack_features"].values()
        dropped[given["vision_mask"][..., 0]] |= first[:, 0].isnan()
    return dropped


def _bare(decoder: nn.Module, **given: Any) -> Any:
    """Layers that choose blocks of keys count places themselves where they are given no positions: with gaps
    in positions they would not work."""

    def count(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {**kwargs, "position_ids": None}

    sparse = [m for m in decoder.modules() if hasattr(getattr(m, "indexer", None), "block_size")]
    hooks = [m.register_forward_pre_hook(count, with_kwargs=True) for m in sparse]
    try:
        return decoder(**given)
    finally:
        for hook in hooks:
            hook.remove()


def cut_mask(mask: Any, row: int, stay: Tensor, config: Any) -> Any:
    """Masks that the base model made for the full prompt, for the tokens that stay."""
    recurrent = isinstance(mask, dict) and "linear_attention" in mask  # made anew from two dimensions
    if mask is None or recurrent or (isinstance(mask, Tensor) and mask.dim() == 2):
        return torch.ones(1, int(stay.sum()), dtype=torch.long)
    if isinstance(mask, dict):
        window = config.sliding_window
        return {
            name: _like(m, _slide(_allowed(m, row), stay, window) if "sliding" in name else _at(m, row, stay))
            for name, m in mask.items()
        }
    return _like(mask, _at(mask, row, stay))


def _allowed(mask: Tensor, row: int) -> Tensor:
    """Which token sees which, of one prompt: (L, L)."""
    own = mask[min(row, len(mask) - 1), 0]
    return own if own.dtype == torch.bool else own >= 0


def _at(mask: Tensor, row: int, stay: Tensor) -> Tensor:
    return _allowed(mask, row)[: len(stay), : len(stay)][stay][:, stay]  # (K, K)


def _slide(allowed: Tensor, stay: Tensor, window: int) -> Tensor:
    """The window counts the tokens that stay. Tokens of a block see each other: of some families only within
    the window, of others at any distance."""
    length = len(stay)
    back = torch.arange(length)[:, None] - torch.arange(length)[None]  # how far a key is behind its query
    ahead = allowed[:length, :length] & (back < 0)
    unbounded = bool((allowed[:length, :length] & (back >= window)).any())
    block = (ahead | ahead.T)[stay][:, stay]
    back = back[: len(block), : len(block)]
    near = (back >= 0) & (back < window)
    return near | (block if unbounded else block & (back < window))


def _like(mask: Tensor, allowed: Tensor) -> Tensor:
    cut = allowed[None, None]
    if mask.dtype == torch.bool:
        return cut
    return torch.zeros(cut.shape).masked_fill(~cut, torch.finfo(mask.dtype).min)


def cut_deepstack(given: dict[str, Any], row: int, stay: Tensor) -> dict[str, Any]:
    """Features for early layers, of the tokens of this row that stay."""
    for mask_name, name in (
        ("visual_pos_masks", "deepstack_visual_embeds"),
        ("vision_mask", "deepstack_features"),
    ):
        mask, features = given.get(mask_name), given.get(name)
        if mask is None or features is None:
            continue
        flat = mask if mask.dim() == 2 else mask[..., 0]  # (B, L)
        chosen = torch.zeros_like(flat)
        chosen[row] = flat[row] & stay
        of_all = chosen[flat]  # (tokens of all images,)
        cut = flat[row : row + 1, stay]
        if mask.dim() == 3:
            cut = cut[..., None].expand(-1, -1, mask.shape[-1])
        if isinstance(features, dict):
            return {mask_name: cut, name: {key: layer[of_all] for key, layer in features.items()}}
        return {mask_name: cut, name: [layer[of_all] for layer in features]}
    return {}
