"""What the mechanism itself costs: the prefill of a compressed model against an oracle and the bare model.

The oracle is the bare model in its own forward, natively given a prompt of K image tokens: its tower and
projector run on the whole picture, then the K kept features take the place of all N. It runs no code of vtc,
so what a compressed prefill takes longer is the price of capturing, scoring, reducing and shortening. One
row per geometry, method and budget is added to the results; rows that exist are not made again.

Run from the repository's root:
    python eval/overhead.py                                  # all geometries, methods and budgets
    python eval/overhead.py --geometry clip-l-336 --methods tome --keeps 0.5
    python eval/overhead.py --clock cpu --threads 1          # on a machine that others use too
    python eval/overhead.py --table                          # the rows as Markdown
    python eval/overhead.py --readme README.md               # fills its part <!-- overhead:begin -->
    python eval/overhead.py --selection                      # each method by itself, see eval/selection.py
    python eval/overhead.py --selection --readme README.md   # fills its part <!-- selection:begin -->
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import inspect
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler writes a line for every start and stop

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

import vtc
from vtc.cost import compare, device_name, first_token, versions
from vtc.evaluation.report import fill_parts
from vtc.evaluation.results import Results, Row, read_rows
from vtc.evaluation.tables import markdown

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "eval/configs/overhead.json"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
TEXT = (16, 48)  # text tokens in front of and behind the picture

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Geometry:
    """A model of random weights and the shape of its picture."""

    name: str
    says: str
    config: dict[str, Any]
    pixels: list[int]
    grid: list[list[int]] | None = None  # image_grid_thw, of towers that take flat patches

    @classmethod
    def of(cls, name: str, entry: dict[str, Any], tiny: bool) -> Geometry:
        entry = merged(entry, entry["tiny"]) if tiny else entry
        name, says = (f"{name} tiny", f"{entry['says']}, scaled down") if tiny else (name, entry["says"])
        return cls(name, says, entry["config"], entry["pixels"], entry.get("grid"))

    def build(self, dtype: torch.dtype, device: str | torch.device) -> nn.Module:
        torch.manual_seed(0)
        kind = {key: value for key, value in self.config.items() if key != "model_type"}
        config = AutoConfig.for_model(self.config["model_type"], **copy.deepcopy(kind))
        with torch.device(device):
            return AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()

    @torch.no_grad()
    def inputs(self, model: nn.Module) -> Inputs:
        """What a processor gives for a prompt with one picture; the bare model says how many tokens it is."""
        draw = torch.Generator().manual_seed(0)
        pictures = {"pixel_values": torch.randn(self.pixels, generator=draw).to(model.device, model.dtype)}
        if self.grid:
            pictures["image_grid_thw"] = torch.tensor(self.grid, device=model.device)
        count = len(model.base_model.get_image_features(**pictures, return_dict=True).pooler_output[0])
        image = model.config.image_token_id
        before, after = (torch.randint(3, 900, (length,), generator=draw) for length in TEXT)
        ids = torch.cat([before, torch.full((count,), image), after])[None].to(model.device)  # (1, L)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pictures}
        if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
            inputs["mm_token_type_ids"] = (ids == image).int()
        return inputs


class Trio:
    """Three models over the same weights: bare, compressed, and the oracle of what was kept there."""

    def __init__(self, model: nn.Module, inputs: Inputs, method: str, keep: float):
        self.inputs = inputs
        self.bare, self.oracle, self.compressed = model, twin(model), twin(model)
        self.pictures = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
        self.handle = vtc.compress(self.compressed, method, keep=keep, stage="features")
        marked = image_features(self.compressed, self.pictures)  # (N, D)
        self.kept = ~marked[:, 0].isnan()  # (N,)
        give(self.oracle, marked[self.kept])
        places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
        self.stay = torch.ones_like(inputs["input_ids"][0], dtype=torch.bool)  # (L,)
        self.stay[places] = self.kept
        self.oracle_inputs = shortened(inputs, self.stay)
        if self.handle.plan[0][1]["positions"] == "keep":  # else the oracle counts its own
            self.oracle_inputs["position_ids"] = positions(model, inputs)[..., self.stay]

    def functions(self) -> dict[str, Callable[[], Any]]:
        return {
            "bare": first_token(self.bare, self.inputs),
            "tower": self.tower(self.bare),
            "oracle": first_token(self.oracle, self.oracle_inputs),
            "compressed": first_token(self.compressed, self.inputs),
        }

    def tower(self, model: nn.Module) -> Callable[[], Any]:
        """Tower and projector, to the end: a GPU is waited for by whoever measures."""
        return lambda: image_features(model, self.pictures)


def twin(model: nn.Module) -> nn.Module:
    """Another model over the same weights, so that hooks and stand-ins of one do not touch the other."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def give(model: nn.Module, features: Tensor) -> None:
    """From now on this model runs its tower and projector, and then goes on with `features` (K, D)."""
    run = model.base_model.get_image_features

    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        output = run(*args, **kwargs)
        output.pooler_output = [features]
        return output

    model.base_model.get_image_features = get_image_features


def image_features(model: nn.Module, pictures: Inputs) -> Tensor:
    return model.base_model.get_image_features(**pictures, return_dict=True).pooler_output[0]


def positions(model: nn.Module, inputs: Inputs) -> Tensor:
    """The positions (..., 1, L) that the bare model gives its decoder; counted where it leaves them to it."""
    seen = []
    hook = model.base_model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    ids = inputs["input_ids"]
    return torch.arange(ids.shape[1], device=ids.device)[None] if seen[0] is None else seen[0]


def shortened(inputs: Inputs, stay: Tensor) -> Inputs:
    """The prompt without the dropped image tokens."""
    shape = inputs["input_ids"].shape
    return {name: value[:, stay] if value.shape == shape else value for name, value in inputs.items()}


@torch.no_grad()
def measure(
    model: nn.Module, inputs: Inputs, method: str, keep: float, repeats: int, clock: Callable[[], float]
) -> Row:
    """The numbers of one row. Spreads are (lower quartile, median, upper quartile) over the rounds.

    `spent` is what the handle says, by the wall clock, and so is the tower's time that it is a share of.
    """
    trio = Trio(model, inputs, method, keep)
    functions, spent, encoded = trio.functions(), [], []
    run, encode = functions["compressed"], functions["tower"]
    functions["compressed"] = lambda: (run(), spent.append(trio.handle.spent))
    functions["tower"] = lambda: encoded.append(wall_seconds(encode, model.device))
    seconds = compare(functions, repeats, clock)
    spent, encoded = spent[1:], encoded[1:]  # without the warm-up's
    bare, tower, oracle, compressed = (seconds[name] for name in functions)
    peaks = {
        "tower_peak_bytes": peak_bytes(trio.tower(trio.bare), model.device),
        "compressed_tower_peak_bytes": peak_bytes(trio.tower(trio.compressed), model.device),
        "prefill_peak_bytes": peak_bytes(first_token(trio.bare, inputs), model.device),
        "compressed_prefill_peak_bytes": peak_bytes(run, model.device),
    }
    return {
        "image_tokens": len(trio.kept),
        "kept_tokens": int(trio.kept.sum()),
        "prompt_length": len(trio.stay),
        "oracle_length": int(trio.stay.sum()),
        "bare_seconds": spread(bare),
        "tower_seconds": spread(tower),
        "oracle_seconds": spread(oracle),
        "compressed_seconds": spread(compressed),
        "to_oracle": spread(ratios(compressed, oracle)),
        "to_bare": spread(ratios(compressed, bare)),
        "spent_seconds": spread(spent),
        "spent_to_tower": spread(ratios(spent, encoded)),
        **peaks,
        "attention": trio.bare.config._attn_implementation,
    }


def wall_seconds(function: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def ratios(these: Sequence[float], those: Sequence[float]) -> list[float]:
    """Round by round: what else the machine was doing then slowed both."""
    return [this / that for this, that in zip(these, those, strict=True)]


def spread(values: Sequence[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """How far a call's tensors go beyond what is allocated when it begins, as torch's allocators count."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    peak = now = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        now += change
        peak = max(peak, now)
    return peak


def servable(geometry: Geometry, methods: Sequence[str], stage: str | None = None) -> list[str]:
    """The methods that this host can serve at the features stage; asked of a model without weights.

    stage  "features": also those that run elsewhere where nobody says, or that read the prompt, which tower
           and projector alone have not
    """
    model, found = geometry.build(torch.float32, "meta"), []
    for method in methods:
        rule = vtc.get_method(method)
        own = stage or rule.stages[0]
        try:
            if stage is None and any(need.kind == "text" for need in rule.needs):
                raise ValueError("it reads the prompt: --selection measures it")
            if own != "features":
                raise ValueError(f"it runs at {own}, where the prompt does not enter the decoder shortened")
            vtc.compress(model, method, keep=0.5, stage="features").remove()
        except ValueError as error:
            print(f"{geometry.name}: no {method}: {error}")
        else:
            found.append(method)
    return found


def run_key(geometry: Geometry, method: str, keep: float, how: dict[str, Any]) -> str:
    """Names a measurement, the same at any commit: rows are made anew by deleting them, or elsewhere."""
    what = [geometry.config, geometry.pixels, geometry.grid, TEXT, how]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    return f"{geometry.name} {method} {keep:g} {digest}"


def run(geometries: Sequence[Geometry], options: argparse.Namespace, command: str) -> None:
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
        for geometry in geometries:
            planned = {
                run_key(geometry, method, keep, how): (method, keep)
                for method in servable(geometry, options.methods)
                for keep in options.keeps
            }
            missing = {key: pair for key, pair in planned.items() if key not in results.rows}
            print(f"{geometry.name}: {len(missing)} of {len(planned)} rows to make", flush=True)
            if not missing:
                continue
            model = geometry.build(dtype, device)
            inputs = geometry.inputs(model)
            for number, (key, (method, keep)) in enumerate(missing.items(), 1):
                start = time.perf_counter()
                row = {"key": key, "geometry": geometry.name, "says": geometry.says, **how}
                row |= {"method": method, "keep": keep}
                row |= measure(model, inputs, method, keep, options.repeats, CLOCKS[options.clock])
                row["date"] = datetime.now(UTC).isoformat(timespec="seconds")
                results.append(row | {"command": command, "versions": versions()})
                print(
                    f"{number}/{len(missing)} {summary(row)} ({time.perf_counter() - start:.0f} s)",
                    flush=True,
                )


def summary(row: Row) -> str:
    return (
        f"{row['geometry']} {row['method']} {row['keep']:g}: {row['to_oracle'][1]:.3f} x oracle, "
        f"{row['to_bare'][1]:.3f} x bare, scoring {row['spent_to_tower'][1]:.1%} of the tower"
    )


def tables(rows: Sequence[Row]) -> str:
    """A table for each geometry, precision and machine, with how it was made."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(
            tuple(row[name] for name in ("geometry", "dtype", "device", "threads", "clock")), []
        ).append(row)
    return "\n\n".join(f"{table(group)}\n\n{source(group)}" for group in groups.values())


def table(rows: Sequence[Row]) -> str:
    heading = ["method", "kept", "compressed / oracle", "compressed / bare", "scoring, % of tower"]
    heading += ["tower's peak memory with scoring (without), MiB"]
    lines = [
        [
            row["method"],
            f"{row['kept_tokens']} of {row['image_tokens']}",
            _spread(row["to_oracle"], digits=3),
            _spread(row["to_bare"], digits=3),
            _spread([100 * share for share in row["spent_to_tower"]], digits=1),
            f"{row['compressed_tower_peak_bytes'] / 2**20:.1f} ({row['tower_peak_bytes'] / 2**20:.1f})",
        ]
        for row in sorted(rows, key=lambda row: (row["method"], -row["keep"]))
    ]
    return markdown([heading, *lines], "lrrrrr")


def source(rows: Sequence[Row]) -> str:
    """What was measured, by which commands at which commits, and on what."""
    newest = max(rows, key=lambda row: row["date"])
    made = newest["versions"]
    commits = {(row["command"], (row["versions"]["commit"] or "no commit")[:10]): None for row in rows}
    return (
        f"{newest['says']}: {newest['prompt_length']} tokens, one picture, random weights, "
        f"{newest['dtype']}, threads: {newest['threads']}; medians (and quartiles) of {newest['repeats']} "
        f"rounds, {newest['clock']} clock. `downsample` shows its tower a smaller picture than the oracle's. "
        f"Made by {', '.join(f'`{command}` at {commit}' for command, commit in commits)} on "
        f"{newest['date'][:10]} with vtc {made['vtc']}, torch {made['torch']}, transformers "
        f"{made['transformers']} on {newest['device']}."
    )


def _spread(values: Sequence[float], digits: int) -> str:
    low, middle, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} ({low}-{high})"


def merged(entry: Any, changes: Any) -> Any:
    """`entry` with the leaves of `changes` in their places."""
    if not isinstance(entry, dict) or not isinstance(changes, dict):
        return changes
    return {**entry, **{key: merged(entry.get(key), value) for key, value in changes.items()}}


def main(arguments: Sequence[str] | None = None) -> None:
    config = json.loads(CONFIG.read_text())
    alone = config["selection"]
    geometries, methods = list(config["geometries"]), vtc.list_methods("features")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", nargs="+", choices=[*geometries, *alone["batches"]])
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--keeps", nargs="+", type=float, default=config["keeps"])
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--dtype", default="bfloat16", help="default: bfloat16, what checkpoints come in")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: time spent waiting for other processes is not counted",
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="models scaled down to run in seconds")
    parser.add_argument(
        "--selection", action="store_true", help="what each method costs beside the tower, without an LLM"
    )
    parser.add_argument("--table", action="store_true", help="print the rows as Markdown and measure nothing")
    parser.add_argument(
        "--readme", type=Path, help="fill this file's part of that name from the rows and measure nothing"
    )
    options = parser.parse_args(arguments)
    part, kind, show, measured = "overhead", config, tables, run
    if options.selection:
        import selection  # which imports this file

        part, kind, show, measured = "selection", alone, selection.tables, selection.run_all
    options.out = options.out or ROOT / kind["output"]
    options.repeats = options.repeats or kind["repeats"]
    if options.table:
        print(show(read_rows(options.out)[0]))
    if options.readme:
        fill_parts(options.readme, {part: lambda: show(read_rows(options.out)[0])})
    if options.table or options.readme:
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    known = list(alone["batches"] if options.selection else geometries)
    names = options.geometry or known
    if foreign := sorted(set(names) - set(known)):
        how = "with" if options.selection else "without"
        parser.error(f"{how} --selection there are {', '.join(known)}, and no {', '.join(foreign)}")
    if options.selection:
        chosen = [selection.Batch.of(name, config, options.tiny) for name in names]
    else:
        chosen = [Geometry.of(name, config["geometries"][name], options.tiny) for name in names]
    command = shlex.join(["python", "eval/overhead.py", *(sys.argv[1:] if arguments is None else arguments)])
    measured(chosen, options, command)


if __name__ == "__main__":
    main()
