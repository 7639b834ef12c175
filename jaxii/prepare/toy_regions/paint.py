"""Paints a scene and degrades the image like a poor camera.

Images are drawn at twice the size and averaged down.
"""

import colorsys
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from jaxii.prepare.toy_regions.scenes import Region, Scene, Thing
from jaxii.prepare.toy_regions.shapes import RGB, drawing

# Fractional bits of OpenCV's fixed-point coordinates.
_SHIFT = 4
_OVERSAMPLING = 2
_GROUND = {
    "Grass": (112, 172, 84),
    "Water": (52, 128, 188),
    "Road": (118, 118, 126),
    "Sand": (232, 206, 142),
    "Snow": (238, 244, 250),
}
_LIGHT = {
    "Day": (1.0, 1.0, 1.0),
    "Sunset": (1.0, 0.86, 0.78),
    "Night": (0.5, 0.54, 0.72),
}
_SKY = {
    "Sunset": ((112, 78, 140), (252, 152, 84)),
    "Night": ((12, 16, 44), (44, 52, 96)),
}
_GLOWING = ("Moon", "Star", "Sun", "Lighthouse", "Street light", "Traffic light")


@dataclass(frozen=True)
class Quality:
    """Properties of a camera and its files.

    Attributes:
      blur_pixels: Standard deviation of the blur.
      noise: Standard deviation of the sensor noise, in grey levels of 255.
      exposure: Factor on the light; below 1 is under-exposed.
      jpeg: JPEG quality, 1 to 100.
    """

    blur_pixels: float = 0.0
    noise: float = 2.0
    exposure: float = 1.0
    jpeg: int = 90


def paint(
    scene: Scene, width: int, height: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "height width 3"]:
    """Returns the RGB image of a scene; `rng` chooses textures and tones."""
    size = (_OVERSAMPLING * width, _OVERSAMPLING * height)
    palette = _palette(scene.region, rng)
    canvas = _background(scene, size, palette, rng)
    light = np.array(_LIGHT[scene.sky])
    for thing in scene.things:
        if scene.ground != "Water" and thing.y + thing.half > scene.horizon + 0.1:
            _shadow(canvas, scene, thing)
        _thing(canvas, scene, thing, palette, light)
    if scene.rain:
        _weather(canvas, rng, rain=True)
    elif scene.ground == "Snow":
        _weather(canvas, rng, rain=False)
    return cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)


def spoil(
    image: UInt8[np.ndarray, "height width 3"],
    quality: Quality,
    rng: np.random.Generator,
) -> UInt8[np.ndarray, "height width 3"]:
    """Returns the image as taken by this camera, before JPEG compression."""
    taken = image.astype(np.float32)
    if quality.blur_pixels > 0.0:
        taken = cv2.GaussianBlur(taken, (0, 0), quality.blur_pixels)
    taken = taken * np.float32(quality.exposure)
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    taken = taken + np.float32(quality.noise) * noise
    return np.clip(np.rint(taken), 0, 255).astype(np.uint8)


def _palette(region: Region, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns the named colours in the tones of a region."""
    hue = region.hue + rng.uniform(-0.008, 0.008)
    saturation = region.saturation * rng.uniform(0.92, 1.08)
    value = region.value * rng.uniform(0.93, 1.05)
    palette = {}
    for name, rgb in (RGB | _GROUND).items():
        h, s, v = colorsys.rgb_to_hsv(*(channel / 255.0 for channel in rgb))
        toned = colorsys.hsv_to_rgb(
            (h + hue) % 1.0, min(s * saturation, 1.0), min(v * value, 1.0)
        )
        palette[name] = 255.0 * np.array(toned)
    return palette


def _background(
    scene: Scene,
    size: tuple[int, int],
    palette: dict[str, np.ndarray],
    rng: np.random.Generator,
) -> np.ndarray:
    width, height = size
    light = np.array(_LIGHT[scene.sky])
    top, low = (np.array(rgb, float) for rgb in _SKY.get(scene.sky, scene.region.sky))
    if scene.rain:
        top, low = np.array((112, 120, 134.0)), np.array((172, 178, 186.0))
    split = int(scene.horizon * height)
    depth = np.linspace(0.0, 1.0, height)[:, None, None]
    above = top + (low - top) * np.minimum(depth / scene.horizon, 1.0)
    below = palette[scene.ground] * light * (0.9 + 0.22 * depth)
    rows = np.where(np.arange(height)[:, None, None] < split, above, below)
    canvas = np.clip(np.broadcast_to(rows, (height, width, 3)), 0, 255).astype(np.uint8)
    if scene.mountain:
        _mountains(canvas, split, light, rng)
    if scene.sea:
        sea = np.clip(palette["Water"] * light, 0, 255)
        edge = split + int(0.16 * height)
        canvas[split:edge] = sea.astype(np.uint8)
        _waves(canvas, split, edge, 8, light, rng)
    if scene.ground == "Water":
        _waves(canvas, split, height, 34, light, rng)
    elif scene.ground == "Road":
        _lane(canvas, split, palette, light)
    else:
        _texture(canvas, scene, palette[scene.ground] * light, split, rng)
    return canvas


def _mountains(
    canvas: np.ndarray, split: int, light: np.ndarray, rng: np.random.Generator
) -> None:
    height, width = canvas.shape[:2]
    for centre in (rng.uniform(0.1, 0.4), rng.uniform(0.55, 0.9)):
        peak = np.array((centre * width, split - rng.uniform(0.2, 0.34) * height))
        reach = rng.uniform(0.26, 0.36) * width
        feet = np.array(((peak[0] - reach, split), (peak[0] + reach, split)))
        _fill(canvas, np.vstack([peak, feet]), light * (112, 116, 148))
        cap = peak + 0.3 * (feet - peak)
        notch = peak + np.array((0.0, 0.2 * (split - peak[1])))
        _fill(canvas, np.vstack([peak, cap[0], notch, cap[1]]), light * (244, 246, 252))


def _waves(
    canvas: np.ndarray,
    top: int,
    bottom: int,
    count: int,
    light: np.ndarray,
    rng: np.random.Generator,
) -> None:
    width = canvas.shape[1]
    for x, y, length in rng.uniform((0, top + 4, 8), (width, bottom, 26), (count, 3)):
        steps = np.linspace(0.0, 1.0, 7)
        wave = np.stack([x + length * steps, y + 2.5 * np.sin(6.0 * steps)], axis=1)
        _stroke(canvas, wave, light * (176, 216, 240), 2.0)


def _lane(
    canvas: np.ndarray, split: int, palette: dict[str, np.ndarray], light: np.ndarray
) -> None:
    height, width = canvas.shape[:2]
    verge = split + int(0.07 * height)
    canvas[split:verge] = np.clip(palette["tan"] * light, 0, 255).astype(np.uint8)
    edge = np.array(((0.0, verge), (width, verge)))
    _stroke(canvas, edge, light * (232, 232, 232), 3.0)
    middle = verge + 0.45 * (height - verge)
    for x in np.arange(-0.05, 1.0, 0.22) * width:
        dash = np.array(((x, middle), (x + 0.12 * width, middle)))
        _stroke(canvas, dash, light * (240, 236, 214), 5.0)


def _texture(
    canvas: np.ndarray,
    scene: Scene,
    colour: np.ndarray,
    split: int,
    rng: np.random.Generator,
) -> None:
    height, width = canvas.shape[:2]
    top = split + (0.18 * height if scene.sea else 4)
    if scene.region.texture == "bands":
        for share in (0.25, 0.55, 0.85):
            row = int(top + share * (height - top))
            canvas[row : row + 5] = np.clip(0.93 * colour, 0, 255).astype(np.uint8)
        return
    places = rng.uniform((0, top), (width, height), (46, 2))
    shades = rng.choice(np.array([0.86, 1.1]), 46)
    dots = scene.region.texture == "dots"
    step, width_pixels = ((0.1, 0.1), 3.5) if dots else ((-2.0, -7.0), 1.5)
    for place, shade in zip(places, shades, strict=True):
        _stroke(canvas, np.stack([place, place + step]), shade * colour, width_pixels)


def _weather(canvas: np.ndarray, rng: np.random.Generator, *, rain: bool) -> None:
    height, width = canvas.shape[:2]
    count, step, colour, width_pixels = 30, (0.1, 0.1), (255, 255, 255), 4.0
    if rain:
        count, step, colour, width_pixels = 36, (-5.0, 17.0), (206, 220, 236), 1.5
    for place in rng.uniform((0, 0), (width, height), (count, 2)):
        line = np.stack([place, place + step])
        _stroke(canvas, line, np.array(colour), width_pixels)


def _shadow(canvas: np.ndarray, scene: Scene, thing: Thing) -> None:
    """Darkens the ground under a thing."""
    height, width = canvas.shape[:2]
    half = thing.half * min(width, height)
    foot = thing.y * height + 0.9 * half
    rows = slice(max(int(foot - 0.16 * half), 0), max(int(foot + 0.16 * half) + 1, 0))
    left = max(int(thing.x * width - half), 0)
    columns = slice(left, max(int(thing.x * width + half) + 1, left))
    patch = canvas[rows, columns]
    if patch.size == 0:
        return
    y = (np.arange(rows.start, rows.start + patch.shape[0]) - foot) / (0.15 * half)
    x = (np.arange(left, left + patch.shape[1]) - thing.x * width) / (0.85 * half)
    inside = np.clip(1.3 - x[None, :] ** 2 - y[:, None] ** 2, 0.0, 1.0)
    strength = 0.22 if scene.ground == "Snow" else 0.34
    patch[:] = (patch * (1.0 - strength * inside[..., None])).astype(np.uint8)


def _thing(
    canvas: np.ndarray,
    scene: Scene,
    thing: Thing,
    palette: dict[str, np.ndarray],
    light: np.ndarray,
) -> None:
    height, width = canvas.shape[:2]
    half = thing.half * min(width, height)
    scale = np.array((-half if thing.mirrored else half, half))
    centre = np.array((thing.x * width, thing.y * height))
    outline = scene.region.outline * half
    for stroke in drawing(thing.name, thing.variant):
        name = thing.colour if stroke.colour == "body" else stroke.colour
        if name == "glass" and scene.sky == "Night":
            name = "lamp"
        glows = name == "lamp" or thing.name in _GLOWING
        colour = palette[name] * (1.0 if glows else light)
        points = centre + scale * stroke.points
        ink = np.array(scene.region.ink) * (light if not glows else 1.0)
        if stroke.width:
            _stroke(canvas, points, colour, max(stroke.width * half, 1.5))
            continue
        _fill(canvas, points, colour)
        if thing.striped and stroke.colour == "body":
            stripe = palette["blue" if thing.colour == "white" else "white"] * light
            _stripe(canvas, points, stripe, half)
        if outline > 0.0:
            _stroke(canvas, np.vstack([points, points[:1]]), ink, outline)


def _stripe(
    canvas: np.ndarray, points: np.ndarray, colour: np.ndarray, half: float
) -> None:
    mask = np.zeros(canvas.shape[:2], np.uint8)
    cv2.fillPoly(mask, [_fixed(points)], (255,), shift=_SHIFT)
    left, top = np.maximum(np.floor(points.min(axis=0)).astype(int), 0)
    right, bottom = np.ceil(points.max(axis=0)).astype(int) + 1
    inside = mask[top:bottom, left:right] > 0
    rows, columns = np.ogrid[: inside.shape[0], : inside.shape[1]]
    period = max(0.42 * half, 8.0)
    banded = ((columns + 0.5 * rows) % period) < 0.5 * period
    patch = canvas[top:bottom, left:right]
    patch[inside & banded] = np.clip(colour, 0, 255).astype(np.uint8)


def _fixed(points: Float[np.ndarray, "point 2"]) -> np.ndarray:
    return np.rint(points * (1 << _SHIFT)).astype(np.int32)


def _colour(rgb: np.ndarray) -> list[float]:
    return np.clip(rgb, 0, 255).astype(float).tolist()


def _fill(canvas: np.ndarray, points: np.ndarray, rgb: np.ndarray) -> None:
    cv2.fillPoly(canvas, [_fixed(points)], _colour(rgb), cv2.LINE_AA, _SHIFT)


def _stroke(
    canvas: np.ndarray, points: np.ndarray, rgb: np.ndarray, width_pixels: float
) -> None:
    thickness = max(round(width_pixels), 1)
    cv2.polylines(
        canvas, [_fixed(points)], False, _colour(rgb), thickness, cv2.LINE_AA, _SHIFT
    )
