"""What rows say of single questions: the hard ones, and how sure a difference from random tokens is."""

import numpy as np
import pytest
from pytest import approx
from test_report import row

from vtc.evaluation.board import boards
from vtc.evaluation.chance import below_random, difference
from vtc.evaluation.hard import hard_legend, hard_lines
from vtc.evaluation.outcomes import pack, unpack
from vtc.evaluation.report import hard_block

N = 30
GIVEN = {"full": 0.97, "blind": 0.3, "divprune": 0.9, "tome": 0.4, "downsample": 0.6, "random": 0.5}


def asked(method, keep, right, **more):
    tokens = {None: 144, 0.5: 72, 0.11: 16}[keep]
    return row(method, keep, tokens, float(np.mean(right)), outcomes=pack(right), **more)


@pytest.fixture
def answers():
    """Of every (method, keep, seed) the questions that it answers."""
    draw, found = np.random.default_rng(0), {}
    for method, share in GIVEN.items():
        for keep in (None,) if method in ("full", "blind") else (0.5, 0.11):
            for seed in (0, 1) if method == "random" else (None,):
                found[method, keep, seed] = [bool(x) for x in draw.random(N) < share]
    return found


@pytest.fixture
def rows(answers):
    return [
        asked(method, keep, right, options={} if seed is None else {"seed": seed}, seed=seed)
        for (method, keep, seed), right in answers.items()
    ]


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 16, 350])
def test_outcomes_come_back_as_they_went_in(n):
    right = [bool(x) for x in np.random.default_rng(n).integers(0, 2, n)]
    assert unpack(pack(right), n) == right and len(pack(right)) == -(-n // 4)
    assert pack([True, False, False, False, True]) == "88"


def test_the_hard_questions_are_those_that_a_smaller_picture_gets_wrong(rows, answers):
    heading, *lines = hard_lines(boards(rows)[0])
    counts = [sum(not right for right in answers["downsample", keep, None]) for keep in (0.5, 0.11)]
    assert heading == ["method", *(f"{p} %, {n} questions" for p, n in zip((50, 11), counts))]
    assert [line[0] for line in lines] == ["divprune", "tome", "random", "all tokens", "no image"]
    for method, *cells in lines:
        name = {"all tokens": "full", "no image": "blind"}.get(method, method)
        for keep, cell in zip((0.5, 0.11), cells, strict=True):
            shares = []
            for (own, budget, _), right in answers.items():
                if own == name and budget in (keep, None):
                    easy = answers["downsample", keep, None]
                    of = [r for r, e in zip(right, easy, strict=True) if not e]
                    shares.append(100 * sum(of) / len(of))
            assert float(cell.split()[0]) == approx(np.mean(shares), abs=0.06)
            assert ("±" in cell) == (method == "random")
    below = float(lines[1][1].split()[0]) < float(lines[2][1].split()[0])
    assert lines[1][1].endswith("▾") == below
    assert "downsample" in hard_legend(boards(rows)[0])


def test_rows_that_cannot_be_compared_are_in_no_hard_table(rows):
    other = next(given for given in rows if given["method"] == "tome" and given["keep"] == 0.5)
    other["errors"] = [{"item": "scene 3", "error": "damaged"}]  # so another question is the third
    older = next(given for given in rows if given["method"] == "divprune" and given["keep"] == 0.5)
    del older["outcomes"]
    lines = {line[0]: line[1:] for line in hard_lines(boards(rows)[0])}
    assert lines["tome"][0] == lines["divprune"][0] == "-" and "-" not in (
        lines["tome"][1],
        lines["random"][0],
    )
    for given in rows:
        given.pop("outcomes", None)
    assert hard_lines(boards(rows)[0]) == [] and hard_block(boards(rows)) == ""


def test_a_difference_from_random_has_the_interval_of_paired_questions(rows, answers):
    (board,) = boards(rows)
    points, half = difference(board.cells["tome", 0.11], board.cells["random", 0.11])
    random = np.mean([answers["random", 0.11, seed] for seed in (0, 1)], axis=0)
    pairs = np.array(answers["tome", 0.11, None], dtype=float) - random
    assert points == approx(100 * pairs.mean())
    assert half == approx(196 * pairs.std(ddof=1) / np.sqrt(N))
    del board.cells["tome", 0.11].rows[0]["outcomes"]
    assert difference(board.cells["tome", 0.11], board.cells["random", 0.11]) == (approx(points), None)


def test_methods_below_random_are_named_by_budget(rows):
    for given in rows:
        if given["method"] in ("tome", "divprune"):
            right = [given["method"] == "divprune"] * N
            given |= {"outcomes": pack(right), "accuracy": float(right[0])}
    half, few = below_random(boards(rows)[0])
    assert half.startswith("50 %, 72 tokens (random ") and few.startswith("11 %, 16 tokens (random ")
    for line in (half, few):
        below = line.split("below: ")[1].split("; ")[0]
        assert "tome -" in below and "divprune" not in line and " ± " in below
