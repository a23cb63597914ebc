"""Every number of a report is one of the rows, and the page needs nothing but itself."""

import json
import re
from html.parser import HTMLParser
from statistics import mean

import numpy as np
import pytest
from PIL import Image
from pytest import approx
from small import small_model, small_processor, write_task

import vtc
from vtc.evaluation.board import boards
from vtc.evaluation.gallery import gallery
from vtc.evaluation.report import load_boards, update_readme, write_report
from vtc.evaluation.style import looks
from vtc.evaluation.tables import accuracy_lines, accuracy_table, costs_table, kinds_table, legend
from vtc.evaluation.tasks import load_task

KINDS = ("colour", "count", "x|y</script><b>")  # a kind is a user's own word
ACCURACIES = {"hiprune": 0.4, "tome": 0.7, "random": 0.5}


def row(method, keep, tokens, accuracy, **more):
    kinds = {kind: {"accuracy": accuracy - 0.01 * i, "items": 10} for i, kind in enumerate(KINDS)}
    cost = {
        "llm_tokens": tokens, "decoder_tokens": tokens + 9.0, "tflops_total": tokens / 1e5,
        "kv_bytes": 4096 * tokens, "first_token_ratio": 0.6, "compressor_share": 0.05,
        "peak_memory_bytes": None,
    }  # fmt: skip
    versions = {
        "vtc": "1",
        "torch": "2",
        "transformers": "5",
        "commit": "0123456789ab",
        "cpu": "x",
        "gpu": None,
    }
    made = {"command": "vtc demo", "date": "2025-01-02T03:04:05+00:00", "versions": versions, "errors": []}
    return {
        "key": f"{method}{keep}{more}", "model": "tiny@1234", "task": "scenes", "split": "test", "n": 30,
        "method": method, "keep": keep, "options": {}, "seed": None, "accuracy": accuracy, "items": 30,
        "tokens": tokens, "kinds": kinds, "cost": cost, **made, **more,
    }  # fmt: skip


@pytest.fixture
def rows():
    found = [row("full", None, 144, 0.9), row("blind", None, 0, 0.3, cost=None)]
    for keep, tokens in ((0.5, 72), (0.11, 16)):
        for method, accuracy in ACCURACIES.items():
            for seed in (0, 1) if method == "random" else (None,):
                given = accuracy + tokens / 1000 + (seed or 0) / 10
                options = {} if seed is None else {"seed": seed}
                found.append(row(method, keep, tokens, given, seed=seed, options=options))
    return found


def test_tables_hold_the_numbers_of_the_rows(rows):
    (board,) = boards(rows)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in accuracy_table(board).splitlines()]
    assert lines[0] == ["method", "50 %, 72 tokens", "11 %, 16 tokens"]
    assert lines[2] == ["tome", "77.2 (86)", "71.6 (80)"]  # the best first
    assert lines[3] == ["hiprune", "47.2 (52) ▾", "41.6 (46) ▾"]  # 0.472 / 0.9 = 0.524; random has 0.622
    assert lines[4] == ["random", "62.2 ± 7.1 (69)", "56.6 ± 7.1 (63)"]  # 0.572 and 0.672
    assert "2 seeds" in legend(board) and "▾ below random" in legend(board)
    assert "| tome | 77.2 | 76.2 | 75.2 |" in kinds_table(board, 0.5)
    assert kinds_table(board, 0.5).startswith("| method | colour | count | x\\|y</script><b> |")
    assert "| all tokens | 90.0 | 89.0 | 88.0 |" in kinds_table(board, 0.5)
    assert "| tome, keep 0.11 | 16 | 25 | 0.16 | 64 | 60 | 5.0 | - |" in costs_table(board)


def test_options_make_a_method_of_their_own(rows):
    rows.append(row("tome", 0.5, 72, 0.1, options={"layer": -1}))
    assert boards(rows)[0].methods == [
        "tome",
        "hiprune",
        "tome (layer=-1)",
        "random",
    ]  # not run at 11 %: last


def test_what_a_method_reads_is_said_where_it_is_not_in_every_model(rows):
    rows += [row("fastervlm", 0.11, 16, 0.8), row("slime", 0.11, 16, 0.1, options={"adaptive": False})]
    rows.append(row("no longer registered", 0.11, 16, 0.2))
    (board,) = boards(rows)
    heading, *lines = accuracy_lines(board)
    told = {line[0]: line[1] for line in lines}
    assert heading[1] == "reads" and told.pop("fastervlm") == "CLS"
    assert told.pop("slime (adaptive=False)") == "text" and not any(told.values())
    assert "*reads*" in legend(board)


def test_of_one_run_the_newest_row_counts(rows):
    older = row("tome", 0.11, 16, 0.1, key="before it was rewritten", date="2025-01-01T00:00:00+00:00")
    failed = {name: older[name] for name in ("model", "task", "split", "n", "method", "options", "keep")}
    for found in ([older, *rows], [*rows, older], [{**failed, "key": "x", "error": "?"}, *rows]):
        (board,) = boards(found)
        cell = board.cells["tome", 0.11]
        assert len(cell.rows) == 1 and cell.accuracy == approx(0.716) and board.errors == []
    newer = {**failed, "key": "x", "error": "?", "date": "2025-01-03T00:00:00+00:00"}
    assert ("tome", 0.11) not in boards([newer, *rows])[0].cells


def test_of_many_methods_only_the_best_have_colours(rows, tmp_path):
    rows += [row(f"method {i}", 0.11, 16, i / 20) for i in range(12)]
    (board,) = boards(rows)
    found = looks(board)
    assert list(found) == board.methods
    assert [method for method, look in found.items() if not look.plain][:2] == ["tome", "method 11"]
    assert sum(look.plain for look in found.values()) == 8  # of 14, six have a colour
    write_report([board], tmp_path)


def test_several_tasks_are_several_boards(rows, tmp_path):
    other = [{**given, "task": "jsonl:mine", "key": given["key"] + "x"} for given in rows]
    found = boards(rows + other)
    assert [board.task for board in found] == ["scenes", "jsonl:mine"]
    write_report(found, tmp_path)
    assert (tmp_path / "accuracy-2.png").exists() and "jsonl:mine" in (tmp_path / "index.html").read_text()


class Loads(HTMLParser):
    """Collects what a page would load, its scripts' data and its text."""

    def __init__(self):
        super().__init__()
        self.loaded, self.texts, self.tag = [], {}, None

    def handle_starttag(self, tag, attributes):
        self.tag = dict(attributes).get("id", tag)
        self.loaded += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data):
        self.texts[self.tag] = self.texts.get(self.tag, "") + data


def read(page):
    loads = Loads()
    loads.feed(page)
    return loads


def test_the_page_needs_nothing_but_itself(rows, tmp_path):
    task = load_task(f"jsonl:{write_task(tmp_path)}")
    runs = [("tome", {}, 0.5), ("tome", {}, 0.11), ("random", {"seed": 0}, 0.5)]
    exhibits = gallery(small_model(), small_processor(), task, runs, 2)
    page = write_report(boards(rows), tmp_path / "report", [exhibits]).read_text()
    found = read(page)
    assert found.loaded == [] and not re.search(r"url\(|@import|<link|fetch\(|XMLHttp", page)
    (data,) = json.loads(found.texts["data"])  # a kind called </script> has not ended it
    assert data["methods"] == ["tome", "hiprune", "random"] and data["keeps"][data["reference"]][:4] == "11 %"
    assert data["kinds"] == list(KINDS)
    tome = next(line for line in data["series"] if line["name"] == "tome")
    assert [point["accuracy"]["all questions"] for point in tome["points"]] == approx([0.772, 0.716])
    assert [level["accuracy"]["all questions"] for level in data["levels"]] == approx([0.9, 0.3])
    assert [exhibit["original"]["right"] for exhibit in data["exhibits"]] == [True, True]  # its own answers
    for exhibit in data["exhibits"]:
        assert [(kept["method"], kept["tokens"]) for kept in exhibit["kept"]] == [
            ("tome", 72), ("tome", 16), ("random", 72)
        ]  # fmt: skip
        urls = [kept["url"] for kept in exhibit["kept"]]
        assert len(set(urls)) == 3 and all(url.startswith("data:image/") for url in urls)
        assert mean(map(len, urls)) < 6e3  # five pictures, 30 methods and five budgets make less than 5 MB
    assert "77.2" in found.texts["td"] and "vtc demo" in found.texts["code"] and "0123456789" in page


def test_plots_show_something(rows, tmp_path):
    write_report(boards(rows), tmp_path)
    for name in ("accuracy.png", "kinds.png"):
        pixels = np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int) @ [65536, 256, 1]
        assert {0x0072B2, 0xD55E00} <= set(np.unique(pixels))  # the lines of both methods
        assert 0.5 < (pixels == 0xFFFFFF).mean() < 0.99


def test_one_kind_of_question_is_not_shown_apart(rows, tmp_path):
    for given in rows:
        given["kinds"] = {"all": {"accuracy": given["accuracy"], "items": 30}}
    page = write_report(boards(rows), tmp_path).read_text()
    assert json.loads(read(page).texts["data"])[0]["kinds"] == []
    assert not (tmp_path / "kinds.png").exists() and "By kind" not in (tmp_path / "report.md").read_text()


def test_what_failed_is_in_the_report(rows, tmp_path):
    failed = {name: rows[2][name] for name in ("model", "task", "split", "n", "method", "options", "keep")}
    rows[2] = {**failed, "key": "x", "error": "RuntimeError: <no> memory"}
    rows[0]["errors"] = [{"item": "mine.jsonl:3", "error": "damaged"}]
    page = write_report(boards(rows), tmp_path).read_text()
    assert "RuntimeError: &lt;no&gt; memory" in page and "mine.jsonl:3: damaged" in page
    text = (tmp_path / "report.md").read_text()
    assert "RuntimeError: <no> memory" in text and "mine.jsonl:3: damaged" in text
    assert "| hiprune | - | 41.6" in text


def test_a_readme_is_filled_between_its_marks(rows, tmp_path):
    readme = tmp_path / "README.md"
    marks = "".join(
        f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n" for name in ("results", "methods", "hosts")
    )
    readme.write_text(f"# Title\n{marks}The end.\n")
    for _ in range(2):  # filling it again changes nothing
        assert update_readme(readme, boards(rows)) == ["results", "methods", "hosts"]
        text = readme.read_text()
        assert (
            text.startswith("# Title\n")
            and text.endswith("<!-- hosts:end -->\nThe end.\n")
            and "OUTDATED" not in text
        )
        assert text.count("| tome | 77.2 (86) | 71.6 (80) |") == 1
        assert "`vtc demo` at commit 0123456789 on 2025-01-02" in text
        assert all(text.count(f"| `{name}` |") == 1 for name in vtc.list_methods())
        assert all(f"| {name}" in text for name in vtc.list_hosts())
    for wrong in ("nothing marked", "<!-- results:begin --> no end"):
        readme.write_text(wrong)
        with pytest.raises(ValueError, match="results:begin"):
            update_readme(readme, boards(rows))
        assert readme.read_text() == wrong


def test_no_results_are_an_error(tmp_path):
    (tmp_path / "empty.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="no results"):
        load_boards(tmp_path / "empty.jsonl")
    with pytest.raises(OSError):
        load_boards(tmp_path / "missing.jsonl")
