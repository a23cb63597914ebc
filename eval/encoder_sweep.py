"""The README's table of methods inside of an encoder: python eval/encoder_sweep.py

A sweep of models/tiny-clip on generated scenes; every method runs with every schedule, so that those of one
schedule have the same number of tokens in every block; those that reduce in one block only have baselines of
their own. Goes on where it was stopped. For the README then:
vtc report eval/results/tiny-clip-singles.jsonl --readme README.md
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch

import vtc
from vtc.evaluation.classifiers import open_classifier
from vtc.evaluation.classify import sweep_encoder

ROOT = Path(__file__).parents[1]
BASELINES = ("random", "pool")
ONCE = ("expedit",)  # in one block only


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", default=str(ROOT / "models" / "tiny-clip"))
    parser.add_argument("--task", default="singles")
    parser.add_argument("--methods", nargs="+", help="default: all that run inside of an encoder")
    parser.add_argument("--keeps", nargs="+", type=float, default=[0.7, 0.5, 0.25])
    parser.add_argument("--schedules", nargs="+", default=["constant", "staged"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1, help="1: times do not count waiting for other work")
    parser.add_argument("--output", default=ROOT / "eval" / "results" / "tiny-clip-singles.jsonl", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    methods = [name for name in vtc.list_methods("encoder") if name not in (*BASELINES, *ONCE)]
    methods += [(name, {"schedule": "once"}) for name in (*ONCE, *BASELINES)]
    sweep_encoder(
        open_classifier(options.host),
        options.methods or methods,
        options.keeps,
        options.task,
        schedules=options.schedules,
        n=options.pictures,
        seeds=options.seeds,
        baselines=BASELINES,
        output=options.output,
        command=shlex.join(["python", *sys.argv]),
    )


if __name__ == "__main__":
    main()
