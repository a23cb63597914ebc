"""What each kind of stage makes small."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..api import Handle, compress, unwrap
from ..hosts import open_host
from ..learned.base import Grid, Resampler
from .answers import Answers
from .batches import IGNORED
from .config import Stage
from .features import Features, behind
from .tower import SharedTower


class Objective(nn.Module):
    """What `Trainer` trains: its only child is the module; the host is held beside it, frozen, and goes along
    to the device. `attach()` puts it into the host, `detach()` takes everything off again.

    forward(**batch) gives {"loss": the sum, and each part by its name}.
    """

    accepts_loss_kwargs = False  # its loss is a mean over the batch, which Trainer is to divide

    def __init__(self, module: Resampler, model: nn.Module, stage: Stage, seed: tuple[int, ...]):
        super().__init__()
        self.module, self.stage, self.seed = module, stage, seed
        self._host = (model,)  # in a tuple: a child would be trained, saved and put into training mode
        self.rank = 0
        self.step = self.micro = 0

    @property
    def host(self) -> nn.Module:
        return self._host[0]

    def to(self, *args: Any, **kwargs: Any) -> Objective:
        self.host.to(*args, **kwargs)
        return super().to(*args, **kwargs)

    def begin(self, step: int) -> None:
        """A step of the optimizer begins; its forwards are counted."""
        self.step, self.micro = step, 0

    def generator(self, shared: bool = False) -> torch.Generator:
        """Numbers that the step alone decides, so that a training that is resumed draws the same; shared: by
        all processes."""
        words = [*self.seed, self.step, self.micro, 0 if shared else 1 + self.rank]
        state = int(np.random.SeedSequence(words).generate_state(1)[0])
        return torch.Generator().manual_seed(state)

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        losses = self.losses(batch)
        self.micro += 1
        return {"loss": sum(losses.values()), **{name: value.detach() for name, value in losses.items()}}

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        raise NotImplementedError

    def taught(self, error: str) -> None:
        """Notes what the halting head learns in this stage: nothing, where the tokens change under it."""
        if hasattr(self.module.config, "error"):
            self.module.config = replace(self.module.config, error=error)

    def attach(self) -> None:
        raise NotImplementedError

    def detach(self) -> None:
        raise NotImplementedError


class OnFeatures(Objective):
    """Images only. Several grids of one batch count by how many rows they have."""

    def attach(self) -> None:
        self.taught("")
        self.features = Features(self.host, behind(self.host, self.module))

    def detach(self) -> None:
        self.features.remove()

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        found = self.features(batch["vision"])
        rows, generator = sum(len(x) for x, _ in found), self.generator()
        total: dict[str, Tensor] = {}
        for x, grid in found:
            for name, value in self.of(x.float(), grid, generator).items():
                total[name] = total.get(name, 0) + value * (len(x) / rows)
        return total

    def of(self, x: Tensor, grid: Grid, generator: torch.Generator) -> dict[str, Tensor]:
        return self.module.training_loss(x, grid, generator)


class Length(OnFeatures):
    """The halting head, of as many lengths of each picture as the stage says."""

    def attach(self) -> None:
        super().attach()
        self.taught("features")

    def of(self, x: Tensor, grid: Grid, generator: torch.Generator) -> dict[str, Tensor]:
        counts = torch.tensor(self.module.counts_for(grid))
        drawn = torch.randint(len(counts), (len(x), self.stage.lengths), generator=generator)
        return {"halting": self.module.halting_loss(x, grid, counts[drawn].to(x.device))}


class Distill(Objective):
    """Answers with few tokens as with all of them.

    kl  the divergence of the student's words from the teacher's, sum of p_teacher (log p_teacher - log
        p_student), both at `temperature`, times its square (arXiv:1503.02531)
    ce  the cross-entropy of the data's answers
    Both are means over the words of answers, and over the two numbers of tokens of a step.
    """

    def __init__(self, *args: Any, grid: Grid, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.grid = grid
        possible = [*self.module.counts_for(grid)]
        if wrong := [k for k in self.stage.counts if k not in possible]:
            raise ValueError(
                f"of {grid[0]} x {grid[1]} tokens, {self.module.name} makes {_told(possible)} tokens, not "
                f"{', '.join(map(str, wrong))}: leave those out of its counts"
            )
        self.possible = possible

    def attach(self) -> None:
        self.taught("")
        self.handle = compress(self.host, self.module, keep=self.possible[-1])
        self.answers = Answers(self.host)
        tower = open_host(unwrap(self.host)).encoder.tower
        # Further layers are read inside of the tower, which has to run for that.
        self.tower = None if self.module.layers else SharedTower(tower)

    def detach(self) -> None:
        if self.tower is not None:
            self.tower.remove()
        self.answers.remove()
        self.handle.remove()

    def counts(self) -> list[int]:
        """The numbers of tokens of this step, the most of them first."""
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

    def student(self, batch: dict[str, Any], k: int) -> Tensor:
        """(M, V) with k tokens."""
        self.handle.keep = k
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


@contextmanager
def all_tokens(handle: Handle) -> Iterator[None]:
    """The host as it is without the module."""
    before, handle.keep = handle.keep, 1.0
    try:
        yield
    finally:
        handle.keep = before


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Of logits (M, V), a mean over M."""
    p, q = (F.log_softmax(logits / temperature, dim=-1) for logits in (teacher, student))
    return F.kl_div(q, p, log_target=True, reduction="batchmean") * temperature**2


def _told(counts: list[int]) -> str:
    from ..learned.base import told

    return told(counts)


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "features": OnFeatures, "distill": Distill, "length": Length,
}  # fmt: skip


def objective_of(stage: Stage) -> type[Objective]:
    return AnswerLength if stage.kind == "length" and stage.errors == "answers" else OBJECTIVES[stage.kind]


NEEDED = {"features": "training_loss", "length": "halting_loss"}  # of the module
