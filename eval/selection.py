"""What each method between the encoder and the LLM costs by itself, against the vision tower before it.

A batch of pictures goes through the bare model, whose tower is timed. Then the same model takes it again and
again, bare and compressed by each method in turn. The tower is not computed anew for that, which would take
an hour: it gives what it gave, and shows the methods' taps the queries, keys and values that it had. So
captures, projector and reductions are run as they are, and a decoder of one layer ends it, because rules that
read the prompt need one. A row has the time that capturing, scoring and reducing took, as the handle says,
and all that a compression adds until the decoder's layer begins, which shortens the prompt, too; both as a
share of the tower's time. `eval/overhead.py --selection` runs this, and has the command line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any
from unittest import mock

import torch
from overhead import CLOCKS, TEXT, Geometry, Inputs, merged, ratios, servable, spread
from torch import nn

import vtc
from vtc.cost import device_name, versions
from vtc.evaluation.results import Results, Row
from vtc.evaluation.tables import markdown
from vtc.hosts import open_host
from vtc.taps import Call, Tap

Clock = Callable[[], float]


@dataclass(frozen=True)
class Batch:
    """Pictures of one shape, each in a prompt of its own, and how many tokens of each are to stay."""

    geometry: Geometry
    keep: int | float
    sizes: list[int] | None = None  # (height, width) of a picture in tiles, for hosts that cut them
    joint: bool = False  # all tiles of a picture are one row, where a method has no way of its own

    @classmethod
    def of(cls, name: str, config: dict[str, Any], tiny: bool) -> Batch:
        """An entry names the geometry that it changes, and may change what is tiny there."""
        entry = config["selection"]["batches"][name]
        entry = merged(config["geometries"][entry["geometry"]], entry)
        geometry = Geometry.of(name, entry, tiny)
        entry = merged(entry, entry["tiny"]) if tiny else entry
        return cls(geometry, entry["keep"], entry.get("sizes"), entry.get("joint", False))

    @torch.no_grad()
    def inputs(self, model: nn.Module) -> Inputs:
        draw = torch.Generator().manual_seed(0)
        pixels = torch.randn(self.geometry.pixels, generator=draw)
        pictures = {"pixel_values": pixels.to(model.device, model.dtype)}
        if self.sizes:
            pictures["image_sizes"] = torch.tensor([self.sizes] * len(pixels), device=model.device)
        one = {name: value[:1] for name, value in pictures.items()}
        count = len(model.base_model.get_image_features(**one, return_dict=True).pooler_output[0])
        before, after = (torch.randint(3, 900, (len(pixels), length), generator=draw) for length in TEXT)
        image = torch.full((len(pixels), count), model.config.image_token_id)
        ids = torch.cat([before, image, after], dim=1).to(model.device)  # (B, L)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pictures}

    def allocate(self, method: str) -> str | None:
        rule = vtc.get_method(method)
        return "joint" if self.joint and rule.allocate == "proportional" and not rule.needs_grid else None


@dataclass
class Times:
    """Of one forward: seconds in the vision tower, and until the decoder's first layer begins."""

    tower: float = 0.0
    ahead: float = 0.0


@contextmanager
def timed(model: nn.Module, clock: Clock) -> Iterator[Times]:
    times, began = Times(), []
    base = model.base_model

    def wait() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return clock()

    def enter(*_: Any) -> None:
        began.append(wait())

    def leave(*_: Any) -> None:
        times.tower += wait() - began.pop()

    def layer(*_: Any) -> None:
        times.ahead = wait() - start

    hooks = [
        base.vision_tower.register_forward_pre_hook(enter),
        base.vision_tower.register_forward_hook(leave),
        base.get_decoder().layers[0].register_forward_pre_hook(layer),
    ]
    start = wait()
    try:
        yield times
    finally:
        for hook in hooks:
            hook.remove()


class Replay:
    """A model's tower on one batch: what it gave, and what its attention was computed from."""

    def __init__(self, model: nn.Module, inputs: Inputs):
        self.tower, self.calls = model.base_model.vision_tower, []
        encoder = open_host(model).encoder
        modules = [encoder.attention(block) for block in range(len(encoder.blocks))]
        taps = [Tap(module, lambda: True, partial(self._note, module)) for module in modules]
        for tap in taps:
            tap.install()
        hook = self.tower.register_forward_hook(self._keep)
        model(**inputs, logits_to_keep=1)
        hook.remove()
        for tap in taps:
            tap.remove()

    def _note(self, module: nn.Module, call: Call) -> None:
        self.calls.append((module, call))

    def _keep(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.output = output

    @contextmanager
    def playing(self) -> Iterator[None]:
        self.tower.forward = self._forward
        try:
            yield
        finally:
            del self.tower.forward

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        for module, call in self.calls:
            for tap in getattr(module.config, "vtc_taps", ()):
                if tap.wanted():
                    tap.see(call)
        return self.output


@torch.no_grad()
def measure(batch: Batch, model: nn.Module, methods: Sequence[str], repeats: int, clock: Clock) -> list[Row]:
    """The numbers of a row for each method. The first round is not timed; `clock` is the handles', too."""
    inputs = batch.inputs(model)
    replay = Replay(model, inputs)
    tower: list[float] = []
    spent, added = ({method: [] for method in methods} for _ in range(2))
    rows: dict[str, Row] = {}
    for number in range(repeats + 1):
        start = time.perf_counter()
        whole = run(model, inputs, clock)
        tower.append(whole.tower)
        with replay.playing():
            bare = run(model, inputs, clock)
        for method in methods:
            lower = vtc.get_method(method).lowers_resolution  # whose tower sees another picture
            playing = nullcontext() if lower else replay.playing()
            with compressed(batch, model, method) as handle, playing:
                with mock.patch.object(time, "perf_counter", clock):
                    ahead = run(model, inputs, clock).ahead
                rows[method] = _facts(handle)
            spent[method].append(handle.spent)
            added[method].append(ahead - (whole if lower else bare).ahead)
        print(f"round {number} of {repeats}: {time.perf_counter() - start:.0f} s", flush=True)
    about = {"pictures": len(inputs["input_ids"]), "tiled": batch.sizes is not None}
    return [
        {"method": method, **facts, **_spreads(tower, spent[method], added[method]), **about}
        for method, facts in rows.items()
    ]


def _facts(handle: vtc.Handle) -> Row:
    allocate = handle.plan[0][1]["allocate"]
    return {
        "image_tokens": len(handle.last[0].source),
        "kept_tokens": statistics.mean(len(record.index) for record in handle.last),
        "allocate": allocate if isinstance(allocate, str) else allocate["name"],  # with options of its own
    }


def _spreads(*seconds: list[float]) -> Row:
    tower, spent, added = (each[1:] for each in seconds)
    return {
        "tower_seconds": spread(tower),
        "spent_seconds": spread(spent),
        "spent_to_tower": spread(ratios(spent, tower)),
        "added_seconds": spread(added),
        "added_to_tower": spread(ratios(added, tower)),
    }


def run(model: nn.Module, inputs: Inputs, clock: Clock) -> Times:
    with timed(model, clock) as times:
        model(**inputs, logits_to_keep=1)
    return times


def compressed(batch: Batch, model: nn.Module, method: str) -> vtc.Handle:
    allocate = batch.allocate(method)
    settings = {} if allocate is None else {"allocate": allocate}
    return vtc.compress(model, method, keep=batch.keep, stage="features", **settings)


def run_key(batch: Batch, method: str, how: dict[str, Any]) -> str:
    geometry = batch.geometry
    what = [geometry.config, geometry.pixels, batch.sizes, batch.keep, batch.allocate(method), TEXT, how]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    return f"{geometry.name} {method} {digest}"


def run_all(batches: Sequence[Batch], options: argparse.Namespace, command: str) -> None:
    """Makes the rows that `options.out` does not hold yet."""
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    how = {
        "dtype": options.dtype,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "repeats": options.repeats,
        "clock": options.clock,
    }
    with Results(options.out) as results:
        for batch in batches:
            geometry = batch.geometry
            keys = {
                run_key(batch, method, how): method
                for method in servable(geometry, options.methods, "features")
            }
            missing = {method: key for key, method in keys.items() if key not in results.rows}
            print(f"{geometry.name}: {len(missing)} of {len(keys)} rows to make", flush=True)
            if not missing:
                continue
            model = geometry.build(dtype, device)
            for row in measure(batch, model, list(missing), options.repeats, CLOCKS[options.clock]):
                about = {
                    "key": missing[row["method"]],
                    "geometry": geometry.name,
                    "says": geometry.says,
                    **how,
                }
                date = datetime.now(UTC).isoformat(timespec="seconds")
                made = {"date": date, "command": command, "versions": versions()}
                results.append(about | row | made)
                print(summary(about | row), flush=True)


def summary(row: Row) -> str:
    return (
        f"{row['geometry']} {row['method']}: {row['kept_tokens']:g} of {row['image_tokens']}, "
        f"{row['spent_to_tower'][1]:.2%} of the tower, {row['added_to_tower'][1]:.2%} until the decoder"
    )


def tables(rows: Sequence[Row]) -> str:
    """A table for each batch, precision and machine, with how it was made."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        names = ("geometry", "dtype", "device", "threads", "clock")
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return "\n\n".join(f"{table(group)}\n\n{source(group)}" for group in groups.values())


def table(rows: Sequence[Row]) -> str:
    """The cheapest first."""
    heading = ["method", "kept of each picture", "tiles share by"]
    heading += ["capturing, scoring, reducing: % of tower", "ms", "all it adds until the decoder: % of tower"]
    lines = [
        [
            row["method"],
            f"{row['kept_tokens']:g} of {row['image_tokens']}",
            row["allocate"],
            _spread([100 * share for share in row["spent_to_tower"]], digits=2),
            f"{1000 * row['spent_seconds'][1]:.0f}",
            _spread([100 * share for share in row["added_to_tower"]], digits=2),
        ]
        for row in sorted(rows, key=lambda row: (row["spent_to_tower"][1], row["method"]))
    ]
    shown = [column for column, name in enumerate(heading) if rows[0]["tiled"] or name != "tiles share by"]
    cells = [[line[column] for column in shown] for line in [heading, *lines]]
    return markdown(cells, "".join("lrlrrr"[column] for column in shown))


def source(rows: Sequence[Row]) -> str:
    """What was measured, by which commands at which commits, and on what."""
    newest = max(rows, key=lambda row: row["date"])
    made, towers = newest["versions"], [row["tower_seconds"][1] for row in rows]
    commits = {(row["command"], (row["versions"]["commit"] or "no commit")[:10]): None for row in rows}
    return (
        f"{newest['says']}: {newest['pictures']} at a time, random weights, {newest['dtype']}, threads: "
        f"{newest['threads']}; medians (and quartiles) of {newest['repeats']} rounds, {newest['clock']} "
        f"clock. The bare tower takes {1000 * statistics.median(towers):.0f} ms. "
        f"Made by {', '.join(f'`{command}` at {commit}' for command, commit in commits)} on "
        f"{newest['date'][:10]} with vtc {made['vtc']}, torch {made['torch']}, transformers "
        f"{made['transformers']} on {newest['device']}."
    )


def _spread(values: Sequence[float], digits: int) -> str:
    low, middle, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} ({low}-{high})"
