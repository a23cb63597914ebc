"""Trains modules with weights on models/tiny-llava, all by one recipe, for the comparison of eval/learned.py.

Run from the repository's root: python eval/train_modules.py [--only tokenpacker ...] [--resume]

Each takes some minutes on two cores, and ends up in models/tiny-llava-NAME. The one that is trained longer,
with all stages, has a file of its own, vtc train models/tiny-llava-ordered/train.yaml; `ordered-400` is the
same with as many steps as the others. What stands in the place of the tower's attention learns its features.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

from vtc.training import train

ANY = (1, 4, 9, 16, 36, 64)  # tokens that those are trained with that make any number
SQUARES = (1, 4, 9, 16, 36)

# The host reads the last block but one.
REPLACED = {"name": "replaced-attention", "blocks": [0, 1, 2, 3, 4]}

# Options, and the numbers of tokens to learn with; none where there is only one.
MODULES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "tokenpacker": ({"window": 3, "layers": [2, 3, 4, 5], "width": 128, "heads": 4}, ()),
    "tokenflex": ({}, ANY),
    "mqt": ({"queries": 64, "heads": 4}, ANY),
    "m3": ({}, SQUARES),
    "pixel-unshuffle": ({"ratio": 3}, ()),
    "token-shuffle": ({"window": 4}, ()),
    "ldpv2": ({"shapes": [[4, 4]]}, ()),
    "c-abstractor": ({"width": 128, "positions": 144}, SQUARES),
    "proxy-projector": ({"window": 3, "proxies": 1, "heads": 4}, ()),
    "agent-pooling": ({"heads": 4}, SQUARES),
    "super-tokens": ({"heads": 4}, SQUARES),
    "semantic-tokens": ({"heads": 4}, ()),
    "token-slimming": ({"tokens": 16}, ()),
    "learned-scorer": ({}, ANY),
    "reconstructing-selector": ({"width": 128, "depth": 2, "heads": 4}, ANY),
    "ordered-400": (
        {"name": "ordered", "tokens": 64, "width": 192, "heads": 6, "decoder_width": 128, "start": "mean"},
        ANY,
    ),
    "agent-attention": ({**REPLACED, "replacement": "agent-attention", "agents": 36}, ()),
    "super-token-attention": ({**REPLACED, "replacement": "super-token-attention", "cell": [2, 2]}, ()),
}


def config(name: str, folder: Path) -> dict[str, Any]:
    """The same steps for all, and the same adapter for what makes fewer tokens."""
    options, counts = MODULES[name]
    steps = {"steps": 400, "batch_size": 32, "muon": 2e-3}
    replaced = options.get("name") == "replaced-attention"
    distill = {"kind": "distill", **steps, "ce": 1.0, "full": False}
    more = {"counts": list(counts)} if counts else {}
    return {
        "model": "models/tiny-llava",
        "module": {"name": name, **options},
        "adapter": None if replaced else {"rank": 16},
        "output": str(folder),
        "data": {
            "train": "scenes", "n": 40000, "questions": 8, "cache": ".cache/scenes",
            "validation": "scenes", "n_validation": 256,
        },
        "stages": [{"kind": "features", **steps} if replaced else distill | more],
    }  # fmt: skip


def main() -> None:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("--only", nargs="+", choices=MODULES, default=[*MODULES], metavar="NAME")
    parser.add_argument("--resume", action="store_true", help="go on where each was stopped")
    options = parser.parse_args()
    for name in options.only:
        folder = Path("models") / f"tiny-llava-{name}"
        train(config(name, folder), resume=options.resume and (folder / "train.json").is_file())
        gc.collect()


if __name__ == "__main__":
    main()
