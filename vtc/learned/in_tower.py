"""Replacements of attention in a vision tower that is there already, as one module to attach and to save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from ..hosts import Vision, is_vlm, open_host
from ..hosts.opening import unwrap
from ..hosts.trunk import Trunk, open_trunk
from .base import Grid, LearnedModule
from .checkpoints import check_plan
from .registry import build, get_module, list_modules, register_module
from .replacement import AttentionReplacement, HostAttention, attention_flops

if TYPE_CHECKING:
    from ..stages.attention import AttentionStage


@register_module
class ReplacedAttention(LearnedModule):
    """Attention replacements for some blocks of a vision transformer, alone or in a vision-language model.

        module = ReplacedAttention.for_host(model, "proxy-attention", window=4)
        handle = vtc.compress(model, module)  # no budget: all tokens stay, only attention is another
        handle.keep = 1.0  # the bare model for a while, until handle.keep = None
        handle.remove()  # the host's own attention is back, as it was

    Starts from the host's attention (each replacement's `start_from`), which rests meanwhile: neither the
    host's weights nor its state_dict change. What is trained are the parameters of this module, for instance
    to give the features of the bare tower (see eval/learned_start.py for how near each kind starts).
    """

    name = "replaced-attention"
    stages: ClassVar[tuple[str, ...]] = ("attention",)  # of a host

    @dataclass(frozen=True)
    class Config:
        """replacement: the name of an AttentionReplacement. blocks: whose attention it takes the place of,
        ascending. options: of each replacement, its width, heads and prefix among them."""

        replacement: str = "proxy-attention"
        blocks: tuple[int, ...] = (0,)
        options: dict[str, Any] = field(default_factory=dict)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        _replacement(config.replacement)
        blocks = tuple(config.blocks)
        if not blocks or list(blocks) != sorted(set(blocks)) or blocks[0] < 0:
            raise ValueError(f"blocks are ascending numbers from 0 on, not {blocks}")
        self.blocks = nn.ModuleDict(
            {str(block): build(config.replacement, **config.options) for block in blocks}
        )
        self.grid: Grid | None = None  # of what it was given last

    @classmethod
    def for_host(
        cls,
        model: nn.Module,
        replacement: str,
        blocks: Sequence[int] | None = None,
        grid: Grid | None = None,
        **options: Any,
    ) -> ReplacedAttention:
        """One that fits the vision tower of a model, and starts from what attends there.

        replacement  "proxy-attention", "agent-attention", "super-token-attention"
        blocks       whose attention is replaced; None: of all blocks
        grid         rows and columns of patches of the pictures; None: of those that the tower is made for
        options      of the replacement. Width, heads and prefix are the tower's, and the `window` of agent
                     attention is the grid
        Raises ValueError for a model without a tower whose attention can be replaced, for options or blocks
        that do not exist, and where windows do not tile the grid.
        """
        from ..stages.attention import check_trunk, usual_grid

        kind = _replacement(replacement)
        model = unwrap(model)
        trunk = open_trunk(open_host(model).encoder.tower if is_vlm(model) else model)
        check_trunk(trunk)
        if blocks is not None and (unknown := sorted(set(blocks) - set(range(len(trunk.blocks))))):
            raise ValueError(f"{trunk.name} has blocks 0 to {len(trunk.blocks) - 1}, and no {unknown}")
        blocks = tuple(range(len(trunk.blocks)) if blocks is None else sorted(set(blocks)))
        if not blocks:
            raise ValueError("blocks=[] would replace no attention: name some, or leave it out for all")
        hosts = [HostAttention.of(trunk.blocks[block].attention) for block in blocks]
        options = {"width": hosts[0].width, "heads": hosts[0].heads, "prefix": trunk.prefix, **options}
        grid = grid or usual_grid(trunk)
        if kind.one_grid and grid is not None:
            options = {"window": list(grid), **options}  # as JSON has it
        module = cls(cls.Config(replacement, blocks, options))
        for part, host in zip(module.blocks.values(), hosts, strict=True):
            part.to(host.qkv)
            part.start_from(host)
            if grid is not None:
                part.fits(grid)
        return module.eval()

    def forward(self, x: Tensor, grid: Grid, block: int) -> Tensor:
        """What attention gives in a block: x (B, prefix + N, width), normalised, and the same shape out.
        Computed on the device and in the dtype of its weights."""
        self.grid = grid
        weight = next(self.parameters(), x)
        return self.blocks[str(block)](x.to(weight), grid).to(x)

    @property
    def parts(self) -> dict[int, AttentionReplacement]:
        return {int(block): part for block, part in self.blocks.items()}

    def flops(self, grid: Grid) -> int:
        """Operations of the replacements for one picture, see `AttentionReplacement.flops`."""
        return sum(part.flops(grid) for part in self.blocks.values())

    def host_flops(self, grid: Grid) -> int:
        """Operations of the attention that they take the place of."""
        configs, n = [part.config for part in self.blocks.values()], grid[0] * grid[1]
        return sum(attention_flops(config.prefix + n, config.width) for config in configs)

    def to_dict(self) -> dict[str, Any]:
        """As a plan has it. Raises ValueError where its weights lie in no folder."""
        check_plan(self)
        return {"method": self.folder, "options": {}}

    def __str__(self) -> str:
        told = f"{self.config.replacement} in {len(self.blocks)} blocks"
        if self.grid is not None:
            share = self.flops(self.grid) / self.host_flops(self.grid)
            told += f" with {share:.2f} of the operations of the attention there"
        return f"{self.name}({told})"

    def as_stage(self, opened: Vision | Trunk) -> AttentionStage:
        """What `vtc.compress()` makes of it. Raises ValueError for a model that it does not fit."""
        from ..stages.attention import AttentionStage

        return AttentionStage(opened, self)


def _replacement(name: str) -> type[AttentionReplacement]:
    kind = get_module(name)
    if not issubclass(kind, AttentionReplacement):
        raise ValueError(f"'{name}' is no replacement of attention: there are {', '.join(replacements())}")
    return kind


def replacements() -> list[str]:
    """Names of modules for the place of attention."""
    return [name for name in list_modules() if issubclass(get_module(name), AttentionReplacement)]
