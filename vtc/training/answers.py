"""What a host says at the places of answers, several questions to a picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..evaluation.prompts import place
from ..hosts import features_owner
from .batches import IGNORED


class Answers:
    """Logits of a host at the places where answers are foretold, and nowhere else.

    Prompts about one picture begin alike: that part is run once for each picture, and its keys and values
    serve all of its questions.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.head = model.get_output_embeddings()
        self._where: Tensor | None = None
        self._hook = None if self.head is None else self.head.register_forward_pre_hook(self._choose)

    def remove(self) -> None:
        if self._hook is not None:
            self._hook.remove()

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """(M, V) of the M places of `batch` (see `Asked`) in the order of its rows, float32."""
        where = batch["wanted"] != IGNORED
        vision = place(batch["vision"], self.model)
        if "rows" in batch:
            return self._logits(where, **vision, **batch["rows"], use_cache=False)
        last = torch.zeros_like(batch["prefix"]["attention_mask"], dtype=torch.bool)
        last[:, -1] = True  # some place has to be read
        cache = self._run(last, **vision, **batch["prefix"], use_cache=True).past_key_values
        owner = batch["owner"]
        cache.batch_select_indices(owner)
        tail = dict(batch["tail"])
        before = batch["prefix"]["attention_mask"][owner]
        mask = torch.cat([before, tail.pop("attention_mask")], 1)  # (R, C + T)
        tail |= self._positions(before.shape[1], tail["input_ids"], owner)
        return self._logits(where, **tail, attention_mask=mask, past_key_values=cache, use_cache=True)

    def _positions(self, start: int, ids: Tensor, owner: Tensor) -> dict[str, Tensor]:
        """Of text behind a beginning of `start` tokens, where positions have several components: such hosts
        keep how far text is from where it was counted (P, 1), for as many prompts as they last saw."""
        apart = getattr(features_owner(self.model), "rope_deltas", None)
        if apart is None:
            return {}
        places = torch.arange(start, start + ids.shape[1], device=ids.device)
        return {"position_ids": (places + apart.to(ids.device)[owner]).expand(3, *ids.shape)}

    def _logits(self, where: Tensor, **inputs: Any) -> Tensor:
        logits = self._run(where, **inputs).logits
        if logits.shape[:2] == where.shape and not (logits.shape[0] == 1 and self.head is not None):
            return logits[where].float()  # a head that is not the model's own
        return logits[0].float()

    def _run(self, where: Tensor, **inputs: Any) -> Any:
        self._where = where
        try:
            return self.model(**inputs)
        finally:
            self._where = None

    def _choose(self, head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """A head is many times as wide as the model: it reads the places that are asked for, (1, M, D)."""
        where = self._where
        if where is None or args[0].shape[:2] != where.shape:
            return None
        return args[0][where][None], *args[1:]
