"""Whether an encoder can be reduced as it is asked for."""

from __future__ import annotations

from ..capture import KINDS, OF_CLS
from ..hosts.trunk import Trunk
from ..method import Method
from ..taps import refusal

_RESTORE = (None, "unmerge")
_CARRY = (None, "gap")


def check_encoder(trunk: Trunk, method: Method, restore: str | None, carry: str | None) -> None:
    if restore not in _RESTORE:
        raise ValueError(f"restore must be 'unmerge' or None, not {restore!r}")
    if carry not in _CARRY:
        raise ValueError(f"carry must be 'gap' or None, not {carry!r}")
    if carry and restore:
        raise ValueError("carry='gap' adds tokens that are no patches, so it goes without restore='unmerge'")
    if trunk.pools_itself and restore is None:
        raise ValueError(
            f"{type(trunk.tower).__name__} has its own forward_features(), which may pool tokens: give "
            "restore='unmerge', and it finds all patches"
        )
    if method.module is not None:
        _check_width(trunk, method)
    if carry and trunk.family.rope:
        raise ValueError(f"carry='gap' adds tokens that have no place, but {trunk.name} turns keys by places")
    kinds = {need.name for need in method.needs}
    if unknown := kinds - set(KINDS):
        raise ValueError(f"'{method.name}' needs {sorted(unknown)}, and there are {', '.join(KINDS)}")
    if "shift" in kinds and not method.after_block:
        raise ValueError(f"method '{method.name}' needs 'shift', known only behind a block: set after_block")
    if kinds & set(OF_CLS) and not trunk.has_cls:
        raise ValueError(
            f"method '{method.name}' needs a CLS token, which {trunk.name} has not: use a method that reads "
            "keys or features, such as 'tome'"
        )
    if (kinds or method.proportional) and (reason := refusal(trunk.blocks[0].attention)):
        raise ValueError(f"method '{method.name}' cannot run in {trunk.name}: it needs {reason}")


def _check_width(trunk: Trunk, method: Method) -> None:
    read, made = method.module.in_width, method.module.out_width
    width = trunk.blocks[0].norm1.weight.numel()
    if (read, made) != (width, width):
        raise ValueError(
            f"'{method.name}' makes tokens of {made} numbers of {read}, and those in {trunk.name} have "
            f"{width}: make it with that width"
        )


def check_blocks(method: Method, left: tuple[int, ...], depth: int) -> None:
    """Raises ValueError where a method cannot work in the blocks that reduce: of 10 000 tokens `left` leave
    each block."""
    own = None if method.module is None else method.blocks
    found = [block for block in range(depth) if left[block] < (left[block - 1] if block else 10_000)]
    if own is not None and (others := sorted(set(found) - set(own))):
        raise ValueError(
            f"'{method.name}' was made for blocks {', '.join(map(str, own))}, not for {others}: "
            "leave schedule out, and name its blocks where keep is a budget by block"
        )
    if method.whole_grid and len({10_000, *left}) > 2:
        raise ValueError(
            f"'{method.name}' works on the whole grid, so it reduces tokens in one block only: give "
            "schedule='once', or one block such as schedule=(3,)"
        )
