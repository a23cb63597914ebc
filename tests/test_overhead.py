"""eval/overhead.py compares with an honest oracle, writes whole rows, and makes none of them twice."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from footprint import footprint

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


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"eval/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look, and the one file for the other
    spec.loader.exec_module(module)
    return module


overhead, selection = load("overhead"), load("selection")
CONFIG = json.loads(overhead.CONFIG.read_text())
ENTRIES, BATCHES = CONFIG["geometries"], CONFIG["selection"]["batches"]


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
    length, tokens, kept = len(trio.stay), len(trio.kept), int(trio.kept.sum())
    assert int(trio.stay.sum()) == length - tokens + kept
    assert kept == tokens / 4 or (kept < tokens / 4 and getattr(vtc.get_method(method), "adaptive", False))
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


@pytest.mark.parametrize("script", [overhead, selection], ids=["overhead", "selection"])
def test_the_readme_shows_the_rows(script):
    readme, name = (ROOT / "README.md").read_text(encoding="utf-8"), script.__name__
    part = readme.split(f"<!-- {name}:begin -->\n")[1].split(f"\n<!-- {name}:end -->")[0]
    assert part == script.tables(read_rows(ROOT / f"eval/results/{name}.jsonl")[0])


def test_peak_is_what_tensors_take_beyond_the_start():
    held = torch.ones(1 << 20)
    peak = overhead.peak_bytes(lambda: (held + 1).sum(), torch.device("cpu"))
    assert peak == pytest.approx(4 << 20, rel=0.01)


def batch_of(name):
    batch = selection.Batch.of(name, CONFIG, tiny=True)
    model = batch.geometry.build(torch.float32, "cpu")
    return batch, model, batch.inputs(model)


@pytest.mark.parametrize("name", BATCHES)
@torch.no_grad()
def test_every_method_does_the_same_behind_a_tower_that_is_played_again(name):
    batch, model, inputs = batch_of(name)
    replay, tower = selection.Replay(model, inputs), model.base_model.vision_tower
    methods = overhead.servable(batch.geometry, vtc.list_methods("features"), "features")
    assert {"tome", "vtc-cls", "slime"} < set(methods)
    for method in methods:
        if vtc.get_method(method).lowers_resolution:
            continue
        with selection.compressed(batch, model, method) as handle:
            logits, records = model(**inputs).logits, handle.last
            with replay.playing():
                assert torch.equal(model(**inputs).logits, logits)
            assert len(handle.last) == len(records) == len(inputs["input_ids"])
            for one, other in zip(records, handle.last):
                assert torch.equal(one.index, other.index) and torch.equal(one.source, other.source)
    assert "forward" not in vars(tower)


@torch.no_grad()
def test_a_played_tower_computes_nothing():
    _, model, inputs = batch_of("clip-l-336-batch-8")
    replay, seen = selection.Replay(model, inputs), []
    model.base_model.vision_tower.encoder.layers[0].register_forward_hook(lambda *_: seen.append(1))
    with replay.playing():
        model(**inputs)
    assert not seen
    model(**inputs)
    assert seen


@torch.no_grad()
def test_times_are_of_the_tower_and_until_the_decoder():
    _, model, inputs = batch_of("clip-l-336-batch-8")
    model(**inputs)  # transformers puts hooks of its own onto it at first
    before, now = footprint(model), iter(range(100))
    times = selection.run(model, inputs, lambda: next(now))
    # Four readings: the call, the tower's begin and end, the decoder's layer.
    assert (times.tower, times.ahead) == (1, 3)
    assert footprint(model) == before


def test_rows_of_selection_are_whole_and_made_once(tmp_path, capsys, monkeypatch):
    out = tmp_path / "rows.jsonl"
    methods = ["divprune", "downsample", "slime", "vtc-cls"]
    arguments = ["--selection", "--tiny", "--methods", *methods, "--repeats", "2", "--dtype", "float32"]
    arguments += ["--device", "cpu", "--clock", "cpu", "--out", str(out)]
    readings = itertools.count()  # on which a busy machine has no influence: a reading is a second
    monkeypatch.setitem(overhead.CLOCKS, "cpu", lambda: next(readings))
    overhead.main(arguments)
    rows, broken = read_rows(out)
    assert not broken and [row["method"] for row in rows] == methods * 2
    assert capsys.readouterr().out.count("4 of 4 rows to make") == 2
    for row in rows:
        tiled = row["geometry"] == "clip-l-336-tiles tiny"
        # Five tiles of 64 tokens and 16 newline tokens
        assert (row["tiled"], row["pictures"], row["image_tokens"]) == (
            (True, 1, 336) if tiled else (False, 2, 64)
        )
        assert row["kept_tokens"] == (40 if tiled else 16)
        assert (row["allocate"] == "joint") == (tiled and row["method"] in ("divprune", "vtc-cls"))
        for name in ("tower_seconds", "spent_seconds", "spent_to_tower"):
            low, middle, high = row[name]
            assert 0 < low <= middle <= high
        # What the compressor reads of the clock more, and downsample's tower is not played again.
        assert (row["added_to_tower"][0] > 0) and row["added_seconds"][0] == row["added_seconds"][2]
        assert row["versions"]["torch"] == torch.__version__ and row["command"].startswith("python eval/")
        assert (row["dtype"], row["repeats"], row["clock"]) == ("float32", 2, "cpu")
    monkeypatch.setattr(selection, "measure", None)
    overhead.main(arguments)
    assert capsys.readouterr().out.count("0 of 4 rows to make") == 2
    assert read_rows(out)[0] == rows
    overhead.main([*arguments, "--table"])
    table = capsys.readouterr().out
    assert table.count("| divprune |") == 2 and "| 16 of 64 |" in table and "| 40 of 336 | joint |" in table
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- selection:begin -->\nold\n<!-- selection:end -->\nbehind\n")
    overhead.main([*arguments, "--readme", str(readme)])
    part = f"<!-- selection:begin -->\n{selection.tables(rows)}\n<!-- selection:end -->"
    assert readme.read_text() == f"before\n{part}\nbehind\n"


def test_a_geometry_of_the_other_measurement_is_refused(capsys):
    for arguments in (["--geometry", "clip-l-336-tiles"], ["--selection", "--geometry", "clip-l-336"]):
        with pytest.raises(SystemExit):
            overhead.main(arguments)
        said = (
            "with --selection there are clip-l-336-"
            if arguments[0] == "--selection"
            else "and no clip-l-336-t"
        )
        assert said in capsys.readouterr().err
