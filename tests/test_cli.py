"""Every command does what it says, and every error is one sentence and exit code 2."""

import json
import re

import pytest
from PIL import Image
from small import write_task

import vtc
from vtc import cli
from vtc.commands import reference_model
from vtc.commands import sweep as commands_sweep
from vtc.evaluation.scenes import scene
from vtc.hosts.trunk import FAMILIES


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder with a picture; returns exit code, output and error output."""
    monkeypatch.chdir(tmp_path)
    scene("test", 3).image.save("scene.png")

    def call(*arguments):
        code = cli.main(list(arguments))
        return code, *capsys.readouterr()

    return call


def test_methods_lists_the_registry(run):
    code, out, _ = run("methods")
    assert code == 0 and [line.split()[0] for line in out.splitlines()[1:]] == vtc.list_methods()
    assert re.search(r"^random +features encoder decoder +seed=0 +\w", out, re.MULTILINE)


def test_hosts_lists_the_table(run):
    code, out, _ = run("hosts")
    table, meanings, encoders, refused = out.split("\n\n")
    assert code == 0 and [line.split()[0] for line in table.splitlines()[1:]] == vtc.list_hosts()
    assert "batches " in meanings and "blip-2 " in refused
    assert all(family.name in encoders for family in FAMILIES)


def test_ask_shows_both_answers_in_columns(run):
    how = ["--method", "random", "--keep", "8", "--set", "seed=3"]
    code, out, err = run("ask", "scene.png", "how many objects are there ?", *how)
    lines = out.splitlines()
    assert code == 0 and "vtc:" not in err  # other libraries may warn when they are imported
    assert re.split(r"  +", lines[0].strip()) == ["all tokens", "random, keep 8 seed=3"]
    assert lines[1].split()[0] == "answer"
    assert next(line.split() for line in lines if line.startswith("image tokens"))[-2:] == ["144", "8"]
    assert lines[-1].startswith("seconds") and all(float(time) > 0 for time in lines[-1].split()[1:])


def test_draw_writes_a_picture(run, tmp_path):
    code, out, _ = run("draw", "scene.png", "--method", "tome", "--keep", "0.11")
    assert (code, out) == (0, "scene-tome.png\n")
    assert run("draw", "scene.png", "--keep", "0.11", "-o", "other.webp")[0] == 0
    first, other = Image.open(tmp_path / "scene-tome.png"), Image.open(tmp_path / "other.webp")
    assert min(first.size) > 96 and first.size == other.size and first.convert("RGB") != other.convert("RGB")


def test_profile_measures_twice(run):
    code, out, _ = run("profile", "scene.png", "--keep", "0.25", "--method", "uniform")
    values = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:]}
    assert code == 0 and values["llm_tokens"] == ["144", "36"]
    assert float(values["tflops_total"][0]) > float(values["tflops_total"][1]) > 0


def test_demo_writes_a_report_and_goes_on(run, tmp_path, monkeypatch):
    monkeypatch.setattr(commands_sweep, "METHODS", ("vtc-cls", "random"))
    monkeypatch.setattr(commands_sweep, "KEEPS", (0.11,))
    code, out, _ = run("demo", "--questions", "7", "--pictures", "1")
    assert code == 0 and out.splitlines()[-1] == "vtc-demo/index.html"
    lines = (tmp_path / "vtc-demo" / "results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["method"] for row in rows] == ["full", "blind", "vtc-cls", "random"]
    assert all(row["model"].startswith("tiny-llava@") for row in rows)  # no path of this machine
    assert rows[0]["command"] == "vtc demo --questions 7 --pictures 1"
    assert f"{100 * rows[2]['accuracy']:.1f}" in out
    assert "data:image/webp" in (tmp_path / "vtc-demo" / "index.html").read_text()
    assert run("demo", "--questions", "7", "--pictures", "0")[0] == 0
    assert (tmp_path / "vtc-demo" / "results.jsonl").read_text().splitlines() == lines


def test_sweep_and_report_on_ones_own_questions(run, tmp_path):
    task = f"jsonl:{write_task(tmp_path, 3)}"
    code, out, _ = run(
        "sweep", "--tasks", task, "--methods", "uniform", "--keeps", "8", "0.5", "--output", "r.jsonl"
    )
    assert code == 0 and "8 tokens" in out and "50 %, 72 tokens" in out and out.splitlines()[-1] == "r.jsonl"
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    beside = ["uniform", "random", "downsample"]  # the baselines come by themselves
    assert [row["method"] for row in rows] == ["full", "blind", *beside, *beside]
    code, out, _ = run("report", "r.jsonl", "--pictures", "1")
    told, page = out.splitlines()[:-1], out.splitlines()[-1]
    assert (code, page) == (0, "vtc-report/index.html")
    assert [line.split(" (random ")[0] for line in told] == ["50 %, 72 tokens", "8 tokens"]
    assert "data:image/webp" in (tmp_path / "vtc-report" / "index.html").read_text()
    (tmp_path / "README.md").write_text("<!-- results:begin --><!-- results:end -->")
    code, out, _ = run("report", "r.jsonl", "--readme", "README.md")
    assert code == 0 and out.splitlines()[-1] == "README.md: results"
    assert "| uniform |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["ask", "missing.png", "what ?"], "no image file 'missing.png'"),
        (["ask", "scene.png", "what ?", "--method", "tom"], "did you mean 'tome'"),
        (["ask", "scene.png", "what ?", "--keep", "1.5"], "keep=1.5"),
        (["ask", "scene.png", "what ?", "--set", "seed"], "name=value"),
        (["draw", "scene.png", "--set", "colour=1"], "no option 'colour'"),
        (["draw", "scene.png", "-o", "missing/folder.png"], "missing/folder.png: no such file"),
        (["profile", "scene.png", "--model", "./missing"], "no folder './missing'"),
        (["sweep", "--tasks", "quiz"], "no task 'quiz'"),
        (["sweep", "--keeps", "mean:0"], "keep='mean:0' is no budget"),
        (["report", "missing.jsonl"], "missing.jsonl: no such file"),
    ],
)
def test_errors_are_one_sentence(run, arguments, message):
    code, out, err = run(*arguments)
    assert (
        (code, out) == (2, "") and err.startswith("vtc: error: ") and message in err and err.count("\n") == 1
    )


def test_debug_shows_where_an_error_comes_from(run):
    with pytest.raises(OSError, match="missing"):
        run("--debug", "report", "missing.jsonl")


def test_a_missing_reference_model_is_an_error(run, tmp_path, monkeypatch):
    monkeypatch.setattr(reference_model, "REFERENCE", tmp_path)
    code, _, err = run("ask", "scene.png", "what ?")
    assert code == 2 and "give --model" in err


def test_ctrl_c_says_how_to_go_on(run, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("vtc.evaluation.report.load_boards", interrupted)
    code, _, err = run("report", "r.jsonl")
    assert code == 130 and "goes on" in err


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["ask", "scene.png", "what ?", "--keep", "half"]])
def test_a_wrong_command_line_exits_with_2(run, arguments):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2


def test_a_missing_plotting_library_is_said_before_the_work(run, monkeypatch):
    monkeypatch.setattr(commands_sweep, "find_spec", lambda name: None)
    code, _, error = run("demo")
    assert code == 2 and "vision-token-compression[eval]" in error
