"""Speed of encoders whose tokens are reduced, against the dense encoder with fused attention.

Vision transformers of timm with random weights run in turn with all tokens, with tokens reduced by a method,
and with tokens sliced off by hand in the same blocks, which is as fast as any method can be. Beside it stands
what the operations say: those of the dense encoder by those of the compressed one, the method's own included,
as torch's counter sees them under the math kernel. Every method has its own schedule. One row per geometry,
batch, method and budget is added to the results; rows that exist are not made again, unless the method's code
is another one.

The default grid is for 40 minutes of one CPU thread: all methods and three budgets for ViT-B at batch 8; half
of the tokens, and three methods where it is expensive, for all else. A method gets as many rounds as fit into
--seconds, at least 3 and at most 15, after one that is not timed.

Run from the repository's root:
    python eval/encoder_speed.py --clock cpu --threads 1      # on a machine that others use too
    python eval/encoder_speed.py --geometry vit-b-16 --batches 8 --methods tome evit --keeps 0.7 0.5 0.25
    python eval/encoder_speed.py --device cuda --dtype bfloat16
    python eval/encoder_speed.py --table                      # the rows as Markdown
    python eval/encoder_speed.py --readme README.md           # fills its part <!-- encoder-speed:begin -->
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from overhead import CLOCKS, ratios, spread, wall_seconds
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import vtc
from vtc.cost import compare, device_name, versions
from vtc.encoder_cost import operations, twin
from vtc.evaluation.report import fill_parts
from vtc.evaluation.results import Results, Row, read_rows
from vtc.evaluation.tables import markdown
from vtc.schedule import counts, show

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "eval/configs/encoder-speed.json"
ROUNDS = (3, 15)  # at least, at most
MACHINE = ("dtype", "device", "threads", "clock")


@dataclass(frozen=True)
class Geometry:
    name: str
    says: str
    sizes: dict[str, int]  # arguments of VisionTransformer

    @classmethod
    def of(cls, name: str, config: dict[str, Any], tiny: bool) -> Geometry:
        sizes = dict(config["geometries"][name])
        says = sizes.pop("says")
        return cls(f"{name} tiny", f"{says}, scaled down", config["tiny"]) if tiny else cls(name, says, sizes)

    def build(self, dtype: torch.dtype, device: torch.device) -> VisionTransformer:
        torch.manual_seed(0)
        return VisionTransformer(**self.sizes).to(device, dtype).eval()


@dataclass(frozen=True)
class Cell:
    """What is measured on one geometry at one batch size."""

    geometry: Geometry
    batch: int
    methods: list[str]
    keeps: list[float]


class Sliced:
    """The dense encoder with tokens sliced off by hand: so many patches are `left` behind the attention of
    each block or, for a method that reduces behind the block, behind its MLP."""

    def __init__(self, model: VisionTransformer, left: Sequence[int], after_block: bool):
        self.model, self.after_block = model, after_block
        self.tokens = [model.num_prefix_tokens + n for n in left]

    def __call__(self, pictures: Tensor) -> Tensor:
        model = self.model
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pictures))))
        for block, tokens in zip(model.blocks, self.tokens, strict=True):
            x = x + block.ls1(block.attn(block.norm1(x)))
            if not self.after_block:
                x = x[:, :tokens]
            x = x + block.ls2(block.mlp(block.norm2(x)))
            x = x[:, :tokens]
        return model.forward_head(model.norm(x))


class Contest:
    """The functions that run in turn: the dense encoder, a method at several budgets, and slicing at each."""

    def __init__(self, model: VisionTransformer, method: str, keeps: Sequence[float], pictures: Tensor):
        self.model, self.keeps, self.pictures = model, keeps, pictures
        self.compressed = twin(model)
        self.handle = vtc.compress(self.compressed, method, keep=keeps[0], stage="encoder")
        of_method, settings = self.handle.plan[0]
        self.schedule = settings["schedule"]
        patches = model.patch_embed.num_patches
        self.left = {keep: counts(keep, self.schedule, patches, len(model.blocks)) for keep in keeps}
        self.sliced = {keep: Sliced(model, left, of_method.after_block) for keep, left in self.left.items()}
        self.spent: dict[float, list[tuple[float, float]]] = {
            keep: [] for keep in keeps
        }  # and all of the time

    def functions(self) -> dict[str, Callable[[], Any]]:
        functions = {"dense": lambda: self.model(self.pictures)}
        for keep in self.keeps:
            functions[f"{keep}"] = lambda keep=keep: self.run(keep)
            functions[f"sliced {keep}"] = lambda keep=keep: self.sliced[keep](self.pictures)
        return functions

    def run(self, keep: float) -> None:
        self.handle.keep = keep
        seconds = wall_seconds(lambda: self.compressed(self.pictures), self.pictures.device)
        self.spent[keep].append((self.handle.spent, seconds))

    def gflops(self, keep: float | None = None) -> float:
        """Of one picture, in 10^9; of the dense encoder where there is no budget."""
        if keep is None:
            return operations(lambda: self.model(self.pictures[:1])) / 1e9
        self.handle.keep = keep
        return operations(lambda: self.compressed(self.pictures[:1])) / 1e9


@torch.no_grad()
def measure(contest: Contest, seconds: float, clock: Callable[[], float]) -> dict[float, Row]:
    """The numbers of each budget's row. Spreads are (lower quartile, median, upper quartile) over the rounds.

    `spent` is what the handle says, by the wall clock, and so is the time that it is a share of.
    """
    batch, dense_gflops = len(contest.pictures), contest.gflops()
    gflops = {keep: contest.gflops(keep) for keep in contest.keeps}
    predicted = {keep: dense_gflops / count for keep, count in gflops.items()}
    functions = contest.functions()
    least, most = ROUNDS
    start = clock()
    functions["dense"]()
    a_round = (clock() - start) * (1 + sum(2 / speed for speed in predicted.values()))
    rounds = max(least, min(most, int(seconds / a_round) - 1))
    times = compare(functions, rounds, clock)
    dense, rows = times["dense"], {}
    for keep in contest.keeps:
        took, sliced = times[f"{keep}"], times[f"sliced {keep}"]
        spent, wall = zip(*contest.spent[keep][1:])  # without the warm-up's
        speed = ratios(dense, took)
        rows[keep] = {
            "schedule": contest.schedule,
            "blocks": show(contest.left[keep]),
            "patches": contest.model.patch_embed.num_patches,
            "left": contest.left[keep][-1],
            "rounds": rounds,
            "dense_gflops": dense_gflops,
            "gflops": gflops[keep],
            "dense_seconds": spread(dense),
            "seconds": spread(took),
            "sliced_seconds": spread(sliced),
            "dense_images_per_second": batch / statistics.median(dense),
            "images_per_second": batch / statistics.median(took),
            "speed": spread(speed),
            "predicted": predicted[keep],
            "of_predicted": statistics.median(speed) / predicted[keep],
            "of_sliced": spread(ratios(sliced, took)),
            "spent_seconds": spread(spent),
            "spent_share": spread(ratios(spent, wall)),
        }
    return rows


def code_of(method: str) -> str:
    """A digest of the file that defines a method."""
    module = sys.modules[type(vtc.get_method(method)).__module__]
    return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()[:12]


def run_key(cell: Cell, method: str, keep: float, how: Row) -> str:
    """Names a measurement, the same at any commit at which the method is the same."""
    what = [cell.geometry.sizes, code_of(method), how]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    return f"{cell.geometry.name} batch {cell.batch} {method} {keep:g} {digest}"


def run(cells: Sequence[Cell], options: argparse.Namespace, command: str) -> None:
    """Makes the rows that `options.out` does not hold yet."""
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    how = {
        "dtype": options.dtype,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "clock": options.clock,
    }
    with Results(options.out) as results:
        for cell in cells:
            keys = {(m, k): run_key(cell, m, k, how) for m in cell.methods for k in cell.keeps}
            missing = {pair: key for pair, key in keys.items() if key not in results.rows}
            title = f"{cell.geometry.name} batch {cell.batch}"
            print(f"{title}: {len(missing)} of {len(keys)} rows to make", flush=True)
            if not missing:
                continue
            model, size = cell.geometry.build(dtype, device), cell.geometry.sizes.get("img_size", 224)
            draw = torch.Generator().manual_seed(0)
            pictures = torch.randn(cell.batch, 3, size, size, generator=draw).to(device, dtype)
            for method in dict.fromkeys(method for method, _ in missing):
                start = time.perf_counter()
                keeps = [keep for keep in cell.keeps if (method, keep) in missing]
                rows = measure(
                    Contest(model, method, keeps, pictures), options.seconds, CLOCKS[options.clock]
                )
                for keep, numbers in rows.items():
                    row = {"key": missing[method, keep], "geometry": cell.geometry.name}
                    row |= {"says": cell.geometry.says, "batch": cell.batch, **how}
                    row |= {"method": method, "code": code_of(method), "keep": keep, **numbers}
                    row["date"] = datetime.now(UTC).isoformat(timespec="seconds")
                    results.append(row | {"command": command, "versions": versions()})
                    print(f"{title} {summary(row)}", flush=True)
                print(
                    f"    {rows[keeps[0]]['rounds']} rounds, {time.perf_counter() - start:.0f} s", flush=True
                )


def summary(row: Row) -> str:
    return (
        f"{row['method']} {row['keep']:g}: {row['speed'][1]:.3f} x dense, {row['of_predicted']:.3f} of what "
        f"operations say, {row['of_sliced'][1]:.3f} x slicing, compressor {row['spent_share'][1]:.1%}"
    )


def tables(rows: Sequence[Row]) -> str:
    """For each machine and precision a table for every batch that was measured at several budgets, one table
    for all other batches, and how they were made."""
    parts = []
    for machine in _grouped(_newest(rows), *MACHINE):
        single = []
        for group in _grouped(machine, "geometry", "batch"):
            if len({row["keep"] for row in group}) > 1:
                parts += [f"**{title(group[0])}**", table(group)]
            else:
                single += group
        if single:
            parts.append(overview(single))
        parts.append(source(machine))
    return "\n\n".join(parts)


def table(rows: Sequence[Row]) -> str:
    """One geometry and batch: a line for each method, with the details at the budget in the middle."""
    keeps = sorted({row["keep"] for row in rows}, reverse=True)
    middle = keeps[len(keeps) // 2]
    heading = ["method", *(f"speed-up at {keep:g}" for keep in keeps)]
    heading += [f"at {middle:g}: GFLOPs", "img/s", "operations say", "of that", "of slicing", "compressor"]
    lines = []
    for group in _grouped(sorted(rows, key=lambda row: row["method"]), "method"):
        at = {row["keep"]: row for row in group}
        line = [group[0]["method"], *(_speed(at[keep]) if keep in at else "" for keep in keeps)]
        row = at.get(middle)
        line += [""] * 6 if row is None else [
            f"{row['gflops']:.1f}",
            f"{row['images_per_second']:.1f}",
            f"{row['predicted']:.2f}",
            f"{row['of_predicted']:.0%}",
            f"{row['of_sliced'][1]:.0%}",
            f"{row['spent_share'][1]:.1%}",
        ]  # fmt: skip
        lines.append(line)
    return markdown([heading, *lines], "l" + "r" * (len(keeps) + 6))


def overview(rows: Sequence[Row]) -> str:
    """Several geometries and batches: a line for each method."""
    rows = sorted(rows, key=lambda row: (row["dense_gflops"], row["batch"], row["method"]))
    columns = {(row["geometry"], row["batch"]): row for row in rows}
    heading = ["method", *(f"{title(row)}, keep {row['keep']:g}" for row in columns.values())]
    lines = []
    for group in _grouped(sorted(rows, key=lambda row: row["method"]), "method"):
        at = {(row["geometry"], row["batch"]): row for row in group}
        cells = [f"{_speed(at[c])}, {at[c]['of_predicted']:.0%}" if c in at else "" for c in columns]
        lines.append([group[0]["method"], *cells])
    return markdown([heading, *lines], "l" + "r" * len(columns))


def title(row: Row) -> str:
    return f"{row['says']}, batch {row['batch']}"


def source(rows: Sequence[Row]) -> str:
    """What was measured, by which commands at which commits, and on what."""
    newest = max(rows, key=lambda row: row["date"])
    made, rounds = newest["versions"], sorted({row["rounds"] for row in rows})
    commits = {(row["command"], (row["versions"]["commit"] or "no commit")[:10]): None for row in rows}
    dense = {
        title(row): f"{row['dense_images_per_second']:.1f} img/s of {row['dense_gflops']:.1f} GFLOPs"
        for row in rows
    }
    return (
        "Speed-up against the same model with all tokens and fused attention "
        f"({'; '.join(f'{name}: {speed}' for name, speed in dense.items())}): median (and quartiles) of the "
        f"quotients of {rounds[0]}{f' to {rounds[-1]}' if rounds[1:] else ''} rounds, and how much it is of "
        'what operations say. "of slicing": against the model in which as many tokens are cut off by hand '
        f"in the same blocks. Random weights, {newest['dtype']}, threads: {newest['threads']}, "
        f"{newest['clock']} clock. Made by {', '.join(f'`{command}` at {at}' for command, at in commits)} on "
        f"{newest['date'][:10]} with vtc {made['vtc']}, torch {made['torch']}, timm {made['timm']} on "
        f"{newest['device']}."
    )


def _speed(row: Row) -> str:
    low, middle, high = (f"{value:.2f}" for value in row["speed"])
    return f"{'slower: ' if row['speed'][1] < 1 else ''}{middle} ({low}-{high})"


def _newest(rows: Sequence[Row]) -> list[Row]:
    """Of rows that differ by the method's code only, the last one made."""
    by_setting = {
        tuple(row[n] for n in ("geometry", "batch", "method", "keep", *MACHINE)): row for row in rows
    }
    return list(by_setting.values())


def _grouped(rows: Sequence[Row], *names: str) -> list[list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(groups.values())


def planned(config: dict[str, Any], options: argparse.Namespace) -> list[Cell]:
    """The cells of the grid that are chosen, with the methods and budgets that are."""
    every, cells = vtc.list_methods("encoder"), []
    for entry in config["grid"]:
        named = {"all": every, "few": config["few"]}.get(entry["methods"], [entry["methods"]])
        if entry["geometry"] in options.geometry and entry["batch"] in (options.batches or [entry["batch"]]):
            geometry = Geometry.of(entry["geometry"], config, options.tiny)
            keeps = options.keeps or entry["keeps"]
            cells.append(Cell(geometry, entry["batch"], options.methods or named, keeps))
    return cells


def main(arguments: Sequence[str] | None = None) -> None:
    config = json.loads(CONFIG.read_text())
    geometries, batches = list(config["geometries"]), sorted({entry["batch"] for entry in config["grid"]})
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", nargs="+", choices=geometries, default=geometries)
    parser.add_argument("--batches", nargs="+", type=int, choices=batches)
    parser.add_argument(
        "--methods", nargs="+", choices=vtc.list_methods("encoder"), help="default: as in the grid"
    )
    parser.add_argument("--keeps", nargs="+", type=float, help="default: as in the grid")
    parser.add_argument("--seconds", type=float, default=8, help="for a method on one geometry and batch")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: time spent waiting for other processes is not counted",
    )
    parser.add_argument("--out", type=Path, default=ROOT / config["output"])
    parser.add_argument("--tiny", action="store_true", help="models scaled down to run in seconds")
    parser.add_argument("--table", action="store_true", help="print the rows as Markdown and measure nothing")
    parser.add_argument(
        "--readme", type=Path, help="fill this file's part 'encoder-speed' from the rows and measure nothing"
    )
    options = parser.parse_args(arguments)
    if options.table:
        print(tables(read_rows(options.out)[0]))
    if options.readme:
        fill_parts(options.readme, {"encoder-speed": lambda: tables(read_rows(options.out)[0])})
    if options.table or options.readme:
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    given = sys.argv[1:] if arguments is None else arguments
    run(planned(config, options), options, shlex.join(["python", "eval/encoder_speed.py", *given]))


if __name__ == "__main__":
    main()
