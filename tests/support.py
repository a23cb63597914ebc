"""The table of families, made of what the tests of them showed in this run."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest
import transformers

import vtc
from vtc.hosts import HOSTS as ENTRIES

TABLE = Path(vtc.__file__).parent / "hosts" / "support.json"
READS = {"keys": "tome", "attention": "hiprune", "CLS": "vtc-cls"}  # what a method that reads it is called


def host_of(item) -> str | None:
    """The tiny host that a test runs on."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return next((value for name, value in parameters.items() if name.endswith("host")), None)


class Support:
    """Collects outcomes: a column of a family is true where every test that shows it passed on every host."""

    def __init__(self):
        self.outcomes: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
        self.properties: dict[str, set[tuple[str, str]]] = defaultdict(set)  # what tests that passed recorded

    def note(self, host: str, columns: list[str], passed: bool, properties: list[tuple[str, str]]) -> None:
        from tiny import HOSTS

        for column in columns:
            if column == "tiles" and HOSTS[host].films:  # frames are its tiles
                column = "video"
            self.outcomes[host][column].append(passed)
        if passed:
            self.properties[host].update(tuple(each) for each in properties)

    @property
    def complete(self) -> bool:
        """Whether every host was in this run: they are in several files."""
        from tiny import HOSTS

        towers = any("encoder stage" in columns for columns in self.outcomes.values())
        return towers and {name for name, tiny in HOSTS.items() if tiny.works} <= self.outcomes.keys()

    def table(self) -> dict:
        from tiny import HOSTS

        families: dict[str, dict] = {}
        for entry in ENTRIES:
            hosts = [name for name, tiny in HOSTS.items() if tiny.works and tiny.family == entry.name]
            row = {"model_types": list(entry.model_types), "hosts": hosts}
            columns = {column for host in hosts for column in self.outcomes[host]}
            for column in sorted(columns):
                shown = [passed for host in hosts for passed in self.outcomes[host][column]]
                row[column] = bool(shown) and all(shown)
            row["lacks"] = sorted({lack for host in hosts for lack in HOSTS[host].lacks})
            known = set().union(*(self.properties[host] for host in hosts))
            row["reads"] = [what for what, method in READS.items() if ("served", method) in known]
            encoder = [what for what in ("tower and prompt", "tower") if ("encoder", what) in known]
            row["encoder"] = encoder[0] if encoder and row["encoder stage"] else None
            row["positions"] = [p for p in ("keep", "repack") if ("positions", p) in known]
            families[entry.name] = row
        return {"transformers": transformers.__version__, "families": families}


class Outcomes:
    """The part of pytest that gathers what tests showed: a run of all tests of families compares the table
    with it, or writes it. Workers (pytest-xdist) hand what they know to the process that started them."""

    def __init__(self, config):
        self.config, self.support = config, Support()
        self.due: set[str] = set()  # tests of families
        self.noted: set[str] = set()  # those with an outcome
        self.deselected = False

    def pytest_deselected(self, items):
        self.deselected |= bool(items)

    def pytest_collection_finish(self, session):
        self.due |= {item.nodeid for item in session.items if item.get_closest_marker("shows")}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report, marker = (yield).get_result(), item.get_closest_marker("shows")
        if marker and (report.when == "call" or report.failed):
            report.shows = list(marker.args)  # goes with the report from a worker
            report.host = host_of(item)

    def pytest_runtest_logreport(self, report):
        if hasattr(report, "shows"):
            self.noted.add(report.nodeid)
            if report.host:
                self.support.note(report.host, report.shows, report.passed, report.user_properties)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node, error):
        """A worker is done; one that broke down says nothing."""
        known = getattr(node, "workeroutput", {})
        self.due |= set(known.get("due", ()))
        self.deselected |= known.get("deselected", False)

    def pytest_sessionfinish(self, session):
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput |= {"due": sorted(self.due), "deselected": self.deselected}
            return
        partial = self.deselected or any("::" in argument for argument in self.config.args)
        if partial or self.due - self.noted or not self.support.complete or self.config.option.collectonly:
            return
        table = self.support.table()
        if self.config.option.families:
            write(table)
        elif table != stored():
            print("\nvtc/hosts/support.json is not what these tests showed: run `make families`")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def write(table: dict) -> None:
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


def stored() -> dict | None:
    return json.loads(TABLE.read_text()) if TABLE.exists() else None
