"""A run of all tests of families is compared with the table, whoever ran them: one process, or workers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Stand-ins for what the table is made of: two families, one host each. Nothing here needs a model.
STUBS = {
    "transformers.py": "__version__ = '5'",
    "vtc/__init__.py": "",
    "vtc/hosts/__init__.py": """
from types import SimpleNamespace as Entry
HOSTS = [Entry(name="a", model_types=("a",)), Entry(name="b", model_types=("b",))]
""",
    "tiny.py": """
from types import SimpleNamespace as Tiny
HOSTS = {n: Tiny(works=True, family=n, films=n == "b", lacks=()) for n in "ab"}
""",
    "conftest.py": """
from support import Outcomes

def pytest_addoption(parser):
    parser.addoption("--families", action="store_true")

def pytest_configure(config):
    config.addinivalue_line("markers", "shows(*columns): a column")
    config.pluginmanager.register(Outcomes(config))
""",
    "test_few.py": """
import os
import pytest

@pytest.mark.parametrize("host", ["a", "b"])
@pytest.mark.parametrize("method", ["tome", "hiprune"])
@pytest.mark.shows("images", "tiles", "encoder stage")
def test_it(host, method, record_property):
    record_property("served", method)
    if os.environ.get("BREAKS") == "worker" and host == "b":
        os._exit(1)
    assert host == "a" or os.environ.get("BREAKS") != "one" or method == "tome"

def test_which_shows_nothing():
    pass
""",
}


@pytest.fixture
def run(tmp_path):
    """Runs pytest over the stand-ins, as a process of its own."""
    for name, text in STUBS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copy(Path(__file__).with_name("support.py"), tmp_path)
    (tmp_path / "pytest.ini").touch()

    def call(*arguments, breaks=""):
        outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *arguments],
            cwd=tmp_path, env={**outside, "PYTHONPATH": str(tmp_path), "BREAKS": breaks},
            capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode, "support.json is not what these tests showed" in done.stdout

    call.table = tmp_path / "vtc/hosts/support.json"
    return call


@pytest.mark.parametrize("workers", [(), ("-n", "2", "--dist", "worksteal")], ids=["alone", "workers"])
def test_a_whole_run_is_compared_with_the_table(run, workers):
    assert run(*workers, "--families") == (0, False)
    families = json.loads(run.table.read_text())["families"]
    assert (families["a"]["images"], families["a"]["tiles"]) == (True, True)
    assert families["b"]["video"] and "tiles" not in families["b"]
    assert families["a"]["reads"] == families["b"]["reads"] == ["keys", "attention"]
    assert run(*workers) == (0, False)
    assert run(*workers, breaks="one") == (1, True)
    run.table.write_text("{}")
    assert run(*workers, "-k", "tome") == run(*workers, "test_few.py::test_it") == (0, False)
    assert run(*workers, "--families", breaks="one")[0] == 1
    families = json.loads(run.table.read_text())["families"]
    assert families["a"]["images"] and not families["b"]["images"] and families["b"]["reads"] == ["keys"]


def test_without_an_outcome_of_a_worker_nothing_is_written(run):
    assert run("-n", "2", "--families", breaks="worker") == (1, False)
    assert not run.table.exists()
