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
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import polars as pl
import xxhash
from jaxtyping import Float32, Int, Int64, UInt8
from threadpoolctl import threadpool_limits

from jaxii.console import OnProgress, no_progress
from jaxii.data.image_decoding import Pixels
from jaxii.data.transforms import read
from jaxii.prepare.threads import Advance, in_threads, num_cores
from jaxii.storage import AnyPath, names_in, write_beside

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
# With fewer images at once, threads wait for Python's lock.
IMAGES_AT_ONCE = 1024
# Of sketches or thumbnails, to save memory.
ROWS_AT_ONCE = 512
# The pairs are aligned in parts of at least this number, and in at most so many parts.
PAIRS_AT_ONCE = 256
MAX_PARTS = 512
VIEWS_KEPT = 4096
VIEW_PIXELS = 64
ITERATIONS = 10
# Lowest correlation after alignment.
MIN_ALIGNED = 0.9
# The mean difference of copies is below this in each region, in levels of 255. JPEG at
# quality 30 gives up to 30; another hand, face or colour gives more.
MAX_DIFFERENCE = 36.0
# Side of a region, in pixels of the view or of a smaller image; that of a JPEG block.
REGION_PIXELS = 8

# Pattern of the files in which a search saves its finished parts.
SAVED_PARTS = "*.found"
DIGEST_BYTES = 16
# A crop of the image `one` and the similar image `other`.
CANDIDATE = np.dtype(
    [
        ("one", np.int64),
        ("other", np.int64),
        ("crop", np.int64),
        ("similar", np.float32),
    ]
)

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
    folder: AnyPath | None = None,
    num_workers: int | None = None,
    on_progress: OnProgress = no_progress,
) -> Int64[np.ndarray, "pair 2"]:
    """Returns the pairs of images that are near copies, the lower number first.

    Memory: 330 bytes per image; per thread, 150 MB and a block of thumbnails.
    Time: grows as num_images^1.5; see launch/README.md.

    Args:
      thumbnails: Functions that return the thumbnails of consecutive blocks of images;
        zeros for images that are not compared.
      kinds: Images of the same kind are not compared.
      encoded: Returns the JPEG bytes of an image by its number.
      folder: Where the finished parts of a search are saved. A search with equal
        thumbnails and kinds, by the same version of this module, continues from them.
        None saves nothing.
      num_workers: Number of threads; None uses one per core.
      on_progress: Called with (images or pairs done, in all, what).
    """
    # Threads of NumPy's own would compete with these.
    with threadpool_limits(1, "blas"):
        near, blocks, key = _read(thumbnails, kinds)
        run = _Parts(folder, key, num_workers or num_cores(), on_progress)
        found = run.each(
            "near copies",
            blocks,
            CANDIDATE,
            lambda i, rows, done: near.candidates(thumbnails[i](), rows.start, done),
        )
    return _copies(_distinct(found), encoded, run)


def _read(
    thumbnails: Sequence[Callable[[], Thumbnails]], kinds: Int[np.ndarray, " image"]
) -> tuple["_InvertedFile", list[range], bytes]:
    """Returns the whole images, the numbers of the images of each block, and a hash.

    The hash is of everything that the candidates depend on: thumbnails, blocks, kinds
    and code.
    """
    digest = xxhash.xxh3_128(Path(__file__).read_bytes() + kinds.tobytes())
    sketches, blocks, first = [], [], 0
    for block in thumbnails:
        small = block()
        digest.update(small.tobytes())
        sketches.append(_sketches(small, SPANS[:1])[:, 0])
        blocks.append(range(first, first + len(small)))
        first += len(small)
    digest.update(repr(blocks).encode())
    near = _InvertedFile(np.concatenate(sketches), kinds)
    return near, blocks, digest.digest()


def _copies(
    pairs: Int64[np.ndarray, "pair 3"], encoded: Callable[[int], bytes], run: "_Parts"
) -> Int64[np.ndarray, "copy 2"]:
    """Returns the pairs that are near copies after alignment; see `find`."""
    size = max(PAIRS_AT_ONCE, -(-len(pairs) // MAX_PARTS))
    parts = [range(len(pairs))[i : i + size] for i in range(0, len(pairs), size)]
    views = functools.lru_cache(VIEWS_KEPT)(lambda i: _view(encoded(i)))

    def check(number: int, rows: range, advance: Advance) -> np.ndarray:
        copies = np.zeros(len(rows), np.bool_)
        for place, row in enumerate(rows):
            one, other, crop = pairs[row].tolist()
            (first, own), (second, its) = views(one), views(other)
            copies[place] = _is_copy(first, second, crop=crop, region=max(own, its))
            advance(1)
        return copies

    run = replace(run, key=xxhash.xxh3_128_digest(run.key + pairs.tobytes()))
    is_copy = run.each("pairs", parts, np.dtype(np.bool_), check)
    copies = np.sort(pairs[is_copy, :2], axis=1)
    return copies[np.lexsort((copies[:, 1], copies[:, 0]))]


@dataclass(frozen=True)
class _Parts:
    """Runs the parts of a search in threads, and saves each when it is finished.

    Attributes:
      folder: See `find`.
      key: Hash of everything that the results depend on.
      num_threads: The most threads at a time.
      on_progress: See `find`.
    """

    folder: AnyPath | None
    key: bytes
    num_threads: int
    on_progress: OnProgress

    def each(
        self,
        what: str,
        parts: Sequence[range],
        kind: np.dtype,
        make: Callable[[int, range, Advance], np.ndarray],
    ) -> np.ndarray:
        """Returns the concatenated results of all parts, in order.

        Args:
          what: Describes the work, for `on_progress` and in names of files.
          parts: The items of each part.
          kind: The dtype of the results.
          make: Returns the result of a part, by number and items. Calls the function
            that it is given with numbers of finished items.
        """
        present = names_in(self.folder) if self.folder else set()

        def work(number: int, items: range, advance: Advance) -> np.ndarray:
            name = SAVED_PARTS.replace("*", f"{what.replace(' ', '_')}-{number:05d}")
            path = self.folder and self.folder / name
            if path and name in present:
                result = self._load(path, kind)
                if result is not None:
                    advance(len(items))
                    return result
            result = make(number, items, advance)
            if path:
                self._save(path, result)
            return result

        jobs = list(enumerate(parts))
        results = in_threads(work, jobs, self.num_threads, self.on_progress, what)
        return np.concatenate([np.zeros(0, kind), *results])

    def _load(self, path: AnyPath, kind: np.dtype) -> np.ndarray | None:
        """Returns a saved result; None if it is damaged or of another search."""
        data = path.read_bytes()
        digest, result = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
        return np.frombuffer(result, kind) if digest == self._digest(result) else None

    def _save(self, path: AnyPath, result: np.ndarray) -> None:
        data = result.tobytes()
        data = self._digest(data) + data
        write_beside(path, lambda file: file.write(data), binary=True)

    def _digest(self, result: bytes) -> bytes:
        return xxhash.xxh3_128_digest(self.key + result)


def _distinct(found: np.ndarray) -> Int64[np.ndarray, "pair 3"]:
    """Returns `one`, `other` and `crop` of candidates, the most similar first.

    Of each pair of images, only the most similar candidate is returned.
    """
    ends = pl.min_horizontal("one", "other"), pl.max_horizontal("one", "other")
    pairs = pl.DataFrame(found).with_columns(low=ends[0], high=ends[1])
    pairs = _best_first(pairs).unique(
        ["low", "high"], keep="first", maintain_order=True
    )
    return pairs.select("one", "other", "crop").to_numpy(order="c")


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
        cells = self._nearest(sketches[usable], 1)[:, 0]
        self._images = usable[np.argsort(cells, kind="stable")]
        self._starts = np.searchsorted(np.sort(cells), np.arange(num_cells + 1))
        self._sketches, self._kinds = sketches[self._images], kinds

    def candidates(
        self, thumbnails: Thumbnails, first: int, advance: Advance
    ) -> np.ndarray:
        """Returns the best candidates of each image, as `CANDIDATE`.

        Args:
          thumbnails: Thumbnails of consecutive images.
          first: Number of the first of these images.
          advance: Called with numbers of finished images.
        """
        found = [np.zeros(0, CANDIDATE)]
        for start in range(0, len(thumbnails), IMAGES_AT_ONCE):
            some = thumbnails[start : start + IMAGES_AT_ONCE]
            found.append(self._best(some, first + start))
            advance(len(some))
        return np.concatenate(found)

    def _best(self, thumbnails: Thumbnails, first: int) -> np.ndarray:
        parts = np.array_split(thumbnails, 1 + len(thumbnails) // ROWS_AT_ONCE)
        crops = np.concatenate([_sketches(part, SPANS) for part in parts])
        sketches = crops.reshape(-1, crops.shape[2])
        cells = self._nearest(sketches, CELLS_PROBED)
        order = np.argsort(cells, axis=None, kind="stable")
        starts = np.searchsorted(cells.ravel()[order], np.arange(len(self._starts)))
        rows, offset = order // cells.shape[1], first * crops.shape[1]
        found = [np.zeros(0, CANDIDATE)]
        for cell in np.flatnonzero(np.diff(starts)).tolist():
            asked = rows[starts[cell] : starts[cell + 1]]
            found.append(self._similar(sketches[asked], offset + asked, cell))
        distinct = _best_first(pl.DataFrame(np.concatenate(found))).unique(
            ["one", "other"], keep="first", maintain_order=True
        )
        best = distinct.group_by("one", maintain_order=True).head(MAX_CANDIDATES)
        return best.to_numpy(structured=True)

    def _nearest(
        self, sketches: Float32[np.ndarray, "row entry"], count: int
    ) -> Int64[np.ndarray, "row nearest"]:
        """Returns the cells of the nearest centres, the nearest first."""
        nearest = []
        for part in np.array_split(sketches, 1 + len(sketches) // ROWS_AT_ONCE):
            near = part @ self._centres.T
            rows, cells = np.arange(len(near)), []
            for _ in range(min(count, near.shape[1])):
                cells.append(near.argmax(axis=1))
                near[rows, cells[-1]] = -2.0
            nearest.append(np.stack(cells, axis=1))
        return np.concatenate(nearest)

    def _similar(
        self,
        sketches: Float32[np.ndarray, "row entry"],
        crops: Int64[np.ndarray, " row"],
        cell: int,
    ) -> np.ndarray:
        """Returns the candidates of some crops in one cell, as `CANDIDATE`.

        Args:
          sketches: Sketches of the crops.
          crops: Numbers of the crops, counted over all images.
          cell: Number of the cell.
        """
        held = slice(self._starts[cell], self._starts[cell + 1])
        similar = sketches @ self._sketches[held].T
        at = np.flatnonzero(similar.max(axis=1, initial=-2.0) >= MIN_CORRELATION)
        if not len(at):
            return np.zeros(0, CANDIDATE)
        similar, images = similar[at], self._images[held]
        owners, crops = np.divmod(crops[at], len(SPANS) ** 2)
        similar[self._kinds[owners][:, None] == self._kinds[images]] = -2.0
        if similar.shape[1] > MAX_CANDIDATES:
            least = np.partition(similar, -MAX_CANDIDATES, axis=1)[:, -MAX_CANDIDATES]
            similar[similar < least[:, None]] = -2.0
        row, place = np.nonzero(similar >= MIN_CORRELATION)
        found = np.zeros(len(row), CANDIDATE)
        found["one"], found["other"] = owners[row], images[place]
        found["crop"], found["similar"] = crops[row], similar[row, place]
        return found


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
