"""Pictures of what attention does on one text: entropies of all heads at all tokens, and the rows of a head."""

from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.image import AxesImage

from entropy_gpt.evaluation.measuring.text_diagnostics import TextDiagnostics

from .plots import COLORMAP, DOTS_PER_INCH, wrap


# Inches: of a token, of a head, and of the axes at least and at most.
TOKEN, HEAD = 0.2, 0.16
LEAST_AXES, MOST_AXES = 3.0, 14.0
# Inches that labels need: one next to the other, and each letter.
LABEL, LETTER = 0.13, 0.075
LABEL_SIZE = 7
LONGEST_LABEL = 14
# The name of a font that shows every letter as a box.
BOXES = "Last Resort"
WHITE_SPACE = {" ": "␣", "\n": "↵", "\t": "→", "\r": "␍"}
# Weights are drawn by their square root: most of a row is small.
WEIGHT_EXPONENT = 0.5
WEIGHT_TICKS = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1)
SCALE_WIDTH = 0.18
TITLE_SIZE = 10


def plot_text_entropies(diagnostics: TextDiagnostics, title: str = "") -> Figure:
    """
    Draws the entropy of every head at every token as a heat map, tokens to the right and heads downwards, and below
    them what uniform attention would have.

    Args:
        diagnostics ([`TextDiagnostics`]): What was measured.
        title (`str`): What stands above it.
    """
    layers, heads, tokens = diagnostics.entropies.shape
    width, height = _length(tokens, TOKEN), _length(layers * heads, HEAD)
    figure = _open(width + 1.6, height + 0.3 + _label_height(diagnostics.tokens), title)
    rows, uniform = figure.subplots(2, 1, sharex=True, height_ratios=(height, HEAD))
    highest = max(float(diagnostics.uniform[-1]), 0.1)
    options = {"cmap": COLORMAP, "vmin": 0, "vmax": highest, "aspect": "auto", "interpolation": "nearest"}
    rows.set_facecolor("lightgray")
    image = rows.imshow(diagnostics.entropies.reshape(layers * heads, tokens), **options)
    uniform.imshow(diagnostics.uniform[None], **options)
    for layer in range(1, layers):
        rows.axhline(layer * heads - 0.5, color="white", lw=1)
    _name_heads(rows, layers, heads, height)
    rows.tick_params(axis="x", bottom=False, labelbottom=False)
    uniform.set_yticks([0], ["uniform"], fontsize=LABEL_SIZE)
    _name_tokens(uniform, "x", diagnostics.tokens, width)
    _add_scale(figure, image, [rows, uniform], width, height, label="entropy of the row (nats)")
    return figure


def plot_text_attention(diagnostics: TextDiagnostics, layer: int, head: int, title: str = "") -> Figure:
    """
    Draws what each token attends to in a head: tokens downwards, and to the right the keys that they see.

    Args:
        diagnostics ([`TextDiagnostics`]): What was measured, with weights.
        layer (`int`): The layer, from 0.
        head (`int`): The head in it, from 0.
        title (`str`): What stands above it.

    Raises:
        `ValueError`: If the weights were not kept.
        `IndexError`: If there is no such head.
    """
    if diagnostics.weights is None:
        raise ValueError("The attention matrices were not kept: diagnose the text with weights=True.")
    return draw_attention(diagnostics.weights[layer, head], diagnostics.tokens, layer, head, title)


def draw_attention(weights: torch.Tensor, tokens: Sequence[str], layer: int, head: int, title: str = "") -> Figure:
    """
    Draws the attention of a head.

    Args:
        weights (`torch.Tensor` of shape `(tokens, tokens)`): Its rows.
        tokens (`Sequence[str]`): The tokens.
        layer (`int`): The layer, from 0.
        head (`int`): The head in it, from 0.
        title (`str`): What stands above it.
    """
    size = _length(len(tokens), TOKEN)
    mean = torch.special.entr(weights).sum(-1).mean()
    name = f"layer {layer}, head {head}: mean entropy {mean:.2f} nats"
    room = _label_height(tokens)
    figure = _open(size + room + 1.3, size + room + 0.6, "\n".join(filter(None, [title, name])), "compressed")
    axes = figure.add_subplot(xlabel="attended token", ylabel="token")
    axes.set_facecolor("white")
    seen = np.where(np.tri(len(tokens), dtype=bool), weights, np.nan)
    norm = PowerNorm(WEIGHT_EXPONENT, 0, 1)
    image = axes.imshow(seen, cmap=COLORMAP, norm=norm, aspect="equal", interpolation="nearest")
    for side in "xy":
        _name_tokens(axes, side, tokens, size)
    _add_scale(figure, image, [axes], size, size, label="attention", ticks=WEIGHT_TICKS)
    return figure


def _open(width: float, height: float, title: str, layout: str = "constrained") -> Figure:
    lines = [wrap(line, width, TITLE_SIZE) for line in title.splitlines()]
    height += 0.18 * sum(line.count("\n") + 1 for line in lines)
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout=layout)
    text = figure.suptitle("\n".join(lines), fontsize=TITLE_SIZE)
    text.set_fontfamily(_fonts(title)[0])
    return figure


def _add_scale(figure: Figure, image: AxesImage, panels: list[Axes], width: float, height: float, **options):
    """Draws the scale of colours at the right, as wide for a long text as for a short one."""
    figure.colorbar(
        image, ax=panels, fraction=SCALE_WIDTH / width, aspect=height / SCALE_WIDTH, pad=SCALE_WIDTH / width, **options
    )


def _length(count: int, each: float) -> float:
    """Inches of an axis."""
    return min(MOST_AXES, max(LEAST_AXES, count * each))


def _label_height(tokens: Sequence[str]) -> float:
    """Inches that the names of tokens take."""
    missing = _fonts("".join(tokens))[1]
    return 0.4 + LETTER * max(len(_label(token, missing)) for token in tokens)


def _name_tokens(axes: Axes, side: str, tokens: Sequence[str], inches: float):
    """Names tokens along an axis, as many as there is room for."""
    step = max(1, -int(-LABEL * len(tokens) // inches))
    fonts, missing = _fonts("".join(tokens))
    labels = [_label(token, missing) for token in tokens[::step]]
    set_ticks = axes.set_xticks if side == "x" else axes.set_yticks
    set_ticks(range(0, len(tokens), step), labels, fontsize=LABEL_SIZE, fontfamily=fonts, parse_math=False)
    if side == "x":
        axes.tick_params(axis="x", rotation=90)


def _name_heads(axes: Axes, layers: int, heads: int, inches: float):
    """Names each head by its layer and its number, or only layers if there is no room."""
    if inches / (layers * heads) >= LABEL:
        names = [f"{layer}.{head}" for layer in range(layers) for head in range(heads)]
        axes.set_yticks(range(layers * heads), names, fontsize=LABEL_SIZE)
        axes.set_ylabel("layer.head")
    else:
        step = max(1, -int(-LABEL * layers // inches))
        middles = [layer * heads + (heads - 1) / 2 for layer in range(0, layers, step)]
        axes.set_yticks(middles, range(0, layers, step), fontsize=LABEL_SIZE)
        axes.set_ylabel(f"layer ({heads} heads each)")


def _label(token: str, missing: Iterable[str] = ()) -> str:
    """A token on one line: white space can be seen, and so can letters that no font has."""
    if len(token) > LONGEST_LABEL:
        token = f"{token[: LONGEST_LABEL - 2]}…"
    return "".join(WHITE_SPACE.get(letter) or _visible(letter, missing) for letter in token)


def _visible(letter: str, missing: Iterable[str]) -> str:
    return letter if letter.isprintable() and letter not in missing else f"U+{ord(letter):04X}"


def _fonts(text: str) -> tuple[list[str], frozenset[str]]:
    """Families that have the letters of a text, the default one first, and letters that no installed font has."""
    return _find_fonts(frozenset(text))


@lru_cache(maxsize=64)
def _find_fonts(letters: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    default = FontProperties()
    families, missing = list(default.get_family()), letters - _letters_of(findfont(default))
    for entry in fontManager.ttflist:
        if not missing:
            break
        found = missing & _letters_of(entry.fname)
        if found and not entry.name.startswith(BOXES):
            families.append(entry.name)
            missing -= found
    return families, missing


@lru_cache(maxsize=4096)
def _letters_of(path: str) -> frozenset[str]:
    """What a font file can show; nothing if it can't be read, as those of coloured bitmaps."""
    try:
        return frozenset(map(chr, FT2Font(path).get_charmap()))
    except (OSError, RuntimeError):
        return frozenset()
