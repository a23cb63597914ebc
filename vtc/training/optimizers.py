"""Which optimizer learns which weights of a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

NO_MATRICES = ("registers", "adapter.")  # of vectors side by side, and products of two matrices


def make_optimizer(
    module: nn.Module, lr: float, muon: float, weight_decay: float, betas: tuple[float, float]
) -> Optimizer:
    """Muon (Jordan et al. 2024) at the rate `muon` for matrices inside of the module, scaled so that its
    steps are as long as AdamW's (arXiv:2502.16982); AdamW for all other weights."""
    named = [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]
    matrices = [weight for name, weight in named if _is_matrix(name, weight)]
    chosen = set(map(id, matrices))
    others = [weight for _, weight in named if id(weight) not in chosen]
    adamw = AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay) if others else None
    if not matrices:
        return adamw
    fast = Muon(matrices, lr=muon, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return Together([fast, adamw]) if adamw else fast


def _is_matrix(name: str, weight: nn.Parameter) -> bool:
    return weight.dim() == 2 and min(weight.shape) > 1 and not any(part in name for part in NO_MATRICES)


class Together(Optimizer):
    """Several optimizers of different weights as one, under one schedule."""

    def __init__(self, parts: list[Optimizer]):
        super().__init__(
            [weight for part in parts for group in part.param_groups for weight in group["params"]], {}
        )
        self.parts = parts
        self._gather()

    def _gather(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._gather()  # which has made new groups
