"""The table of families, made of what the tests in test_families.py showed in this run."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import transformers

import vtc
from vtc.capture import missing
from vtc.hosts import HOSTS as ENTRIES
from vtc.hosts import open_host

TABLE = Path(vtc.__file__).parent / "hosts" / "support.json"
READS = {"keys": "tome", "attention": "hiprune", "CLS": "vtc-cls"}  # what a method that reads it is called


class Support:
    """Collects outcomes: a column of a family is true where every test that shows it passed on every host."""

    def __init__(self):
        self.outcomes: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))

    def note(self, item, passed: bool) -> None:
        marker, call = item.get_closest_marker("shows"), getattr(item, "callspec", None)
        if marker and call:
            host = call.params.get("host") or call.params["video_host"]
            for column in marker.args:
                self.outcomes[host][column].append(passed)

    @property
    def complete(self) -> bool:
        """Whether every host was in this run: one kind of them has its tests in a file of its own."""
        from tiny import HOSTS

        return {name for name, tiny in HOSTS.items() if tiny.works} <= self.outcomes.keys()

    def table(self) -> dict:
        from tiny import HOSTS, build

        families: dict[str, dict] = {}
        for entry in ENTRIES:
            hosts = [name for name, tiny in HOSTS.items() if tiny.works and tiny.family == entry.name]
            row = {"model_types": list(entry.model_types), "hosts": hosts}
            columns = {column for host in hosts for column in self.outcomes[host]}
            for column in sorted(columns):
                shown = [passed for host in hosts for passed in self.outcomes[host][column]]
                row[column] = bool(shown) and all(shown)
            row["lacks"] = sorted({lack for host in hosts for lack in HOSTS[host].lacks})
            visions = [open_host(build(host)[0]) for host in hosts]
            row["reads"] = [
                what
                for what, method in READS.items()
                if any(not missing(v.encoder, n) for v in visions for n in vtc.get_method(method).needs)
            ]
            row["repack"] = not any(vision.mrope for vision in visions)
            row["tiles"] = entry.tiled
            families[entry.name] = row
        return {"transformers": transformers.__version__, "families": families}


def write(table: dict) -> None:
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


def stored() -> dict | None:
    return json.loads(TABLE.read_text()) if TABLE.exists() else None
