"""eval/encoder_speed.py slices as much as a method removes, writes whole rows, and makes none twice."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import vtc
from vtc.encoder_cost import operations
from vtc.evaluation.results import read_rows

ROOT = Path(__file__).parents[1]
SPREADS = ("dense_seconds", "seconds", "sliced_seconds", "speed", "of_sliced", "spent_seconds", "spent_share")


def load():
    sys.path.insert(0, str(ROOT / "eval"))  # where a script finds its neighbours
    try:
        spec = importlib.util.spec_from_file_location("encoder_speed", ROOT / "eval/encoder_speed.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses look
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "eval"))
    return module


speed = load()
CONFIG = json.loads(speed.CONFIG.read_text())


@pytest.fixture
def contest():
    geometry = speed.Geometry.of("vit-b-16", CONFIG, tiny=True)
    model = geometry.build(torch.float32, torch.device("cpu"))
    return lambda method, keeps: speed.Contest(model, method, keeps, torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize("method", ["random", "representation-shift"])  # in front of the MLP, and behind it
@torch.no_grad()
def test_slicing_costs_what_a_method_without_products_costs(contest, method):
    made = contest(method, [0.5, 0.25])
    made.functions()["0.25"]()
    assert made.handle.last[0].entering["out"] == made.left[0.25][-1] == 16
    for keep, sliced in made.sliced.items():
        count = operations(lambda sliced=sliced: sliced(made.pictures[:1]))
        assert made.gflops(keep) * 1e9 == pytest.approx(count) and made.gflops(keep) < made.gflops()


@torch.no_grad()
def test_slicing_nothing_is_the_dense_encoder(contest):
    made = contest("random", [1.0])
    assert torch.equal(made.sliced[1.0](made.pictures), made.model(made.pictures))


def test_rows_are_whole_and_made_once(tmp_path, capsys, monkeypatch):
    out = tmp_path / "rows.jsonl"
    arguments = ["--tiny", "--geometry", "vit-b-16", "--batches", "1", "8", "--methods", "evit", "tome"]
    arguments += ["--seconds", "0", "--device", "cpu", "--out", str(out)]
    speed.main(arguments)
    rows, broken = read_rows(out)
    assert not broken and len(rows) == 8  # three budgets for each method at batch 8, one at batch 1
    assert "6 of 6 rows to make" in capsys.readouterr().out
    for row in rows:
        assert row["geometry"] == "vit-b-16 tiny" and row["patches"] == 64
        assert row["left"] == int(64 * row["keep"] + 0.5) and row["blocks"].endswith(f"{row['left']}")
        for name in SPREADS:
            low, middle, high = row[name]
            assert 0 < low <= middle <= high
        assert row["predicted"] == pytest.approx(row["dense_gflops"] / row["gflops"]) and row["predicted"] > 1
        assert row["of_predicted"] == pytest.approx(row["speed"][1] / row["predicted"])
        assert row["images_per_second"] == pytest.approx(row["batch"] / row["seconds"][1])
        assert row["versions"]["torch"] == torch.__version__ and row["command"].startswith("python eval/")
        assert (row["dtype"], row["rounds"], row["threads"]) == ("float32", 3, torch.get_num_threads())
    measure = speed.measure
    monkeypatch.setattr(speed, "measure", None)
    speed.main(arguments)
    assert "0 of 6 rows to make" in capsys.readouterr().out and read_rows(out)[0] == rows
    monkeypatch.setattr(speed, "measure", measure)
    code_of = speed.code_of
    monkeypatch.setattr(speed, "code_of", lambda name: "new" if name == "tome" else code_of(name))
    speed.main(arguments)
    assert "3 of 6 rows to make" in capsys.readouterr().out
    again = read_rows(out)[0]
    assert len(again) == 12 and {row["method"] for row in again if row["code"] == "new"} == {"tome"}
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- encoder-speed:begin -->\nold\n<!-- encoder-speed:end -->\nbehind\n")
    speed.main([*arguments, "--readme", str(readme)])
    part = f"<!-- encoder-speed:begin -->\n{speed.tables(again)}\n<!-- encoder-speed:end -->"
    assert readme.read_text() == f"before\n{part}\nbehind\n"


def test_the_table_says_who_is_slower_and_shows_the_newest_row():
    def row(method, keep, quotients, batch=8, code="a"):
        return {
            "geometry": "g", "says": "ViT-G", "batch": batch, "method": method, "keep": keep, "code": code,
            "dtype": "float32", "device": "some CPU", "threads": 1, "clock": "cpu", "rounds": 3,
            "dense_gflops": 35.0, "gflops": 20.0, "dense_images_per_second": 4.0, "images_per_second": 6.0,
            "speed": quotients, "predicted": 1.75, "of_predicted": quotients[1] / 1.75,
            "of_sliced": [0.8, 0.9, 1.0], "spent_share": [0.01, 0.02, 0.03], "command": "python it",
            "versions": {"vtc": "1", "torch": "2", "timm": "3", "commit": "0123456789abc"},
            "date": "2026-01-01T00:00:00",
        }  # fmt: skip

    rows = [row("tome", keep, [1.5, 1.6, 1.7]) for keep in (0.7, 0.5, 0.25)]
    rows += [row("atc", 0.5, [2.0, 2.0, 2.0]), row("atc", 0.5, [0.8, 0.875, 0.9], code="b")]
    rows += [row("atc", 0.5, [1.0, 1.4, 1.8], batch=1)]
    table, overview = [part for part in speed.tables(rows).split("\n\n") if part.startswith("| method")]
    details = "| 20.0 | 6.0 | 1.75 | {} | 90% | 2.0% |"
    assert table.splitlines()[2:] == [
        f"| atc |  | slower: 0.88 (0.80-0.90) |  {details.format('50%')}",
        f"| tome {3 * '| 1.60 (1.50-1.70) '}{details.format('91%')}",
    ]
    assert overview.splitlines()[0] == "| method | ViT-G, batch 1, keep 0.5 |"
    assert overview.splitlines()[2] == "| atc | 1.40 (1.00-1.80), 80% |"


def test_the_grid_has_every_geometry_and_batch():
    cells = {(cell["geometry"], cell["batch"]) for cell in CONFIG["grid"]}
    assert cells == {(geometry, batch) for geometry in CONFIG["geometries"] for batch in (1, 8, 32)}
    assert set(CONFIG["few"]) < set(vtc.list_methods("encoder"))


def test_the_readme_shows_the_rows():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    part = readme.split("<!-- encoder-speed:begin -->\n")[1].split("\n<!-- encoder-speed:end -->")[0]
    assert part == speed.tables(read_rows(ROOT / CONFIG["output"])[0])
