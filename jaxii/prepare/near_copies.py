"""Finds near copies: pairs of images that differ by compression, size or crop.

Preparation makes a thumbnail of each image. The sketch of an image is the low
frequencies of its thumbnail: a discrete cosine transform as in perceptual hashes, but
not binarised, because a crop flips too many bits of a hash. The sketches of 100 crops
of each image are compared with those of whole images, through an inverted file (Sivic
and Zisserman 2003). The nearest few images are then aligned at 64 x 64 pixels by the
enhanced correlation coefficient (Evangelidis and Psarakis 2008), and compared region by
region, in colour.
"""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import cv2
import numpy as np
import polars as pl
from jaxtyping import Float32, Int, Int64, UInt8

from jaxii.console import OnProgress, no_progress
from jaxii.data.image_decoding import Pixels
from jaxii.data.transforms import read

# Side of a thumbnail in pixels; the channels are luma and two of chroma.
THUMBNAIL_PIXELS = 24
THUMBNAIL_SHAPE = THUMBNAIL_PIXELS, THUMBNAIL_PIXELS, 3
# Frequencies per side of a sketch, for luma and the two chroma channels.
FREQUENCIES = (8, 3, 3)
# Most that a crop may cut off at each of the four sides, as a share of the image.
MAX_CROP = 0.15
# Middles of three equal parts of that range; a shift by half of a part hardly changes
# a sketch.
CROPS = (MAX_CROP / 6, MAX_CROP / 2, MAX_CROP * 5 / 6)
SPANS = ((0.0, 1.0), *((low, 1 - high) for low in CROPS for high in CROPS))
# Images with a lower standard deviation, in levels of 255, are flat and not compared.
MIN_CONTRAST = 4.0
# Lowest correlation of the sketches of candidates; 99 % of cropped copies reach 0.96.
MIN_CORRELATION = 0.95
# Most candidates per image, over all its crops.
MAX_CANDIDATES = 4
CELLS_PROBED = 4
IMAGES_AT_ONCE = 256
PAIRS_AT_ONCE = 4096
VIEW_PIXELS = 64
ITERATIONS = 10
# Lowest correlation after alignment.
MIN_ALIGNED = 0.9
# The mean difference of copies is below this in each region, in levels of 255. JPEG at
# quality 30 gives up to 30; another hand, face or colour gives more.
MAX_DIFFERENCE = 36.0
# Side of a region, in pixels of the view or of a smaller image; that of a JPEG block.
REGION_PIXELS = 8

Thumbnails = UInt8[np.ndarray, "image y x channel"]


def thumbnail(pixels: Pixels) -> UInt8[np.ndarray, "y x channel"]:
    """Returns the thumbnail of an image, resized to a square."""
    size = THUMBNAIL_PIXELS, THUMBNAIL_PIXELS
    small = cv2.resize(np.ascontiguousarray(pixels), size, interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(small, cv2.COLOR_RGB2YCrCb)


def find(
    thumbnails: Sequence[Callable[[], Thumbnails]],
    kinds: Int[np.ndarray, " image"],
    encoded: Callable[[int], bytes],
    *,
    num_workers: int | None = None,
    on_progress: OnProgress = no_progress,
) -> Int64[np.ndarray, "pair 2"]:
    """Returns the pairs of images that are near copies, the lower number first.

    Memory: 330 bytes per image, 300 MB per 1,000,000 images and thread, and one block.
    Time: grows as num_images^1.5; see tests/benchmarks/README.md.

    Args:
      thumbnails: Functions that return the thumbnails of consecutive blocks of images;
        zeros for images that are not compared.
      kinds: Images of the same kind are not compared.
      encoded: Returns the JPEG bytes of an image by its number.
      num_workers: Number of threads; None uses Python's default.
      on_progress: Called with (images or pairs done, in all, what).
    """
    candidates = _candidates(thumbnails, kinds, on_progress)
    views = functools.lru_cache(PAIRS_AT_ONCE)(lambda i: _view(encoded(i)))

    def check(pair: tuple[int, int, int]) -> bool:
        one, other, crop = pair
        (first, own), (second, its) = views(one), views(other)
        return _is_copy(first, second, crop=crop, region=max(own, its))

    pairs = candidates.select("one", "other", "crop").iter_rows()
    found, done = list[tuple[int, int]](), 0
    with ThreadPoolExecutor(num_workers) as pool:
        while part := list(islice(pairs, PAIRS_AT_ONCE)):
            for (one, other, _), is_copy in zip(
                part, pool.map(check, part), strict=True
            ):
                if is_copy:
                    found.append((min(one, other), max(one, other)))
            done += len(part)
            on_progress(done, len(candidates), "pairs")
    return np.array(sorted(found), np.int64).reshape(-1, 2)


def _candidates(
    thumbnails: Sequence[Callable[[], Thumbnails]],
    kinds: Int[np.ndarray, " image"],
    on_progress: OnProgress,
) -> pl.DataFrame:
    """Returns pairs where a `crop` of `one` is similar to `other`, each pair once."""
    whole = [_sketches(block(), SPANS[:1])[:, 0] for block in thumbnails]
    near, first = _InvertedFile(np.concatenate(whole), kinds), 0
    found = []
    for block in thumbnails:
        small = block()
        for start in range(0, len(small), IMAGES_AT_ONCE):
            crops = _sketches(small[start : start + IMAGES_AT_ONCE], SPANS)
            found.append(near.candidates(crops, first + start))
        first += len(small)
        on_progress(first, len(kinds), "near copies")
    ends = pl.min_horizontal("one", "other"), pl.max_horizontal("one", "other")
    low_and_high = ends[0].alias("low"), ends[1].alias("high")
    return _best_first(pl.concat(found).with_columns(low_and_high)).unique(
        ["low", "high"], keep="first", maintain_order=True
    )


def _best_first(pairs: pl.DataFrame) -> pl.DataFrame:
    return pairs.sort(
        ["similar", "one", "other", "crop"], descending=[True] + 3 * [False]
    )


class _InvertedFile:
    """Finds the whole images whose sketches are similar to given ones.

    Each sketch is in the cell of its nearest centre; centres are random sketches.
    """

    def __init__(
        self,
        sketches: Float32[np.ndarray, "image entry"],
        kinds: Int[np.ndarray, " image"],
    ):
        usable = np.flatnonzero(sketches.any(axis=1))
        # With this number, finding a cell takes as long as searching it.
        num_cells = 1 + int((CELLS_PROBED * len(usable)) ** 0.5)
        chosen = np.random.default_rng(0).permutation(usable)[:num_cells]
        self._centres = np.zeros((num_cells, sketches.shape[1]), np.float32)
        self._centres[: len(chosen)] = sketches[chosen]
        parts = np.array_split(sketches[usable], 1 + len(usable) // 4096)
        cells = np.concatenate([self._nearest(part).argmax(axis=1) for part in parts])
        self._images = usable[np.argsort(cells, kind="stable")]
        self._starts = np.searchsorted(np.sort(cells), np.arange(num_cells + 1))
        self._sketches, self._kinds = sketches[self._images], kinds

    def candidates(
        self, crops: Float32[np.ndarray, "image crop entry"], first: int
    ) -> pl.DataFrame:
        """Returns the best candidates of each image: `one`, `other`, `crop`, `similar`.

        Args:
          crops: Sketches of all crops of consecutive images.
          first: Number of the first of these images.
        """
        sketches = crops.reshape(-1, crops.shape[2])
        rows = np.arange(len(sketches))
        owners = first + rows // crops.shape[1]
        near, found = self._nearest(sketches), [_pairs()]
        for _ in range(min(CELLS_PROBED, near.shape[1])):
            cells = near.argmax(axis=1)
            near[rows, cells] = -2.0
            order = np.argsort(cells, kind="stable")
            starts = np.searchsorted(cells[order], np.arange(len(self._starts)))
            for cell in np.flatnonzero(np.diff(starts)):
                asked = order[starts[cell] : starts[cell + 1]]
                held = slice(self._starts[cell], self._starts[cell + 1])
                found.append(self._similar(sketches[asked], owners[asked], asked, held))
        distinct = _best_first(pl.concat(found)).unique(
            ["one", "other"], keep="first", maintain_order=True
        )
        best = distinct.group_by("one", maintain_order=True).head(MAX_CANDIDATES)
        return best.with_columns(pl.col("crop") % crops.shape[1])

    def _nearest(
        self, sketches: Float32[np.ndarray, "row entry"]
    ) -> Float32[np.ndarray, "row cell"]:
        return sketches @ self._centres.T

    def _similar(
        self,
        sketches: Float32[np.ndarray, "row entry"],
        owners: Int[np.ndarray, " row"],
        rows: Int[np.ndarray, " row"],
        held: slice,
    ) -> pl.DataFrame:
        """Returns the candidates of some crops in one cell."""
        images = self._images[held]
        similar = sketches @ self._sketches[held].T
        similar[self._kinds[owners][:, None] == self._kinds[images]] = -2.0
        at = np.flatnonzero(similar.max(axis=1, initial=-2.0) >= MIN_CORRELATION)
        similar = similar[at]
        if similar.shape[1] > MAX_CANDIDATES:
            least = np.partition(similar, -MAX_CANDIDATES, axis=1)[:, -MAX_CANDIDATES]
            similar[similar < least[:, None]] = -2.0
        crop, place = np.nonzero(similar >= MIN_CORRELATION)
        at = at[crop]
        return _pairs(owners[at], images[place], rows[at], similar[crop, place])


def _pairs(one=(), other=(), crop=(), similar=()) -> pl.DataFrame:
    columns = {"one": one, "other": other, "crop": crop, "similar": similar}
    kinds = pl.Int64, pl.Int64, pl.Int64, pl.Float32
    return pl.DataFrame(columns, schema=dict(zip(columns, kinds, strict=True)))


def _sketches(
    thumbnails: Thumbnails, spans: Sequence[tuple[float, float]]
) -> Float32[np.ndarray, "image crop entry"]:
    """Returns unit sketches of the crops by every pair of spans (rows, then columns).

    A sketch of a flat image is zero.
    """
    planes = thumbnails.astype(np.float32) - np.array([0, 128, 128], np.float32)
    parts, count = [], len(spans)
    for channel, size in enumerate(FREQUENCIES):
        basis = np.concatenate([_cosines(*span, size) for span in spans])
        values = basis @ planes[..., channel] @ basis.T
        values = values.reshape(-1, count, size, count, size).swapaxes(2, 3)
        values = values.reshape(-1, count**2, size**2)
        # The mean of luma is left out: it is similar in most images.
        parts.append(values[..., 1:] if channel == 0 else values)
    flat = np.linalg.norm(parts[0], axis=-1, keepdims=True) < MIN_CONTRAST
    sketches = np.concatenate(parts, axis=-1)
    length = np.linalg.norm(sketches, axis=-1, keepdims=True)
    return np.where(flat, 0.0, sketches / np.maximum(length, 1e-6)).astype(np.float32)


def _cosines(low: float, high: float, size: int) -> Float32[np.ndarray, "frequency x"]:
    """Returns the mean of each cosine over each pixel, for the pixels of a span."""
    edges = np.linspace(0.0, 1.0, THUMBNAIL_PIXELS + 1)
    place = np.clip((edges - low) / (high - low), 0.0, 1.0)
    waves = [place]
    for frequency in range(1, size):
        turns = np.pi * frequency
        waves.append(np.sqrt(2.0) * np.sin(turns * place) / turns)
    return np.diff(np.stack(waves)).astype(np.float32)


def _view(encoded: bytes) -> tuple[UInt8[np.ndarray, "y x channel"], int]:
    """Returns an image as a square, slightly blurred, and the side of a region."""
    image = read(encoded)
    pixels = np.ascontiguousarray(image.decode(VIEW_PIXELS, VIEW_PIXELS))
    size = VIEW_PIXELS, VIEW_PIXELS
    square = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    side = min(image.height, image.width, VIEW_PIXELS)
    region = min(round(REGION_PIXELS * VIEW_PIXELS / side), VIEW_PIXELS // 2)
    return cv2.GaussianBlur(square, (0, 0), 0.8), region


def _is_copy(
    one: UInt8[np.ndarray, "y x channel"],
    other: UInt8[np.ndarray, "y x channel"],
    *,
    crop: int,
    region: int,
) -> bool:
    """Returns whether `other` shows approximately this crop of `one`."""
    rows, columns = divmod(crop, len(SPANS))
    warp = np.zeros((2, 3), np.float32)
    for axis, (low, high) in enumerate((SPANS[columns], SPANS[rows])):
        warp[axis, axis] = high - low
        warp[axis, 2] = low * VIEW_PIXELS - 0.5 * (1 - (high - low))
    grey, template = (cv2.cvtColor(x, cv2.COLOR_RGB2GRAY) for x in (one, other))
    everywhere = np.full(template.shape, 255, np.uint8)
    stop = cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, ITERATIONS, 1e-4
    try:
        aligned, warp = cv2.findTransformECC(
            template, grey, warp, cv2.MOTION_AFFINE, stop, everywhere, 1
        )
    except cv2.error:  # it does not converge
        return False
    if aligned < MIN_ALIGNED:
        return False
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    size = VIEW_PIXELS, VIEW_PIXELS
    inside = cv2.warpAffine(np.full(size, 255, np.uint8), warp, size, flags=how)
    inside = cv2.erode(inside, np.ones((3, 3), np.uint8)) == 255
    moved = cv2.warpAffine(one, warp, size, flags=how)
    differences = cv2.absdiff(moved, other).astype(np.float32) * inside[..., None]
    worst = cv2.blur(differences, (region, region)).max()
    return bool(inside.mean() > 0.5 and worst < MAX_DIFFERENCE)
