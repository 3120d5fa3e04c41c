"""What a file is, told from its first bytes: a picture that is read here, or what people send instead of one."""

from __future__ import annotations

import base64
import re
from functools import cache

from PIL import Image, features

from lingbot_rt.session.messages import shown

HEAD_BYTES = 1024
"""How much of a file is looked at."""

_MAX_NAME = 255
"""Of a file, characters."""

_READ: dict[str, tuple[str, re.Pattern[bytes]]] = {
    "PNG": ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n")),
    "JPEG": ("JPEG", re.compile(rb"\xff\xd8\xff")),
    "WebP": ("WEBP", re.compile(rb"RIFF....WEBP", re.DOTALL)),
    "GIF": ("GIF", re.compile(rb"GIF8[79]a")),
    "BMP": ("BMP", re.compile(rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL)),
    "TIFF": ("TIFF", re.compile(rb"II\x2a\0|MM\0\x2a|II\x2b\0|MM\0\x2b")),
    "AVIF": ("AVIF", re.compile(rb"....ftypavi[fs]", re.DOTALL)),
    "JPEG 2000": ("JPEG2000", re.compile(rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51")),
    "ICO": ("ICO", re.compile(rb"\0\0\x01\0(?:[^\0].|.[^\0])", re.DOTALL)),
    "CUR": ("CUR", re.compile(rb"\0\0\x02\0(?:[^\0].|.[^\0])", re.DOTALL)),
    "ICNS": ("ICNS", re.compile(rb"icns")),
    "PPM": ("PPM", re.compile(rb"P[1-6][\s#]")),
    "PCX": ("PCX", re.compile(rb"\x0a[\0\x02\x03\x04\x05][\0\x01][\x01\x02\x04\x08]")),
    "QOI": ("QOI", re.compile(rb"qoif")),
    # A TGA has no mark of its own: an identifier's length, then values that few other files have there.
    "TGA": (
        "TGA",
        re.compile(
            rb".(?:\0[\x02\x03\x0a\x0b]\0\0\0\0.|\x01[\x01\x09]....[\x0f\x10\x18\x20]).{8}[\x08\x0f\x10\x18\x20]",
            re.DOTALL,
        ),
    ),
}
"""Picture formats that are read: name -> Pillow's name, and how such files begin. None of them runs a program."""

_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"mif2", b"msf1")

_NOT_READ: tuple[tuple[str, re.Pattern[bytes]], ...] = tuple(
    (name, re.compile(pattern, re.DOTALL))
    for name, pattern in {
        "a JPEG XL picture": rb"\xff\x0a|\0\0\0\x0cJXL ",
        "a JPEG XR picture": rb"II\xbc",
        "a Photoshop picture (PSD)": rb"8BPS",
        "a GIMP picture (XCF)": rb"gimp xcf",
        "an OpenEXR picture": rb"\x76\x2f\x31\x01",
        "a Radiance HDR picture": rb"#\?R",
        "a DDS texture": rb"DDS ",
        "a camera's raw picture": rb"....ftypcrx |FUJIFILMCCD-RAW|IIRO|IIU\0",
        "a FITS picture": rb"SIMPLE  =",
        "a video (MP4 or QuickTime)": rb"....(?:ftyp|moov|mdat|wide|skip|free|pnot)",
        "a video (WebM or Matroska)": rb"\x1a\x45\xdf\xa3",
        "a video (AVI)": rb"RIFF....AVI ",
        "a video (MPEG)": rb"\0\0\x01[\xba\xb3]|G.{187}G",
        "a video (FLV)": rb"FLV\x01",
        "a video (WMV)": rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11",
        "an Ogg video or sound": rb"OggS",
        "a sound (WAV)": rb"RIFF....WAVE",
        "a sound (MP3)": rb"ID3",
        "a sound (FLAC)": rb"fLaC",
        "a PDF document": rb"\s{0,64}%PDF-",
        "a PostScript file (EPS)": rb"%!PS|\xc5\xd0\xd3\xc6",
        "a Windows metafile (WMF or EMF)": rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF",
        "a ZIP archive": rb"PK(?:\x03\x04|\x05\x06)",
        "a gzip file": rb"\x1f\x8b",
        "a Zstandard file": rb"\x28\xb5\x2f\xfd",
        "an xz file": rb"\xfd7zXZ",
        "a bzip2 file": rb"BZh[1-9]",
        "a 7-Zip archive": rb"7z\xbc\xaf",
        "a RAR archive": rb"Rar!",
        "a NumPy array": rb"\x93NUMPY",
        "an HDF5 file": rb"\x89HDF",
        "a program": rb"\x7fELF|MZ.{58}",
    }.items()
)

_TEXTS: tuple[tuple[str, re.Pattern[bytes]], ...] = tuple(
    (name, re.compile(pattern, re.IGNORECASE | re.DOTALL))
    for name, pattern in {
        "a Git LFS pointer (the picture itself was never fetched: git lfs pull)": rb"version https://git-lfs|version https://hawser",
        "a git-annex pointer (the picture itself was never fetched)": rb"/annex/objects/|\.\./.{0,200}\.git/annex/",
        "an SVG drawing": rb"(?:<\?xml|<!--|<!doctype svg).{0,900}<(?:\w+:)?svg[\s>]|<(?:\w+:)?svg[\s>]",
        "an HTML page": rb"<!doctype html|<(?:html|head|body|title|meta|script|div|p)[\s>]"
        rb"|(?:<\?xml|<!--).{0,900}<html[\s>]",
        "an XML document": rb"<\?xml|<error|<\w+[\w:-]*(?:\s[^<>]{0,400})?>",
        "a data: URL as bytes (send it as a string)": rb"data:",
        "an address as bytes (send it as a string, or the picture's bytes)": rb"(?:https?|file|blob|s3|ftp):",
        "JSON": rb"[\[{]\s*(?:[\"{\[\]}0-9-]|true|false|null)",
    }.items()
)


@cache
def formats() -> dict[str, str]:
    """The picture formats that this installation reads: name -> name of Pillow's plugin."""
    Image.init()
    optional = {"WebP": "webp", "JPEG 2000": "jpg_2000", "AVIF": "avif"}
    missing = {name for name, feature in optional.items() if feature not in features.get_supported()}
    return {name: plugin for name, (plugin, _) in _READ.items() if plugin in Image.OPEN and name not in missing}


def expected() -> str:
    """The end of a refusal: what is read."""
    return f"expected a picture: {', '.join(formats())}"


def format_of(data: bytes) -> str | None:
    """The name of the picture format among those that are known, whether or not this installation reads it."""
    head = data[:HEAD_BYTES]
    if head[4:12] in (b"ftypmif1", b"ftypmsf1", b"ftypmiaf") and b"avi" in _brands(head):
        return "AVIF"
    for name, (_, begins) in _READ.items():
        if begins.match(head) and (name != "TGA" or _as_text(head) is None):
            return name
    return None


def describe(data: bytes) -> str:
    """What a file that is no readable picture is, for a sentence: ``an HTML page``, ``2048 bytes of ...``."""
    head = data[:HEAD_BYTES]
    if not head:
        return "no bytes"
    known = format_of(data)
    if known is not None:
        return f"{'an' if known[0] in 'AI' else 'a'} {known} picture, which this server's Pillow cannot read"
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
        return "an HEIC picture (HEIF), as phones store them: convert it to JPEG"
    for name, begins in _NOT_READ:
        if begins.match(head):
            return name
    if not head.strip(b"\0"):
        return f"{len(data)} bytes that begin with zeros"
    text = _as_text(head)
    if text is None:
        return f"{len(data)} bytes of an unknown kind (they begin with {head[:8].hex(' ')})"
    plain = text.lstrip().encode()
    for name, begins in _TEXTS:
        if begins.match(plain):
            return name
    if looks_like_base64(text.strip()):
        return "base64 text (send the bytes that it stands for, or a data: URL as a string)"
    return f"text that begins with {shown(text.strip()[:40])}"


def looks_like_base64(text: str) -> bool:
    """Whether a string can be the base64 of a file. A short one must begin like a picture: it could be a path too."""
    if not re.fullmatch(r"[A-Za-z0-9+/_\-\s]+={0,2}\s*", text[: 4 * HEAD_BYTES].rstrip("=\r\n \t")):
        return False
    letters = re.sub(r"\s+", "", text[: 4 * HEAD_BYTES])
    if len(letters) > HEAD_BYTES or max(len(part) for part in letters.split("/")) > _MAX_NAME:
        return True
    letters = letters.rstrip("=").replace("-", "+").replace("_", "/")
    head = base64.b64decode(letters[: len(letters) // 4 * 4])
    return len(head) >= 12 and (format_of(head) not in (None, "TGA", "PCX") or head[4:8] == b"ftyp")


def _brands(head: bytes) -> bytes:
    """The brands in a file type box, one after the other."""
    return head[8 : min(int.from_bytes(head[:4], "big"), HEAD_BYTES)]


def _as_text(head: bytes) -> str | None:
    """The beginning of a text in UTF-8 or UTF-16; None: it is no text."""
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    text = head.decode(encoding, "replace").rstrip("�")  # the last letter may be cut
    printable = sum(letter.isprintable() or letter.isspace() for letter in text)
    return text if text and "�" not in text and printable >= 0.95 * len(text) else None
