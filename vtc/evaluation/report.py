"""From rows of results to files: Markdown tables, pictures and one HTML page, and the tables of a README."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path

from ..hosts import support
from ..method import doc, get_method, list_methods
from . import tables
from .board import Board, boards
from .gallery import Exhibit
from .hard import hard_legend, hard_lines, hard_table
from .plot import plot_accuracy, plot_kinds
from .report_html import page
from .results import read_rows
from .varying import varying_legend, varying_lines, varying_table


def load_boards(path: str | Path) -> list[Board]:
    """The boards of a file of results. Raises OSError if it is not there, ValueError if it holds none."""
    found = boards(read_rows(path)[0])
    if not found:
        raise ValueError(f"{path} holds no results: run `vtc sweep` or `vtc demo` first")
    return found


def write_report(found: list[Board], out: str | Path, exhibits: list[list[Exhibit]] | None = None) -> Path:
    """Writes index.html, report.md and the PNG files into the folder `out`; returns the page's path.

    exhibits  for each board what `gallery()` made; without, the page has no pictures of kept tokens
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    text = []
    for i, board in enumerate(found):
        end = "" if len(found) == 1 else f"-{i + 1}"
        pictures = {"accuracy": plot_accuracy} if board.keeps else {}
        if board.keeps and board.kinds:
            pictures["kinds"] = plot_kinds
        for name, plot in pictures.items():
            plot(board, out / f"{name}{end}.png")
        text.append(_markdown(board, [f"![{name}]({name}{end}.png)" for name in pictures]))
    (out / "report.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    path = out / "index.html"
    made = "<br>".join(source(board, html=True) for board in found)
    path.write_text(page(found, exhibits or [[] for _ in found], made), encoding="utf-8")
    return path


def update_readme(path: str | Path, found: list[Board]) -> list[str]:
    """Fills the parts results, hard, varying, encoders, methods, hosts, tokenizers and modules of a
    Markdown file, as
    fill_parts() does.

    Boards of questions are for the first three, those of classes for encoders; without any a part stays.
    """
    asked, classes = [b for b in found if not b.classes], [b for b in found if b.classes]
    parts = {"results": results_block, "hard": hard_block, "varying": varying_block} if asked else {}
    blocks = {name: partial(block, asked) for name, block in parts.items()}
    if classes:
        blocks["encoders"] = partial(encoders_block, classes)
    registered = {"methods": methods_table, "hosts": hosts_table}
    registered |= {"tokenizers": tokenizers_table, "modules": modules_table}
    return fill_parts(path, {**blocks, **registered})


def fill_parts(path: str | Path, blocks: dict[str, Callable[[], str]]) -> list[str]:
    """Fills the parts of a Markdown file that are marked `<!-- NAME:begin -->` to `<!-- NAME:end -->`.

    blocks  by NAME what makes the text of a part
    Returns the names that were found. Raises ValueError if there is none or one has no end.
    """
    text = Path(path).read_text(encoding="utf-8")
    filled = []
    for name, make in blocks.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        head, found_begin, rest = text.partition(begin)
        if not found_begin:
            continue
        _, found_end, tail = rest.partition(end)
        if not found_end:
            raise ValueError(f"{path} has {begin} and no {end} behind it")
        text = f"{head}{begin}\n{make()}\n{end}{tail}"
        filled.append(name)
    if not filled:
        name = next(iter(blocks))
        raise ValueError(
            f"{path} has no part to fill: mark one by <!-- {name}:begin --> .. <!-- {name}:end -->"
        )
    Path(path).write_text(text, encoding="utf-8")
    return filled


def results_block(found: list[Board]) -> str:
    """The accuracy table of each board with what it means and how it was made."""
    return "\n\n".join(
        f"{tables.accuracy_table(board)}\n\n{tables.legend(board)} {tables.bounds(board)}\n\n{source(board)}"
        for board in found
    )


def hard_block(found: list[Board]) -> str:
    """The table of hard questions of each board that has one, and what it means."""
    return _blocks(found, hard_lines, hard_table, hard_legend)


def varying_block(found: list[Board]) -> str:
    """The table of budgets that differ from picture to picture, of each board that has some."""
    return _blocks(found, varying_lines, varying_table, varying_legend)


def _blocks(found: list[Board], lines: Callable, table: Callable, legend: Callable) -> str:
    return "\n\n".join(f"{table(board)}\n\n{legend(board)}" for board in found if lines(board))


def encoders_block(found: list[Board]) -> str:
    """The table of each board of classes with what it means and how it was made."""
    parts = []
    for board in found:
        legend = f"{tables.legend(board, costs=True)} {tables.bounds(board)}"
        parts += [tables.encoder_table(board), legend, source(board)]
    return "\n\n".join(parts)


def methods_table() -> str:
    """All methods of the registry."""
    rows = [["method", "stage", "what it does", "source"]]
    for name in list_methods():
        cls = type(get_method(name))
        rows.append([f"`{name}`", ", ".join(cls.stages), doc(cls).rstrip("."), _link(cls.paper)])
    return tables.markdown(rows, "llll")


def tokenizers_table() -> str:
    """All systems of the registry, and what the columns mean."""
    from ..tokenizers.listing import MEANING, rows

    return _listed(rows(), MEANING)


def modules_table() -> str:
    """All modules with weights, and what the columns mean."""
    from ..learned.listing import MEANING, rows

    return _listed(rows(), MEANING)


def _listed(rows: list[tuple[str, ...]], meanings: dict[str, str]) -> str:
    heading, *known = rows
    meaning = "; ".join(f"*{column}*: {what}" for column, what in meanings.items())
    table = [heading, *([f"`{name}`", *rest[:-1], rest[-1].rstrip(".")] for name, *rest in known)]
    return f"{tables.markdown(table, 'l' * len(heading))}\n\n{meaning}."


def hosts_table() -> str:
    """All families of models that `compress()` knows, and those that it refuses."""
    heading, *families = support.rows()
    meaning = "; ".join(f"*{column}*: {what}" for column, what in support.MEANING.items())
    why = [["not served", "why"], *([f"`{model_type}`", reason] for model_type, reason in support.refused())]
    table = tables.markdown([heading, *families], "l" * len(heading))
    return f"{table}\n\n{meaning}.\n\n{tables.markdown(why, 'll')}"


def source(board: Board, html: bool = False) -> str:
    """By which command, commit and versions the board's rows were made, and when."""
    newest = max(board.rows, key=lambda row: row["date"])
    commands = dict.fromkeys(row["command"] for row in board.rows)
    code = "<code>{}</code>" if html else "`{}`"
    made = " and ".join(code.format(escape(command) if html else command) for command in commands)
    versions = newest["versions"]
    commits = dict.fromkeys(row["versions"]["commit"] for row in board.rows)
    commit = ", ".join(commit[:10] for commit in commits if commit)
    commit = f" at commit {commit}" if commit else ""
    tools = f"vtc {versions['vtc']}, torch {versions['torch']}, transformers {versions['transformers']}"
    device = versions["gpu"] or versions["cpu"]
    return f"Made by {made}{commit} on {newest['date'][:10]} with {tools} on {device}; model {board.model}."


def _markdown(board: Board, pictures: list[str]) -> str:
    parts = [f"# {board.model.split('@')[0]} on {board.task}", *pictures]
    if board.keeps:
        table = tables.encoder_table if board.classes else tables.accuracy_table
        parts += [table(board), tables.legend(board, costs=board.classes is not None)]
    parts.append(tables.bounds(board))
    if hard := hard_block([board]):
        parts += ["## Hard questions", hard]
    if varying := varying_block([board]):
        parts += ["## Budgets that differ from picture to picture", varying]
    for keep in board.keeps if board.kinds else []:
        parts += [f"## By kind of question: {tables.budget(board, keep)}", tables.kinds_table(board, keep)]
    parts += ["## Costs", tables.costs_table(board)]
    failed = board.errors + board.item_errors
    parts += ["## Not measured", "\n".join(f"- {line}" for line in failed)] if failed else []
    return "\n\n".join([*parts, source(board)])


def _link(paper: str) -> str:
    return f"[{paper}](https://arxiv.org/abs/{paper[6:]})" if paper.startswith("arXiv:") else paper
