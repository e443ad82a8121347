"""Draw the pictures of how-it-works.md: ``python docs/pictures.py [FOLDER]``.

Cells, owners, directions, sizes and the order of loads come from zo's own functions, so that a
picture shows what the code does.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from zo.method.estimator import empty_table
from zo.method.passes import Matrices
from zo.method.perturbation import rank_one
from zo.method.table import Grid
from zo.state.log_file import _U32, _packer
from zo.streaming.ring import Ring

FOLDER = Path(__file__).parent / "pages" / "pictures"
RANKS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")
INK, LIGHT, RED = "#333333", "#e8ecef", "#c44e52"
ARROW = {"arrowstyle": "-|>", "color": INK, "lw": 1.2}
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
STYLE = {
    "svg.fonttype": "none",  # Text stays text: small files, and a test reads the labels.
    "svg.hashsalt": "zo",
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": INK,
}


def _figure(width: float, height: float, *panels: float) -> tuple[Figure, list[Axes]]:
    """Return a figure of some inches, and its panels of some relative widths."""
    figure = Figure(figsize=(width, height), layout="constrained")
    found = figure.subplots(1, len(panels) or 1, squeeze=False, width_ratios=panels or None)
    return figure, list(found[0])


def _bare(axes: Axes, width: float, height: float) -> None:
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    axes.axis("off")


def _box(axes: Axes, x: float, y: float, w: float, h: float, text: str, color: str = LIGHT) -> None:
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=style, fc=color, ec=INK, lw=1))
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=9.5)


def _cells(axes: Axes, x: float, y: float, kinds: torch.Tensor, colors: Sequence[str]) -> None:
    """Draw a cell of size one for each number of a matrix, in the color of that number."""
    height, width = kinds.shape
    edges = [x + i for i in range(width + 1)], [y + i for i in range(height + 1)]
    style = {"edgecolors": "white", "lw": 1, "vmin": 0, "vmax": len(colors) - 1}
    axes.pcolormesh(*edges, kinds, cmap=ListedColormap(colors), **style)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops=ARROW)


def draw_step() -> Figure:
    """Draw the loss along one direction, its two probes, and the step."""
    figure, (axes,) = _figure(6.6, 3.2)
    along, eps, step = torch.linspace(-1.6, 1.7, 200), 0.8, -0.62

    def loss(t: torch.Tensor) -> torch.Tensor:
        return 0.35 * (t + 0.9) ** 2 + 0.06 * t**3 + 1

    axes.plot(along, loss(along), color=INK, lw=1.6)
    ends = torch.tensor([-eps, eps])
    low, high = loss(ends).tolist()
    axes.plot(ends, [low, high], color=RED, lw=1.4, ls="--")
    axes.plot(ends, [low, high], "o", color=RED)
    here = float(loss(torch.tensor(0.0)))
    axes.plot([0], [here], "o", color=INK)
    axes.text(0.06, here - 0.17, "θ", fontsize=12)
    axes.text(-eps - 0.06, low + 0.12, "θ - εz, loss l₋", ha="right")
    axes.text(eps - 0.1, high + 0.08, "θ + εz, loss l₊", ha="right")
    axes.text(0.95, 1.55, "g = (l₊ - l₋) / 2ε", color=RED, fontsize=12, ha="center")
    axes.annotate("", (step, 0.8), (0, 0.8), arrowprops=ARROW)
    axes.text(0.06, 0.77, "step: -lr · g along z", va="center")
    axes.set(xlabel="distance along the direction z", ylabel="loss", ylim=(0.62, 3.1))
    axes.set(xticks=[], yticks=[])
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_table() -> Figure:
    """Draw a full and a diagonal loss table, each cell in the color of the rank that owns it."""
    figure, both = _figure(7.6, 3.9, 1, 1)
    full = (
        "cover=full, spsa, two directions\nmesh.perturb=2 mesh.data=2",
        "spsa",
        2,
        "full",
        (2, 2),
    )
    diagonal = (
        "cover=diagonal, one-sided, probes=2\nmesh.data=4",
        "one-sided",
        8,
        "diagonal",
        (1, 4),
    )
    for axes, (title, name, directions, cover, mesh) in zip(both, (full, diagonal), strict=True):
        height = 4 if cover == "full" else 3
        table = empty_table(name, 1, directions, 1e-3, Grid(height, 4, 1, cover))
        _bare(axes, 6.4, 10.4)
        axes.set_title(title, fontsize=9, pad=12)
        for column in range(4):
            axes.text(2.5 + column, 0.75, str(column), ha="center")
        axes.text(4, 0.05, "micro-batch", ha="center")
        for row, probe in enumerate(table.probes):
            sign = "+" if probe.scale > 0 else "-"
            label = f"θ {sign} εz{probe.direction}" if probe.scale else "θ"
            axes.text(1.85, 1.5 + row, label, ha="right", va="center")
        owners = torch.full((table.rows, 4), len(RANKS))
        for (row, column), rank in zip(table.cells, table.owners(*mesh), strict=True):
            owners[row, column] = rank
            middle = {"ha": "center", "va": "center", "color": "white", "fontsize": 8}
            axes.text(2.5 + column, 1.5 + row, str(rank), **middle)
        _cells(axes, 2, 1, owners, [*RANKS, LIGHT])
    both[0].text(4, 6.2, "a cell: one forward, by the rank\nof its number", ha="center")
    return figure


def draw_log() -> Figure:
    """Draw the log between the base model and what replay makes of it."""
    figure, (axes,) = _figure(7.6, 3.3)
    _bare(axes, 15.2, 6.2)
    _box(axes, 0.1, 2, 2.5, 1.4, "base model\nθ₀")
    sizes = [_packer(directions).size + _U32.size for directions in (1, 240)]
    axes.text(6.5, 1.55, "steps.log: the state of training", ha="center")
    for number in range(6):
        text = ("1", "2", "3", "…", "n", "n+1")[number]
        style = {"fc": LIGHT, "ec": INK} if number < 5 else {"fc": "white", "ec": INK, "ls": "--"}
        axes.add_patch(Rectangle((3.5 + number, 2), 1, 1.4, **style))
        axes.text(4 + number, 2.7, text, ha="center", va="center")
    axes.text(
        6.5,
        4.1,
        "an entry: step, position in the data, rate, part,\nprojected gradients, checksum\n"
        f"{sizes[0]} bytes with one direction, {sizes[1]} with 240",
        ha="center",
        va="top",
        fontsize=9,
    )
    _arrow(axes, (2.6, 2.7), (3.5, 2.7))
    axes.text(10.55, 2.35, "replay", ha="center", fontsize=9)
    made = ("the weights of now", "a resumed run", "the best step", "a Hugging Face folder")
    for place, text in enumerate(made):
        y = 0.1 + 1.55 * place
        _box(axes, 11.6, y, 3.5, 1.1, text)
        _arrow(axes, (9.6, 2.7), (11.55, y + 0.55))
    return figure


def draw_blocks() -> Figure:
    """Draw which slot holds which block while a model of eight blocks is visited twice."""
    figure, (axes,) = _figure(7.6, 2.7)
    blocks = 8
    ring = Ring([1] * blocks, 3, lambda slot: False)
    since = {slot: -1 for _, slot in ring.begin(every=True)}
    for time in range(2 * blocks):
        block = time % blocks
        slot, loads = ring.acquire(block)
        since |= {into: time for _, into in loads if into != slot}
        begun = since.pop(slot, time)
        axes.add_patch(Rectangle((begun, slot + 0.1), time - begun, 0.8, fc=LIGHT, ec="white"))
        axes.add_patch(Rectangle((time, slot + 0.1), 1, 0.8, fc=RANKS[0], ec="white"))
        style = {"ha": "center", "va": "center", "fontsize": 8}
        axes.text((begun + time) / 2, slot + 0.5, f"read {block}", **style)
        axes.text(time + 0.5, slot + 0.5, f"block {block}", color="white", **style)
        since |= {into: time + 1 for _, into in ring.release()}
        if time == blocks - 1:
            since |= {into: time + 1 for _, into in ring.begin(every=True)}
    axes.set(xlim=(-1, 16), ylim=(3, 0), xticks=range(16), yticks=[0.5, 1.5, 2.5])
    axes.set_yticklabels(["slot 0", "slot 1", "slot 2"])
    axes.set_xlabel("visits: replay the log's new entries, then the forwards of all probes")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    return figure


def draw_rank_one() -> Figure:
    """Draw a rank-one direction of a matrix, and the layers that a part computes once."""
    figure, (left, right) = _figure(7.6, 3.5, 1.25, 1)
    rows, width = 8, 12
    z = rank_one(0, 1, 0, rows * width, matrices=[Matrices(0, rows * width, rows, width)])
    z = z.view(rows, width)
    a, b = z[:, :1], z[:1] * z[0, 0]
    assert torch.equal(z, a * b)
    _bare(left, 15.5, 13.4)
    for x, y, signs in ((0.6, 3, a), (3, 1, b), (3, 3, z)):
        _cells(left, x, y, signs > 0, ("#f2d7b0", RANKS[0]))
    left.text(9, 0.5, "b: a sign for each column", ha="center")
    left.text(1.1, 2.6, "a", ha="center")
    left.text(9, 2.7, f"z = a bᵀ: {rows * width} numbers of {rows + width} bits", ha="center")
    left.text(7.6, 12.6, "x (W + ε a bᵀ)ᵀ = x Wᵀ + ε (x · b) aᵀ", ha="center", fontsize=11)
    _bare(right, 10, 11)
    for place in range(2, 6):
        _box(right, 3.2, 1.2 + 1.5 * place, 3.6, 1.1, f"layer {6 - place}")
    for x in (0.2, 2.65, 5.1, 7.55):
        _box(right, x, 1.2, 2.2, 1.1, "layer 6", "#cfdcea")
        _box(right, x, 2.7, 2.2, 1.1, "layer 5", "#cfdcea")
        _arrow(right, (5, 4.2), (x + 1.1, 3.85))
    right.text(5, 0.7, "part=top:2, four probes", ha="center")
    right.text(5, 10.8, "computed once for all probes", ha="center", fontsize=9)
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "step": draw_step,
    "table": draw_table,
    "log": draw_log,
    "blocks": draw_blocks,
    "rank-one": draw_rank_one,
}


def draw(folder: Path) -> None:
    """Write all pictures to a folder."""
    with matplotlib.rc_context(STYLE):
        for name, make in PICTURES.items():
            make().savefig(folder / f"{name}.svg", metadata=NO_METADATA)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
