"""The encoder and the decoder of FlexTok (arXiv:2502.13967), with the published names of modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...transformer import causal_last
from .flextok_blocks import Transformer
from .flextok_parts import (
    Linear,
    MaskToken,
    NullCondition,
    PatchEmbedder,
    Positions,
    Readout,
    Registers,
    TimeEmbedder,
    unpatchify,
)

ENCODER = (
    "enc_patch_emb", "enc_posemb_module", "enc_register_module", "enc_transformer", "enc_to_latents",
)  # fmt: skip
DECODER = (
    "dec_from_latents", "dec_registers_posemb_module", "dec_nested_dropout", "dec_latent_dropout",
    "dec_noise_patch_emb", "dec_patches_posemb_module", "dec_time_embedder", "dec_transformer",
    "dec_to_patches",
)  # fmt: skip


class Encoder(nn.Module):
    """Latents (B, C, h, w) to what each of the first k registers reads: (B, k, dim).

    Patches see each other, a register sees the patches and the registers up to itself.
    """

    def __init__(
        self,
        names: Sequence[str],
        channels: int,
        patch: int,
        rows: int,
        tokens: int,
        width: int,
        depth: int,
        dim: int,
        head_dim: int,
        ratio: float,
        positions: str,
        readout_base: int | None,
    ) -> None:
        super().__init__()
        self.module_dict = _named(
            names,
            PatchEmbedder(channels, patch, width),
            Positions(width, (rows, rows), positions),
            Registers(tokens, width),
            Transformer(width, depth, head_dim, ratio),
            Readout(width, dim, False, readout_base),
        )
        self.apply(_initialise)

    def forward(self, latents: Tensor, k: int) -> Tensor:
        embed, positions, registers, transformer, readout = self.module_dict.values()
        x = embed(latents) + positions()
        n = x.shape[1]
        x = torch.cat([x, registers(len(x), k)], 1)  # (B, N + k, width)
        return readout(transformer(x, causal_last(n, k, x.device))[:, n:])


class Decoder(nn.Module):
    """Foretells the velocity of noisy latents, given tokens and the time. All see each other."""

    def __init__(
        self,
        names: Sequence[str],
        channels: int,
        patch: int,
        rows: int,
        tokens: int,
        width: int,
        depth: int,
        dim: int,
        head_dim: int,
        ratio: float,
        positions: str,
        readout_base: int | None,
        token_positions: str,
        modulation_sets: int,
        time_frequencies: int,
        max_time: float,
    ) -> None:
        super().__init__()
        self.tokens, self.patch, self.rows = tokens, patch, rows
        self.module_dict = _named(
            names,
            Linear(dim, width),
            Positions(width, (tokens,), token_positions),
            MaskToken(width),
            NullCondition(width),
            PatchEmbedder(channels, patch, width),
            Positions(width, (rows, rows), positions),
            TimeEmbedder(time_frequencies, width, max_time),
            Transformer(width, depth, head_dim, ratio, modulation_sets),
            Readout(width, channels * patch**2, True, readout_base),
        )
        self.apply(_initialise)

    def condition(self, values: Tensor, valid: Tensor, index: Tensor) -> Tensor:
        """Values (B, k, dim) at their places (B, k), the mask token at all others: (B, tokens, width)."""
        linear, positions, mask = list(self.module_dict.values())[:3]
        tokens = linear(values) + positions()[index.clamp(min=0)]
        return mask(tokens, valid, index, self.tokens)

    def without(self, condition: Tensor, drop: Tensor) -> Tensor:
        """The condition, and the null condition for images to drop (B,)."""
        return list(self.module_dict.values())[3](condition, drop)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Noisy latents (B, C, h, w) at times (B,): their velocity (B, C, h, w)."""
        embed, positions, times, transformer, readout = list(self.module_dict.values())[4:]
        patches, time = embed(x) + positions(), times(t)
        n = patches.shape[1]
        x = transformer(torch.cat([patches, condition], 1), None, time, n)[:, :n]
        return unpatchify(readout(x, time), self.patch, self.rows)


def _named(names: Sequence[str], *modules: nn.Module) -> nn.ModuleDict:
    if len(names) != len(modules) or len(set(names)) != len(names):
        raise ValueError(f"{len(modules)} modules take as many different names, not {names}")
    return nn.ModuleDict(dict(zip(names, modules)))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    # children come first: these stay at zero
    if isinstance(module, Readout):
        nn.init.zeros_(module.proj.weight)
    if hasattr(module, "adaLN_modulation"):
        nn.init.zeros_(module.adaLN_modulation[1].weight)
