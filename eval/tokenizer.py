"""How well a tokenizer reconstructs: error by number of tokens, beside JPEG and WebP, and of policies.

Rows of four kinds are added to the results (see vtc/evaluation/reconstruction.py); rows that exist are not
made again. The pictures are test scenes and textures, or with --images those of a folder, of each the largest
square in its middle. eval/tokenizer_pictures.py draws from the rows.

Run from the repository's root:
    python eval/tokenizer.py                                             # models/tiny-tokenizer
    python eval/tokenizer.py --tokenizer my-folder --images my-photos/   # yours
    python eval/tokenizer.py --lpips alexnet-owt-7be5be79.pth --fid weights-inception-2015-12-05-6726825d.pth
    python eval/tokenizer.py --table                                     # the rows as Markdown
    python eval/tokenizer.py --readme README.md                          # fills <!-- tokenizer:begin -->
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import features

from vtc.cost import device_name, versions
from vtc.evaluation.adaptivity import epsilons, objects_row, policies_row
from vtc.evaluation.codecs import CODECS
from vtc.evaluation.image_metrics import FID, inception, lpips, ms_ssim, ssim
from vtc.evaluation.reconstruction import (
    Pictures,
    Reconstruction,
    codec_row,
    length_row,
    measured_lengths,
    reconstruct,
)
from vtc.evaluation.reconstruction_tables import block
from vtc.evaluation.report import fill_parts
from vtc.evaluation.results import Results, Row, read_rows
from vtc.evaluation.scenes import scene
from vtc.evaluation.textures import texture
from vtc.tokenizers import from_pretrained
from vtc.tokenizers.images import load_images
from vtc.tokenizers.manifest import list_images, weights_digest

ROOT = Path(__file__).parents[1]
TOKENIZER = "models/tiny-tokenizer"
OUTPUT = ROOT / "eval/results/tiny-tokenizer.jsonl"


def scenes(n: int, size: int) -> Pictures:
    drawn = [scene("test", index) for index in range(n)]
    images = load_images([one.image for one in drawn], size)
    return Pictures("scenes", images, np.array([len(one.objects) for one in drawn]))


def textures(n: int, size: int) -> Pictures:
    return Pictures("textures", load_images([texture("test", index) for index in range(n)], size))


def photos(folder: Path, size: int) -> Pictures:
    """The pictures of a folder and of those in it. Raises ValueError where none can be read."""
    found = []
    for name, _ in list_images(folder):
        try:
            found.append(load_images(folder / name, size))
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not found:
        raise ValueError(f"{folder} has no picture that can be read")
    return Pictures(folder.name or str(folder), torch.cat(found))


class Run:
    """Makes the rows of one tokenizer that results do not have yet."""

    def __init__(self, options: argparse.Namespace, results: Results, command: str) -> None:
        self.options, self.results, self.command = options, results, command
        self.tokenizer = tokenizer = from_pretrained(options.tokenizer).to(options.device)
        self.lengths = sorted(set(options.lengths or measured_lengths(tokenizer)))
        tokenizer.check_length(self.lengths)
        self.about = {
            "tokenizer": options.tokenizer,
            "weights": weights_digest(tokenizer)[:12],
            "system": tokenizer.name,
            "parameters": sum(parameter.numel() for parameter in tokenizer.parameters()),
            "device": device_name(torch.device(options.device)),
            "threads": torch.get_num_threads(),
        }
        self.metrics = {"ssim": ssim, "ms_ssim": ms_ssim}
        if options.lpips:
            self.metrics["lpips"] = lpips(options.lpips, options.lpips_net)
        self.network = inception(options.fid) if options.fid else None

    def make(self, sets: Sequence[Pictures], seen: Pictures | None) -> None:
        """All rows of sets of pictures; seen: scenes to count objects on."""
        sets = [data.to(self.options.device) for data in sets if len(data.images)]
        if not sets:
            raise ValueError("there are no pictures to measure")
        names, n = " and ".join(data.name for data in sets), sum(len(data.images) for data in sets)
        keys = [self.key(kind, data.name, len(data.images)) for data in sets for kind in ("lengths", *CODECS)]
        keys.append(self.key("policies", names, n))
        if seen is not None:
            seen = seen.to(self.options.device)
            keys.append(self.key("objects", seen.name, len(seen.images)))
        missing = [key for key in keys if key not in self.results.rows]
        print(f"{len(missing)} of {len(keys)} rows to make", flush=True)
        if not missing:
            return
        bits, found = self.tokenizer.bits_per_token, []
        for data in sets:
            found.append(self.reconstruct(data))
            self.add("lengths", data, partial(length_row, data, found[-1], bits))
            for codec in CODECS:
                self.add(codec, data, partial(codec_row, codec, data, found[-1], bits))
        joined = Pictures(names, torch.cat([data.images for data in sets]))
        every = Reconstruction.cat(found)
        asked = []
        if self.tokenizer.halts:
            asked = self.options.epsilons or epsilons(self.tokenizer, joined.images)
        self.add("policies", joined, partial(policies_row, self.tokenizer, joined, every, asked))
        if seen is not None:
            own = getattr(self.tokenizer.config, "epsilon", None)  # what it halts at where nobody asks
            if asked and own and None not in asked:
                asked = sorted({own, *asked}, reverse=True)
            self.add("objects", seen, partial(objects_row, self.tokenizer, seen, asked))

    def reconstruct(self, data: Pictures) -> Reconstruction:
        start = time.perf_counter()
        fid = FID(data.images, self.network) if self.network else None
        found = reconstruct(self.tokenizer, data.images, self.lengths, self.metrics, fid)
        print(
            f"{data.name}: {len(data.images)} pictures at {len(self.lengths)} lengths "
            f"({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
        return found

    def key(self, kind: str, data: str, n: int) -> str:
        """Names a measurement, the same at any commit: rows are made anew by deleting them, or elsewhere."""
        what = [self.lengths, list(self.metrics), self.network is not None, self.options.epsilons]
        digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:8]
        return f"{self.about['tokenizer']}@{self.about['weights']} {kind} {data} {n} {digest}"

    def add(self, kind: str, data: Pictures, measure: Callable[[], Row]) -> None:
        key = self.key(kind, data.name, len(data.images))
        if key in self.results.rows:
            return
        start = time.perf_counter()
        row = {"key": key} | self.about | measure()
        row |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": self.command}
        self.results.append(row | {"versions": versions() | libraries()})
        print(f"{data.name}: {kind} ({time.perf_counter() - start:.0f} s)", flush=True)


def libraries() -> dict[str, str | None]:
    return {
        "torchmetrics": version("torchmetrics"),
        "pillow": version("pillow"),
        "libjpeg": features.version("libjpeg_turbo") or features.version("jpg"),
        "libwebp": features.version("webp"),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", default=TOKENIZER, help="a folder, or a name on the Hugging Face Hub")
    parser.add_argument("--images", type=Path, help="a folder of pictures, in place of scenes and textures")
    parser.add_argument("--scenes", type=int, default=128, help="how many test scenes")
    parser.add_argument("--textures", type=int, default=64, help="how many test textures")
    parser.add_argument("--seen", type=int, default=1000, help="scenes on which objects are counted")
    parser.add_argument(
        "--lengths", type=int, nargs="+", help="default: all, or about 64 where there are more"
    )
    parser.add_argument("--epsilons", type=float, nargs="+", help="errors to ask a halting head for")
    parser.add_argument("--lpips", type=Path, help="weights of LPIPS's backbone as torchvision has them")
    parser.add_argument("--lpips-net", default="alex", choices=("alex", "vgg", "squeeze"))
    parser.add_argument("--fid", type=Path, help="Inception's weights as torch-fidelity has them")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--out", type=Path, help="default: eval/results/TOKENIZER.jsonl")
    parser.add_argument("--table", action="store_true", help="print the rows as Markdown and measure nothing")
    parser.add_argument("--readme", type=Path, help="fill this file's part and measure nothing")
    options = parser.parse_args(arguments)
    options.out = options.out or OUTPUT.with_name(f"{Path(options.tokenizer).name}.jsonl")
    if options.readme:
        fill_parts(options.readme, {"tokenizer": lambda: block(read_rows(options.out)[0])})
    elif not options.table:
        given = sys.argv[1:] if arguments is None else arguments
        measure(options, shlex.join(["python", "eval/tokenizer.py", *given]))
    if not options.readme:
        print(block(read_rows(options.out)[0]))


def measure(options: argparse.Namespace, command: str) -> None:
    torch.set_num_threads(options.threads)
    with Results(options.out) as results:
        run = Run(options, results, command)
        size = run.tokenizer.config.image_size
        if options.images:
            run.make([photos(options.images, size)], None)
        else:
            sets = [scenes(options.scenes, size), textures(options.textures, size)]
            run.make(sets, scenes(options.seen, size) if options.seen else None)


if __name__ == "__main__":
    main()
