"""Runs the sweep of a config: python eval/sweep.py --config eval/configs/tiny-llava-scenes.json

"also" in a config has further sweeps into the same file; what one does not say is as in the config itself.
On a machine of several cores the first sweep can run in parts, each in a process of its own (--part 1/2 and
--part 2/2). A run without --part takes in what parts have measured, and runs all that is missing.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from vtc.ask import load_model
from vtc.evaluation.results import Results
from vtc.evaluation.sweep import sweep

ROOT = Path(__file__).parents[1]


def main() -> None:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--part", type=_part, metavar="1/2", help="these of the methods, into a file beside")
    options = parser.parse_args()
    config = json.loads(options.config.read_text())
    name = ROOT / config.pop("model")  # a folder of the checkout, else a name on the Hugging Face Hub
    model, processor = load_model(name if name.is_dir() else name.relative_to(ROOT).as_posix())
    output = ROOT / config.pop("output")
    also = config.pop("also", [])
    command = shlex.join(["python", sys.argv[0], "--config", str(options.config)])  # which made all the parts
    if options.part:
        number, parts = options.part
        output, also = output.with_name(f"{output.name}.part{number}"), []
        config = {**config, "methods": config["methods"][number - 1 :: parts], "baselines": []}
    else:
        take_in(output)
    for own in ({}, *also):
        sweep(model, processor, output=output, command=command, **{**config, **own})


def take_in(output: Path) -> None:
    """Moves the rows of parts into the file they are parts of."""
    for path in sorted(output.parent.glob(f"{output.name}.part*")):
        with Results(path) as part, Results(output) as results:
            for row in part.rows.values():
                results.append(row)
        path.unlink()


def _part(text: str) -> tuple[int, int]:
    number, parts = map(int, text.split("/"))
    if not 1 <= number <= parts:
        raise ValueError(f"there is no part {text}")
    return number, parts


if __name__ == "__main__":
    main()
