"""The report as one HTML page that needs no other file and no network."""

from __future__ import annotations

import json
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from .board import Board, is_baseline
from .gallery import SIDE, Exhibit, Picture
from .hard import hard_legend, hard_lines
from .results import Row
from .style import looks
from .tables import BELOW_RANDOM, READS, budget, cost_columns, costs, legend, reads
from .varying import varying_legend, varying_lines

HERE = Path(__file__).parent
LEVELS = (("full", "all tokens", "7 4"), ("blind", "no image", "1.5 4"))  # field of a board, name, dashes


def page(boards: list[Board], exhibits: list[list[Exhibit]], source: str) -> str:
    """The page's text. `exhibits` has a list for each board; `source`, HTML, says how the rows were made."""
    data = [_data(*pair) for pair in zip(boards, exhibits, strict=True)]
    parts = {
        "title": escape(" · ".join(dict.fromkeys(_name(board) for board in boards))),
        "boards": "\n".join(_board(i, *pair) for i, pair in enumerate(zip(boards, exhibits, strict=True))),
        "footer": source,
        "data": json.dumps(data).replace("</", "<\\/"),  # no text in the data can end the script element
        "script": (HERE / "page.js").read_text(encoding="utf-8"),
    }
    text = (HERE / "page.html").read_text(encoding="utf-8")
    pieces = text.split("{{")
    filled = [parts[name] + rest for name, rest in (piece.split("}}", 1) for piece in pieces[1:])]
    return pieces[0] + "".join(filled)


def _name(board: Board) -> str:
    return f"{board.model.split('@')[0]} on {board.task}"


def _board(i: int, board: Board, exhibits: list[Exhibit]) -> str:
    split = f", {board.split} split" if board.split else ""
    methods = f"{len(board.methods)} methods at {len(board.keeps)} budgets, measured side by side."
    lead = f"{board.items} {board.things}{split}. {methods}"
    parts = [
        f"<h1>{escape(_name(board))}</h1><p class=lead>{escape(lead)}</p>{_cards(board)}",
        f"<h2>Accuracy against kept tokens</h2><div id=chart-{i}></div>" if board.keeps else "",
        f"<h2>Table</h2><div class=scroll>{_table(board)}</div>" if board.keeps else "",
        _note(legend(board)),
        _more("Hard questions", hard_lines, hard_legend, board),
        _more("Budgets that differ from picture to picture", varying_lines, varying_legend, board),
        f"<h2>What was kept</h2><div id=gallery-{i}></div>" if exhibits and board.keeps else "",
        f"<details><summary>What it costs</summary><div class=scroll>{_costs(board)}</div></details>",
        _errors(board),
    ]
    return f"<section class=board>{''.join(parts)}</section>"


def _cards(board: Board) -> str:
    cards = []
    if board.full:
        cards.append((board.full["accuracy"], f"all {board.full['tokens']:.0f} tokens"))
    for keep in dict.fromkeys(board.keeps[i] for i in (len(board.keeps) // 2, -1) if board.keeps):
        best = _best(board, keep)
        cards.append((board.cells[best, keep].accuracy, f"{best} with {budget(board, keep).split(', ')[-1]}"))
    if board.blind:
        cards.append((board.blind["accuracy"], "the question without its image"))
    shown = (
        f"<div class=card><b>{100 * value:.1f} %</b><span>{escape(name)}</span></div>"
        for value, name in cards
    )
    return f"<div class=cards>{''.join(shown)}</div>"


def _best(board: Board, keep: float | int) -> str:
    return max(
        (m for m in board.methods if (m, keep) in board.cells), key=lambda m: board.cells[m, keep].accuracy
    )


def _table(board: Board) -> str:
    heading = "".join(f"<th>{'<br>'.join(budget(board, keep).split(', '))}</th>" for keep in board.keeps)
    told = {method: reads(board, method) for method in board.methods}
    best = {keep: _best(board, keep) for keep in board.keeps}
    body = []
    for method in board.methods:
        cells = "".join(_cell(board, method, keep, best[keep] == method) for keep in board.keeps)
        row = "<tr class=baseline>" if is_baseline(method) else "<tr>"
        known = f"<td class=word>{told[method]}</td>" if any(told.values()) else ""
        body.append(f"{row}<th scope=row>{escape(method)}</th>{known}{cells}</tr>")
    heading = f"<th class=word>{READS}</th>{heading}" if any(told.values()) else heading
    return f"<table><thead><tr><th>method</th>{heading}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _more(title: str, lines: Callable, legend: Callable[[Board], str], board: Board) -> str:
    """A table of lines, the heading first; "" where there are none."""
    found = lines(board)
    if not found:
        return ""
    heading, *body = found
    rows = ""
    for name, *cells in body:
        start = "<tr class=baseline>" if is_baseline(name) else "<tr>"
        shown = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows += f"{start}<th scope=row>{escape(name)}</th>{shown}</tr>"
    top = "".join(f"<th>{'<br>'.join(escape(cell).split(', '))}</th>" for cell in heading)
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<h2>{title}</h2><div class=scroll>{table}</div>{_note(legend(board))}"


def _note(markdown: str) -> str:
    return f"<p class=note>{escape(markdown.replace('*', '').replace('`', ''))}</p>"


def _cell(board: Board, method: str, keep: float | int, best: bool) -> str:
    cell = board.cells.get((method, keep))
    if cell is None:
        return "<td>-</td>"
    text = f"{100 * cell.accuracy:.1f}"
    if cell.spread is not None:
        text += f" ± {100 * cell.spread:.1f}"
    if (relative := board.relative(cell)) is not None:
        text += f"<small>({100 * relative:.0f})</small>"
    if board.loses(method, keep):
        text += f"<span class=below title='below random tokens at this budget'>{BELOW_RANDOM}</span>"
    return f"<td class=best>{text}</td>" if best else f"<td>{text}</td>"


def _costs(board: Board) -> str:
    heading = "".join(f"<th>{escape(cost.heading)}</th>" for cost in cost_columns(board))
    body = [
        f"<tr><th scope=row>{escape(name)}</th>{''.join(f'<td>{value}</td>' for value in values)}</tr>"
        for name, values in costs(board)
    ]
    return f"<table><thead><tr><th>run</th>{heading}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _errors(board: Board) -> str:
    found = board.errors + board.item_errors
    listed = "".join(f"<li>{escape(error)}</li>" for error in found)
    return f"<h2>Not measured</h2><ul>{listed}</ul>" if found else ""


def _data(board: Board, exhibits: list[Exhibit]) -> dict[str, Any]:
    series = []
    for method, look in looks(board).items():
        cells = [board.cells[method, keep] for keep in board.keeps if (method, keep) in board.cells]
        kinds = [{kind: cell.kind(kind) for kind in board.kinds} for cell in cells]
        points = [
            {"tokens": cell.tokens, "accuracy": {"all questions": cell.accuracy, **by_kind}}
            for cell, by_kind in zip(cells, kinds, strict=True)
        ]
        dashes = " ".join(str(length * look.width) for length in look.dashes)
        series.append(
            {"name": method, "colour": look.colour, "width": look.width, "dashes": dashes, "points": points}
        )
    rows = [(getattr(board, field), name, dashes) for field, name, dashes in LEVELS]
    levels = [
        {"name": name, "dashes": dashes, "accuracy": _accuracy(row)} for row, name, dashes in rows if row
    ]
    return {
        "series": series, "levels": levels, "kinds": board.kinds, "axis": board.axis,
        "keeps": [budget(board, keep) for keep in board.keeps], "methods": board.methods, "side": SIDE,
        "reference": board.keeps.index(board.reference) if board.keeps else 0,
        "exhibits": [_exhibit(board, exhibit) for exhibit in exhibits],
    }  # fmt: skip


def _accuracy(row: Row) -> dict[str, float]:
    return {
        "all questions": row["accuracy"],
        **{kind: found["accuracy"] for kind, found in row["kinds"].items()},
    }


def _exhibit(board: Board, exhibit: Exhibit) -> dict[str, Any]:
    kept = [
        {"method": method, "keep": budget(board, keep), **_picture(picture)}
        for (method, keep), picture in exhibit.kept.items()
    ]
    question = {"question": exhibit.item.question, "answer": exhibit.item.answer}
    return {**question, "original": _picture(exhibit.original), "kept": kept}


def _picture(picture: Picture) -> dict[str, Any]:
    return {"url": picture.url, "tokens": picture.tokens, "answer": picture.answer, "right": picture.right}
