"""How near to its host a fresh module starts: eval/learned_start.py on a few questions."""

import importlib.util
import sys
from pathlib import Path

import pytest

from vtc.evaluation.results import read_rows

SCRIPT = Path(__file__).parents[1] / "eval" / "learned_start.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("learned_start", SCRIPT)
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses look there
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def output(script, tmp_path_factory):
    path = tmp_path_factory.mktemp("start") / "rows.jsonl"
    few = [
        "--questions",
        "14",
        "--scenes",
        "2",
        "--training-scenes",
        "8",
        "--threads",
        "1",
        "--out",
        str(path),
    ]
    names = ["agent-attention", "proxy-projector", "token-slimming", "pool"]
    script.main(["--models", "tiny-llava", "--modules", *names, *few])
    return path


def test_rows_say_what_was_measured(output):
    rows = read_rows(output)[0]
    places = [(row["place"], row["name"]) for row in rows]
    assert places == [
        ("attention", None), ("attention", "agent-attention"), ("attention", "agent-attention"),
        ("features", "pool"), ("features", "token-slimming"), ("features", "proxy-projector"),
        ("encoder", "token-slimming"),
    ]  # fmt: skip
    bare, agents, trained, *reduced = rows
    assert bare["accuracy"] >= 12 / 14 and "distance" not in bare and bare["tokens"] == 144
    assert agents["distance"] > 0 and agents["operations"] < 1
    assert 0 < trained["distance"] < agents["distance"] and trained["note"] == "trained"
    assert all(row["tokens"] == 36 and 0 <= row["accuracy"] <= 1 for row in reduced)


def test_what_is_there_is_not_measured_again(script, output, capsys):
    before = output.read_text()
    few = ["--questions", "14", "--scenes", "2", "--training-scenes", "8", "--out", str(output)]
    script.main(["--models", "tiny-llava", "--modules", "pool", *few])
    assert output.read_text() == before and "| the host's own |" in capsys.readouterr().out


def test_the_tables_are_of_one_number_of_questions(script, output):
    rows = read_rows(output)[0]
    more = [row | {"questions": 50, "accuracy": 0.5} for row in rows[:3]]
    text = script.block([*rows, *more])
    assert "on 50 questions" in text and "| `token-slimming`" not in text
    text = script.block(rows)
    assert "on 14 questions" in text and "`agent-attention`" in text and "behind block 2 of the tower" in text


def test_what_it_does_not_know_is_refused(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--modules", "no-such"])
    assert "invalid choice: 'no-such'" in capsys.readouterr().err
