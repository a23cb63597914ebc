"""Budgets that differ from picture to picture: what they come to, and what is run beside them."""

import pytest
from small import small_model, small_processor, write_task
from test_sweep import run

import vtc
from vtc.evaluation.board import boards
from vtc.evaluation.calibrate import NO_CAP, check, fraction, resolve
from vtc.evaluation.chance import below_random
from vtc.evaluation.prompts import Batches
from vtc.evaluation.report import varying_block, write_report
from vtc.evaluation.tables import accuracy_lines, budget
from vtc.evaluation.tasks import load_task
from vtc.evaluation.varying import varying_lines


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def batches(task):
    return Batches(small_processor(), load_task(f"jsonl:{task}"), 4)


def mean_kept(model, batches, method, keep):
    kept = []
    with vtc.compress(model, method, keep=keep) as handle:
        for batch in batches:
            model(**batch.inputs)
            kept += [len(record.index) for record in handle.last]
    return sum(kept) / len(kept)


@pytest.mark.parametrize("method", ["vtc-cls", "fastervlm"])
@pytest.mark.parametrize("mean, tokens", [(16, 16), (0.5, 72), (3, 3)])
def test_a_fraction_comes_to_the_mean(batches, method, mean, tokens):
    model = small_model()
    p = fraction(model, method, batches, mean)
    assert 0 < p < 1 and mean_kept(model, batches, method, f"p:{p:.6g}") == pytest.approx(tokens, abs=0.5)
    with pytest.raises(RuntimeError, match="not compressed"):
        vtc.restore(model)


def test_a_sample_is_the_first_pictures(batches):
    model = small_model()
    p = fraction(model, "vtc-cls", batches, 16, sample=1)  # a batch of four
    first = [next(iter(batches))]
    assert mean_kept(model, first, "vtc-cls", f"p:{p:.6g}") == pytest.approx(16, abs=0.5)


def test_a_method_without_scores_has_no_fraction(batches):
    with pytest.raises(ValueError, match="divprune"):
        fraction(small_model(), "divprune", batches, 16)


def test_budgets_of_a_sweep():
    for keep in ("own", "mean:16", "mean:0.11", "p:0.9", 0.5, 16):
        assert check(keep) == keep
    for keep in ("mean:", "mean:0", "mean:x", "mean:1.5", "q:0.9", "p:2", "most"):
        with pytest.raises((TypeError, ValueError), match="keep"):
            check(keep)
    assert (
        resolve(None, None, "tome", 0.5, {}) == 0.5 and resolve(None, None, "prumerge", "own", {}) == NO_CAP
    )


def test_beside_varying_budgets_runs_what_keeps_as_many_of_every_picture(task, tmp_path):
    output, model = tmp_path / "r.jsonl", small_model()
    options = {"baselines": ("random", "downsample"), "seeds": (0, 1), "model": model}
    rows = run(task, output, ["vtc-cls", "prumerge"], ["p:0.5", "mean:16", "own"], **options)
    found = {(row["method"], row["keep"]): row for row in rows if row["seed"] in (None, 0)}
    assert all("error" not in row for row in rows)
    mean, share, own = found["vtc-cls", "mean:16"], found["vtc-cls", "p:0.5"], found["prumerge", "own"]
    assert mean["tokens"] == pytest.approx(16, abs=0.5) and mean["given"].startswith("p:0.")
    assert "given" not in share and "given" not in own
    assert min(row["tokens_spread"] for row in (mean, share, own)) > 0
    assert found["vtc-cls", round(share["tokens"])]["tokens_spread"] == 0
    assert found["prumerge", round(own["tokens"])]["options"] == {"adaptive": False}
    assert ("vtc-cls", "own") not in found and ("downsample", "own") not in found  # nor does prumerge score
    seeds = [
        row["seed"] for row in rows if row["method"] == "random" and row["keep"] == round(mean["tokens"])
    ]
    assert seeds == [0, 1]

    (board,) = boards(rows)
    assert board.keeps == [] and len(board.varying) == 3  # no column for what is only compared with
    heading, *lines = varying_lines(board)
    assert len(heading) == 7 and all("-" not in line for line in lines)
    assert ["own", f"{own['tokens']:.1f}", f"{own['tokens_spread']:.1f}"] == next(
        line[1:4] for line in lines if line[0] == "prumerge"
    )
    page = write_report([board], tmp_path / "report").read_text()
    assert "<h2>Budgets that differ from picture to picture</h2>" in page and "<h2>Table</h2>" not in page
    assert varying_block([board]).count("\n") > 4 and len(below_random(board)) == 1

    rows += run(task, output, ["vtc-cls", "tome"], [16], **options)
    (board,) = boards(rows)
    assert board.keeps == [16] and budget(board, 16) == "16 tokens"
    assert [line[0] for line in accuracy_lines(board)][1:] == [*board.methods]
    assert set(board.methods) == {"vtc-cls", "tome", "random", "downsample"}


def test_what_is_known_already_is_not_run_again(task, tmp_path):
    output, model = tmp_path / "r.jsonl", small_model()
    run(task, output, ["vtc-cls", "random"], [0.11], model=model)  # 16 tokens
    rows = run(task, output, ["vtc-cls"], ["mean:16"], model=model, baselines=("random",))
    assert [(row["method"], row["keep"]) for row in rows] == [
        ("full", None),
        ("blind", None),
        ("vtc-cls", "mean:16"),
    ]


def test_a_method_that_cannot_vary_runs_without_and_a_warning_says_so(task, tmp_path):
    with pytest.warns(UserWarning, match="'divprune' runs without keep='mean:16': it has no scores"):
        rows = run(task, tmp_path / "r.jsonl", ["divprune"], ["mean:16", 8])
    assert [row["keep"] for row in rows] == [None, None, 8]
