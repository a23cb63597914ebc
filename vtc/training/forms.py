"""Whether a host answers alike where the beginning that prompts have in common is run once for a picture."""

from __future__ import annotations

import logging
from typing import Any

import torch

PICTURES, QUESTIONS = 2, 2
NEAR = 2e-3  # of the spread of logits
COARSE = 0.1  # the same, where the host is in half precision

log = logging.getLogger(__name__)


def check_form(objective: Any, collate: Any, items: list) -> None:
    """Sets `collate.shared` to whether it does, measured on a few questions. Raises ValueError where nothing
    in the module has an influence on answers that could be learned."""
    images, asked = _some(collate, items)
    device = next(objective.host.parameters()).device
    batches = [_to(collate.batch(images, asked, shared), device) for shared in (collate.shared, False)]
    with torch.enable_grad():
        if not objective.student(batches[1], objective.possible[0]).requires_grad:
            raise ValueError(
                f"answers have no gradient for {objective.module.name}, which has nothing to learn: give it "
                "an adapter, or leave the stages of kind distill out"
            )
    with torch.no_grad():
        _compare(objective, collate, batches)


def _compare(objective: Any, collate: Any, batches: list[dict[str, Any]]) -> None:
    if "rows" in batches[0]:
        return  # these pictures have no common beginning, others may
    reason = None
    try:
        for run in (objective.teacher, lambda batch: objective.student(batch, objective.possible[-1])):
            found, wanted = (run(batch) for batch in batches)
            off = float((found - wanted).abs().max() / wanted.std())
            near = NEAR if objective.host.dtype == torch.float32 else COARSE
            if not off < near:
                reason = f"its logits are {off:.2g} of their spread away"
                break
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        collate.shared = False
        log.warning(
            "each question is run with a prompt of its own, because %s does not go on from a shared one (%s)",
            type(objective.host).__name__, reason,
        )  # fmt: skip


def _some(collate: Any, items: list) -> tuple[list, list[tuple[int, str, str]]]:
    visits = {item.picture: item for item in items[: 16 * PICTURES]}
    chosen = [*visits.values()][:PICTURES]
    images = collate.opened(chosen)
    asked = [
        (place, *collate.pictures[number].questions[question])
        for place, number in enumerate(images)
        for question in visits[number].questions[:QUESTIONS]
    ]
    return list(images.values()), asked


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: _to(part, device) for name, part in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value
