"""Pages of images and PDFs as RGB, decoded in a child process of bounded memory and time.

A hostile file can crash a decoder or take all memory. The child runs this file as a script, so it
imports nothing of the lab.
"""

from __future__ import annotations

import fcntl
import math
import os
import resource
import signal
import stat
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from io import BytesIO, FileIO
from itertools import count
from multiprocessing.connection import Connection, Pipe
from typing import Any

import numpy as np
import pypdfium2
from PIL import Image, ImageOps, UnidentifiedImageError

DPI = 150
# The published processor takes no image with one side more than 200 times the other.
MOST_TIMES = 200
# The bounds on a page, and on a file.
MEMORY_BYTES, PAGE_S, FILE_BYTES = 2**31, 30, 2**32
# Photos that are a TIFF, of which Pillow reads the preview.
RAW = (".dng", ".cr2", ".nef", ".arw", ".pef")
# Formats of several pages, and those whose 16-bit grey has a known white.
PAGED, DEEP = ("TIFF", "DCX"), (None, "TIFF", "PNG", "PPM", "JPEG2000")
# Tags of a TIFF. Bits 1 and 4 of the subfile type mark a thumbnail and a mask, which are no pages.
SUBFILE, BITS, PHOTOMETRIC, ORIENTATION, SAMPLE_FORMAT = 254, 258, 262, 274, 339
# Pixels this many times as high as wide, or less, are believed.
MOST_OBLONG = 4
THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # each takes address space

Source = str | bytes  # a path, or the bytes of an image


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raises ValueError for a device, a pipe or a file beyond 4 GiB; OSError without a file."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    if status.st_size > FILE_BYTES:
        raise ValueError(f"it is larger than {FILE_BYTES >> 30} GiB")


class Decoder:
    """A child process that decodes pages. It starts on the first one, and again after a crash."""

    def __init__(self, memory_bytes: int = MEMORY_BYTES, page_s: float = PAGE_S) -> None:
        self.memory_bytes, self.page_s = memory_bytes, page_s
        self._connection: Connection | None = None

    def count(self, source: Source) -> int:
        """The number of pages. Raises ValueError with the reason if the file cannot be read."""
        return self._answer(source)

    def page(self, source: Source, number: int = 0) -> Image.Image:
        """A page as RGB. Raises ValueError with the reason if it cannot be read."""
        return self._answer(source, number)

    def close(self) -> None:
        """End the child; the next page starts another."""
        if self._connection:
            self._end()
            self._connection = None

    def _answer(self, *question: Any) -> Any:
        connection = self._connection or self._start()
        try:
            connection.send(question)
            answer = connection.recv()
        except (EOFError, OSError):
            late = self._child.wait() == -signal.SIGALRM
            self.close()
            if late:
                raise ValueError(f"it takes over {self.page_s} s") from None
            most = self.memory_bytes >> 20
            raise ValueError(f"it needs more than {most} MiB, or crashes its decoder") from None
        except BaseException:  # such as Ctrl-C: the next question must not get this answer
            self.close()
            raise
        if isinstance(answer, str):
            raise ValueError(answer)
        return answer

    def _start(self) -> Connection:
        connection, theirs = Pipe()
        arguments = map(str, (theirs.fileno(), self.memory_bytes, self.page_s))
        path = os.pathsep.join(filter(None, sys.path))
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-P", __file__, *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | THREADS | {"PYTHONPATH": path},
            )
        self._end = weakref.finalize(self, _end, self._child, connection)
        self._connection = connection  # last: another thread may close the decoder
        return connection


def _end(child: subprocess.Popen[bytes], connection: Connection) -> None:
    child.kill()  # a thread that waits for its answer sees the end of the pipe
    child.wait()
    connection.close()


# ---------------------------------------------------------------- the child's side


def serve(connection: Connection, memory_bytes: int, page_s: float) -> None:
    """Answers until the pipe closes; SIGALRM ends a page that takes too long."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for limit, value in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_CORE, 0)):
        with suppress(ValueError, OSError):  # a lower limit holds already; macOS has none
            resource.setrlimit(limit, (value, value))
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    pipe = connection.fileno()
    flags = fcntl.fcntl(pipe, fcntl.F_GETFL)
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    with suppress(EOFError, OSError):  # the pipe is closed
        while True:
            question = connection.recv()
            signal.setitimer(signal.ITIMER_REAL, page_s)
            # SIGIO ends a decoder whose parent closes the pipe, or ends.
            fcntl.fcntl(pipe, fcntl.F_SETFL, flags | os.O_ASYNC)
            answer = _answer(*question)
            fcntl.fcntl(pipe, fcntl.F_SETFL, flags)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send(answer)


def _answer(source: Source, number: int | None = None) -> Image.Image | int | str:
    """The number of pages, or a page; a text is the reason why there is none."""
    try:
        pages = _pages(source)
        return len(pages) if number is None else pages[number]()
    except UnidentifiedImageError:
        return "it is not a PDF, and no image that Pillow reads"
    except MemoryError:
        return "it needs more memory than a page may take"
    except Exception as error:  # decoders raise anything
        return f"{str(error) or type(error).__name__:.200}"


@lru_cache(maxsize=1)
def _pages(source: Source) -> list[Callable[[], Image.Image]]:
    """A function for each page, which returns it as RGB. Contents say what a file is."""
    if isinstance(source, bytes):
        suffix, head = "", source[:5]
    else:
        check_regular(source)
        suffix = os.path.splitext(source)[1].lower()
        with open(source, "rb") as file:  # other bytes may precede a PDF
            head = file.read(1024 if suffix == ".pdf" else 5)
    if not head:
        raise ValueError("it is empty")
    if b"%PDF-" in head:
        return _pdf_pages(source)
    with _opened(source) as image:
        if image.format == "TIFF" and suffix in RAW:
            raise ValueError(f"Pillow does not read {suffix}")
        frames = _frames(image) if image.format in PAGED else [0]
    if not frames:
        raise ValueError("it holds no page")
    return [partial(_frame, source, number) for number in frames]


def _opened(source: Source) -> Image.Image:
    """An image of any format but PostScript, which Pillow hands to another program."""
    Image.init()
    formats = [name for name in Image.ID if name != "EPS"]
    return Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=formats)


def _frames(image: Image.Image) -> list[int]:
    """The numbers of the frames that are pages, or cannot be read."""
    frames = []
    for number in count():
        try:
            image.seek(number)
            if not getattr(image, "tag_v2", {}).get(SUBFILE, 0) & 5:
                frames.append(number)
        except EOFError:
            break
        except Exception:  # reading it gives the reason
            frames.append(number)
            if image.tell() != number:  # nothing says where the next frame is
                break
    return frames


def _frame(source: Source, number: int) -> Image.Image:
    with _opened(source) as image:
        if number:  # a PSD counts from 1
            image.seek(number)
        return to_rgb(image)


def _pdf_pages(source: Source) -> list[Callable[[], Image.Image]]:
    # A path need not be UTF-8, as the library takes it to be.
    file = source if isinstance(source, bytes) else FileIO(source)
    try:
        document = pypdfium2.PdfDocument(file, autoclose=True)
    except pypdfium2.PdfiumError as error:
        no_page = "Success" in str(error)  # PDFium's reason for it
        raise ValueError("it holds no page" if no_page else str(error)) from None
    if document.get_formtype() == pypdfium2.raw.FORMTYPE_XFA_FULL:
        raise ValueError("its pages are an XFA form, which only some PDF readers draw")
    document.init_forms()
    return [partial(_pdf_page, document, number) for number in range(len(document))]


def _pdf_page(document: pypdfium2.PdfDocument, number: int) -> Image.Image:
    page = document[number]
    width, height = (size * DPI / 72 for size in page.get_size())
    if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
        pixels = f"{width:.0f} x {height:.0f} pixels at {DPI} dpi"
        raise ValueError(f"a page of {pixels} is beyond Pillow's limit")
    return to_rgb(page.render(scale=DPI / 72).to_pil())


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any of Pillow's modes as upright RGB, on white where it is transparent.

    12-bit and 16-bit grey is scaled to 8 bits, a fax to square pixels. Raises ValueError if the
    value of white is unknown, or one side is more than 200 times the other.
    """
    tags, grey = getattr(image, "tag_v2", {}), image.mode[0] == "I"
    bits = max(tags.get(BITS, (16 if grey else 8,)))
    signed = image.mode == "F" or tags.get(SAMPLE_FORMAT, (1,))[0] in (2, 3)
    # A black bit of a PSD is 1; Pillow takes it for white.
    inverse = (tags and PHOTOMETRIC not in tags) or (image.mode, image.format) == ("1", "PSD")
    if signed or inverse or bits > 16 or (grey and image.format not in DEEP):
        kind = f"{image.format or 'image'} of mode {image.mode}"
        raise ValueError(f"the value of white is unknown in a {kind}, {bits} bits")
    across, down = map(float, image.info.get("dpi", (1, 1)))
    if image.getexif().get(ORIENTATION, 1) > 4:  # it lies on its side
        across, down = down, across
    image = ImageOps.exif_transpose(image)
    if bits > 8:
        # Where the highest bit is never set, the values may have fewer bits.
        white = 2**bits - 1 if grey else 255
        values = np.asarray(image if grey else image.getextrema())
        if values.min() < 0 or values.max() > white or 0 < values.max() <= white // 2:
            found = f"{values.min()} to {values.max()} where {bits} bits allow {white}"
            raise ValueError(f"the value of white is unknown: {found}")
        if grey:
            eight_bit = np.rint(np.linspace(0, 255, white + 1)).astype(np.uint8)
            eight_bit = eight_bit if tags.get(PHOTOMETRIC, 1) else eight_bit[::-1]
            image = Image.fromarray(eight_bit[values])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    oblong = across / down if across and down else 1
    if 1 / MOST_OBLONG <= oblong <= MOST_OBLONG and abs(oblong - 1) > 0.01:
        width, height = image.width * max(1, 1 / oblong), image.height * max(1, oblong)
        image = image.resize((round(width), round(height)))
    if max(image.size) > MOST_TIMES * min(image.size):
        size = f"{image.width} x {image.height} pixels"
        raise ValueError(f"{size}: one side is more than {MOST_TIMES} times the other")
    image.info.clear()
    return image


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), int(sys.argv[2]), float(sys.argv[3]))
