"""What the README shows runs as it stands there, and its generated parts are what the registries say."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vtc.cli import main
from vtc.evaluation.learned_lengths_tables import lengths_block
from vtc.evaluation.report import (
    encoders_block,
    hard_block,
    hosts_table,
    load_boards,
    methods_table,
    modules_table,
    results_block,
    tokenizers_table,
    varying_block,
)
from vtc.evaluation.results import read_rows

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.M | re.S)


def generated(name: str) -> str:
    return README.split(f"<!-- {name}:begin -->\n")[1].split(f"\n<!-- {name}:end -->")[0]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder that looks like the repository's root and may be written to."""
    for name in ("models", "assets", "eval"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_snippets_run_in_order(checkout):
    python = blocks("python")
    assert len(python) >= 4
    script = "\n".join(python)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert "tokens kept in the last forward: 36 of 144" in done.stdout
    assert (checkout / "kept.png").is_file()


@pytest.mark.parametrize("line", [line for block in blocks("bash") for line in block.splitlines()])
def test_commands_run(checkout, line, capsys):
    program, *arguments = shlex.split(line)
    assert program == "vtc"
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip()


def test_make_has_the_two_commands():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M)
    for line in re.findall(r"^make (\w+)", README, flags=re.M):
        assert line in targets


def test_generated_tables_are_up_to_date():
    assert generated("methods") == methods_table()
    assert generated("hosts") == hosts_table()
    assert generated("tokenizers") == tokenizers_table()
    assert generated("modules") == modules_table()
    lengths = read_rows(ROOT / "eval/results/learned-lengths.jsonl")[0]
    assert generated("learned-lengths") == lengths_block(lengths)
    encoders = load_boards(ROOT / "eval/results/tiny-clip-singles.jsonl")
    assert generated("encoders") == encoders_block(encoders)
    asked = load_boards(ROOT / "eval/results/tiny-llava-scenes.jsonl")
    assert generated("results") == results_block(asked)
    assert generated("hard") == hard_block(asked)
    assert generated("varying") == varying_block(asked)


SCRIPTS = {
    "clustering": "clustering", "finetune_encoder": "finetune", "tokenizer": "tokenizer",
    "learned": "learned", "learned_start": "learned-start",
}  # fmt: skip


@pytest.mark.parametrize("name, part", SCRIPTS.items())
def test_parts_filled_by_eval_scripts_are_up_to_date(name, part, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, ROOT / "eval" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, script)  # dataclasses look there
    spec.loader.exec_module(script)
    assert generated(part) == script.block(read_rows(script.OUTPUT)[0])


def test_costs_of_methods_are_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "eval")
    selection = importlib.import_module("selection")
    assert generated("selection") == selection.tables(read_rows(ROOT / "eval/results/selection.jsonl")[0])


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
