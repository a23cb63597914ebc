"""What a compressed model must equal: the bare decoder over a prompt shortened by hand, one row at a time."""

from __future__ import annotations

import torch
from tiny import IMAGE, SUPPRESS, Inputs
from torch import Tensor, nn


def marked_features(model: nn.Module, inputs: Inputs) -> Tensor:
    """The features of all images as the compressed model marks them: (sum of n, D), NaN where dropped."""
    vision = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    with torch.no_grad():
        return torch.cat(list(model.base_model.get_image_features(**vision, return_dict=True).pooler_output))


def shortened(model: nn.Module, inputs: Inputs, features: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each prompt: embeddings (1, K, D), positions (1, K), and which of its L columns remain (L,)."""
    rows, used = [], 0
    embed = model.get_input_embeddings()
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"]):
        x = embed(ids).detach().clone()  # (L, D)
        image = ids == IMAGE
        x[image] = features[used : used + int(image.sum())].to(x.dtype)
        used += int(image.sum())
        stay = mask.bool() & ~x[:, 0].isnan()
        positions = mask.cumsum(0) - 1
        rows.append((x[stay][None], positions[stay][None], stay))
    return rows


@torch.no_grad()
def next_logits(model: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
    """Logits (K, vocabulary) of the bare decoder, no cache."""
    mask = torch.ones(x.shape[:2], dtype=torch.long)
    decoder = model.base_model.get_decoder()
    out = decoder(inputs_embeds=x, position_ids=positions, attention_mask=mask, use_cache=False)
    return model.lm_head(out.last_hidden_state)[0]


@torch.no_grad()
def greedy(model: nn.Module, x: Tensor, positions: Tensor, steps: int) -> tuple[list[int], Tensor]:
    """Greedy tokens and their logits (steps, vocabulary), everything recomputed at each step."""
    tokens, logits = [], []
    for _ in range(steps):
        last = next_logits(model, x, positions)[-1].clone()
        logits.append(last)
        allowed = last.clone()
        allowed[SUPPRESS] = -float("inf")
        tokens.append(int(allowed.argmax()))
        x = torch.cat([x, model.get_input_embeddings()(torch.tensor([[tokens[-1]]]))], dim=1)
        positions = torch.cat([positions, positions[:, -1:] + 1], dim=1)
    return tokens, torch.stack(logits)
