"""Runs a method over the rows of one call."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..tokens import COMBINE, Reduction, Tokens, fraction_of_scores
from .budgets import count_own, groups, spend
from .recorded import Recorded
from .rows import Row

if TYPE_CHECKING:
    from .features import FeaturesStage


class Reducer:
    """What the features stage does with the features of one call, for each image (n, D and more): the method
    sees their first `width` columns, all are reduced."""

    def __init__(
        self, stage: FeaturesStage, features: tuple[Tensor, ...], width: int, recorded: Recorded | None
    ):
        self.stage, self.method = stage, stage.method
        self.features, self.width, self.recorded = features, width, recorded
        self._stacked: dict[tuple[int, ...], Tensor] = {}  # by the rows of a group

    def choose(self, rows: list[Row]) -> None:
        """Lowers the budgets of the rows to what this picture needs, where that is asked for."""
        p = fraction_of_scores(self.stage.keep)
        if p is not None:
            spend(p, self.method, rows, self._tokens)
        else:
            count_own(self.method, rows, self._tokens)

    def reduce(self, rows: list[Row]) -> None:
        for group in groups([row for row in rows if row.k]):
            self._reduce(group)

    def _reduce(self, group: list[Row]) -> None:
        """Rows of one grid and one budget: the method sees them as one batch."""
        x, k = self._stack(group), group[0].k  # (R, n, D and more)
        if k == group[0].n and not group[0].anew:
            every = torch.arange(k, device=x.device).expand(len(group), k)
            reduction, new = Reduction.select(every, k), x
        else:
            reduction = self._made(group, k) if self.method.module is None else self._learned(group, k)
            if not (reduction.ordered and self.stage.positions == "repack"):
                reduction = reduction.ascending()
            new = self._new(group, x, reduction)
            reduction = reduction.ascending()
        for i, row in enumerate(group):
            row.index, row.source, row.new = reduction.index[i], reduction.source[i], new[i]

    def _made(self, group: list[Row], k: int) -> Reduction:
        """What a method says, and what becomes of the tokens it drops."""
        tokens = self._tokens(group)
        # Scores are what they are, whatever precision the model's own products have.
        with torch.no_grad(), torch.autocast(tokens.x.device.type, enabled=False):
            reduction = self.method.reduce(tokens, k)
            check_reduction(self.method.name, reduction, tokens, k)
            if self.stage.merge:
                features = replace(tokens, x=self._stack(group)[..., : self.width].detach())
                reduction = self.stage.merge.extend(features, reduction.ascending())
        return reduction

    def _learned(self, group: list[Row], k: int) -> Reduction:
        """What a module makes, with gradients and in the precision of all that is around."""
        if not group[0].in_front and self.method.module.place == "instead":
            raise ValueError(
                f"'{self.method.name}' takes the place of a projector, and which of the features that this "
                f"one is given belong to a token of {self.stage.vision.host.name} is not known"
            )
        module, width = self.method.module, self.width
        if not group[0].in_front and module.in_width != width:
            raise ValueError(
                f"here {self.stage.vision.host.name}'s projector does not work token by token, so that "
                f"'{self.method.name}' works behind it, where a token has {width} numbers and not "
                f"{module.in_width}: make it with in_width={width}"
            )
        tokens = self._tokens(group, learned=True)
        reduction = self.method.reduce(tokens, k)
        check_reduction(self.method.name, reduction, tokens, k, contents=False)
        return reduction

    def _new(self, group: list[Row], x: Tensor, reduction: Reduction) -> Tensor:
        """The tokens that go on: x (R, n, D and more) -> (R, k, D and more)."""
        if reduction.new is None and (reduction.pruned or not self._in_front(group)):
            return reduction.apply(x)
        if self._in_front(group):
            own = reduction.apply(self._vision(group))  # (R, k, D')
            if getattr(self.method.module, "place", "before") == "before":
                own = self.stage.projection.project(own)
        else:
            own = reduction.apply(x[..., : self.width])
        if x.shape[-1] == self.width:
            return own.to(x.dtype)
        if reduction.pruned:  # though its tokens may be new, so that gradients reach what chose them
            reduction = replace(reduction, new=None)
        elif reduction.new is not None:  # which tells nothing of further features of the same tokens
            source = _nearest(reduction.index, group[0].tile.grid)
            reduction = Reduction(reduction.index, source)
        return torch.cat([own.to(x.dtype), reduction.apply(x[..., self.width :])], dim=-1)

    def _tokens(self, group: list[Row], learned: bool = False) -> Tokens:
        """learned: with gradients."""
        x = self._vision(group) if self._in_front(group) else self._stack(group)[..., : self.width]
        x = x if learned else x.detach()
        tokens = Tokens(
            x,
            grid=group[0].tile.grid,
            group=torch.tensor([row.image for row in group], device=x.device),
            lot=torch.stack([row.lot for row in group]).to(x.device),
            thumbnail=torch.tensor([row.tile.thumbnail for row in group], device=x.device),
        )
        for name in group[0].extras:
            own = torch.stack([row.extras[name] for row in group]).to(x.device)
            tokens.extras[name] = own if learned else own.detach()
        if self.recorded and self.recorded.texts is not None:
            tokens.extras |= _texts([self.recorded.texts[row.image] for row in group], x.device)
        if self.stage.resolution:
            patches = torch.stack([row.patches for row in group])  # (R, n, m)
            tokens.extras["cell"] = self.stage.resolution.cells(patches[..., 0])
        return tokens

    def _stack(self, group: list[Row]) -> Tensor:
        key = tuple(map(id, group))
        if key not in self._stacked:
            self._stacked[key] = torch.stack([self._of(row) for row in group])
        return self._stacked[key]

    def _of(self, row: Row) -> Tensor:
        """(n, D and more); a slice where its tokens lie one behind the other, which needs no copy."""
        feature, slots = self.features[row.image], row.tile.slots
        if bool((slots.diff() == 1).all()):
            first = int(slots[0])
            return feature[first : first + len(slots)]
        return feature[slots]

    def _vision(self, group: list[Row]) -> Tensor:
        """What the projector was given: (R, n, D')."""
        return torch.stack([row.extras["vision"] for row in group])

    def _in_front(self, group: list[Row]) -> bool:
        """Whether the method sees what the projector was given."""
        return self.method.before_projector and group[0].in_front


def _nearest(index: Tensor, grid: tuple[int, int]) -> Tensor:
    """For each place of a grid which of the places at index (R, k) is the nearest: (R, N)."""
    rows, columns = torch.meshgrid(*(torch.arange(side, device=index.device) for side in grid), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], -1).float()  # (N, 2)
    return torch.cdist(places.expand(len(index), -1, -1), places[index]).argmin(2)


def _texts(texts: list[tuple[Tensor, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """The prompts of a few rows, (T, D) and (T,) each, as one batch."""
    text = pad_sequence([text.to(device) for text, _ in texts], batch_first=True)  # (R, T, D)
    lengths = torch.tensor([len(text) for text, _ in texts], device=device)
    mask = torch.arange(text.shape[1], device=device) < lengths[:, None]
    after = pad_sequence([after.to(device) for _, after in texts], batch_first=True)  # False where padded
    return {"text": text, "text_mask": mask, "text_after": after}


def check_reduction(name: str, reduction: Any, tokens: Tokens, k: int, contents: bool = True) -> None:
    """Raises RuntimeError unless a method has put every token of each row into one of k slots or none, with
    k different places in their own slots. Without `contents`, what takes no look into tensors."""
    rows, n = tokens.x.shape[:2]
    wrong = None
    if not isinstance(reduction, Reduction):
        wrong = f"{type(reduction).__name__} where a Reduction was due"
    elif reduction.index.shape != (rows, k) or reduction.source.shape != (rows, n):
        shapes = tuple(reduction.index.shape), tuple(reduction.source.shape)
        wrong = f"index and source of shapes {shapes} where {(rows, k)} and {(rows, n)} were due"
    elif reduction.combine not in COMBINE:
        wrong = f"combine={reduction.combine!r}, which is none of {', '.join(COMBINE)}"
    elif reduction.mix is not None and reduction.mix.shape != (rows, k, n):
        wrong = f"mix of shape {tuple(reduction.mix.shape)} where {(rows, k, n)} was due"
    elif reduction.new is not None and reduction.new.shape[:2] != (rows, k):
        wrong = f"new of shape {tuple(reduction.new.shape)} where {(rows, k)} tokens were due"
    elif contents:
        index, source = reduction.index, reduction.source
        slots = torch.arange(k, device=index.device)
        fine = not rows or (int(index.min()) >= 0 and int(index.max()) < n)
        fine = fine and bool((index.sort(dim=1).values.diff(dim=1) > 0).all())
        fine = fine and bool((source.gather(1, index) == slots).all())
        if not fine or bool(((source < -1) | (source >= k)).any()):
            wrong = f"no {k} different places of {n} that are each in their own slot"
    if wrong:
        raise RuntimeError(f"method '{name}' returned {wrong}: mend its reduce()")
