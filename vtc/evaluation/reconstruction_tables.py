"""The part of a README about what a tokenizer leaves of pictures, every number of which comes from rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from .results import Row
from .tables import markdown

CONTAINERS = {"file": "", "payload": ", headers not counted"}
METRICS = {"ssim": "SSIM", "ms_ssim": "MS-SSIM", "lpips": "LPIPS", "rfid": "rFID"}
CODECS = {"jpeg": "JPEG", "webp": "WebP"}
POLICIES = {
    "fixed": "the same for all",
    "halting": "**halting head**",
    "halting, shuffled": "those of the halting head, shuffled",
    "complexity, gradient": "gradients of the picture",
    "complexity, jpeg": "bytes of the picture as JPEG",
    "quality": "search for one error for all",
    "quality, wrong": "search for one share of wrong pixels for all",
    "oracle": "oracle",
}


def block(rows: Sequence[Row]) -> str:
    """Tables and their legends for each tokenizer, whichever of them rows have."""
    rows = newest(rows)
    names = dict.fromkeys(row["tokenizer"] for row in rows)
    return "\n\n".join(_tokenizer([row for row in rows if row["tokenizer"] == name]) for name in names)


def newest(rows: Sequence[Row]) -> list[Row]:
    """Of each tokenizer the rows with the weights that were measured last; of a set of pictures the last."""
    ordered = sorted(rows, key=lambda row: row["date"])
    weights = {row["tokenizer"]: row["weights"] for row in ordered}
    own = [row for row in ordered if row["weights"] == weights[row["tokenizer"]]]
    found = {(row["tokenizer"], row["kind"], row.get("codec"), row["data"]): row for row in own}
    return list(found.values())


def _tokenizer(rows: list[Row]) -> str:
    parts: list[tuple[str, Callable[[list[Row]], str]]] = [
        ("lengths", lengths_part),
        ("codec", codec_part),
        ("policies", policies_part),
        ("objects", objects_part),
    ]
    made = [make(found) for kind, make in parts if (found := [row for row in rows if row["kind"] == kind])]
    return "\n\n".join([*made, source(rows)])


def lengths_part(rows: list[Row]) -> str:
    """A table for all sets of pictures that were measured alike."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        metrics = [name for name in METRICS if name in row]
        groups.setdefault(f"{row['ladder']} {metrics} {row['size']}", []).append(row)
    return "\n\n".join(f"{lengths_table(group)}\n\n{lengths_legend(group)}" for group in groups.values())


def lengths_table(rows: list[Row]) -> str:
    """PSNR, SSIM and what else was measured, by number of tokens, for each set of pictures."""
    first = rows[0]
    shown = {name: title for name, title in METRICS.items() if name in first}
    heading = ["tokens", "bytes"]
    for row in rows:
        heading += [f"{row['data']}: PSNR, dB", *shown.values()]
    lines = [heading]
    for step, k in enumerate(first["ladder"]):
        line = [str(k), f"{k * first['bits_per_token'] / 8:.0f}"]
        for row in rows:
            column = row["k"].index(k)
            line.append(f"{row['psnr']['mean'][column]:.1f} ± {row['psnr']['std'][column]:.1f}")
            for name in shown:
                value = row[name][step] if name == "rfid" else row[name]["mean"][step]
                line.append(f"{value:.1f}" if name == "rfid" else f"{value:.3f}")
        lines.append(line)
    return markdown(lines, "r" * len(heading))


def lengths_legend(rows: list[Row]) -> str:
    """What the table has, and whether more tokens leave less error."""
    first = rows[0]
    n = first["ms_ssim_scales"]
    scales = "" if n == 5 else f", MS-SSIM over {n} of its 5 scales, for which the pictures are large enough"
    size = f"{_tokens(first['bits_per_token'])} a token"
    steps = "; ".join(f"{row['data']}: {monotone(row)}" for row in rows)
    counts = " and ".join(f"{row['n']} {row['data']}" for row in rows)
    pixels = " x ".join(map(str, first["size"]))
    return (
        f"Means over {counts} of {pixels} pixels (± the standard deviation over pictures{scales}), {size}. "
        f"Mean squared error from each number of tokens to the next: {steps}."
    )


def _tokens(bits: float) -> str:
    return f"{bits:.2f}".rstrip("0").rstrip(".") + " bits"


def monotone(row: Row) -> str:
    """How many steps to the next length lower the mean squared error, and how far it rises at the others."""
    changes = [after / before - 1 for before, after in pairwise(row["mse"])]
    if not changes:
        return "there is one number only"
    falling = sum(change < 0 for change in changes)
    if falling == len(changes):
        return f"it falls at all of {len(changes)} steps"
    return f"it falls at {falling} of {len(changes)} steps and rises by up to {100 * max(changes):.2g} %"


def codec_part(rows: list[Row]) -> str:
    return f"{codec_table(rows)}\n\n{codec_legend(rows)}"


def codec_table(rows: list[Row]) -> str:
    """PSNR of tokens, of codecs with as many bytes, and the bytes that codecs need for the tokens' PSNR."""
    columns = [("webp", "file"), ("webp", "payload"), ("jpeg", "file"), ("jpeg", "payload")]
    sets = list(dict.fromkeys(row["data"] for row in rows))
    found = {(row["data"], row["codec"]): row for row in rows}
    columns = [column for column in columns if (sets[0], column[0]) in found]
    titles = [f"{CODECS[codec]}{CONTAINERS[count]}" for codec, count in columns]
    same = [f"{CODECS[codec]}, bytes for that PSNR" for codec, count in columns if count == "file"]
    lines = [["pictures", "tokens", "bytes", "PSNR, dB", *titles, *same]]
    for data in sets:
        some = found[data, columns[0][0]]
        for step, k in enumerate(some["ladder"]):
            line = [data, str(k), f"{some['budgets'][step]:.0f}", f"{some['tokens_psnr'][step]:.1f}"]
            line += [_fit(found[data, codec], count, step) for codec, count in columns]
            line += [_needed(found[data, codec], step) for codec, count in columns if count == "file"]
            lines.append(line)
    return markdown(lines, "l" + "r" * (len(lines[0]) - 1))


def _fit(row: Row, count: str, step: int) -> str:
    cell = row[count]["cells"][step]
    if not cell["fits"]:
        return f"none (≥ {row[count]['least']})" if row[count]["least"] else "none"
    share = "" if cell["fits"] == row["n"] else f" ({100 * cell['fits'] / row['n']:.0f} %)"
    return f"{cell['psnr']:.1f}{share}"


def _needed(row: Row, step: int) -> str:
    needed = row["file"]["needed"][step]
    return f"> {row['budgets'][-1]:.0f}" if needed is None else f"{needed:.0f}"


def codec_legend(rows: list[Row]) -> str:
    counts = {row["data"]: row["n"] for row in rows}
    settings = max(row["settings"] for row in rows)
    return (
        f"On {' and '.join(f'{n} {data}' for data, n in counts.items())}. Codecs do their best: of every "
        f"picture the one of up to {settings} settings with the highest PSNR in the budget, over qualities, "
        "sizes (down to a twelfth of the side) and, for JPEG, chroma subsampling. *none (≥ 100)*: no setting "
        "has so few bytes, the smallest of any picture has 100; *(87 %)*: a setting has for so many of the "
        "pictures, and the mean is over these. *Headers not counted*: for WebP the RIFF container; for JPEG "
        "all but the scan, coded with the standard's Huffman tables, as if the receiver knew the rest; which "
        "setting it is would take another byte or so. *Bytes for that PSNR*: the median over pictures of the "
        "smallest file that is as good as the tokens. Codecs serve all kinds of pictures, the tokenizer has "
        "learned this kind, and its weights are not counted."
    )


def policies_part(rows: list[Row]) -> str:
    return "\n\n".join(f"{policies_table(row)}\n\n{policies_legend(row)}" for row in rows)


def policies_table(row: Row) -> str:
    """What comes of lengths by policies, at the same mean number of tokens."""
    heading = ["mean", "lengths by", "tokens", "PSNR of mean error", "gain", "mean PSNR", "gain"]
    heading += ["wrong pixels, %", "change", "95 % have"]
    lines = [heading]
    for point in row["points"]:
        for place, (name, found) in enumerate(point["policies"].items()):
            own = "" if name == "fixed" else _gain(found["gain"], found["gain_interval"])
            psnr = "" if name == "fixed" else _gain(found["psnr_gain"], found["psnr_gain_interval"])
            shares = [100 * share for share in (found["wrong_gain"], *found["wrong_gain_interval"])]
            wrong = "" if name == "fixed" else _gain(shares[0], shares[1:])
            lines.append(
                [
                    "" if place else f"{point['mean']:.1f}",
                    POLICIES[name],
                    f"{found['mean']:.1f} ± {found['std']:.1f}",
                    *(f"{found['of_mean']:.2f}", own, f"{found['psnr']:.2f}", psnr),
                    *(f"{100 * found['wrong']:.1f}", wrong, f"{found['low']:.1f}"),
                ]
            )
    return markdown(lines, "rlrrrrrrrr")


def _gain(gain: float, interval: Sequence[float]) -> str:
    low, high = interval
    return f"{gain:+.2f} ({low:+.2f} to {high:+.2f})"


def policies_legend(row: Row) -> str:
    asked = [point["epsilon"] for point in row["points"] if "epsilon" in point]
    parts = [
        f"On {row['n']} {row['data']}; PSNR in dB.",
        "*PSNR of mean error*: of the mean squared error of all pictures, which large errors make up; *mean "
        "PSNR*: the mean of each picture's own, to which a dB counts the same everywhere; *wrong pixels*: "
        "those of which a channel is off by more than 0.15 of its range, so that faint texture does not "
        "count; *95 % have*: at least that PSNR.",
        "Gains and changes (95 % interval, bootstrap over pictures) are over as many tokens for all "
        "pictures, where the mean is no whole number over one more for a share of them.",
    ]
    if asked:
        parts += [
            f"The means are those of the halting head{_asked(asked)}; the other policies' thresholds are set "
            "to these means on these very pictures.",
            "*Shuffled*: expected over all ways to deal the head's lengths to the pictures.",
        ]
    parts += [
        "*Search* decodes a picture at all lengths to find its own; the *oracle* knows all errors of all "
        "pictures and makes their sum least. What it takes to tell each length is not counted."
    ]
    return " ".join(parts)


def _asked(epsilons: Sequence[float | None]) -> str:
    told = ", ".join(f"{epsilon:.3f}" for epsilon in epsilons if epsilon is not None)
    return f", asked for an error of {told}" if told else ""


def objects_part(rows: list[Row]) -> str:
    return "\n\n".join(f"{objects_table(row)}\n\n{objects_legend(row)}" for row in rows)


def objects_table(row: Row) -> str:
    """Tokens of scenes by how many objects are on them, with the rank correlation."""
    counts = list(row["points"][0]["by"])
    heading = ["lengths by", "epsilon", *(f"{count} object{'s' * (count != '1')}" for count in counts)]
    lines = [[*heading, "all", "rank correlation"]]
    for point in row["points"]:
        low, high = point["interval"]
        epsilon = point["epsilon"]
        lines.append(
            [
                POLICIES[point["policy"]],
                "" if epsilon is None else f"{epsilon:.3f}",
                *(f"{point['by'][count]['mean']:.1f} ± {point['by'][count]['std']:.1f}" for count in counts),
                f"{point['mean']:.1f} ± {point['std']:.1f}",
                f"{point['correlation']:.2f} ({low:.2f} to {high:.2f})",
            ]
        )
    return markdown(lines, "lr" + "r" * (len(lines[0]) - 2))


def objects_legend(row: Row) -> str:
    return (
        f"Tokens on {row['n']} {row['data']} (± the standard deviation over pictures), and Spearman's rank "
        "correlation of tokens with objects (95 % interval, bootstrap over pictures). *epsilon*: the error "
        "that the halting head was asked for; of the system `ordered` it is a share of wrong pixels, those "
        "of which a channel is off by more than 0.15 of its range."
    )


def source(rows: Sequence[Row]) -> str:
    """What was measured, by which commands at which commits, and on what."""
    newest = max(rows, key=lambda row: row["date"])
    made = newest["versions"]
    commits = {(row["command"], (row["versions"]["commit"] or "no commit")[:10]): None for row in rows}
    size = f"{newest['parameters'] / 1e6:.1f} million parameters, weights {newest['weights']}"
    return (
        f"`{newest['tokenizer']}` (`{newest['system']}`, {size}). "
        f"Made by {', '.join(f'`{command}` at {commit}' for command, commit in commits)} on "
        f"{newest['date'][:10]} with vtc {made['vtc']}, torch {made['torch']}, torchmetrics "
        f"{made['torchmetrics']}, Pillow {made['pillow']} (libjpeg-turbo {made['libjpeg']}, libwebp "
        f"{made['libwebp']}) on {newest['device']}."
    )
