"""Drawings of the objects in the embedded dataset.

An object has one or more drawings in a frame of -100..100 (x to the right, y down). A
drawing lists strokes from back to front: `poly COLOUR x y x y ...`, `disc COLOUR x y rx
[ry]`, `line COLOUR width x y x y ...`, `ring` and `arc` (a whole and an upper half
outline: COLOUR width x y rx [ry]). `body` stands for the colour of the object.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float

RGB = {
    "red": (214, 40, 44),
    "blue": (44, 92, 204),
    "yellow": (247, 206, 48),
    "green": (52, 148, 84),
    "orange": (240, 132, 40),
    "purple": (132, 72, 168),
    "white": (246, 246, 242),
    "grey": (138, 140, 146),
    "black": (40, 40, 48),
    "brown": (134, 88, 54),
    "tan": (206, 168, 122),
    "pink": (242, 138, 176),
    "glass": (176, 216, 236),
    "lamp": (255, 236, 150),
    "leaf": (64, 148, 70),
    "needle": (28, 98, 78),
    "skin": (222, 168, 128),
    "stone": (186, 182, 176),
    "cream": (250, 236, 204),
}

# Body colours of each object; TOY_COLOURS if absent.
TOY_COLOURS = ("red", "blue", "yellow", "green", "orange", "purple", "white")
COLOURS = {
    "Dog": ("brown", "tan", "black"),
    "Cat": ("grey", "orange", "black"),
    "Sheep": ("white", "cream"),
    "Bird": ("black", "brown", "blue", "white"),
    "Fish": ("orange", "orange", "yellow", "blue"),
    "Butterfly": ("orange", "purple", "blue", "yellow"),
    "Tree": ("leaf",),
    "Palm tree": ("leaf",),
    "Conifer": ("needle",),
    "Cactus": ("green",),
    "Mushroom": ("red", "brown"),
    "Flower": ("pink", "red", "yellow", "purple", "white"),
    "House": ("cream", "red", "blue", "yellow", "white", "stone"),
    "Tower": ("stone", "grey"),
    "Lighthouse": ("white",),
    "Windmill": ("cream", "stone"),
    "Sun": ("lamp",),
    "Moon": ("cream",),
    "Star": ("lamp",),
    "Cloud": ("white",),
    "Rainbow": ("white",),
    "Fence": ("white", "brown"),
    "Street light": ("black", "grey"),
    "Traffic light": ("black",),
    "Airplane": ("white", "grey", "blue", "red"),
}

_DRAWINGS: dict[str, tuple[str, ...]] = {
    "Boat": (
        """poly body -100 40 100 40 66 94 -66 94; line white 7 -88 54 88 54; poly white
        -46 40 -46 -14 34 -14 48 40; poly glass -34 22 -34 0 -8 0 -8 22; poly glass
        4 22 4 0 26 0 32 22; poly black -30 -14 -30 -52 -8 -52 -8 -14""",
        """poly body -100 40 100 40 66 94 -66 94; line white 7 -88 54 88 54; poly white
        -60 40 -60 6 60 6 60 40; poly white -36 6 -36 -24 30 -24 30 6; poly red 2
        -24 2 -62 24 -62 24 -24""",
    ),
    "Sailboat": (
        """poly body -100 40 100 40 66 94 -66 94; line white 7 -88 54 88 54; line brown
        8 0 40 0 -100; poly white 8 -96 8 28 84 28; poly white -8 -80 -8 28 -66 28""",
        """poly body -100 40 100 40 66 94 -66 94; line white 7 -88 54 88 54; line brown
        8 -10 40 -10 -100; poly cream -2 -94 70 -30 -2 30""",
    ),
    "Car": (
        """poly body -100 64 -100 22 -62 12 -36 -30 42 -30 66 12 100 24 100 64; poly
        glass -50 10 -30 -20 -2 -20 -2 10; poly glass 7 10 7 -20 37 -20 54 10; disc
        black -55 66 25; disc grey -55 66 10; disc black 55 66 25; disc grey 55 66
        10""",
        """poly body -100 64 -100 14 -80 8 -70 -34 70 -34 84 8 100 14 100 64; poly
        glass -68 8 -60 -24 -4 -24 -4 8; poly glass 6 8 6 -24 60 -24 70 8; disc
        black -55 66 25; disc grey -55 66 10; disc black 55 66 25; disc grey 55 66
        10""",
    ),
    "Bus": (
        """poly body -100 66 -100 -60 96 -60 100 -50 100 66; poly glass -90 0 -90 -42
        -52 -42 -52 0; poly glass -44 0 -44 -42 -6 -42 -6 0; poly glass 2 0 2 -42 40
        -42 40 0; poly glass 50 40 50 -42 90 -42 90 40; line white 9 -98 22 44 22;
        disc black -55 66 25; disc grey -55 66 10; disc black 55 66 25; disc grey 55
        66 10""",
    ),
    "Truck": (
        """poly stone -100 64 -100 -62 24 -62 24 64; line grey 6 -70 -50 -70 50; line
        grey 6 -38 -50 -38 50; line grey 6 -6 -50 -6 50; poly body 30 64 30 -26 72
        -26 100 14 100 64; poly glass 46 12 46 -14 68 -14 86 12; disc black -55 66
        25; disc grey -55 66 10; disc black 55 66 25; disc grey 55 66 10""",
    ),
    "Bicycle": (
        """ring black 11 -54 42 44; ring black 11 54 42 44; line body 12 -54 42 -20 -14
        34 -14 2 42 -54 42; line body 12 2 42 -26 -34; line body 12 54 42 28 -40 48
        -52; line black 12 -44 -36 -10 -36""",
    ),
    "Train": (
        """poly body -100 60 -100 -50 -34 -50 -34 -10 80 -10 80 60; poly glass -86 -4
        -86 -36 -50 -36 -50 -4; poly black 40 -10 34 -60 72 -60 66 -10; poly grey 80
        60 80 20 100 60; disc black -70 72 22; disc black -18 72 22; disc black 30
        72 22; disc black 72 76 16; line grey 9 -70 72 30 72""",
    ),
    "Airplane": (
        """poly body -100 -44 -78 -44 -56 -12 70 -12 100 6 70 22 -70 22; poly grey -10
        6 26 6 -24 70 -46 70; poly grey -6 -12 22 -12 -12 -52 -30 -52; disc glass 66
        0 12 7""",
    ),
    "Bird": (
        """disc body -6 16 52 34; disc body 46 -18 25; poly orange 66 -24 98 -12 66 -6;
        poly body -50 10 -100 -10 -92 34; poly grey -36 6 20 4 -22 46; disc white 52
        -22 8; line orange 7 0 48 0 84; line orange 7 -18 46 -18 84""",
        """line body 20 -100 -30 -60 -58 -24 -30 0 14 24 -30 60 -58 100 -30; disc body
        0 12 22 15; poly orange 0 20 14 44 -10 24""",
    ),
    "Fish": (
        """poly body 40 0 100 -46 84 0 100 46; disc body -16 0 78 44; disc white -62
        -10 12; disc black -62 -10 6; poly white -10 -40 24 -66 30 -30; line white 8
        -34 -34 -26 0 -34 34""",
    ),
    "Dog": (
        """poly body -66 4 54 4 54 50 -66 50; poly body -64 44 -44 44 -44 98 -64 98;
        poly body 32 44 52 44 52 98 32 98; line body 14 -62 10 -96 -34; poly body 34
        14 34 -46 70 -50 100 -26 98 -6 64 0 56 14; poly black 34 -50 52 -50 44 -2 28
        -8; disc black 96 -20 9; disc white 68 -32 7""",
    ),
    "Cat": (
        """disc body 0 54 46 44; disc body 0 -26 44 38; poly body -42 -36 -42 -94 -8
        -56; poly body 42 -36 42 -94 8 -56; line body 15 40 84 86 70 84 20; disc
        yellow -18 -30 10; disc yellow 18 -30 10; disc black -18 -30 5 9; disc black
        18 -30 5 9; poly pink -7 -12 7 -12 0 -3; line black 4 -58 -14 -16 -8; line
        black 4 58 -14 16 -8""",
    ),
    "Sheep": (
        """line black 13 -36 40 -36 94; line black 13 34 40 34 94; disc body -44 14 34
        30; disc body 42 14 34 30; disc body -2 -8 44 32; disc body 0 28 52 28; disc
        black 78 -16 23 27; poly black 58 -34 40 -26 60 -16; disc white 84 -22 7""",
    ),
    "Butterfly": (
        """disc body -48 -30 48 40; disc body 48 -30 48 40; disc body -36 40 34 34;
        disc body 36 40 34 34; disc white -52 -32 20; disc white 52 -32 20; disc
        black 0 4 9 56; line black 5 0 -40 -24 -88; line black 5 0 -40 24 -88""",
    ),
    "Tree": (
        """poly brown -13 100 -11 10 11 10 13 100; disc body 0 -44 56 52; disc body -44
        -8 42 38; disc body 44 -8 42 38""",
        "poly brown -11 100 -9 20 9 20 11 100; disc body 0 -26 62 70",
    ),
    "Palm tree": (
        """line brown 15 -16 100 -6 40 6 -34; line body 17 6 -38 -50 -56 -88 -10; line
        body 17 6 -38 60 -60 98 -8; line body 17 6 -38 -24 -92 -66 -86; line body 17
        6 -38 40 -94 78 -80; line body 15 6 -38 -30 -20 -50 18; line body 15 6 -38
        38 -18 56 18; disc brown 4 -30 12""",
    ),
    "Conifer": (
        """poly brown -10 100 -10 60 10 60 10 100; poly body -62 72 62 72 0 -6; poly
        body -50 30 50 30 0 -48; poly body -36 -16 36 -16 0 -100""",
    ),
    "Cactus": (
        """line body 34 0 98 0 -78; line body 22 0 36 -54 36 -54 -22; line body 22 0 10
        52 10 52 -46; disc pink 0 -87 13; line cream 4 -6 80 -6 -66; line cream 4 7
        80 7 -66""",
    ),
    "Flower": (
        """line leaf 11 0 0 0 100; disc leaf 28 66 26 11; disc body 0 -74 27; disc body
        42 -42 27; disc body 26 4 27; disc body -26 4 27; disc body -42 -42 27; disc
        orange 0 -32 23""",
        """line leaf 11 0 0 0 100; disc leaf -28 70 26 11; poly body -44 -70 -20 -40 0
        -84 20 -40 44 -70 40 8 0 30 -40 8""",
    ),
    "Mushroom": (
        """poly cream -24 90 -18 0 18 0 24 90; poly body -90 12 -76 -34 -36 -68 36 -68
        76 -34 90 12; disc white -36 -26 15; disc white 24 -40 15; disc white 54 -6
        11""",
    ),
    "House": (
        """poly body -78 96 -78 -6 78 -6 78 96; poly brown -98 0 0 -86 98 0; poly brown
        -16 96 -16 36 18 36 18 96; poly glass -62 46 -62 16 -32 16 -32 46; poly
        glass 34 46 34 16 62 16 62 46""",
        """poly body -86 96 -86 -46 86 -46 86 96; poly brown -96 -38 -96 -62 96 -62 96
        -38; poly brown 24 96 24 36 58 36 58 96; poly glass -66 6 -66 -24 -30 -24
        -30 6; poly glass 24 6 24 -24 60 -24 60 6; poly glass -66 66 -66 36 -30 36
        -30 66""",
    ),
    "Tower": (
        """poly body -40 100 -34 -70 34 -70 40 100; poly body -50 -56 -50 -100 -28 -100
        -28 -80 -10 -80 -10 -100 10 -100 10 -80 28 -80 28 -100 50 -100 50 -56; poly
        black -9 -8 -9 -38 9 -38 9 -8; poly black -15 100 -15 56 15 56 15 100""",
        """poly body -40 100 -40 -98 40 -98 40 100; poly glass -28 -50 -28 -82 -6 -82
        -6 -50; poly glass 8 -50 8 -82 30 -82 30 -50; poly glass -28 0 -28 -34 -6
        -34 -6 0; poly glass 8 0 8 -34 30 -34 30 0; poly glass -28 50 -28 16 -6 16
        -6 50; poly glass 8 50 8 16 30 16 30 50""",
    ),
    "Lighthouse": (
        """poly body -34 100 -22 -52 22 -52 34 100; poly red -32 72 -29 38 29 38 32 72;
        poly red -27 8 -25 -24 25 -24 27 8; poly lamp -20 -52 -20 -78 20 -78 20 -52;
        poly red -28 -76 0 -100 28 -76; poly lamp 22 -72 100 -96 100 -44 22 -58""",
    ),
    "Windmill": (
        """poly body -40 100 -24 -24 24 -24 40 100; poly brown -30 -20 0 -54 30 -20;
        poly brown -12 100 -12 62 12 62 12 100; line white 17 -68 -98 0 -30 68 38;
        line white 17 68 -98 0 -30 -68 38; disc black 0 -30 9""",
    ),
    "Tent": (
        """poly body -100 84 0 -70 100 84; poly black -26 84 0 2 26 84; line brown 7 0
        -66 0 -90""",
    ),
    "Sun": (
        """line yellow 9 -96 0 96 0; line yellow 9 0 -96 0 96; line yellow 9 -68 -68 68
        68; line yellow 9 -68 68 68 -68; disc yellow 0 0 58""",
        "disc orange 0 0 74; disc yellow 0 0 60",
    ),
    "Moon": (
        """poly body 30 -90 -16 -86 -58 -56 -78 -8 -66 44 -30 80 16 90 50 78 10 56 -14
        14 -12 -36""",
    ),
    "Star": (
        "poly body 0 -96 22 -30 92 -30 36 12 58 80 0 38 -58 80 -36 12 -92 -30 -22 -30",
    ),
    "Cloud": (
        """disc body -46 14 48 32; disc body 46 14 50 34; disc body 0 -14 48 42; poly
        body -60 44 -60 14 60 14 60 46""",
    ),
    "Rainbow": (
        """arc red 15 0 70 92; arc orange 15 0 70 79; arc yellow 15 0 70 66; arc green
        15 0 70 53; arc blue 15 0 70 40""",
    ),
    "Person": (
        """line black 17 -13 40 -18 98; line black 17 13 40 18 98; poly body -28 -28 28
        -28 24 46 -24 46; line skin 13 -28 -20 -52 26; line skin 13 28 -20 52 26;
        disc skin 0 -60 27; disc brown 0 -76 26 14""",
        """poly body -14 -30 14 -30 44 70 -44 70; line skin 13 -12 70 -12 98; line skin
        13 12 70 12 98; line skin 13 -14 -22 -56 -44; line skin 13 14 -22 50 16;
        disc skin 0 -58 27; disc black 0 -74 27 16""",
    ),
    "Ball": ("disc body 0 0 90; disc white -30 -34 18",),
    "Kite": (
        """line black 5 0 40 -20 66 14 84 -6 100; poly body 0 -100 60 -34 0 50 -60 -34;
        line black 5 0 -98 0 48; line black 5 -58 -34 58 -34""",
    ),
    "Umbrella": (
        """line brown 9 0 -40 0 98; poly body -98 4 -80 -46 -40 -78 0 -88 40 -78 80 -46
        98 4 66 -8 33 4 0 -8 -33 4 -66 -8""",
    ),
    "Balloon": (
        """line black 5 0 30 10 62 -4 100; disc body 0 -34 58 66; poly body -12 40 12
        40 0 26; disc white -22 -58 11 17""",
    ),
    "Flag": (
        """line grey 11 -60 100 -60 -98; poly body -54 -94 -10 -84 30 -98 88 -86 88 -14
        30 -26 -10 -12 -54 -22""",
    ),
    "Street light": (
        "line body 13 -24 100 -24 -84 34 -84; poly lamp 16 -82 58 -82 74 -52 4 -52",
    ),
    "Traffic light": (
        """line grey 13 0 100 0 20; poly body -34 26 -34 -98 34 -98 34 26; disc red 0
        -74 17; disc yellow 0 -36 17; disc green 0 2 17""",
    ),
    "Fence": (
        """line body 13 -100 12 100 12; line body 13 -100 56 100 56; line body 17 -84
        92 -84 -24; line body 17 -42 92 -42 -24; line body 17 0 92 0 -24; line body
        17 42 92 42 -24; line body 17 84 92 84 -24""",
    ),
}

NAMES = tuple(_DRAWINGS)


@dataclass(frozen=True)
class Stroke:
    """A filled polygon (width 0) or a polyline, in the object's frame of -1..1."""

    colour: str
    width: float
    points: Float[np.ndarray, "point 2"]


@cache
def drawing(name: str, variant: int) -> tuple[Stroke, ...]:
    """Returns the strokes of an object, back to front; variants wrap around."""
    texts = _DRAWINGS[name]
    return tuple(
        _stroke(line.split()) for line in texts[variant % len(texts)].split(";")
    )


def _stroke(words: list[str]) -> Stroke:
    kind, colour = words[:2]
    numbers = np.array([float(word) for word in words[2:]]) / 100.0
    if kind == "poly":
        return Stroke(colour, 0.0, numbers.reshape(-1, 2))
    if kind == "line":
        return Stroke(colour, float(numbers[0]), numbers[1:].reshape(-1, 2))
    if kind == "disc":
        return Stroke(colour, 0.0, _ellipse(numbers[:2], numbers[2:], 0.0, 2.0))
    start, stop = {"ring": (0.0, 2.0), "arc": (1.0, 2.0)}[kind]
    curve = _ellipse(numbers[1:3], numbers[3:], start, stop)
    return Stroke(colour, float(numbers[0]), curve)


def _ellipse(
    centre: np.ndarray, radii: np.ndarray, start: float, stop: float
) -> np.ndarray:
    angles = np.pi * np.linspace(start, stop, 25)
    return centre + radii * np.stack([np.cos(angles), np.sin(angles)], axis=1)
