"""Modules with weights in sweeps: what rows call them, lengths of each picture, tables and pictures."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from learned_host import randomise
from pytest import approx
from small import small_model, small_processor, write_task

import vtc
from vtc.evaluation import learned, learned_lengths
from vtc.evaluation.board import boards
from vtc.evaluation.learned_lengths import calibrate, dealt, look, sweep_lengths
from vtc.evaluation.learned_lengths_tables import choices, lengths_block, lengths_table
from vtc.evaluation.learned_plot import plot_learned, plot_lengths
from vtc.evaluation.learned_tables import Contest, block, learned_table, losses_table
from vtc.evaluation.outcomes import pack, unpack
from vtc.evaluation.prompts import Batches
from vtc.evaluation.results import newest, read_rows
from vtc.evaluation.runner import ask, label
from vtc.evaluation.sweep import sweep
from vtc.evaluation.tasks import Task, load_task
from vtc.learned.registry import build

OPTIONS = {
    "width": 16, "depth": 1, "heads": 2, "decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2,
    "error": "answers",
}  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("task"))


def save(folder: Path, seed: int = 0, tokens: int = 20) -> str:
    """A module for `small_model()` whose halting head tells pictures apart."""
    torch.manual_seed(seed)
    module = build("ordered", in_width=32, tokens=tokens, **OPTIONS)
    randomise(module.halting, seed, 0.5)
    module.save_pretrained(folder)
    return str(folder)


def run(task, output, methods, keeps, **options):
    options = {"repeats": 1, "progress": False, "command": "test", "baselines": (), **options}
    tasks = [f"jsonl:{task}"]
    return sweep(small_model(), small_processor(), methods, keeps, tasks, output=output, **options)


def test_a_folder_is_a_method_and_rows_name_it_by_its_weights(task, tmp_path):
    folder, output = save(tmp_path / "tiny-ordered"), tmp_path / "rows.jsonl"
    row = run(task, output, [folder], [4])[2]
    name = learned.card(folder).name
    assert row["method"] == name and row["folder"] == folder and row["keep"] == 4 and row["tokens"] == 4
    assert name.startswith("ordered@") and label(name, {"epsilon": 0.3}) == f"{name[:12]} (epsilon=0.3)"
    module = learned.load(folder)
    assert row["parameters"] == sum(weight.numel() for weight in module.parameters()) and row["adapter"] == 0
    assert row["minutes"] is None and row["cost"]["llm_tokens"] == 4
    done = output.read_bytes()
    assert run(task, output, [folder], [4])[2] == row and output.read_bytes() == done
    save(tmp_path / "elsewhere")
    assert run(task, output, [str(tmp_path / "elsewhere")], [4])[2] == row  # the same weights


def test_weights_trained_anew_are_another_row_and_the_last_ones_count(task, tmp_path):
    folder, output = save(tmp_path / "tiny-ordered"), tmp_path / "rows.jsonl"
    first = run(task, output, [folder], [4, 2])[2:]
    report = {"stages": {"features": {"minutes": 2.5}, "distill": {"minutes": 1}}}
    (tmp_path / "tiny-ordered/train.json").write_text(json.dumps(report))
    save(tmp_path / "tiny-ordered", seed=1)
    second = run(task, output, [folder], [4])[2]
    assert second["method"] != first[0]["method"] and second["minutes"] == 3.5
    rows = [{**row, "date": f"2025-01-0{i + 1}"} for i, row in enumerate([*first, second])]
    assert [row["method"] for row in newest(rows)] == [second["method"]]
    assert [row["method"] for row in newest(rows[:2])] == [first[0]["method"]] * 2


def test_numbers_that_a_module_cannot_make_are_left_out(task, tmp_path):
    folder = save(tmp_path / "tiny-ordered")
    rows = run(task, tmp_path / "rows.jsonl", [folder, "uniform"], [36, 0.5, 20, 1])
    assert [(row["method"].split("@")[0], row["keep"]) for row in rows[2:]] == [
        ("uniform", 36), ("uniform", 0.5), ("ordered", 20), ("uniform", 20), ("ordered", 1), ("uniform", 1),
    ]  # fmt: skip
    assert not any("error" in row for row in rows)


def test_a_module_that_chooses_its_own_number_has_its_mean_beside_it(task, tmp_path):
    folder = save(tmp_path / "tiny-ordered")
    rows = run(task, tmp_path / "rows.jsonl", [(folder, {"epsilon": 1.0})], ["own"])[2:]
    own, fixed = rows
    assert own["keep"] == "own" and own["options"] == {"epsilon": 1.0} and own["tokens_spread"] > 0
    assert fixed["options"] == {} and fixed["keep"] == fixed["tokens"] == round(own["tokens"])
    with pytest.warns(UserWarning, match="chooses no number"):
        assert len(run(task, tmp_path / "other.jsonl", [folder], ["own"])) == 2


def test_a_folder_without_a_module_is_refused(task, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, OSError), match="empty"):
        run(task, tmp_path / "rows.jsonl", [str(tmp_path / "empty")], [4])
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.fixture(scope="module")
def lengths(tmp_path_factory):
    """Rows of a module on twelve scenes, twice with the same output, and the output's bytes in between."""
    folder = tmp_path_factory.mktemp("lengths")
    module, output = save(folder / "tiny-ordered"), folder / "rows.jsonl"

    def go():
        return sweep_lengths(
            small_model(), small_processor(), module, [3, 6], shuffles=2, n=12, sample=24, output=output,
            command="test", progress=False,
        )  # fmt: skip

    first = go()
    between = output.read_bytes()
    return first, go(), between == output.read_bytes()


def test_lengths_are_dealt_to_other_pictures_at_an_equal_mean(lengths):
    rows, again, untouched = lengths
    assert again == rows and untouched
    kinds = [(row["kind"], row.get("mean"), row.get("seed")) for row in rows if row["kind"] != "fixed"]
    assert kinds == [
        ("halting", 3, None), ("shuffled", 3, 0), ("shuffled", 3, 1),
        ("halting", 6, None), ("shuffled", 6, 0), ("shuffled", 6, 1),
    ]  # fmt: skip
    for mean in (3, 6):
        own, *others = [row for row in rows if row.get("mean") == mean]
        assert len(own["lengths"]) == 12 and own["tokens"] == approx(np.mean(own["lengths"]))
        assert own["tokens_spread"] > 0 and own["epsilon"] > 0
        assert [(row["tokens"], row["tokens_spread"]) for row in others] == [
            (approx(own["tokens"]), approx(own["tokens_spread"]))
        ] * 2
        k = round(own["tokens"])
        assert any(row["kind"] == "fixed" and row["k"] == row["tokens"] == k for row in rows)
    dealt_twice = [dealt(own["lengths"], seed) for seed in (0, 1)]
    assert all(sorted(found) == sorted(own["lengths"]) for found in dealt_twice)
    assert (dealt_twice[0] != dealt_twice[1]).any() and (dealt_twice[0] == dealt(own["lengths"], 0)).all()


def test_each_picture_has_the_length_that_was_meant_for_it(tmp_path):
    module, model = learned.load(save(tmp_path / "m")), small_model()
    batches = Batches(small_processor(), load_task("scenes", 7), 3)
    seen = look(model, batches, module)
    wanted = np.array([1, 5, 2, 20, 3, 1, 9])
    found = []
    with vtc.compress(model, learned_lengths.given(module, seen.lots, wanted), keep=20) as handle:
        for batch in batches:
            model.generate(**batch.inputs, do_sample=False, max_new_tokens=1)
            found += [record.entering["decoder"] for record in handle.last]
    assert found == wanted.tolist()
    own = learned_lengths.halted(module, seen, 1.0, 20)
    with vtc.compress(model, module.as_method(epsilon=1.0), keep=20):
        assert ask(model, batches).tokens == own.tolist() and len(set(own)) > 1


def test_an_error_is_found_for_a_mean_and_refused_for_one_out_of_reach(tmp_path):
    module = learned.load(save(tmp_path / "m"))
    seen = look(small_model(), Batches(small_processor(), load_task("scenes", 40), 20), module)
    few, many = (calibrate(module, seen, mean, 20) for mean in (4, 10))
    assert few > many
    assert learned_lengths.halted(module, seen, few, 20).mean() == approx(4, abs=0.3)
    with pytest.raises(ValueError, match="tokens where 30 are wanted"):
        calibrate(module, seen, 30, 20)


def test_a_mean_out_of_reach_is_left_out(tmp_path):
    folder = save(tmp_path / "m", tokens=4)
    with pytest.warns(UserWarning, match="without a mean of 9: the halting head gives 4.0"):
        rows = sweep_lengths(
            small_model(), small_processor(), folder, [9, 2], shuffles=1, n=4, sample=24,
            output=tmp_path / "rows.jsonl", command="test", progress=False,
        )  # fmt: skip
    assert {row["mean"] for row in rows if row["kind"] != "fixed"} == {2}


def test_pictures_that_are_the_same_have_no_lengths_of_their_own(tmp_path):
    module, items = learned.load(save(tmp_path / "m")), load_task("scenes", 2).items
    twice = Task("scenes", [items[0], items[1], items[0]])
    model = small_model()
    with pytest.raises(ValueError, match="same picture"):
        look(model, Batches(small_processor(), twice, 2), module)
    vtc.compress(model, "uniform", keep=4).remove()  # nothing was left on it


# -- tables and pictures, of rows that were made up

VERSIONS = {"vtc": "1", "torch": "2", "transformers": "5", "commit": "0123456789ab", "cpu": "x", "gpu": None}
N = 200


def row(method, keep, right, /, **more):
    """`right` of N questions, the first ones, are answered right."""
    found = {
        "key": f"{method}{keep}{more}", "model": "tiny@1234", "task": "scenes", "split": "test", "n": N,
        "method": method, "keep": keep, "options": {}, "seed": None, "accuracy": right / N, "items": N,
        "tokens": keep or 144, "kinds": {"all": {"accuracy": right / N, "items": N}}, "cost": None,
        "outcomes": pack([i < right for i in range(N)]), "errors": [], "command": "test",
        "versions": VERSIONS, "date": "2025-01-02T03:04:05+00:00",
    }  # fmt: skip
    return found | more


def module_row(name, keep, right, /, **more):
    about = {"folder": f"models/tiny-{name}", "parameters": 250_000, "adapter": 0, "minutes": 12.4}
    return row(f"{name}@12345678", keep, right, **about | more)


@pytest.fixture
def rows():
    found = [row("full", None, 190), row("blind", None, 40, tokens=0)]
    for keep, ordered, tome, random in ((16, 188, 184, 100), (4, 182, 150, 60), (1, 120, 50, 60)):
        found += [module_row("ordered", keep, ordered), row("tome", keep, tome)]
        found.append(row("divprune", keep, tome - 4, options={"merge": "restore"}))
        found += [row("random", keep, random + 2 * s, seed=s, options={"seed": s}) for s in (0, 1)]
    found += [module_row("ordered", 36, 189), row("tome", 36, 189)]
    found += [module_row("mqt", 36, 5, adapter=50_000), row("mmtok", 36, 4)]
    return [*found, module_row("m3", 16, 170, parameters=0, minutes=None)]


def cells(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_the_table_has_modules_first_and_what_they_cost_to_have(rows):
    (board,) = boards(rows)
    heading, _, *lines = cells(learned_table(Contest(board)))
    counts = ["36 tokens, 25 %", "16 tokens, 11 %", "4 tokens, 3 %", "1 token, 1 %"]
    assert heading == ["method", "reads", "parameters", "minutes", *counts]
    told = {line[0]: line.pop(1) for line in lines}
    assert told.pop("mmtok") == "text" and not any(told.values())
    assert lines[0] == ["ordered ◆", "0.25 M", "12", "94.5", "94.0", "91.0", "60.0"]
    assert lines[1] == ["m3 ◆", "0", "-", "-", "85.0", "-", "-"]
    assert lines[2] == ["mqt ◆", "0.20 M + 50.0 k", "12", "2.5", "-", "-", "-"]
    assert lines[3] == ["tome", "", "", "94.5", "92.0", "75.0", "25.0 ▾"]
    assert lines[6] == ["random", "", "", "-", "50.5 ± 0.7", "30.5 ± 0.7", "30.5 ± 0.7"]


def test_losses_are_those_of_the_flagship_and_of_the_best_method_without_training(rows):
    (board,) = boards(rows)
    _, _, *lines = cells(losses_table(Contest(board)))
    assert [line[:5] for line in lines] == [  # of 190, 36 tokens are too many to be compared
        ["16", "1.0", "3.0", "tome", "0.33"],
        ["4", "4.0", "20.0", "tome", "0.20"],
        ["1", "35.0", "64.5", "random", "0.54"],
    ]
    assert lines[0][5] == "+2.0 ± 1.9"  # 4 of 200 questions: 1.96 * sqrt(0.02 * 0.98 / 200), with n - 1


def test_two_folders_of_one_module_are_told_apart(rows):
    other = module_row("ordered", 16, 150, method="ordered@87654321", folder="models/tiny-other", key="other")
    table = learned_table(Contest(boards([*rows, other])[0]))
    assert "| ordered, tiny-ordered ◆ |" in table and "| ordered, tiny-other ◆ |" in table


def test_a_best_method_that_reads_the_question_is_followed_by_one_that_does_not(rows):
    (board,) = boards([*rows, row("mmtok", 1, 90)])
    assert [line[:5] for line in cells(losses_table(Contest(board)))[2:]][2:] == [
        ["1", "35.0", "50.0", "mmtok, reads text", "0.70"],
        ["1", "35.0", "64.5", "random", "0.54"],
    ]


def test_the_flagship_is_the_best_with_the_fewest_tokens(rows):
    about = {"method": "ordered@87654321", "folder": "models/tiny-short"}
    short = [module_row("ordered", keep, 189, **about) for keep in (16, 4)]
    assert Contest(boards([*short, *rows])[0]).flagship == "ordered@1234"  # with 1 token, the other has 4
    one = module_row("ordered", 1, 121, **about)
    assert Contest(boards([*rows, *short, one])[0]).flagship == "ordered@8765"


def test_a_report_has_no_pictures_of_what_modules_kept(rows):
    runs = boards(rows)[0].runs
    assert {method for method, _, _ in runs} == {"tome", "divprune", "random", "mmtok"}


def test_what_failed_is_said(rows):
    about = {name: rows[0][name] for name in ("model", "task", "split", "n", "options")}
    failed = {"key": "x", **about, "method": "tofu", "keep": 1, "error": "ValueError: too few"}
    assert "Not measured: tofu, keep 1: ValueError: too few." in block([*rows, failed])
    assert "Not measured" not in block(rows)


def test_pictures_are_drawn(rows, tmp_path):
    from PIL import Image

    (board,) = boards(rows)
    plot_learned(Contest(board), tmp_path / "a.png")
    for found in choices(length_rows()).values():
        plot_lengths(found, tmp_path / "b.png")
    for name in ("a", "b"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 1500 and np.array(image.convert("L")).std() > 10


def length_rows(method="ordered@12345678", date="2025-01-02"):
    about = {"folder": "models/tiny-ordered", "method": method, "date": date}
    found = []
    for mean, halting, shuffled in ((4, 180, (170, 174)), (8, 188, (184, 186))):
        lengths = [mean - 2] * (N // 2) + [mean + 2] * (N // 2)
        about_lengths = {
            "kind": "halting", "mean": mean, "epsilon": 0.1, "lengths": lengths,
            "by_objects": {"1": mean - 2.0, "2": mean + 2.0}, "correlation": 0.5,
            "correlation_interval": [0.4, 0.6],
        }  # fmt: skip
        found.append(row("", mean, halting, **about, **about_lengths))
        for seed, right in enumerate(shuffled):
            found.append(row("", mean, right, **about | {"kind": "shuffled", "mean": mean, "seed": seed}))
        found.append(row("", mean, halting - 2, **about, kind="fixed", k=mean))
    return found


def test_the_table_of_lengths_holds_the_numbers_of_the_rows():
    rows = length_rows()
    older = length_rows("ordered@00000000", "2024-01-01")
    (found,) = choices([*rows, *older]).values()
    assert choices([*older, *rows]) == choices(rows)
    _, _, first, second = cells(lengths_table(found))
    assert first[:5] == ["4.0", "2", "6", "90.0", "86.0 ± 1.4"] and first[6:] == [
        "89.0 (4)",
        "0.50 (0.40 to 0.60)",
    ]
    assert first[5].startswith("+4.0 (+1.") and second[5].startswith("+1.5 (")
    assert found[0].interval == approx(12.71 * 1.5**0.5 * 2**0.5, rel=1e-3)  # two seeds, one point off
    assert "over 2 seeds" in lengths_block(rows) and "200 test pictures" in lengths_block(rows)
    assert sum(unpack(rows[0]["outcomes"], N)) == 180


@pytest.fixture
def script():
    path = Path(__file__).parents[1] / "eval" / "learned.py"
    spec = importlib.util.spec_from_file_location("eval_learned", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_script_fills_a_readme(script, rows, tmp_path):
    config = json.loads(script.CONFIG.read_text())
    assert (script.ROOT / config["output"], script.ROOT / config["lengths"]) == (
        script.OUTPUT,
        script.LENGTHS,
    )
    for name, found in (("output", rows), ("lengths", length_rows())):
        config[name] = str(tmp_path / f"{name}.jsonl")
        Path(config[name]).write_text("".join(json.dumps(one) + "\n" for one in found))
    (tmp_path / "config.json").write_text(json.dumps(config))
    readme = tmp_path / "README.md"
    marks = [f"<!-- {name}:{end} -->" for name in ("learned", "learned-lengths") for end in ("begin", "end")]
    readme.write_text("\n".join(marks))
    script.main(["--config", str(tmp_path / "config.json"), "--readme", str(readme)])
    text = readme.read_text()
    assert script.block(read_rows(config["output"])[0]) in text and "ordered ◆" in text
    assert script.lengths_block(read_rows(config["lengths"])[0]) in text


def test_the_script_runs_methods_and_the_modules_that_it_finds(script, tmp_path, monkeypatch, capsys):
    models = Path(__file__).parents[1] / "models"
    (tmp_path / "models").mkdir()
    (tmp_path / "models/tiny-llava").symlink_to(models / "tiny-llava")
    (tmp_path / "models/tiny-llava-else").symlink_to(models / "tiny-tokenizer")  # has a config.json, too
    build("ordered", in_width=128, tokens=9, **OPTIONS).save_pretrained(tmp_path / "models/tiny-llava-fresh")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    config = {
        "model": "models/tiny-llava", "modules": "models/tiny-llava-*", "n": 4, "keeps": [16, 4],
        "seeds": [0], "methods": [["divprune", {"merge": "restore"}], "random"], "means": [4],
        "halting": ["models/tiny-llava-fresh"],
        "shuffles": 2, "sample": 8, "output": "rows.jsonl", "lengths": "lengths.jsonl",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["--config", str(tmp_path / "config.json")]
    script.main(arguments)
    told = capsys.readouterr().out
    assert "| ordered ◆ |" in told and "divprune (merge=restore)" in told and "halting head" in told
    methods = [row["method"].split("@")[0] for row in read_rows("rows.jsonl")[0]]
    assert methods == ["full", "blind", "divprune", "random", "divprune", "random", "ordered"]
    kinds = [(row["kind"], row["folder"]) for row in read_rows("lengths.jsonl")[0]]
    wanted = ["halting", "shuffled", "shuffled", "fixed"]
    assert kinds == [(kind, "models/tiny-llava-fresh") for kind in wanted]
    before = [Path(name).read_bytes() for name in ("rows.jsonl", "lengths.jsonl")]
    script.main(arguments)
    assert before == [Path(name).read_bytes() for name in ("rows.jsonl", "lengths.jsonl")]
    (tmp_path / "assets").mkdir()
    script.main([*arguments, "--pictures"])
    assert {path.name for path in (tmp_path / "assets").iterdir()} == {"learned.png", "learned-lengths.png"}
