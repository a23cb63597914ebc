"""Stages that look at answers of the host, beside those with all its tokens."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..api import compress, unwrap
from ..hosts import find_host, open_host
from ..learned.base import Grid, LearnedModule, Resampler, told
from .answers import Answers
from .batches import IGNORED
from .objective import Objective, all_tokens
from .tower import SharedTower


class Distill(Objective):
    """Answers with few tokens as with all of them.

    kl  the divergence of the student's words from the teacher's, sum of p_teacher (log p_teacher - log
        p_student), both at `temperature`, times its square (arXiv:1503.02531)
    ce  the cross-entropy of the data's answers
    Both are means over the words of answers, and over the two numbers of tokens of a step.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.possible = possible_counts(self.module, self.grid)
        if self.where.get("stage") == "encoder":  # where all tokens are left alone
            self.possible = [k for k in self.possible if k < math.prod(self.grid)]
        if wrong := [k for k in self.stage.counts if k not in self.possible]:
            raise ValueError(
                f"of {self.grid[0]} x {self.grid[1]} tokens, {self.module.name} makes "
                f"{_told(self.possible)} tokens, not {', '.join(map(str, wrong))}: leave those out of its "
                "counts"
            )

    def attach(self) -> None:
        self.taught("")
        self.handle = compress(self.host, self.module, keep=self.budget(self.possible[-1]), **self.where)
        self.answers = Answers(self.host)
        tower = open_host(unwrap(self.host)).encoder.tower
        # What works inside of the tower, or reads further layers there, needs it to run.
        inside = self.where.get("stage", "features") != "features" or self.module.layers
        self.tower = None if inside else SharedTower(tower)

    def budget(self, k: int | None) -> int | float | None:
        return budget(self.host, self.where, self.grid, k)

    def detach(self) -> None:
        if self.tower is not None:
            self.tower.remove()
        self.answers.remove()
        self.handle.remove()

    def counts(self) -> list[int] | list[None]:
        """The numbers of tokens of this step, the most of them first."""
        if self.possible == [None]:
            return [None]
        few, generator = self.stage.counts, self.generator(shared=True)
        if few:
            drawn = few[int(torch.randint(len(few), (), generator=generator))]
        else:
            drawn = self.module.draw(self.grid, generator)
        most = max(few, default=self.possible[-1])
        return list(dict.fromkeys([most, drawn] if self.stage.full else [drawn]))

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        wanted = batch["wanted"][batch["wanted"] != IGNORED]  # (M,)
        counts = self.counts()
        total = {"kl": wanted.new_zeros((), dtype=torch.float32), "ce": 0.0}
        with self.shared():
            teacher = self.teacher(batch) if self.stage.kl else None
            for k in counts:
                student = self.student(batch, k)
                if teacher is not None:
                    total["kl"] = total["kl"] + divergence(student, teacher, self.stage.temperature)
                total["ce"] = total["ce"] + F.cross_entropy(student, wanted)
        weights = {"kl": self.stage.kl, "ce": self.stage.ce}
        return {name: weights[name] * total[name] / len(counts) for name in total if weights[name]}

    def shared(self) -> Any:
        return nullcontext() if self.tower is None else self.tower.sharing()

    @torch.no_grad()
    def teacher(self, batch: dict[str, Any]) -> Tensor:
        """(M, V) of the host with all its tokens."""
        with all_tokens(self.handle):
            return self.answers(batch)

    def student(self, batch: dict[str, Any], k: int | None) -> Tensor:
        """(M, V) with k tokens, with all and the module where None."""
        self.handle.keep = self.budget(k)
        return self.answers(batch)


class AnswerLength(Distill):
    """The halting head, of how far the answers about a picture are from the teacher's, in nats for each of
    their words, with as many tokens as the stage says. Nothing but the head learns."""

    def attach(self) -> None:
        super().attach()
        self.seen: list[tuple[Tensor, Grid]] = []
        self._hook = self.module.register_forward_pre_hook(lambda _, args: self.seen.append(args[:2]))
        self.taught("answers")

    def detach(self) -> None:
        self._hook.remove()
        super().detach()

    def counts(self) -> list[int]:
        few = self.stage.counts or self.possible
        order = torch.randperm(len(few), generator=self.generator(shared=True))
        return [few[int(i)] for i in order[: self.stage.lengths]]

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        asked = batch["wanted"] != IGNORED  # (R, L)
        owner = batch["owner"][asked.nonzero()[:, 0]]  # (M,)
        counts, errors = self.counts(), []
        with torch.no_grad(), self.shared():
            teacher = F.log_softmax(self.teacher(batch), dim=-1)
            for k in counts:
                self.seen.clear()
                student = F.log_softmax(self.student(batch, k), dim=-1)
                errors.append(
                    _mean_by(F.kl_div(student, teacher, log_target=True, reduction="none").sum(1), owner)
                )
        error = torch.stack(errors, 1)  # (P, m)
        x, grid = self.seen[0]
        if len(x) != len(error):  # a row for each question
            x = x[torch.searchsorted(batch["owner"], torch.arange(len(error), device=owner.device))]
        lengths = torch.tensor(counts, device=x.device).expand(len(x), -1)
        return {"halting": self.module.halting_loss(x, grid, lengths, error)}


def _mean_by(values: Tensor, owner: Tensor) -> Tensor:
    """Means of values (M,) of each owner, 0 to the last."""
    sums = values.new_zeros(int(owner.max()) + 1).index_add(0, owner, values)
    return sums / torch.bincount(owner)


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Of logits (M, V), a mean over M."""
    p, q = (F.log_softmax(logits / temperature, dim=-1) for logits in (teacher, student))
    return F.kl_div(q, p, log_target=True, reduction="batchmean") * temperature**2


def possible_counts(module: LearnedModule, grid: Grid) -> list[int] | list[None]:
    """The numbers of tokens that a module makes of a grid, ascending; [None] for one that keeps all."""
    return [*module.counts_for(grid)] if isinstance(module, Resampler) else [None]


def budget(model: nn.Module, where: dict[str, Any], grid: Grid, k: int | None) -> int | float | None:
    """What `compress` is told for k tokens of each grid. Tiles inside of an encoder take a share."""
    inside = where.get("stage") == "encoder" and find_host(model).tiled
    return k / math.prod(grid) if inside and k is not None else k


def _told(counts: list[int] | list[None]) -> str:
    return "no fewer" if counts == [None] else told(counts)
