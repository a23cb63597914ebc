"""A sweep is one row per run, survives being killed, and goes on past whatever fails."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from small import small_model, small_processor, write_task

import vtc
from vtc.evaluation.results import Results, read_rows
from vtc.evaluation.runner import Setting
from vtc.evaluation.sweep import run_key, sweep
from vtc.evaluation.tasks import load_task, normalise
from vtc.method import Select, _methods

METHODS, KEEPS = ("uniform", "random"), (0.5, 8)
RUNS = 2 + len(METHODS) * len(KEEPS)
KILLED = """
import sys
from small import small_model, small_processor
from vtc.evaluation.sweep import sweep
task, output = sys.argv[1:]
sweep(small_model(), small_processor(), {methods}, {keeps}, [task], output=output, repeats=1, baselines=())
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("task"))


def run(task, output, methods=METHODS, keeps=KEEPS, model=None, **options):
    options = {"repeats": 1, "progress": False, "command": "test", "baselines": (), **options}
    model = model or small_model()
    return sweep(model, small_processor(), methods, keeps, [f"jsonl:{task}"], output=output, **options)


def keys(path: Path) -> list[str]:
    return [json.loads(line)["key"] for line in path.read_text().splitlines()]


def test_a_killed_sweep_goes_on_without_losing_or_doubling_a_row(task, tmp_path):
    output = tmp_path / "results.jsonl"
    script = KILLED.format(methods=METHODS, keeps=KEEPS)
    paths = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(vtc.__file__).parents[1])]}"
    command = [sys.executable, "-c", paths + script, f"jsonl:{task}", str(output)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (output.exists() and output.read_text().count("\n") >= 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was in the middle
    before = output.read_text()
    with output.open("a") as file:
        file.write('{"key": "0123", "accuracy": 0.')  # what a kill in the middle of a write leaves
    with pytest.warns(UserWarning, match="was torn"):
        rows = run(task, output)
    assert output.read_text().startswith(before[: before.rindex("\n") + 1])
    assert keys(output) == [row["key"] for row in rows] and len(set(keys(output))) == RUNS
    assert (tmp_path / "results.jsonl.torn").read_text().endswith('"accuracy": 0.\n')
    fresh = run(task, tmp_path / "fresh.jsonl")
    assert [(row["key"], row["accuracy"]) for row in rows] == [(row["key"], row["accuracy"]) for row in fresh]
    done = output.read_bytes()
    assert run(task, output) == rows and output.read_bytes() == done  # nothing is left to do


def test_a_row_says_what_was_measured(task, tmp_path):
    full, blind, half, few = run(task, tmp_path / "results.jsonl", ["uniform"])
    assert (full["method"], full["accuracy"], full["tokens"]) == ("full", 1.0, 144)
    assert (blind["method"], blind["tokens"], blind["cost"]) == ("blind", 0, None) and blind["accuracy"] < 1
    assert (half["keep"], half["tokens"], few["keep"], few["tokens"]) == (0.5, 72, 8, 8)
    assert few["accuracy"] < 1
    assert few["cost"]["llm_tokens"] == 8 < half["cost"]["llm_tokens"] < full["cost"]["llm_tokens"]
    assert few["cost"]["tflops_total"] < half["cost"]["tflops_total"] < full["cost"]["tflops_total"]
    for row in (full, blind, half, few):
        right = sum(kind["accuracy"] * kind["items"] for kind in row["kinds"].values())
        assert row["accuracy"] == pytest.approx(right / row["items"]) and row["items"] == 6
        assert row["command"] == "test" and row["versions"]["torch"] == torch.__version__ and row["date"]


def test_batches_do_not_change_the_answers(task, tmp_path):
    rows = [run(task, tmp_path / f"{size}.jsonl", ["uniform"], [8], batch_size=size) for size in (1, 4)]
    assert [row["accuracy"] for row in rows[0]] == [row["accuracy"] for row in rows[1]]


def test_seeds_are_for_methods_that_have_one(task, tmp_path):
    rows = run(task, tmp_path / "results.jsonl", ["uniform", "random"], [8], seeds=(0, 1))
    seeds = [("full", None), ("blind", None), ("uniform", None), ("random", 0), ("random", 1)]
    assert [(row["method"], row["seed"]) for row in rows] == seeds
    assert run(task, tmp_path / "results.jsonl", [("random", {"seed": 1})], 8)[2] == rows[4]


def test_a_failing_method_is_an_error_row_and_the_rest_goes_on(task, tmp_path, monkeypatch):
    @dataclass
    class Broken(Select):
        name = "broken"

        def score(self, tokens):
            raise RuntimeError("no score today")

    monkeypatch.setitem(_methods.all(), "broken", Broken)
    output, model = tmp_path / "results.jsonl", small_model()
    for _ in range(2):
        with pytest.warns(UserWarning, match="no score today"):
            rows = run(task, output, ["broken", "uniform"], [8], model)
        assert rows[2]["error"] == "RuntimeError: no score today" and rows[3]["tokens"] == 8
    assert len(keys(output)) == 4  # tried again, and the same error is not written again
    Broken.score = lambda self, tokens: tokens.x[..., 0]
    mended = run(task, output, ["broken", "uniform"], [8], model)
    assert mended[2]["tokens"] == 8 and "error" not in mended[2]
    assert read_rows(output)[0] == [mended[0], mended[1], mended[2], mended[3]]
    with pytest.raises(RuntimeError, match="not compressed"):
        vtc.restore(model)  # no run left anything on the model


def test_items_that_cannot_be_asked_are_reported_and_not_counted(task, tmp_path):
    lines = task.read_text().splitlines()
    bad = [
        '{"image": "missing.png", "question": "a", "answer": "b"}',
        '{"image": "0.png", "question": "no answer"}',
        "not json",
        '{"image": "0.png", "question": "what is <image> ?", "answer": "x"}',
    ]
    (tmp_path / "noise.png").write_bytes(b"\x89PNG no picture")
    bad.append('{"image": "noise.png", "question": "a", "answer": "b"}')
    for picture in task.parent.glob("*.png"):
        (tmp_path / picture.name).write_bytes(picture.read_bytes())
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join([bad[0], *lines[:3], *bad[1:], *lines[3:]]))
    (full, blind) = run(mixed, tmp_path / "results.jsonl", [])
    assert full["accuracy"] == 1.0 and full["items"] == blind["items"] == 6 and full["n"] == 11
    assert [error["item"].rsplit(":")[-1] for error in full["errors"]] == ["1", "5", "6", "7", "8"]
    assert "missing.png" in full["errors"][0]["error"] and "answer" in full["errors"][1]["error"]


def test_a_task_of_errors_only_is_an_error_row(task, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("not json\n")
    with pytest.warns(UserWarning, match="no item"):
        rows = run(broken, tmp_path / "results.jsonl", [])
    assert all("no item" in row["error"] for row in rows)


def test_lines_that_are_no_rows_stay_and_are_reported(task, tmp_path):
    output = tmp_path / "results.jsonl"
    first = run(task, output, [], [])
    lines = output.read_text().splitlines()
    output.write_bytes(b"\xff\xfe\n" + f"{lines[0]}\nbroken {{\n[1]\n{lines[1]}".encode())  # and no newline
    with pytest.warns(UserWarning, match="no row of results") as warned:
        assert run(task, output, [], []) == first
    assert [str(w.message).split(" ")[0].rsplit(":")[-1] for w in warned] == ["1", "3", "4"]
    assert output.read_bytes() == b"\xff\xfe\n" + f"{lines[0]}\nbroken {{\n[1]\n{lines[1]}\n".encode()


def test_other_weights_are_another_model(task, tmp_path):
    output = tmp_path / "results.jsonl"
    run(task, output, [], [])
    run(task, output, [], [], small_model(seed=1))
    assert len(set(keys(output))) == 4


def test_a_file_has_one_writer(tmp_path):
    with Results(tmp_path / "results.jsonl"), pytest.raises(RuntimeError, match="another sweep"):
        Results(tmp_path / "results.jsonl")
    Results(tmp_path / "results.jsonl").close()


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"methods": ["tom"]}, ValueError, "tome"),
        ({"methods": [("tome", {"colour": 1})]}, ValueError, "colour"),
        ({"keeps": [0]}, ValueError, "keep"),
        ({"keeps": "half"}, TypeError, "keep"),
        ({"model": torch.nn.Linear(1, 1)}, ValueError, "no known host"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_run(task, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        run(task, tmp_path / "results.jsonl", **arguments)
    assert not (tmp_path / "results.jsonl").exists()


def test_a_compressed_model_is_refused(task, tmp_path):
    model = small_model()
    with vtc.compress(model, "uniform", keep=8), pytest.raises(RuntimeError, match="compressed already"):
        run(task, tmp_path / "results.jsonl", model=model)


def test_scenes_are_a_task():
    task = load_task("scenes", 14, "validation")
    assert len(task.items) == 14 and len({item.kind for item in task.items}) == 7
    assert task.items[0].open().size == (96, 96)
    assert task.fingerprint == load_task("scenes", 14, "validation").fingerprint
    assert task.fingerprint != load_task("scenes", 14, "test").fingerprint
    for name in ("scene", "jsonl:", "csv:x"):
        with pytest.raises(ValueError, match="no task"):
            load_task(name)
    with pytest.raises(ValueError, match="split"):
        load_task("scenes", 1, "holdout")


def test_answers_match_without_case_punctuation_and_spaces():
    assert normalise(" Top  Left.\n") == normalise("top left") != normalise("top right")
    assert normalise("1") != normalise("10")


def test_baselines_run_beside_the_methods(task, tmp_path):
    rows = run(task, tmp_path / "r.jsonl", ["tome"], [0.5], baselines=("random", "tome"))
    assert [row["method"] for row in rows] == ["full", "blind", "tome", "random"]


def test_parts_of_a_config_come_together_in_one_file(task, tmp_path, monkeypatch):
    path = Path(__file__).parents[1] / "eval" / "sweep.py"
    spec = importlib.util.spec_from_file_location("eval_sweep", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    model = small_model()
    monkeypatch.setattr(script, "load_model", lambda name: (model, small_processor()))
    config = {
        "model": "models/tiny-llava", "tasks": [f"jsonl:{task}"], "keeps": [8], "repeats": 1,
        "progress": False, "baselines": ["random"],
        "methods": ["uniform", ["divprune", {"merge": "restore"}], "pool"],
        "also": [{"methods": ["uniform", "fastervlm"], "keeps": [0.5]}],
    }  # fmt: skip

    def call(output, *more):
        given = tmp_path / "config.json"
        given.write_text(json.dumps({**config, "output": str(output)}))
        monkeypatch.setattr(sys, "argv", ["eval/sweep.py", "--config", str(given), *more])
        script.main()
        return output.exists() and read_rows(output)[0]

    output = tmp_path / "r.jsonl"
    assert not call(output, "--part", "2/2")  # in a file beside
    assert [row["method"] for row in read_rows(tmp_path / "r.jsonl.part2")[0]] == [
        "full",
        "blind",
        "divprune",
    ]
    call(output, "--part", "1/2")
    seconds = {row["key"]: row["seconds"] for i in (1, 2) for row in read_rows(f"{output}.part{i}")[0]}
    rows, whole = call(output), call(tmp_path / "whole.jsonl")
    assert sorted(row["key"] for row in rows) == sorted(row["key"] for row in whole)
    assert {row["key"]: row["accuracy"] for row in rows} == {row["key"]: row["accuracy"] for row in whole}
    taken = [row for row in rows if row["key"] in seconds and row["method"] in ("divprune", "pool")]
    assert len(taken) == 2 and all(seconds[row["key"]] == row["seconds"] for row in taken)  # not run again
    assert {row["command"] for row in rows} == {f"python eval/sweep.py --config {tmp_path / 'config.json'}"}
    assert not list(tmp_path.glob("*.part*"))


def test_another_picture_and_another_code_are_other_runs(task, tmp_path, monkeypatch):
    first = load_task(f"jsonl:{task}")
    renamed = tmp_path / "renamed.jsonl"
    renamed.write_text(Path(task).read_text().replace('"image": "', '"image": "x', 1))
    assert [item.question for item in load_task(f"jsonl:{renamed}").items] == [
        item.question for item in first.items
    ]
    assert (
        first.items[0].picture
        and load_task(f"jsonl:{renamed}").items[0].picture == "x" + first.items[0].picture
    )
    before = run_key("model", first, Setting("tome", 0.5))
    assert run_key("model", first, Setting("tome", 0.5)) == before
    monkeypatch.setattr("inspect.getsource", lambda cls: "rewritten")
    assert run_key("model", first, Setting("tome", 0.5)) != before


def test_methods_inside_of_the_language_model_say_so(task, tmp_path):
    """Beside them is random at the same stage: elsewhere only the kept tokens enter the language model."""
    rows = run(task, tmp_path / "r.jsonl", ["dart"], [0.5], baselines=["random"])
    staged = {(row["method"], row["options"].get("stage")) for row in rows if row["keep"]}
    assert staged == {("dart", "decoder"), ("random", "decoder"), ("random", None)}
    assert not any("error" in row for row in rows)
