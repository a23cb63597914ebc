"""The package itself: what importing it costs and what it shows."""

import subprocess
import sys

import vtc

IMPORT = """
import sys, time, torch, transformers
before = set(sys.modules)
start = time.process_time()  # waiting for other processes does not count
import vtc
print(time.process_time() - start)
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new - {"vtc", "torch"} - set(sys.stdlib_module_names)))
print("torch._dynamo" in sys.modules)
"""


def test_importing_is_light():
    out = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True
    ).stdout.split("\n")
    assert float(out[0]) <= 0.2
    assert out[1:3] == ["[]", "False"]


def test_every_public_name_is_there_and_documented():
    for name in vtc.__all__:
        assert getattr(vtc, name).__doc__, name


def test_every_method_is_one_short_file_with_its_source():
    import inspect
    from pathlib import Path

    from vtc.method import doc

    baselines = {"random", "uniform", "pool", "downsample"}
    for name in vtc.list_methods():
        cls = type(vtc.get_method(name))
        lines = Path(inspect.getfile(cls)).read_text().splitlines()
        assert len(lines) <= 140, name
        assert doc(cls)
        assert name in baselines or cls.paper.startswith("arXiv:") or "doi:" in cls.paper
        assert not any("transformers" in line or "timm" in line for line in lines if "import" in line)
