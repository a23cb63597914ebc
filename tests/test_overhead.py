"""eval/overhead.py compares with an honest oracle, writes whole rows, and makes none of them twice."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import vtc
from vtc.api import current
from vtc.evaluation.results import read_rows

ROOT = Path(__file__).parents[1]
SPREADS = (
    "bare_seconds",
    "tower_seconds",
    "oracle_seconds",
    "compressed_seconds",
    "to_oracle",
    "to_bare",
    "spent_seconds",
    "spent_to_tower",
)
PEAKS = (
    "tower_peak_bytes",
    "compressed_tower_peak_bytes",
    "prefill_peak_bytes",
    "compressed_prefill_peak_bytes",
)


def load():
    spec = importlib.util.spec_from_file_location("overhead", ROOT / "eval/overhead.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


overhead = load()
ENTRIES = json.loads(overhead.CONFIG.read_text())["geometries"]


def tiny(name):
    geometry = overhead.Geometry.of(name, ENTRIES[name], tiny=True)
    model = geometry.build(torch.float32, "cpu")
    return geometry, model, geometry.inputs(model)


def served(name):
    geometry = overhead.Geometry.of(name, ENTRIES[name], tiny=True)
    return overhead.servable(geometry, vtc.list_methods("features"))


@pytest.mark.parametrize("name, method", [(name, method) for name in ENTRIES for method in served(name)])
@torch.no_grad()
def test_the_oracle_says_what_the_compressed_model_says(name, method):
    _, model, inputs = tiny(name)
    trio = overhead.Trio(model, inputs, method, keep=0.25)
    length, tokens = len(trio.stay), len(trio.kept)
    assert int(trio.kept.sum()) == round(tokens / 4) and int(trio.stay.sum()) == length - tokens * 3 // 4
    compressed = trio.compressed(**inputs).logits[:, trio.stay]
    oracle = trio.oracle(**trio.oracle_inputs).logits
    bare = trio.bare(**inputs).logits[:, trio.stay]
    torch.testing.assert_close(compressed, oracle, rtol=1e-4, atol=1e-5)
    assert (oracle - bare).abs().max() > 0.01  # so that agreement says something
    assert current(trio.compressed) and not (current(trio.oracle) or current(trio.bare))


@torch.no_grad()
def test_the_oracle_runs_its_tower_and_nothing_of_vtc(monkeypatch):
    _, model, inputs = tiny("clip-l-336")
    trio = overhead.Trio(model, inputs, "tome", keep=0.25)
    images, lengths = [], []
    tower, decoder = trio.oracle.model.vision_tower, trio.oracle.model.language_model
    tower.register_forward_hook(lambda module, args, output: images.append(output))
    decoder.register_forward_hook(
        lambda module, args, kwargs, output: lengths.append(kwargs["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    monkeypatch.setattr(type(trio.handle._stages[0]), "features", None)
    trio.functions()["oracle"]()
    assert len(images) == 1 and lengths == [int(trio.stay.sum())]
    assert trio.oracle.lm_head.weight is trio.compressed.lm_head.weight


def test_rows_are_whole_and_made_once(tmp_path, capsys, monkeypatch):
    out = tmp_path / "rows.jsonl"
    arguments = ["--tiny", "--geometry", "clip-l-336", "--methods", "tome", "uniform", "--keeps", "1", "0.25"]
    arguments += ["--repeats", "2", "--dtype", "float32", "--device", "cpu", "--out", str(out)]
    overhead.main(arguments)
    rows, broken = read_rows(out)
    assert not broken and len(rows) == 4
    assert "4 of 4 rows to make" in capsys.readouterr().out
    for row in rows:
        assert row["geometry"] == "clip-l-336 tiny" and row["image_tokens"] == 64
        assert row["kept_tokens"] == 64 * row["keep"]
        assert row["prompt_length"] - row["oracle_length"] == 64 - row["kept_tokens"]
        for name in SPREADS:
            low, middle, high = row[name]
            assert 0 < low <= middle <= high
        assert all(row[name] > 0 for name in PEAKS)
        assert row["versions"]["torch"] == torch.__version__ and row["command"].startswith("python eval/")
        assert (row["dtype"], row["repeats"], row["threads"]) == ("float32", 2, torch.get_num_threads())
    monkeypatch.setattr(overhead, "measure", None)
    overhead.main(arguments)
    assert "0 of 4 rows to make" in capsys.readouterr().out
    assert read_rows(out)[0] == rows
    overhead.main([*arguments, "--table"])
    table = capsys.readouterr().out
    assert table.count("| tome |") == 2 and "| 16 of 64 |" in table
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- overhead:begin -->\nold\n<!-- overhead:end -->\nbehind\n")
    overhead.main([*arguments, "--readme", str(readme)])
    part = f"<!-- overhead:begin -->\n{overhead.tables(rows)}\n<!-- overhead:end -->"
    assert readme.read_text() == f"before\n{part}\nbehind\n"


def test_the_readme_shows_the_rows():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    part = readme.split("<!-- overhead:begin -->\n")[1].split("\n<!-- overhead:end -->")[0]
    assert part == overhead.tables(read_rows(ROOT / "eval/results/overhead.jsonl")[0])


def test_peak_is_what_tensors_take_beyond_the_start():
    held = torch.ones(1 << 20)
    peak = overhead.peak_bytes(lambda: (held + 1).sum(), torch.device("cpu"))
    assert peak == pytest.approx(4 << 20, rel=0.01)
