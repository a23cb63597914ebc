"""The output folder of a training, and what its train.json says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..weights import CONFIG
from .config import Config

REPORT = "train.json"
OF_STAGES = ("seed", "precision", "train", "split", "n", "questions")  # what each is trained by


class Folder:
    """What was trained there already, in `report`; a training that goes on adds to it and writes it.

    Raises ValueError for a folder that is in use, or that cannot be gone on with by this configuration.
    """

    def __init__(self, config: Config, resume: bool):
        self.path, self.names = Path(config.output), config.names()
        self.report = self._opened(json.loads(json.dumps(config.shown())), resume)

    def write(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        draft = self.path / f".{REPORT}"
        draft.write_text(json.dumps(self.report, indent=2) + "\n")
        draft.replace(self.path / REPORT)

    def _opened(self, shown: dict[str, Any], resume: bool) -> dict[str, Any]:
        file = self.path / REPORT
        if self.path.is_file():
            raise ValueError(f"{self.path} is a file: output is the folder of the finished module")
        new = {"config": shown, "stages": {}}
        if not file.is_file():
            if resume and self.path.exists() and any(self.path.iterdir()):
                raise ValueError(f"{self.path} holds no training to go on with: there is no {REPORT}")
            if (self.path / CONFIG).is_file():
                raise ValueError(f"{self.path} holds a model, which would be lost: choose another output")
            return new
        report = json.loads(file.read_text())
        if not resume and not report["stages"]:  # refused or stopped before its first checkpoint
            return new
        if not resume:
            same = "this" if report["config"] == shown else "another"
            raise ValueError(
                f"{self.path} holds a training with {same} configuration: go on with --resume, or choose "
                "another output"
            )
        fixed = ("model", "module", "compress", "adapter")
        changed = [name for name in fixed if report["config"].get(name) != shown.get(name)]
        if changed:
            raise ValueError(
                f"{self.path} holds a training with another {' and '.join(changed)}: choose another output"
            )
        self._check_done(report, shown)
        self._check_left(report, shown)
        return report | {"config": shown}

    def _check_left(self, report: dict[str, Any], shown: dict[str, Any]) -> None:
        """Raises ValueError where nothing is left to be trained by what was changed."""
        if any(not report["stages"].get(name, {}).get("done") for name in self.names):
            return
        old, new = ({**one, **one["data"]} for one in (report["config"], shown))
        if changed := [name for name in OF_STAGES if old.get(name) != new[name]]:
            raise ValueError(
                f"all stages in {self.path} are trained, which another {' and '.join(changed)} would change "
                "nothing of: choose another output"
            )

    def _check_done(self, report: dict[str, Any], shown: dict[str, Any]) -> None:
        """Raises ValueError where a stage that was trained is now another one. The last that was may have
        more steps than it had, and is then gone on with."""
        old = {f"{i}-{stage['kind']}": stage for i, stage in enumerate(report["config"]["stages"], 1)}
        new = dict(zip(self.names, shown["stages"]))
        last = next(reversed(report["stages"]), None)
        for name, told in report["stages"].items():
            now, before = new.get(name), old.get(name, {})
            if now and (now == before or not told.get("done")):
                continue
            if now and name == last and now == before | {"steps": max(now["steps"], told["steps"])}:
                del told["done"]
                continue
            raise ValueError(
                f"stage {name} was trained already, by other settings than it has now: leave those as they "
                "were, or go on with the module in another output, as module: {from: ...}"
            )
