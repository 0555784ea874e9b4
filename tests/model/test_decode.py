"""Pages of odd and hostile files: white paper is white, and a bound holds on memory and time."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import zlib
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pypdfium2
import pytest
from PIL import Image

from colqwen_lab.model import decode
from colqwen_lab.model.decode import Decoder

SIZE = 24  # of a page in pixels: paper, with ink in its left third


def read(source: str | bytes, number: int = 0) -> Image.Image | int | str:
    """What the child answers."""
    return decode._answer(source, number)


def ifd(values: dict[int, int | tuple[int, ...]], at: int, last: int = 0) -> bytes:
    """A TIFF's directory of 32-bit values at offset `at`, with longer ones behind it."""
    entries, behind = b"", b""
    for tag, value in sorted(values.items()):
        numbers = value if isinstance(value, tuple) else (value,)
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        if len(packed) > 4:
            packed, behind = (
                struct.pack("<I", at + 6 + 12 * len(values) + len(behind)),
                behind + packed,
            )
        entries += struct.pack("<HHI", tag, 4, len(numbers)) + packed
    return struct.pack("<H", len(values)) + entries + struct.pack("<I", last) + behind


def tiff(
    photometric: int, bits: int, ink: int, paper: int, packed: bool = False, **more: int
) -> bytes:
    """A grey TIFF of SIZE pixels squared; `more` are tags by `t` and their number."""
    row = [ink] * (SIZE // 3) + [paper] * (SIZE - SIZE // 3)
    if bits >= 16:
        pixels = struct.pack(f"<{SIZE}{'H' if bits == 16 else 'I'}", *row)
    else:
        pixels = int("".join(f"{value:0{bits}b}" for value in row), 2).to_bytes(SIZE * bits // 8)
    data = pixels * SIZE
    data = zlib.compress(data) if packed else data
    tags = {256: SIZE, 257: SIZE, 258: bits, 259: 8 if packed else 1, 262: photometric, 273: 8}
    tags |= {277: 1, 278: SIZE, 279: len(data)} | {int(k[1:]): v for k, v in more.items()}
    data += b"\0" * (len(data) % 2)
    at = 8 + len(data)
    return b"II*\0" + struct.pack("<I", at) + data + ifd(tags, at)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
@pytest.mark.parametrize("photometric", [0, 1])
def test_white_paper_is_white(photometric: int, bits: int, packed: bool) -> None:
    white = 2**bits - 1
    ink, paper = (white, 0) if photometric == 0 else (0, white)
    page = read(tiff(photometric, bits, ink, paper, packed))
    if (photometric, bits) == (0, 12):
        assert page == "it is not a PDF, and no image that Pillow reads"
        return
    assert isinstance(page, Image.Image)
    assert np.unique(np.asarray(page)[:, : SIZE // 3]).tolist() == [0]
    assert np.unique(np.asarray(page)[:, SIZE // 3 :]).tolist() == [255]


def test_grey_between_is_scaled() -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for format in ("PNG", "TIFF"):
        file = BytesIO()
        Image.fromarray(values).save(file, format)
        grey = np.asarray(read(file.getvalue()))
        assert grey[..., 0].ravel().tolist() == list(range(256))
    assert np.unique(np.asarray(read(tiff(1, 12, 2048, 4095)))).tolist() == [128, 255]
    pgm = b"P5 2 1 1023\n" + struct.pack(">HH", 0, 1023)
    assert np.asarray(read(pgm))[0, :, 0].tolist() == [0, 255]


# One bit: its header, one pixel wide and high, and three empty parts.
PSD = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 1, 1, 1, 1, 0) + bytes(15)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (tiff(1, 16, 0, 4095), ": 0 to 4095 where 16 bits allow 65535"),
        (tiff(0, 16, 4095, 0), ": 0 to 4095 where 16 bits allow 65535"),
        (tiff(1, 32, 0, 255), " in a TIFF of mode I, 32 bits"),
        (tiff(1, 16, 0, 32767, t339=2), " in a TIFF of mode I, 16 bits"),
        (tiff(1, 8, 0, 127, t339=2), " in a TIFF of mode L, 8 bits"),
        (tiff(1, 32, 0, 0x3F800000, t339=3), " in a TIFF of mode F, 32 bits"),
        # Another tag in place of the photometric meaning.
        (tiff(1, 8, 0, 255).replace(b"\6\1\4\0", b"\7\1\4\0"), " in a TIFF of mode L, 8 bits"),
        (PSD + bytes(2), " in a PSD of mode 1, 8 bits"),
    ],
)
def test_an_unknown_white_is_named(file: bytes, reason: str) -> None:
    assert read(file) == f"the value of white is unknown{reason}"


def test_colours_of_16_bits_that_hold_12_are_named() -> None:
    data = struct.pack("<3H", 4095, 4095, 0) * SIZE * SIZE
    tags = {256: SIZE, 257: SIZE, 258: (16,) * 3, 259: 1, 262: 2, 273: 8, 277: 3, 278: SIZE}
    at = 8 + len(data)
    for value, expected in ((data, "the value of white is unknown: 0 to 15"), (data[::-1], "")):
        file = b"II*\0" + struct.pack("<I", at) + value + ifd(tags | {279: len(data)}, at)
        answer = read(file)
        assert answer.startswith(expected) if expected else isinstance(answer, Image.Image)


def pdf(*objects: bytes) -> bytes:
    """A PDF of these objects; the first is the catalog."""
    file, offsets = b"%PDF-1.7\n", []
    for number, value in enumerate(objects, 1):
        offsets.append(len(file))
        file += b"%d 0 obj\n%b\nendobj\n" % (number, value)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    end = b"trailer<</Root 1 0 R/Size %d>>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, len(file))
    return file + b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1) + table + end


def stream(entries: bytes, content: bytes) -> bytes:
    return b"<<%b/Length %d>>stream\n%b\nendstream" % (entries, len(content), content)


CATALOG, FORM = b"<</Type/Catalog/Pages 2 0 R>>", b"/Type/XObject/Subtype/Form/BBox[0 0 72 72]"


def self_drawing() -> bytes:
    """The second of three pages holds a form that draws itself twice."""
    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 72 72]%b>>"
    resources = b"/Resources<</XObject<</F 7 0 R>>>>"
    return pdf(
        CATALOG,
        b"<</Type/Pages/Kids[3 0 R 4 0 R 5 0 R]/Count 3>>",
        page % b"",
        page % (b"/Contents 6 0 R" + resources),
        page % b"",
        stream(b"", b"/F Do"),
        stream(FORM + resources, b"/F Do /F Do"),
    )


def test_form_fields_and_annotations_are_part_of_a_page(tmp_path: Path) -> None:
    note = b"<</Type/Annot/Subtype/%b/F 4/Rect[%b]/AP<</N 8 0 R>>%b>>"
    fields = b"/AcroForm<</Fields[4 0 R 6 0 R]/DR<</Font<</Helv 7 0 R>>>>>>"
    path = tmp_path / "form.pdf"
    path.write_bytes(
        pdf(
            CATALOG[:-2] + fields + b">>",
            b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 72 72]/Annots[4 0 R 5 0 R 6 0 R]>>",
            note % (b"Widget", b"0 48 24 72", b"/FT/Tx/T(a)/V()"),
            note % (b"Stamp", b"48 48 72 72", b""),
            b"<</Type/Annot/Subtype/Widget/FT/Tx/T(b)/V(WWWW)/F 4/Rect[0 0 72 24]"
            b"/DA(/Helv 20 Tf 0 g)>>",
            b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
            stream(FORM, b"1 0 0 rg 0 0 72 72 re f"),
        )
    )
    page = np.asarray(read(str(path)))
    assert page[25, [25, 125]].tolist() == [[255, 0, 0]] * 2, "a button and a stamp"
    assert page[25, 75].tolist() == [255] * 3
    assert 0.1 < (page[100:] < 128).all(-1).mean() < 0.6, "the text of a field"


def test_an_xfa_form_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.pdf").write_bytes(
        pdf(
            b"<</Type/Catalog/Pages 2 0 R/NeedsRendering true/AcroForm<</Fields[]/XFA 4 0 R>>>>",
            b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 72 72]>>",
            stream(b"", b"<xdp/>"),
        )
    )
    assert "XFA form" in str(read(str(tmp_path / "x.pdf")))


def test_a_page_that_takes_all_memory_leaves_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(self_drawing())
    decoder = Decoder(memory_bytes=2**28)
    assert decoder.count(str(tmp_path / "a.pdf")) == 3
    first = decoder._child.pid
    assert decoder.page(str(tmp_path / "a.pdf"), 0).size == (150, 150)
    with pytest.raises(ValueError, match="needs more than 256 MiB, or crashes its decoder"):
        decoder.page(str(tmp_path / "a.pdf"), 1)
    assert decoder.page(str(tmp_path / "a.pdf"), 2).size == (150, 150)
    second = decoder._child
    assert first != second.pid
    decoder.close()
    assert second.returncode is not None


def test_a_page_that_takes_too_long_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(self_drawing())
    decoder = Decoder(page_s=0.2)
    with pytest.raises(ValueError, match=r"it takes over 0.2 s"):
        decoder.page(str(tmp_path / "a.pdf"), 1)


def test_a_decoder_ends_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(self_drawing())
    decoder = Decoder()
    assert decoder.page(str(tmp_path / "a.pdf")).size == (150, 150)
    decoder._connection.send((str(tmp_path / "a.pdf"), 1))
    with pytest.raises(subprocess.TimeoutExpired):
        decoder._child.wait(0.2)
    decoder._connection.close()
    assert decoder._child.wait(2) == -signal.SIGIO


def test_after_ctrl_c_no_page_is_another_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for side in (1, 2):
        Image.new("L", (side, side)).save(tmp_path / f"{side}.png")
    decoder, receive = Decoder(), Connection.recv

    def interrupted(connection: Connection) -> None:
        raise KeyboardInterrupt

    decoder.count(str(tmp_path / "1.png"))
    monkeypatch.setattr(Connection, "recv", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoder.page(str(tmp_path / "1.png"))
    monkeypatch.setattr(Connection, "recv", receive)
    assert decoder.page(str(tmp_path / "2.png")).size == (2, 2)


def test_what_is_no_plain_file_and_postscript_are_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    for make, reason in (
        (lambda: os.mkfifo(path), "not a regular file"),
        (lambda: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda: path.symlink_to(path), "symbolic links"),
        (lambda: (path.touch(), os.truncate(path, 2**40)), "larger than 4 GiB"),
        (
            lambda: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
            "no image",
        ),
    ):
        make()
        assert reason in str(read(str(path)))
        path.unlink()


@pytest.mark.parametrize(
    ("name", "content", "page"),
    [
        ("pdf.png", "pdf", (150, 150)),
        ("png.pdf", "png", (3, 2)),
        ("png.heic", "png", (3, 2)),
        ("late.pdf", "late", (150, 150)),
        ("raw.dng", "tiff", "Pillow does not read .dng"),
        ("heic.heic", "heic", "it is not a PDF, and no image that Pillow reads"),
        ("text.pdf", "heic", "it is not a PDF, and no image that Pillow reads"),
        ("none.pdf", "none", "it holds no page"),
        ("empty.pdf", "empty", "it is empty"),
    ],
)
def test_contents_say_what_a_file_is(
    name: str, content: str, page: tuple[int, int] | str, tmp_path: Path
) -> None:
    one = pdf(
        CATALOG,
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 72 72]>>",
    )
    contents = {"pdf": one, "late": b"\n\n" + one, "heic": b"\0\0\0\x18ftypheic", "empty": b""}
    for format in ("png", "tiff"):
        file = BytesIO()
        Image.new("L", (3, 2)).save(file, format)
        contents[format] = file.getvalue()
    file = BytesIO()
    pypdfium2.PdfDocument.new().save(file)
    contents["none"] = file.getvalue()
    (tmp_path / name).write_bytes(contents[content])
    answer = read(str(tmp_path / name))
    assert (answer.size if isinstance(answer, Image.Image) else answer) == page
    if name == "pdf.png":
        assert isinstance(read(one), Image.Image), "also the bytes of a data set"


@pytest.mark.parametrize(
    ("dpi", "turned", "size"),
    [
        ((204, 98), 1, (17, 42)),
        ((204, 196), 1, (17, 21)),
        ((98, 204), 1, (35, 20)),
        ((204, 98), 6, (42, 17)),
        ((200, 200), 1, (17, 20)),
        ((1, 72), 1, (17, 20)),
        ((0, 72), 1, (17, 20)),
    ],
)
@pytest.mark.parametrize("format", ["tiff", "png"])
def test_a_fax_has_square_pixels(
    format: str, dpi: tuple[int, int], turned: int, size: tuple[int, int]
) -> None:
    file, exif = BytesIO(), Image.Exif()
    exif[274] = turned
    Image.new("1", (17, 20)).save(file, format, dpi=dpi, exif=exif)
    page = read(file.getvalue())
    assert isinstance(page, Image.Image)
    assert page.size == size


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_thumbnails_and_masks_are_no_pages_and_a_bad_page_leaves_the_others() -> None:
    file = b"II*\0" + struct.pack("<I", 72) + bytes(range(64))
    kinds = [{}, {254: 1}, {262: 99}, {254: 4}, {273: 8 + 32, 257: 4, 278: 4, 279: 32}]
    tags = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: 64}
    for number, other in enumerate(kinds):
        size = len(ifd(tags | other, 0))
        last = number == len(kinds) - 1
        file += ifd(tags | other, len(file), 0 if last else len(file) + size)
    assert decode._answer(file) == 3
    first, second, third = (read(file, number) for number in range(3))
    assert (first.size, third.size) == ((8, 8), (8, 4))
    assert second == "unknown pixel mode"
    broken = file[:-4] + struct.pack("<I", len(file) - 1)
    assert decode._answer(broken) == 4
    assert [type(read(broken, number)) for number in (2, 3)] == [Image.Image, str]


def test_a_decoder_starts_again_where_the_system_started_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, decoder = tmp_path / "a.png", Decoder()
    Image.new("RGB", (40, 40)).save(path)

    def none(*_: object, **__: object) -> None:
        raise OSError(11, "no more processes")

    with monkeypatch.context() as patch:
        patch.setattr(decode.subprocess, "Popen", none)
        with pytest.raises(OSError, match="no more"):
            decoder.count(str(path))
    decoder.close()
    assert decoder.count(str(path)) == 1
    decoder.close()
