"""Composes the scenes of the embedded dataset and their labels.

Tables of the objects on each ground make labels co-occur (boat with water) and give
their frequencies a long tail.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from jaxii.prepare.toy_regions.shapes import COLOURS, NAMES, TOY_COLOURS


@dataclass(frozen=True)
class Region:
    """A region of the toy world: its look and its common scenes.

    Attributes:
      hue: Shift of all colours, in turns.
      saturation, value: Factors on the colours.
      outline: Width of outlines as a share of the object's size; 0 draws none.
      ink: RGB colour of the outlines.
      sky: RGB colours of a clear day at the top and at the horizon.
      texture: "strokes", "dots" or "bands" on the ground.
      foreign: Probability that an object has its second drawing.
      grounds: Weights in the order of GROUNDS.
    """

    name: str
    hue: float
    saturation: float
    value: float
    outline: float
    ink: tuple[int, int, int]
    sky: tuple[tuple[int, int, int], tuple[int, int, int]]
    texture: str
    foreign: float
    grounds: tuple[float, ...]


GROUNDS = ("Grass", "Water", "Road", "Sand", "Snow")
SEEN = (
    Region("north", -0.010, 0.82, 0.95, 0.035, (38, 40, 52),
           ((112, 160, 206), (206, 226, 238)), "strokes", 0.15, (3, 2.2, 3, 0.6, 2.4)),
    Region("east", 0.012, 1.12, 1.0, 0.0, (0, 0, 0),
           ((92, 178, 236), (226, 242, 250)), "dots", 0.3, (2.6, 2.6, 3, 1.8, 1)),
    Region("west", 0.0, 0.95, 1.04, 0.055, (44, 44, 96),
           ((130, 196, 224), (250, 240, 214)), "bands", 0.4, (2.6, 2, 3.2, 2, 0.8)),
)  # fmt: skip
UNSEEN = (
    Region("south", 0.022, 0.74, 0.92, 0.025, (92, 58, 40),
           ((150, 186, 200), (246, 226, 196)), "dots", 0.7, (2, 2, 2.6, 3, 0.6)),
    Region("islands", -0.022, 1.2, 1.0, 0.045, (250, 248, 240),
           ((72, 150, 200), (190, 230, 226)), "strokes", 0.6, (2.4, 3, 2, 2.6, 0.8)),
)  # fmt: skip

ON_GROUND: dict[str, dict[str, float]] = {
    "Grass": {"Tree": 11, "Flower": 9, "House": 7, "Person": 7, "Dog": 8, "Sheep": 6,
              "Cat": 6, "Fence": 5, "Ball": 5, "Mushroom": 4, "Bicycle": 4,
              "Windmill": 4, "Conifer": 3, "Tent": 3, "Tower": 2, "Umbrella": 1},
    "Water": {"Sailboat": 11, "Boat": 11, "Fish": 11, "Lighthouse": 5, "Bird": 3,
              "Person": 2, "Flag": 1},
    "Road": {"Car": 13, "Bus": 8, "Truck": 6, "Bicycle": 6, "Person": 6, "House": 4,
             "Tower": 5, "Street light": 5, "Traffic light": 4, "Train": 3, "Tree": 3,
             "Dog": 2, "Flag": 1.5, "Umbrella": 1.5, "Cat": 1},
    "Sand": {"Palm tree": 10, "Umbrella": 7, "Cactus": 7, "Ball": 6, "Person": 5,
             "Tent": 4, "Boat": 2, "Lighthouse": 2, "Flag": 2, "Dog": 2},
    "Snow": {"Conifer": 10, "House": 5, "Person": 5, "Dog": 3, "Tent": 3, "Fence": 3,
             "Flag": 2, "Truck": 2, "Cat": 2, "Tower": 2, "Train": 2},
}  # fmt: skip
IN_SKY: dict[str, dict[str, float]] = {
    "Day": {"Cloud": 9, "Bird": 8, "Sun": 8, "Airplane": 6, "Balloon": 6, "Kite": 6,
            "Butterfly": 5, "Rainbow": 3},
    "Sunset": {"Sun": 6, "Bird": 4, "Cloud": 4, "Balloon": 2, "Airplane": 2},
    "Night": {"Moon": 9, "Star": 9, "Airplane": 1},
}  # fmt: skip

# Relative size of objects; 1 if absent.
SCALE = {"House": 1.2, "Tower": 1.25, "Lighthouse": 1.25, "Windmill": 1.2, "Tree": 1.2,
         "Palm tree": 1.25, "Conifer": 1.15, "Bus": 1.2, "Truck": 1.15, "Train": 1.2,
         "Rainbow": 1.5, "Ball": 0.65, "Mushroom": 0.75, "Bird": 0.8, "Star": 0.7,
         "Butterfly": 0.75, "Flower": 0.9}  # fmt: skip
GROUPS = ("Bird", "Flower", "Sheep", "Fish", "Person", "Star", "Balloon", "Car",
          "Sailboat", "Tree", "Conifer", "Mushroom")  # fmt: skip
STRIPES = ("Ball", "Umbrella", "Tent", "Balloon", "Kite", "Boat", "Flag", "Fish")

PARENTS = {
    "Vehicle": ("Boat", "Sailboat", "Car", "Bus", "Truck", "Bicycle", "Train",
                "Airplane"),
    "Animal": ("Bird", "Fish", "Dog", "Cat", "Sheep", "Butterfly"),
    "Plant": ("Tree", "Palm tree", "Conifer", "Cactus", "Flower"),
    "Building": ("House", "Tower", "Lighthouse", "Windmill"),
    "Toy": ("Ball", "Kite", "Balloon"),
    "Astronomical object": ("Sun", "Moon", "Star"),
}  # fmt: skip
CONTEXTS = (*GROUNDS, "Night", "Sunset", "Rain", "Mountain")
ATTRIBUTES = ("Red", "Blue", "Yellow", "Striped", "Close-up", "Group")
KINDS: Mapping[str, str] = {
    **dict.fromkeys(NAMES, "object"),
    **dict.fromkeys(PARENTS, "parent"),
    **dict.fromkeys(CONTEXTS, "context"),
    **dict.fromkeys(ATTRIBUTES, "attribute"),
}
LABELS = tuple(KINDS)


@dataclass(frozen=True)
class Thing:
    """An object: centre as shares of the sides, half size of the shorter side."""

    name: str
    x: float
    y: float
    half: float
    colour: str
    striped: bool
    mirrored: bool
    variant: int


@dataclass(frozen=True)
class Scene:
    """The content of an image."""

    region: Region
    ground: str
    sky: str
    rain: bool
    mountain: bool
    sea: bool
    horizon: float
    things: tuple[Thing, ...]
    close_up: bool
    group: bool


def compose(region: Region, rng: np.random.Generator) -> Scene:
    """Returns a scene of a region."""
    ground = _pick(rng, dict(zip(GROUNDS, region.grounds, strict=True)))
    sky = _pick(rng, {"Day": 70, "Sunset": 14, "Night": 16})
    rain = bool(sky == "Day" and ground != "Snow" and rng.random() < 0.14)
    odds = dict(ON_GROUND[ground])
    if rain and ground != "Water":
        odds["Umbrella"] = odds.get("Umbrella", 0.0) + 12
    layouts = {"single": 26, "pair": 36, "three": 12, "close": 11, "group": 8}
    layout = _pick(rng, layouts)
    horizon = float(rng.uniform(0.4, 0.58))
    if layout == "close":
        things = [_thing(region, rng, _pick(rng, odds), 0.5, 0.56, 0.42)]
    elif layout == "group":
        things = _group(region, rng, odds, IN_SKY[sky], horizon)
    else:
        count = {"single": 1, "pair": 2, "three": 3}[layout]
        things = _row(region, rng, odds, count, horizon)
    if layout != "close" and rng.random() < (0.8 if rain else 0.5):
        name = "Cloud" if rain else _pick(rng, IN_SKY[sky])
        # Keeps wide objects above the ground.
        half = float(rng.uniform(0.14, 0.18)) * SCALE.get(name, 1.0)
        y = min(float(rng.uniform(0.16, 0.26)), horizon - 0.08)
        things.insert(0, _thing(region, rng, name, rng.uniform(0.2, 0.8), y, half))
    return Scene(
        region=region,
        ground=ground,
        sky=sky,
        rain=rain,
        mountain=bool(ground != "Road" and rng.random() < 0.14),
        sea=bool(ground == "Sand" and rng.random() < 0.4),
        horizon=horizon,
        things=tuple(things),
        close_up=layout == "close",
        group=layout == "group",
    )


def another_view(scene: Scene, rng: np.random.Generator) -> Scene:
    """Returns the scene from another place: mirrored, shifted and zoomed."""
    zoom, shift = rng.uniform(0.88, 1.08), rng.uniform(-0.05, 0.05)
    things = tuple(
        replace(
            thing,
            x=float(np.clip(1.0 - thing.x + shift, 0.1, 0.9)),
            half=thing.half * float(zoom),
            mirrored=not thing.mirrored,
        )
        for thing in scene.things
    )
    horizon = scene.horizon + float(rng.uniform(-0.04, 0.04))
    return replace(scene, things=things, horizon=horizon)


def labels(scene: Scene) -> tuple[str, ...]:
    """Returns every true label of a scene, in the order of LABELS."""
    names = {thing.name for thing in scene.things}
    true = names | {scene.ground, scene.sky}
    true |= {parent for parent, members in PARENTS.items() if names & set(members)}
    true |= {
        thing.colour.capitalize()
        for thing in scene.things
        if thing.name not in ("Butterfly", "Bird", "Mushroom")
    }
    flags = {
        "Rain": scene.rain,
        "Mountain": scene.mountain,
        "Water": scene.sea,
        "Close-up": scene.close_up,
        "Group": scene.group,
        "Striped": any(thing.striped for thing in scene.things),
    }
    true |= {name for name, holds in flags.items() if holds}
    return tuple(name for name in LABELS if name in true)


def _pick(rng: np.random.Generator, weights: Mapping[str, float]) -> str:
    odds = np.cumsum(list(weights.values()))
    place = np.searchsorted(odds, rng.random() * odds[-1], side="right")
    return tuple(weights)[int(place)]


def _thing(
    region: Region, rng: np.random.Generator, name: str, x: float, y: float, half: float
) -> Thing:
    colours = COLOURS.get(name, TOY_COLOURS)
    return Thing(
        name=name,
        x=float(x),
        y=float(y),
        half=float(half),
        colour=colours[int(rng.integers(len(colours)))],
        striped=bool(name in STRIPES and rng.random() < 0.4),
        mirrored=bool(rng.random() < 0.5),
        variant=int(rng.random() < region.foreign),
    )


def _row(
    region: Region,
    rng: np.random.Generator,
    odds: Mapping[str, float],
    count: int,
    horizon: float,
) -> list[Thing]:
    """Returns objects side by side; nearer objects come last."""
    left = dict(odds)
    things = []
    for place in range(count):
        name = _pick(rng, left)
        del left[name]
        half = {1: 0.29, 2: 0.23, 3: 0.18}[count] * rng.uniform(0.88, 1.12)
        half *= SCALE.get(name, 1.0) ** 0.5 if count > 1 else 1.0
        x = (place + 0.5) / count + rng.uniform(-0.5, 0.5) * (0.3 / count)
        foot = max(rng.uniform(horizon + 0.14, 0.95), 2.0 * half + 0.06)
        things.append(_thing(region, rng, name, x, foot - half, half))
    return sorted(things, key=lambda thing: thing.y + thing.half)


def _group(
    region: Region,
    rng: np.random.Generator,
    odds: Mapping[str, float],
    sky_odds: Mapping[str, float],
    horizon: float,
) -> list[Thing]:
    """Returns four to six objects of one kind, on the ground or in the sky."""
    flying = {name: weight for name, weight in sky_odds.items() if name in GROUPS}
    standing = {name: weight for name, weight in odds.items() if name in GROUPS}
    in_sky = rng.random() < 0.35
    name = _pick(rng, flying if in_sky and flying else standing)
    model = _thing(region, rng, name, 0.5, 0.5, 0.14)
    count = int(rng.integers(4, 7))
    things = []
    for place in range(count):
        x = (place + 0.5) / count + rng.uniform(-0.04, 0.04)
        if in_sky and flying:
            y = rng.uniform(0.12, horizon - 0.02)
        else:
            y = rng.uniform(horizon + 0.02, 0.85)
        half = 0.14 * rng.uniform(0.85, 1.15)
        things.append(replace(model, x=float(x), y=float(y), half=float(half)))
    return sorted(things, key=lambda thing: thing.y + thing.half)
