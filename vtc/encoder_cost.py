"""What a forward of a vision encoder costs, measured beside the same encoder with all tokens."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .api import compress, current
from .cost import compare, device_name, peak_memory
from .hosts.trunk import open_trunk
from .method import Method
from .tokens import Reduction, Tokens

Inputs = dict[str, Tensor]
Forward = Callable[[nn.Module, Inputs], Any]


@torch.no_grad()
def encoder_cost(
    model: nn.Module, forward: Forward, inputs: Inputs, bare: nn.Module | None = None, repeats: int = 9
) -> dict[str, Any]:
    """What a forward costs on a batch of pictures, with tokens reduced as they now are.

    forward  runs (model, inputs) once
    bare     what `twin()` made of the model before it was compressed; None where it is not compressed

    plan, images           as in `vtc.profile`; images is the size of the batch
    blocks                 patch tokens of a picture that leave each block, exactly
    block_tokens           their mean over the blocks
    gflops                 of a picture, in 10^9 operations: what torch's counter sees under the math kernel.
                           These are products of matrices, those of the compressor included
    compressor_gflops      how much less it is where as many tokens are kept in each block without looking
    seconds, bare_seconds  median time of a batch, and of the bare model, each measured in turn with the other
    images_per_second      of the median
    speed                  median over rounds of how many times as fast as the bare model it is
    clock                  what times these: "cpu", which waiting for other processes does not count on, where
                           there is one thread; else "wall"
    compressor_seconds     median time of the compressor itself, on the host's wall clock
    compressor_share       the same as a part of a batch's time on that clock
    peak_memory_bytes      and peak_memory, as in `vtc.profile`
    Raises ValueError for a compressed model without `bare`.
    """
    handle = current(model)
    if handle is not None and bare is None:
        raise ValueError(
            "a compressed encoder is measured beside its bare twin: give twin(model), made before"
        )
    first = next(iter(inputs.values()))
    one = {name: value[:1] for name, value in inputs.items()}
    gflops, free_gflops, blocks = _operations(model, forward, one, bare)
    peak, peak_kind = peak_memory(first.device, lambda: forward(model, inputs))
    spent, whole = [], []

    def compressed() -> None:
        start = time.perf_counter()
        forward(model, inputs)
        whole.append(time.perf_counter() - start)
        spent.append(handle.spent if handle else 0.0)

    runs = {"compressed": compressed}
    if handle is not None:
        runs = {"bare": lambda: forward(bare, inputs), **runs}
    alone = first.device.type == "cpu" and torch.get_num_threads() == 1
    times = compare(runs, repeats, time.process_time if alone else time.perf_counter)
    times.setdefault("bare", times["compressed"])
    seconds = statistics.median(times["compressed"])
    return {
        "plan": [{**method.to_dict(), **step} for method, step in handle.plan] if handle else [],
        "images": len(first),
        "blocks": blocks,
        "block_tokens": statistics.mean(blocks),
        "gflops": gflops,
        "compressor_gflops": gflops - free_gflops,
        "seconds": seconds,
        "bare_seconds": statistics.median(times["bare"]),
        "images_per_second": len(first) / seconds,
        "speed": statistics.median(b / c for b, c in zip(times["bare"], times["compressed"], strict=True)),
        "clock": "cpu" if alone else "wall",
        "compressor_seconds": statistics.median(spent[1:]),  # the first round was not timed
        "compressor_share": statistics.median(
            part / all for part, all in zip(spent[1:], whole[1:], strict=True)
        ),
        "repeats": repeats,
        "peak_memory_bytes": peak,
        "peak_memory": peak_kind,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": device_name(first.device),
    }


def twin(model: nn.Module) -> nn.Module:
    """The same model once more, on the same weights: what is done to the one is not done to the other."""
    weights = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(weight): weight for weight in weights})


def operations(forward: Callable[[], Any]) -> int:
    """Operations of one call as torch's counter sees them, under the math kernel: 2 m n k for a product."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    # the counter asks for the graph of module inputs that are parameters
    with sdpa_kernel(SDPBackend.MATH), counter, torch.enable_grad():
        forward()
    return counter.get_total_flops()


@dataclass
class _First(Method):
    """Keeps the first tokens: costs nothing, so that what is left is the encoder."""

    name = "first"
    stages = ("encoder",)

    def reduce(self, tokens: Tokens, k: int) -> Reduction:
        return Reduction.select(torch.arange(k, device=tokens.x.device).expand(len(tokens.x), k), tokens.n)


def _operations(
    model: nn.Module, forward: Forward, inputs: Inputs, bare: nn.Module | None
) -> tuple[float, float, list[int]]:
    """GFLOPs, GFLOPs where the tokens are chosen for nothing, and the tokens that leave each block."""
    gflops = operations(lambda: forward(model, inputs)) / 1e9
    handle, settings, free = current(model), {"keep": 1.0, "stage": "encoder"}, _First()
    if handle is not None:
        (method, settings), = handle.plan  # fmt: skip
        free.after_block = method.after_block
    with compress(bare or model, free, **settings) as kept:
        free_gflops = operations(lambda: forward(bare or model, inputs)) / 1e9
        record = (handle or kept).last[0]
    now, blocks = record.entering["encoder"], []
    for block in range(len(open_trunk(model).blocks)):
        now = len(record.blocks[block][0]) if block in record.blocks else now
        blocks.append(now)
    return gflops, free_gflops, blocks
