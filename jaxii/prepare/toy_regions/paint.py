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
    painter = _Painter(scene, _OVERSAMPLING * width, _OVERSAMPLING * height, rng)
    painter.background()
    for thing in scene.things:
        if scene.ground != "Water" and thing.y + thing.half > scene.horizon + 0.1:
            painter.shadow(thing)
        painter.thing(thing)
    painter.weather()
    return cv2.resize(painter.canvas, (width, height), interpolation=cv2.INTER_AREA)


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


class _Palette(dict[str, np.ndarray]):
    """The named colours in the tones of a region, computed on demand."""

    def __init__(self, region: Region, rng: np.random.Generator):
        super().__init__()
        self._hue = region.hue + rng.uniform(-0.008, 0.008)
        self._saturation = region.saturation * rng.uniform(0.92, 1.08)
        self._value = region.value * rng.uniform(0.93, 1.05)

    def __missing__(self, name: str) -> np.ndarray:
        rgb = RGB.get(name) or _GROUND[name]
        h, s, v = colorsys.rgb_to_hsv(*(channel / 255.0 for channel in rgb))
        toned = colorsys.hsv_to_rgb(
            (h + self._hue) % 1.0,
            min(s * self._saturation, 1.0),
            min(v * self._value, 1.0),
        )
        self[name] = 255.0 * np.array(toned)
        return self[name]


class _Painter:
    """Paints a scene on a canvas; methods draw from `rng` in the order of calls."""

    def __init__(self, scene: Scene, width: int, height: int, rng: np.random.Generator):
        self.scene, self.rng = scene, rng
        self.width, self.height = width, height
        self.palette = _Palette(scene.region, rng)
        self.light = np.array(_LIGHT[scene.sky])
        self.horizon = int(scene.horizon * height)
        self.canvas = np.zeros((height, width, 3), np.uint8)

    def background(self) -> None:
        scene, height = self.scene, self.height
        sky = _SKY.get(scene.sky, scene.region.sky)
        if scene.rain:
            sky = ((112, 120, 134), (172, 178, 186))
        top, low = (np.array(rgb, float) for rgb in sky)
        depth = np.linspace(0.0, 1.0, height)[:, None, None]
        above = top + (low - top) * np.minimum(depth / scene.horizon, 1.0)
        below = self.palette[scene.ground] * self.light * (0.9 + 0.22 * depth)
        is_above = np.arange(height)[:, None, None] < self.horizon
        rows = np.clip(np.where(is_above, above, below), 0, 255).astype(np.uint8)
        # Repeats columns in a fifth of NumPy's time.
        size = self.width, height
        self.canvas = cv2.resize(rows, size, interpolation=cv2.INTER_NEAREST)
        if scene.mountain:
            self.mountains()
        if scene.sea:
            edge = self.horizon + int(0.16 * height)
            self.rows(self.horizon, edge, self.palette["Water"] * self.light)
            self.waves(edge, 8)
        if scene.ground == "Water":
            self.waves(height, 34)
        elif scene.ground == "Road":
            self.lane()
        else:
            self.texture(self.palette[scene.ground] * self.light)

    def mountains(self) -> None:
        rng, base = self.rng, self.horizon
        for centre in (rng.uniform(0.1, 0.4), rng.uniform(0.55, 0.9)):
            rise = rng.uniform(0.2, 0.34) * self.height
            peak = np.array((centre * self.width, base - rise))
            reach = rng.uniform(0.26, 0.36) * self.width
            feet = np.array(((peak[0] - reach, base), (peak[0] + reach, base)))
            self.fill(np.vstack([peak, feet]), self.light * (112, 116, 148))
            cap = peak + 0.3 * (feet - peak)
            notch = peak + np.array((0.0, 0.2 * (base - peak[1])))
            snow = np.vstack([peak, cap[0], notch, cap[1]])
            self.fill(snow, self.light * (244, 246, 252))

    def waves(self, bottom: int, count: int) -> None:
        lowest, highest = (0, self.horizon + 4, 8), (self.width, bottom, 26)
        drawn = self.rng.uniform(lowest, highest, (count, 3))
        x, y, length = drawn.T[..., None]
        steps = np.linspace(0.0, 1.0, 7)
        waves = np.stack([x + length * steps, y + 2.5 * np.sin(6.0 * steps)], axis=-1)
        self.strokes(waves, self.light * (176, 216, 240), 2.0)

    def lane(self) -> None:
        height, width = self.height, self.width
        verge = self.horizon + int(0.07 * height)
        self.rows(self.horizon, verge, self.palette["tan"] * self.light)
        edge = np.array(((0.0, verge), (width, verge)))
        self.stroke(edge, self.light * (232, 232, 232), 3.0)
        middle = verge + 0.45 * (height - verge)
        x = np.arange(-0.05, 1.0, 0.22) * width
        ends = np.stack([x, x + 0.12 * width], axis=1)
        dashes = np.stack([ends, np.full_like(ends, middle)], axis=-1)
        self.strokes(dashes, self.light * (240, 236, 214), 5.0)

    def texture(self, colour: np.ndarray) -> None:
        top = self.horizon + (0.18 * self.height if self.scene.sea else 4)
        kind = self.scene.region.texture
        if kind == "bands":
            for share in (0.25, 0.55, 0.85):
                row = int(top + share * (self.height - top))
                self.rows(row, row + 5, 0.93 * colour)
            return
        places = self.rng.uniform((0, top), (self.width, self.height), (46, 2))
        shades = self.rng.choice(np.array([0.86, 1.1]), 46)
        step, width_pixels = (0.1, 3.5) if kind == "dots" else ((-2.0, -7.0), 1.5)
        lines = np.stack([places, places + step], axis=1)
        self.strokes(lines, shades[:, None] * colour, width_pixels)

    def weather(self) -> None:
        if self.scene.rain:
            count, step, colour, width_pixels = 36, (-5.0, 17.0), (206, 220, 236), 1.5
        elif self.scene.ground == "Snow":
            count, step, colour, width_pixels = 30, 0.1, (255, 255, 255), 4.0
        else:
            return
        places = self.rng.uniform((0, 0), (self.width, self.height), (count, 2))
        lines = np.stack([places, places + step], axis=1)
        self.strokes(lines, np.array(colour, float), width_pixels)

    def shadow(self, thing: Thing) -> None:
        """Darkens the ground under a thing."""
        half = thing.half * min(self.width, self.height)
        x, y = thing.x * self.width, thing.y * self.height + 0.9 * half
        top, left = max(int(y - 0.16 * half), 0), max(int(x - half), 0)
        bottom = max(int(y + 0.16 * half) + 1, 0)
        right = max(int(x + half) + 1, left)
        patch = self.canvas[top:bottom, left:right]
        down = (np.arange(top, top + patch.shape[0]) - y) / (0.15 * half)
        across = (np.arange(left, left + patch.shape[1]) - x) / (0.85 * half)
        inside = np.clip(1.3 - across[None, :] ** 2 - down[:, None] ** 2, 0.0, 1.0)
        strength = 0.22 if self.scene.ground == "Snow" else 0.34
        patch[:] = (patch * (1.0 - strength * inside[..., None])).astype(np.uint8)

    def thing(self, thing: Thing) -> None:
        scene, light, palette = self.scene, self.light, self.palette
        half = thing.half * min(self.width, self.height)
        scale = np.array((-half if thing.mirrored else half, half))
        centre = np.array((thing.x * self.width, thing.y * self.height))
        outline = scene.region.outline * half
        for stroke in drawing(thing.name, thing.variant):
            name = thing.colour if stroke.colour == "body" else stroke.colour
            if name == "glass" and scene.sky == "Night":
                name = "lamp"
            glows = name == "lamp" or thing.name in _GLOWING
            colour = palette[name] * (1.0 if glows else light)
            points = centre + scale * stroke.points
            if stroke.width:
                self.stroke(points, colour, max(stroke.width * half, 1.5))
                continue
            self.fill(points, colour)
            if thing.striped and stroke.colour == "body":
                stripe = palette["blue" if thing.colour == "white" else "white"] * light
                self.stripes(points, stripe, half)
            if outline > 0.0:
                ink = np.array(scene.region.ink) * (1.0 if glows else light)
                self.stroke(np.vstack([points, points[:1]]), ink, outline)

    def stripes(self, points: np.ndarray, colour: np.ndarray, half: float) -> None:
        mask = np.zeros((self.height, self.width), np.uint8)
        cv2.fillPoly(mask, [_fixed(points)], (255,), shift=_SHIFT)
        left, top = np.maximum(np.floor(points.min(axis=0)).astype(int), 0)
        right, bottom = np.ceil(points.max(axis=0)).astype(int) + 1
        inside = mask[top:bottom, left:right] > 0
        rows, columns = np.ogrid[: inside.shape[0], : inside.shape[1]]
        period = max(0.42 * half, 8.0)
        banded = ((columns + 0.5 * rows) % period) < 0.5 * period
        patch = self.canvas[top:bottom, left:right]
        patch[inside & banded] = np.clip(colour, 0, 255).astype(np.uint8)

    def rows(self, top: int, bottom: int, rgb: np.ndarray) -> None:
        self.canvas[top:bottom] = np.clip(rgb, 0, 255).astype(np.uint8)

    def fill(self, points: np.ndarray, rgb: np.ndarray) -> None:
        shape, colour = [_fixed(points)], _colour(rgb)
        cv2.fillPoly(self.canvas, shape, colour, cv2.LINE_AA, _SHIFT)

    def stroke(self, points: np.ndarray, rgb: np.ndarray, width_pixels: float) -> None:
        self.strokes(points[None], rgb, width_pixels)

    def strokes(
        self,
        lines: Float[np.ndarray, "line point 2"],
        rgb: Float[np.ndarray, "*line 3"],
        width_pixels: float,
    ) -> None:
        """Draws lines in order, all in one colour or each in its own."""
        width = max(round(width_pixels), 1)
        how = width, cv2.LINE_AA, _SHIFT
        colours = rgb if rgb.ndim == 2 else [rgb] * len(lines)
        for line, colour in zip(_fixed(lines), colours, strict=True):
            cv2.polylines(self.canvas, [line], False, _colour(colour), *how)


def _fixed(points: Float[np.ndarray, "*point 2"]) -> np.ndarray:
    return np.rint(points * (1 << _SHIFT)).astype(np.int32)


def _colour(rgb: np.ndarray) -> list[float]:
    return [min(max(channel, 0.0), 255.0) for channel in rgb.tolist()]
