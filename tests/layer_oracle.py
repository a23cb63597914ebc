"""What tokens cut inside of a decoder must equal: the bare model, in whose deeper layers nobody sees them."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from tiny import SUPPRESS, Inputs
from torch import Tensor, nn

from vtc.hosts import open_host


@contextmanager
def watched(handle):
    """The tokens that each forward with images drops, (B, L) each."""
    (stage,) = handle._stages
    found, choose = [], stage.cut.choose

    def watch(scene):
        hidden, dropped = choose(scene)
        found.append(dropped)
        return hidden, dropped

    stage.cut.choose = watch
    try:
        yield found
    finally:
        stage.cut.choose = choose


@contextmanager
def unseen(model: nn.Module, layer: int, dropped: Tensor):
    """The bare model with eager attention, where in the layers from number `layer` on no token sees the
    dropped ones (B, L). As all tokens keep their positions, the others come out as if these were gone."""
    decoder = open_host(model).decoder

    def hide(module, args, kwargs):
        mask = kwargs["attention_mask"]
        least = torch.finfo(mask.dtype).min / 4  # added to a mask it stays finite
        return args, {**kwargs, "attention_mask": mask + dropped[:, None, None].to(mask.dtype) * least}

    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    hooks = [x.register_forward_pre_hook(hide, with_kwargs=True) for x in decoder.layers[layer:]]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)


@torch.no_grad()
def greedy(
    model: nn.Module, inputs: Inputs, layer: int, dropped: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Tokens (B, steps) and logits (B, steps, vocabulary), everything recomputed at each step."""
    inputs, tokens, logits = dict(inputs), [], []
    for _ in range(steps):
        with unseen(model, layer, dropped):
            last = model(**inputs, use_cache=False).logits[:, -1].clone()
        logits.append(last.clone())
        last[:, SUPPRESS] = -torch.inf
        tokens.append(last.argmax(dim=-1, keepdim=True))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens[-1]], dim=1)
        kinds = ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids")
        for name, fill in [("attention_mask", 1), *((kind, 0) for kind in kinds)]:
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], torch.full_like(tokens[-1], fill)], dim=1)
        dropped = torch.cat([dropped, torch.zeros_like(tokens[-1], dtype=torch.bool)], dim=1)
    return torch.cat(tokens, dim=1), torch.stack(logits, dim=1)
