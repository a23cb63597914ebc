"""Rows of results in a JSONL file: one line per run, written so that a kill at any moment loses no run."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Results:
    """The rows of a file by their key, open for appending; one process at a time may hold it.

    Opening sets a torn last line aside in `<file>.torn`. Lines that are not rows stay in the file and are
    reported by a warning. Raises RuntimeError where another process is writing to the file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab+")
        _lock(self._file, self.path)
        self._mend()
        rows, broken = read_rows(self.path)
        for line in broken:
            warnings.warn(f"{self.path}:{line} is no row of results; it stays there, unused", stacklevel=2)
        self.rows: dict[str, Row] = {row["key"]: row for row in rows}

    def append(self, row: Row) -> None:
        """Writes the row and waits until the disk has it; an error that is known already is not repeated."""
        known = self.rows.get(row["key"])
        if known is not None and "error" in row and known.get("error") == row["error"]:
            return
        line = json.dumps(row)
        self.rows[row["key"]] = json.loads(line)  # as whoever reads the file has it: tuples are lists
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _mend(self) -> None:
        self._file.seek(0)
        data = self._file.read()
        whole, newline, last = data.rpartition(b"\n")
        if not last:
            return
        if _row(last) is not None:  # only the newline is missing
            self._file.write(b"\n")
        else:
            aside = self.path.with_name(self.path.name + ".torn")
            with aside.open("ab") as torn:
                torn.write(last + b"\n")
            self._file.truncate(len(whole + newline))
            warnings.warn(f"the last line of {self.path} was torn; it is set aside in {aside}", stacklevel=3)
        self._file.flush()
        os.fsync(self._file.fileno())


def read_rows(path: str | Path) -> tuple[list[Row], list[int]]:
    """The rows of a file, the newest of each key, and the numbers of the lines that are none."""
    rows: dict[str, Row] = {}
    broken = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        row = _row(line)
        if row is not None:
            rows[row["key"]] = row
        elif line.strip():
            broken.append(number)
    return list(rows.values()), broken


def newest(rows: list[Row]) -> list[Row]:
    """Of rows about the same run the last one made: a method that was rewritten is run under another key. Of
    a module's folder only the weights that were run last count."""
    weights: dict[str, Row] = {}
    for row in rows:
        if "folder" in row:
            _keep_later(weights, _place(row, "folder"), row)
    found: dict[str, Row] = {}
    for row in rows:
        if "folder" in row and weights[_place(row, "folder")]["method"] != row["method"]:
            continue
        _keep_later(found, _place(row, "method", "options", "keep"), row)
    return list(found.values())


def _place(row: Row, *names: str) -> str:
    return json.dumps([row[name] for name in ("model", "task", "split", "n", *names)], sort_keys=True)


def _keep_later(found: dict[str, Row], key: str, row: Row) -> None:
    older = found.get(key)
    if older is None or older.get("date", "") <= row.get("date", ""):
        found[key] = row


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:  # includes bytes that are not text
        return None
    return row if isinstance(row, dict) and isinstance(row.get("key"), str) else None


def _lock(file, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RuntimeError(f"another sweep is writing to {path}: wait or give another output") from None
