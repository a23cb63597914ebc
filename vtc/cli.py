"""The command `vtc`."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Sequence

from .commands.arguments import parser
from .commands.listing import hosts, methods, modules, tokenizers
from .commands.picture import ask, draw, profile
from .commands.sweep import demo, report, sweep
from .commands.tokenize import detokenize, tokenize
from .commands.train import train

COMMANDS = {
    "methods": methods, "hosts": hosts, "ask": ask, "draw": draw, "profile": profile, "demo": demo,
    "sweep": sweep, "report": report, "tokenizers": tokenizers, "tokenize": tokenize,
    "detokenize": detokenize, "modules": modules, "train": train,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 2 after an error, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parser(COMMANDS).parse_args(arguments)
    options.command = shlex.join(["vtc", *arguments])
    warnings.showwarning = lambda message, *_: print(f"vtc: warning: {_one_line(message)}", file=sys.stderr)
    try:
        options.run(options)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        if options.debug:
            raise
        print(f"vtc: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "a demo, sweep or tokenize goes on when it is started again, a train with --resume"
        print(f"vtc: stopped; {again}", file=sys.stderr)
        return 130
    return 0


def _one_line(message: object) -> str:
    if isinstance(message, OSError) and message.filename:
        return f"{message.filename}: {message.strerror.lower()}"
    return " ".join(str(message).split()) or type(message).__name__


if __name__ == "__main__":  # accelerate launch -m vtc.cli train CONFIG
    sys.exit(main())
