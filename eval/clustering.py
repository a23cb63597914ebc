"""Agglomerative clustering of tokens: scikit-learn's route, which ATC's official code takes, against vtc's.

Both start from the same cosine distances of random keys and end with labels: there one
AgglomerativeClustering(metric="precomputed") per image, in one thread; here vtc.clustering.agglomerate on the
batch, with threads over images. They run in turn; a row holds the median, least and greatest seconds, and how
many images are partitioned alike. The newest row of a setting counts.

Run from the repository's root:
    python eval/clustering.py                          # 196 tokens, batch 32, on one and on all threads
    python eval/clustering.py --threads 1 --clock cpu  # on a machine that others use too
    python eval/clustering.py --forward                # what it is of a dense ViT-B's time
    python eval/clustering.py --table                  # the rows as Markdown
    python eval/clustering.py --readme README.md       # fills its part <!-- clustering:begin -->
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vtc.clustering import LINKAGES, agglomerate
from vtc.cost import compare, device_name, versions
from vtc.evaluation.report import fill_parts
from vtc.evaluation.results import Results, Row, read_rows
from vtc.evaluation.tables import markdown

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "eval/results/clustering.jsonl"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
KINDS = (
    "random",
    "smooth",
)  # keys that have nothing to do with each other, and ones that drift over the tokens


def drawn_keys(kind: str, batch: int, tokens: int, channels: int, device: str) -> Tensor:
    keys = torch.randn(batch, tokens, channels, generator=torch.Generator().manual_seed(0))
    return F.normalize(keys.cumsum(dim=1) if kind == "smooth" else keys, dim=-1).to(device)


def of_scikit_learn(distance: Tensor, kept: int, linkage: str) -> Tensor:
    from sklearn.cluster import AgglomerativeClustering

    images = distance.cpu().numpy()
    rule = AgglomerativeClustering(n_clusters=kept, metric="precomputed", linkage=linkage)
    return torch.from_numpy(np.stack([rule.fit_predict(image) for image in images])).to(distance.device)


def alike(one: Tensor, other: Tensor) -> int:
    """How many rows of labels (B, N) are the same partition, whatever the labels are called."""
    together = [labels[:, :, None] == labels[:, None] for labels in (one, other)]
    return int((together[0] == together[1]).all(dim=2).all(dim=1).sum())


def measure(options: argparse.Namespace, kind: str, linkage: str, threads: int) -> Row:
    import fastcluster
    import scipy
    import sklearn

    torch.set_num_threads(threads)
    kept, shape = options.kept, (options.batch, options.tokens, options.channels)
    keys = drawn_keys(kind, *shape, options.device)
    distance = 1 - keys @ keys.transpose(1, 2)  # (B, N, N)
    functions = {
        "scikit-learn": lambda: of_scikit_learn(distance, kept, linkage),
        "vtc": lambda: agglomerate(distance, kept, linkage),
        "distances": lambda: 1 - keys @ keys.transpose(1, 2),
    }
    seconds = compare(functions, options.repeats, CLOCKS[options.clock])
    official, ours = seconds["scikit-learn"], seconds["vtc"]
    where = device_name(torch.device(options.device))
    return {
        "key": f"{where}, {options.clock} {threads} threads, {kind} {shape}, {kept} kept, {linkage}",
        "data": kind,
        "batch": options.batch,
        "tokens": options.tokens,
        "channels": options.channels,
        "kept": kept,
        "linkage": linkage,
        "device": where,
        "threads": threads,
        "processors": os.cpu_count(),
        "repeats": options.repeats,
        "clock": options.clock,
        "official_seconds": _spread(official),
        "vtc_seconds": _spread(ours),
        "distances_seconds": _spread(seconds["distances"]),
        "faster": statistics.median(a / b for a, b in zip(official, ours)),
        "alike": alike(functions["scikit-learn"](), functions["vtc"]()),
        "libraries": {
            "fastcluster": fastcluster.__version__,
            "scikit-learn": sklearn.__version__,
            "scipy": scipy.__version__,
        },
    }


def forward_seconds(options: argparse.Namespace, threads: int) -> list[float]:
    """Of a dense ViT-B/16 at 224 pixels on the same batch, once warm: [median, least, greatest]."""
    import timm

    torch.set_num_threads(threads)
    model = timm.create_model("vit_base_patch16_224").eval().to(options.device)
    pictures = torch.randn(options.batch, 3, 224, 224, device=options.device)
    with torch.no_grad():
        return _spread(compare({"": lambda: model(pictures)}, 1, CLOCKS[options.clock])[""])


def table(rows: list[Row]) -> str:
    heading = ("device", "clock", "threads", "keys", "tokens", "kept", "linkage", "scikit-learn ms", "vtc ms")
    lines = [[*heading, "faster", "alike", "of a ViT-B forward"]]
    for row in rows:
        of = ("device", "clock", "threads", "data", "tokens", "kept", "linkage")
        official, ours, forward = row["official_seconds"], row["vtc_seconds"], row.get("forward_seconds")
        lines.append(
            [
                *(str(row[name]) for name in of),
                *(f"{1e3 * seconds[0]:.1f}" for seconds in (official, ours)),
                f"{row['faster']:.1f} x",
                f"{row['alike']} / {row['batch']}",
                f"{100 * ours[0] / forward[0]:.2f} %" if forward else "-",
            ]
        )
    return markdown(lines, "llrlrrlrrrrr")


def block(rows: list[Row]) -> str:
    """The table with how it was made."""
    made = {(row["command"], (row["versions"]["commit"] or "no commit")[:10]): None for row in rows}
    by = "; ".join(f"`{command}` at commit {commit}" for command, commit in made)
    return f"{table(rows)}\n\nMade by {by}."


def _spread(seconds: list[float]) -> list[float]:
    return [statistics.median(seconds), min(seconds), max(seconds)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=196)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--kept", type=int, default=98)
    parser.add_argument("--keys", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--linkages", nargs="+", choices=LINKAGES, default=LINKAGES)
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: of all threads, waiting for others not counted"
    )
    parser.add_argument("--forward", action="store_true", help="time a dense ViT-B on the same batch, too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=OUTPUT)
    parser.add_argument("--table", action="store_true", help="print the rows as Markdown and measure nothing")
    parser.add_argument("--readme", type=Path, help="fill this file's part and measure nothing")
    options = parser.parse_args(arguments)
    if options.readme:
        fill_parts(options.readme, {"clustering": lambda: block(read_rows(options.out)[0])})
    elif not options.table:
        given = sys.argv[1:] if arguments is None else arguments
        command = shlex.join(["python", "eval/clustering.py", *given])
        with Results(options.out) as results:
            for threads in options.threads:
                forward = {"forward_seconds": forward_seconds(options, threads)} if options.forward else {}
                for kind in options.keys:
                    for linkage in options.linkages:
                        row = {**measure(options, kind, linkage, threads), **forward}
                        row["date"] = datetime.now(UTC).isoformat(timespec="seconds")
                        results.append({**row, "command": command, "versions": versions()})
    print(table(read_rows(options.out)[0]))


if __name__ == "__main__":
    main()
