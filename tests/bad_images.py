"""200 image files with realistic damage, and the fault expected for each.

`all_images` makes them from a fixed seed. Every file shows `scene`, which is bright
everywhere: a dark image shows that damage was not reported.
"""

import base64
import functools
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from mixed_images import by_opencv, saved
from PIL import Image

HEIGHT, WIDTH = 64, 96
# No pixel of the scene is darker; lossy encodings are darker by at most a few levels.
DARKEST = 70
SIGNATURE = b"\x89PNG\r\n\x1a\n"
SOI, EOI = b"\xff\xd8", b"\xff\xd9"


@dataclass(frozen=True)
class Bad:
    """An image file with damage.

    Attributes:
      content: Its bytes.
      fault: Pattern of the fault; "" if it has to be read and show the scene; None if
        the damage may change the pixels.
    """

    content: bytes
    fault: str | None


def scene(height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """Returns a bright image with large shapes and a little texture."""
    rng = np.random.default_rng(20)
    coarse = rng.integers(90, 250, (4, 6, 3), np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    noise = rng.integers(-4, 5, image.shape)
    return Image.fromarray(np.clip(image + noise, DARKEST, 255).astype(np.uint8))


@functools.cache
def all_images() -> dict[str, Bad]:
    """Returns the files by name."""
    return {
        name: bad
        for family in (
            _cut,
            _overwritten,
            _other_files,
            _misnamed,
            _sizes,
            _depths,
            _exif,
            _png_chunks,
            _jpeg_segments,
            _webp_chunks,
        )
        for name, bad in family()
    }


def encodings() -> dict[str, bytes]:
    """Returns the scene in common encodings."""
    image = scene()
    # An alpha channel of 255 everywhere is not stored.
    clear = image.convert("RGBA")
    clear.putalpha(254)
    return {
        "baseline.jpg": saved(image, "JPEG", quality=95),
        "progressive.jpg": saved(image, "JPEG", quality=95, progressive=True),
        "grey.jpg": saved(image.convert("L"), "JPEG", quality=95),
        "rgb.png": saved(image, "PNG"),
        "interlaced.png": by_zlib(interlace=1, raw=bytes(interlaced_rows())),
        "lossy.webp": saved(image, "WEBP", quality=95),
        "lossless.webp": saved(image, "WEBP", lossless=True),
        "alpha.webp": saved(clear, "WEBP", quality=95, exact=True),
    }


def _cut() -> Iterator[tuple[str, Bad]]:
    """Truncated downloads: at any place, in the header, and in the last bytes."""
    for name, data in encodings().items():
        stem, suffix = name.split(".")
        for share in (0.02, 0.2, 0.5, 0.8, 0.95):
            end = max(4, int(len(data) * share))
            yield f"cut_{stem}_{share:g}.{suffix}", Bad(data[:end], "truncated|damaged")
        yield f"cut_{stem}_last.{suffix}", Bad(data[:-2], "truncated|damaged")


def _overwritten() -> Iterator[tuple[str, Bad]]:
    """Lost disk blocks: zeros or flipped bits inside a file of full length."""
    rng = np.random.default_rng(21)
    for name, data in encodings().items():
        stem, suffix = name.split(".")
        half = len(data) // 2
        yield (
            f"zero_end_{stem}.{suffix}",
            Bad(data[:half] + bytes(len(data) - half), "truncated|damaged"),
        )
        # WebP has no checksum, and JPEG codes may continue after a lost block.
        fault = "damaged" if suffix == "png" else None
        hole = min(len(data) // 3, 2048)
        yield (
            f"zero_hole_{stem}.{suffix}",
            Bad(data[:half] + bytes(hole) + data[half + hole :], fault),
        )
        flipped = bytearray(data)
        for place in rng.integers(len(data) // 3, len(data) - 20, 8):
            flipped[place] ^= 1 << rng.integers(8)
        yield f"flipped_{stem}.{suffix}", Bad(bytes(flipped), fault)
    data = saved(scene(), "JPEG", quality=95, restart_marker_rows=1)
    half = len(data) // 2
    holed = data[:half] + bytes(256) + data[half + 256 :]
    yield "zero_hole_restarts.jpg", Bad(holed, "damaged JPEG .* before marker 0xd1")


def _other_files() -> Iterator[tuple[str, Bad]]:
    """Other content with an image's name, left by a scraper, Git or a converter."""
    page = b"<!DOCTYPE html>\n<html><title>404 Not Found</title></html>\n"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    image = scene()
    jpeg = saved(image, "JPEG")
    contents = {
        "empty.jpg": (b"", "an empty file"),
        "one_byte.jpg": (b"\xff", "not an image"),
        "page.jpg": (page, "HTML"),
        "page_after_lines.png": (b"\r\n\n  " + page, "not an image"),
        "page_with_mark.webp": (b"\xef\xbb\xbf" + page, "not an image"),
        "denied.jpg": (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "XML"),
        "error.json.jpg": (b'{"error": "quota exceeded"}', "not an image"),
        "pointer.jpg": (pointer, "a Git LFS pointer"),
        "base64.jpg": (base64.b64encode(jpeg), "not an image"),
        "data_url.png": (
            b"data:image/jpeg;base64," + base64.b64encode(jpeg),
            "not an im",
        ),
        "zeros.jpg": (bytes(4096), "not an image"),
        "ones.png": (b"\xff" * 4096, "not an image|damaged|truncated"),
        "random.webp": (np.random.default_rng(22).bytes(4096), "not an image"),
        "mac._x.jpg": (b"\0\5\26\7\0\2\0\0Mac OS X        ", "not an image"),
        "document.jpg": (b"%PDF-1.7\n", "not an image"),
        "archive.jpg": (b"PK\3\4" + bytes(40), "not an image"),
        "film.jpg": (b"\0\0\0\x18ftypmp42" + bytes(40), "not an image"),
        "photo.heic.jpg": (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC"),
        "photo.avif.jpg": (b"\0\0\0\x18ftypavif" + bytes(40), "AVIF"),
        "drawing.svg.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "XML"),
        "still.gif.png": (saved(image.quantize(64), "GIF"), "a GIF"),
        "old.bmp.jpg": (saved(image, "BMP"), "a BMP"),
        "scan.tif.jpg": (saved(image, "TIFF"), "a TIFF"),
        "raw_pixels.jpg": (np.asarray(image).tobytes(), "not an image"),
        "sound.webp": (b"RIFF" + struct.pack("<I", 36) + b"WAVEfmt ", "not an image"),
        "jpeg2000.jpg": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), "not an image"),
    }
    for name, (content, fault) in contents.items():
        yield name, Bad(content, fault)


def _misnamed() -> Iterator[tuple[str, Bad]]:
    """Intact images with the suffix of another format, or with bytes around them."""
    forms = encodings()
    for name, suffix in (("rgb.png", "jpg"), ("lossy.webp", "png")):
        yield f"{name}_as.{suffix}", Bad(forms[name], "")
    yield "jpeg_as.webp", Bad(forms["baseline.jpg"], "")
    yield "jpeg_with_tail.jpg", Bad(forms["baseline.jpg"] + b"<!-- tail -->" * 9, "")
    yield "png_with_tail.png", Bad(forms["rgb.png"] + bytes(5000), "")
    yield "webp_with_tail.webp", Bad(forms["lossy.webp"] + bytes(5000), "")
    yield "jpeg_after_line.jpg", Bad(b"\r\n" + forms["baseline.jpg"], "not an image")
    yield "two_jpegs.jpg", Bad(forms["baseline.jpg"] * 2, "")
    lines = forms["baseline.jpg"].replace(b"\n", b"\r\n")
    yield "as_text.jpg", Bad(lines, None)
    yield (
        "png_as_text.png",
        Bad(forms["rgb.png"].replace(b"\r\n", b"\n"), "not an image"),
    )
    # Bytes above 127 are read as Latin-1 and saved as UTF-8.
    utf8 = forms["baseline.jpg"].decode("latin-1").encode()
    yield "as_utf8.jpg", Bad(utf8, "not an image")


def _sizes() -> Iterator[tuple[str, Bad]]:
    """Sides of 0, 1 and very many pixels, real and declared."""
    for height, width in ((1, 1), (1, 300), (300, 1), (2, 20_000), (20_000, 2)):
        image, size = scene(height, width), f"{height}x{width}"
        yield f"thin_{size}.jpg", Bad(saved(image, "JPEG", quality=95), "")
        yield f"thin_{size}.png", Bad(saved(image, "PNG"), "")
    yield "thin_1x16383.webp", Bad(saved(scene(1, 16_383), "WEBP"), "")
    yield "thin_1x65500.jpg", Bad(saved(scene(1, 65_500), "JPEG"), "")
    # A JPEG cannot be this wide, so such an image cannot be stored.
    yield "thin_1x100000.png", Bad(saved(scene(1, 100_000), "PNG"), "65,?500|too ")
    forms, many = encodings(), "megapixels"
    for side, fault in ((0, "pixels"), (60_000, many), (2**31 - 1, many)):
        header = png_header(side, side)
        yield f"declared_{side}.png", Bad(with_header(forms["rgb.png"], header), fault)
    header = png_header(12_000, 9_000)
    yield "declared_more.png", Bad(with_header(forms["rgb.png"], header), "damaged")
    for height, width, fault in (
        (0, WIDTH, "damaged"),
        (HEIGHT, 0, "damaged"),
        (65_500, 65_500, many),
        (HEIGHT * 2, WIDTH, "truncated|damaged"),
    ):
        data = with_frame(forms["baseline.jpg"], height, width)
        yield f"declared_{height}x{width}.jpg", Bad(data, fault)
    for side, fault in ((2**24, many), (9_000, "damaged")):
        data = with_canvas(forms["alpha.webp"], side)
        yield f"declared_{side}.webp", Bad(data, fault)
    lossless = bytearray(forms["lossless.webp"])
    lossless[21:25] = b"\xff\xff\xff\x0f"
    yield "declared_lossless.webp", Bad(bytes(lossless), many)
    # 225 megapixels of one bit in 28 kB.
    rows = zlib.compress(bytes((15_000 // 8 + 1) * 15_000), 9)
    bomb = png(png_header(15_000, 15_000, depth=1, color=0), chunk(b"IDAT", rows))
    yield "bomb_one_bit.png", Bad(bomb, many)


def _depths() -> Iterator[tuple[str, Bad]]:
    """Bit depths and colour spaces that cameras and scanners write."""
    image = scene()
    grey = np.asarray(image.convert("L"))
    wide = np.asarray(image)[..., ::-1].astype(np.uint16) * 257
    alpha = np.full((*wide.shape[:2], 1), 65_535, np.uint16)
    yield "deep_rgb.png", Bad(_encoded(wide), "")
    yield "deep_rgba.png", Bad(_encoded(np.concatenate([wide, alpha], -1)), "")
    yield "deep_grey.png", Bad(_encoded(grey.astype(np.uint16) * 257), None)
    yield "grey_alpha.png", Bad(saved(image.convert("LA"), "PNG"), None)
    yield "one_bit.png", Bad(saved(image.convert("1"), "PNG"), None)
    yield "palette.png", Bad(saved(image.quantize(256), "PNG"), "")
    cmyk = image.convert("CMYK")
    yield "cmyk.jpg", Bad(saved(cmyk, "JPEG", quality=95), "")
    yield "cmyk_progressive.jpg", Bad(saved(cmyk, "JPEG", progressive=True), "")
    clear = image.convert("RGBA")
    clear.putalpha(0)
    yield "clear.png", Bad(saved(clear, "PNG"), None)
    yield "clear.webp", Bad(saved(clear, "WEBP"), None)
    jpeg = saved(image, "JPEG", quality=95)
    place = jpeg.index(b"\xff\xc0") + 4
    yield "twelve_bits.jpg", Bad(jpeg[:place] + b"\x0c" + jpeg[place + 1 :], "damaged")
    for marker in (0xC3, 0xC9, 0xCF):
        data = jpeg.replace(b"\xff\xc0", bytes([0xFF, marker]), 1)
        # Arithmetic coding (9) may decode to anything.
        fault = None if marker == 0xC9 else "damaged|truncated"
        yield f"process_{marker:x}.jpg", Bad(data, fault)
    yield "by_opencv.jpg", Bad(by_opencv(image, ".jpg"), "")
    yield "by_opencv.webp", Bad(by_opencv(image, ".webp"), "")


def _exif() -> Iterator[tuple[str, Bad]]:
    """An intact image with broken EXIF counts as upright."""
    forms = encodings()
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    tiff = b"II*\0\x08\0\0\0"
    tiffs = {
        "no_start": b"",
        "short": b"II*\0",
        "start_outside": b"II*\0\xff\xff\xff\xff",
        "other_order": b"XX" + tiff[2:] + b"\1\0" + entry,
        "no_count": tiff,
        "too_many": tiff + b"\xff\xff",
        "turn_0": tiff + b"\1\0" + struct.pack("<HHIHH", 0x0112, 3, 1, 0, 0),
        "turn_9": tiff + b"\1\0" + struct.pack("<HHIHH", 0x0112, 3, 1, 9, 0),
        "turn_65535": tiff + b"\1\0" + struct.pack("<HHIHH", 0x0112, 3, 1, 65535, 0),
    }
    for name, text in tiffs.items():
        exif = b"Exif\0\0" + text
        data = with_segment(forms["baseline.jpg"], 0xE1, exif)
        yield f"exif_{name}.jpg", Bad(data, "")
    body = chunk(b"eXIf", b"II*\0\xff\xff\xff\xff")
    yield "exif_outside.png", Bad(with_header(forms["rgb.png"], more=body), "")
    twice = with_segment(forms["baseline.jpg"], 0xE1, b"Exif\0\0" + tiffs["turn_9"])
    twice = with_segment(twice, 0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>")
    yield "exif_after_xmp.jpg", Bad(twice, "")


def _png_chunks() -> Iterator[tuple[str, Bad]]:
    """PNG files with wrong chunks, mostly with correct checksums."""
    whole, raw = encodings()["rgb.png"], bytes(png_rows())
    header, rows = png_header(WIDTH, HEIGHT), zlib.compress(raw)
    lies = {
        "few_rows": png(header, chunk(b"IDAT", zlib.compress(raw[: len(raw) // 2]))),
        "cut_stream": png(header, chunk(b"IDAT", rows[: len(rows) // 2])),
        "more_rows": png(header, chunk(b"IDAT", zlib.compress(raw * 2))),
        "no_pixels": png(header),
        "empty_pixels": png(header, chunk(b"IDAT", b"")),
        "no_zlib": png(header, chunk(b"IDAT", b"nothing at all")),
        "wrong_adler": png(header, chunk(b"IDAT", rows[:-4] + b"1234")),
        "wrong_filter": png(header, chunk(b"IDAT", zlib.compress(b"\x09" + raw[1:]))),
        "wrong_sum": png(header, chunk(b"IDAT", rows, wrong=True)),
        "wrong_header_sum": png(
            png_header(WIDTH, HEIGHT, wrong=True), chunk(b"IDAT", rows)
        ),
        "no_header": png(chunk(b"IDAT", rows)),
        "header_later": png(chunk(b"tEXt", header), header, chunk(b"IDAT", rows)),
        "two_headers": png(header, png_header(9_000, 9_000), chunk(b"IDAT", rows)),
        "small_then_large": png(
            png_header(8, 8), png_header(30_000, 30_000), chunk(b"IDAT", rows)
        ),
        "no_palette": png(png_header(WIDTH, HEIGHT, color=3), chunk(b"IDAT", rows)),
        "depth_3": png(png_header(WIDTH, HEIGHT, depth=3), chunk(b"IDAT", rows)),
        "color_5": png(png_header(WIDTH, HEIGHT, color=5), chunk(b"IDAT", rows)),
        "interlace_7": png(
            png_header(WIDTH, HEIGHT, interlace=7), chunk(b"IDAT", rows)
        ),
        "long_chunk": png(header, b"\xff\xff\xff\xffIDAT" + rows),
    }
    for name, data in lies.items():
        fault = "damaged|truncated|megapixels"
        yield f"png_{name}.png", Bad(data, None if name == "more_rows" else fault)
    bomb = zlib.compress(bytes(50_000_000), 9)
    harmless = {
        "text_bomb": chunk(b"zTXt", b"Comment\0\0" + bomb),
        "profile_bomb": chunk(b"iCCP", b"p\0\0" + bomb),
        "profile": chunk(b"iCCP", b"not a profile"),
        "long_clear": chunk(b"tRNS", bytes(600)),
        "time": chunk(b"tIME", bytes(3)),
        "unknown": chunk(b"jxIi", b"private"),
    }
    for name, more in harmless.items():
        yield f"png_{name}.png", Bad(with_header(whole, more=more), None)
    frames = chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))
    yield "png_many_frames.png", Bad(with_header(whole, more=frames), "")
    frame = struct.pack(">IIIIIHHBB", 0, 4000, 4000, 4000, 4000, 1, 1, 0, 0)
    more = chunk(b"acTL", struct.pack(">II", 1, 0)) + chunk(b"fcTL", frame)
    yield "png_frame_outside.png", Bad(with_header(whole, more=more), "")
    second = scene().transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    animated = saved(scene(), "PNG", save_all=True, append_images=[second])
    yield "animated.png", Bad(animated, "")


def _jpeg_segments() -> Iterator[tuple[str, Bad]]:
    """JPEG files with wrong segments."""
    data = encodings()["baseline.jpg"]
    quantization = data.index(b"\xff\xdb")
    huffman, scan = data.index(b"\xff\xc4"), data.index(b"\xff\xda")
    yield "jpeg_no_huffman.jpg", Bad(data[:huffman] + data[scan:], None)
    frame = data.index(b"\xff\xc0")
    without = data[:quantization] + data[frame:]
    yield "jpeg_no_quantization.jpg", Bad(without, "damaged")
    yield "jpeg_no_frame.jpg", Bad(data[:frame] + data[scan:], "damaged|truncated")
    yield "jpeg_no_scan.jpg", Bad(data[:scan] + EOI, "damaged|truncated")
    yield "jpeg_empty_scan.jpg", Bad(data[: scan + 14] + EOI, "damaged|truncated")
    yield "jpeg_soi_eoi.jpg", Bad(SOI + EOI, "damaged|truncated|not an image")
    long = data[:2] + b"\xff\xe2\xff\xff" + data[2:]
    yield "jpeg_long_segment.jpg", Bad(long, "damaged|truncated")
    short = data[:2] + b"\xff\xe2\0\0" + data[2:]
    yield "jpeg_short_segment.jpg", Bad(short, None)
    profile = with_segment(data, 0xE2, b"ICC_PROFILE\0\1\2x")
    yield "jpeg_profile.jpg", Bad(profile, "bad ICC marker")
    yield "jpeg_many_scans.jpg", Bad(many_scans(200, 512), "201 scans")
    yield "jpeg_scan_bomb.jpg", Bad(many_scans(20_000, 10_000), "20,001 scans")


def _webp_chunks() -> Iterator[tuple[str, Bad]]:
    """WebP files with wrong chunks."""
    forms = encodings()
    lossy, alpha, lossless = (
        forms[name] for name in ("lossy.webp", "alpha.webp", "lossless.webp")
    )
    chunks = webp_chunks(alpha)
    less = riff([(name, body) for name, body in chunks if name != b"VP8 "])
    yield "webp_no_pixels.webp", Bad(less, "damaged|truncated")
    yield "webp_only_header.webp", Bad(riff(chunks[:1]), "damaged|truncated")
    yield "webp_nothing.webp", Bad(riff([]), "damaged|truncated")
    half = [(n, b[: len(b) // 2] if n == b"ALPH" else b) for n, b in chunks]
    yield "webp_half_alpha.webp", Bad(riff(half), None)
    for size, fault in ((0, "damaged|truncated"), (2**32 - 10, "truncated")):
        data = lossy[:4] + struct.pack("<I", size) + lossy[8:]
        yield f"webp_size_{size}.webp", Bad(data, fault)
    data = lossy[:16] + struct.pack("<I", 10) + lossy[20:]
    yield "webp_short_chunk.webp", Bad(data, "damaged|truncated")
    data = lossy[:16] + struct.pack("<I", 2**31) + lossy[20:]
    yield "webp_long_chunk.webp", Bad(data, "damaged|truncated")
    yield "webp_unknown.webp", Bad(lossy.replace(b"VP8 ", b"VP9 "), "damaged|truncated")
    data = bytearray(lossless)
    data[20] = 0
    yield "webp_no_mark.webp", Bad(bytes(data), "damaged")
    second = scene().transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    moving = saved(scene(), "WEBP", save_all=True, append_images=[second], quality=95)
    yield "animated.webp", Bad(moving, "")
    yield "animated_cut.webp", Bad(moving[:-400], "truncated")
    frames = webp_chunks(moving)
    kept = [(name, body) for name, body in frames if name != b"ANMF"]
    yield "animated_no_frame.webp", Bad(riff(kept), "damaged")
    outside = [
        (n, b"\xff\xff\x0f" * 2 + b[6:] if n == b"ANMF" else b) for n, b in frames
    ]
    yield "animated_outside.webp", Bad(riff(outside), "damaged")


def chunk(name: bytes, body: bytes, *, wrong: bool = False) -> bytes:
    """Returns a PNG chunk; `wrong` gives it a wrong checksum."""
    checksum = zlib.crc32(name + body) ^ wrong
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)


def png_header(
    width: int, height: int, *, depth=8, color=2, interlace=0, wrong=False
) -> bytes:
    """Returns the chunk IHDR."""
    body = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace)
    return chunk(b"IHDR", body, wrong=wrong)


def png(*chunks: bytes) -> bytes:
    """Returns a PNG file of these chunks and an end."""
    return SIGNATURE + b"".join(chunks) + chunk(b"IEND", b"")


def png_rows() -> bytes:
    """Returns the rows of the scene, each with the filter "none"."""
    return b"".join(b"\0" + row.tobytes() for row in np.asarray(scene()))


def interlaced_rows() -> Iterator[int]:
    """Yields the bytes of the scene in the seven passes of an interlaced PNG."""
    image = np.asarray(scene())
    starts = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4))
    starts += ((2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    for top, left, down, across in starts:
        for row in image[top::down, left::across]:
            yield 0
            yield from row.tobytes()


def by_zlib(*, raw: bytes, interlace: int = 0) -> bytes:
    """Returns a PNG file of the scene's size with these rows."""
    header = png_header(WIDTH, HEIGHT, interlace=interlace)
    return png(header, chunk(b"IDAT", zlib.compress(raw)))


def with_header(data: bytes, header: bytes = b"", *, more: bytes = b"") -> bytes:
    """Returns a PNG file with another header, or with more chunks after its own."""
    return data[:8] + (header or data[8:33]) + more + data[33:]


def with_segment(data: bytes, marker: int, body: bytes) -> bytes:
    """Returns a JPEG file with an additional segment at its start."""
    head = bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2)
    return data[:2] + head + body + data[2:]


def with_frame(data: bytes, height: int, width: int) -> bytes:
    """Returns a baseline JPEG file that declares another size."""
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", height, width) + data[place + 4 :]


def with_canvas(data: bytes, side: int) -> bytes:
    """Returns an extended WebP file that declares another size."""
    size = (side - 1).to_bytes(3, "little")
    return data[:24] + size * 2 + data[30:]


def webp_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Returns name and body of each chunk of a WebP file."""
    found, place = [], 12
    while place + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, place)
        found.append((name, data[place + 8 : place + 8 + size]))
        place += 8 + size + size % 2
    return found


def riff(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """Returns a WebP file of these chunks."""
    body = b"".join(
        name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)
        for name, content in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def many_scans(num_scans: int, side: int) -> bytes:
    """Returns a small progressive JPEG with one pass over all blocks per scan.

    Each of its Huffman tables has one code: "0" is a DC difference of 0, or the end of
    16,384 blocks for AC.
    """
    blocks = (-(-side // 8)) ** 2

    def segment(marker: int, body: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body

    def scan(first: int, last: int, num_bits: int) -> bytes:
        head = bytes([1, 1, 0, first, last, 0])
        return segment(0xDA, head) + bytes(-(-num_bits // 8))

    lengths = bytes([1]) + bytes(15)
    tables = segment(0xDB, b"\0" + bytes([1] * 64))
    tables += segment(0xC4, b"\x00" + lengths + b"\x00")
    tables += segment(0xC4, b"\x10" + lengths + b"\xe0")
    frame = segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0")
    more = scan(1, 63, 15 * -(-blocks // 16_384))
    return SOI + tables + frame + scan(0, 0, blocks) + more * num_scans + EOI


def _encoded(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()
