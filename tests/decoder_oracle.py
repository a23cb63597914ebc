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
    length, rows = x.shape[1], []
    for row in range(len(x)):
        real = inputs["attention_mask"][row].bool()
        stay = real & ~x[row, :, 0].isnan()
        positions = given.get("position_ids")
        positions = torch.arange(length)[None] if positions is None else positions
        positions = positions[..., row : row + 1, :] if positions.shape[-2] > 1 else positions
        if repack:
            gone = [int((real & ~stay)[:column].sum()) for column in range(length)]
            positions = positions - torch.tensor(gone)
        out = decoder(
            inputs_embeds=x[row : row + 1, stay],
            position_ids=positions[..., stay],
            attention_mask=cut_mask(given.get("attention_mask"), row, stay, decoder.config),
            use_cache=False,
            **{name: given[name][row : row + 1, stay] for name in PER_TOKEN if given.get(name) is not None},
            **cut_deepstack(given, row, stay),
        )
        rows.append(Row(stay, out.last_hidden_state[0]))
    return rows


def cut_mask(mask: Any, row: int, stay: Tensor, config: Any) -> Any:
    """Masks that the base model made for the full prompt, for the tokens that stay. A token sees the ones
    before it, in a sliding layer those within the window, and always all of its own block."""
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
        return torch.ones(1, int(stay.sum()), dtype=torch.long)
    if isinstance(mask, dict):
        full = next(m for name, m in mask.items() if "full" in name and m is not None or len(mask) == 1)
        return {name: _cut(full, row, stay, config, "sliding" in name) for name in mask}
    return _cut(mask, row, stay, config, sliding=False)


def _cut(full: Tensor, row: int, stay: Tensor, config: Any, sliding: bool) -> Tensor:
    allowed = (
        full[min(row, len(full) - 1), 0]
        if full.dtype == torch.bool
        else full[min(row, len(full) - 1), 0] >= 0
    )
    allowed = allowed[: len(stay), : len(stay)][stay][:, stay]  # (K, K)
    if sliding:
        ahead = torch.arange(len(allowed))
        near = (ahead[:, None] - ahead[None]).abs() < config.sliding_window
        allowed = allowed & (near | allowed.T)
    cut = allowed[None, None]
    return (
        cut
        if full.dtype == torch.bool
        else torch.zeros(cut.shape).masked_fill(~cut, torch.finfo(full.dtype).min)
    )


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
