"""Runs the sweep of a config: python eval/sweep.py --config eval/configs/tiny-llava-scenes.json"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from vtc.ask import load_model
from vtc.evaluation.sweep import sweep

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    config = json.loads(parser.parse_args().config.read_text())
    name = ROOT / config.pop("model")  # a folder of the checkout, else a name on the Hugging Face Hub
    model, processor = load_model(name if name.is_dir() else name.relative_to(ROOT).as_posix())
    output = ROOT / config.pop("output")
    sweep(model, processor, output=output, command=shlex.join(["python", *sys.argv]), **config)


if __name__ == "__main__":
    main()
