"""Pages of PDF files as images, rendered by PDFium through pypdfium2 (extra `pdf`)."""

import math
import os
import threading
from collections.abc import Sequence

from PIL import Image

from .errors import InvalidRequestError, UnsupportedError
from .image import ImageLimits, check_size, local_file

MAX_RENDERED_PIXELS = 2**30  # of all pages of a request: 4 GiB as Pillow holds them

_PDFIUM = threading.Lock()  # PDFium is not safe to call from two threads


def render_pages(
    source: str | os.PathLike[str] | bytes,
    dpi: float = 144,
    pages: Sequence[int] | None = None,
    max_pages: int = 64,
    *,
    limits: ImageLimits | None = None,
    name: str = "pdf",
) -> list[Image.Image]:
    """RGB images of the pages on white, forms filled in; `pages` counts from 1, None means all of them.

    Every size is checked before the first page is drawn. Raises `InvalidRequestError` for a file that is broken,
    encrypted or empty, pages it does not have, more than `max_pages`, or a page whose image is beyond the limits, and
    `UnsupportedError` where pypdfium2 is not installed.
    """
    try:
        import pypdfium2
    except ImportError:
        raise UnsupportedError("reading PDF files needs pypdfium2: pip install 'vitrail[pdf]'") from None
    if not 1 <= dpi <= 2400:
        raise InvalidRequestError(f"{name}: dpi must be between 1 and 2400, got {dpi}")
    limits = limits or ImageLimits()
    data = source if isinstance(source, bytes) else local_file(source, name)
    scale = dpi / 72  # a PDF unit is 1/72 inch
    with _PDFIUM:
        try:
            with pypdfium2.PdfDocument(data) as document:
                document.init_forms()
                numbers = _page_numbers(len(document), pages, max_pages, name)
                pixels = 0
                for number in numbers:
                    width, height = (math.ceil(side * scale) for side in document.get_page_size(number - 1))
                    check_size(width, height, limits, f"{name}: page {number} at {dpi:g} dpi")
                    pixels += width * height
                if pixels > MAX_RENDERED_PIXELS:
                    raise InvalidRequestError(
                        f"{name}: {len(numbers)} pages at {dpi:g} dpi exceed {MAX_RENDERED_PIXELS} pixels, render fewer"
                    )
                return [document[number - 1].render(scale=scale).to_pil() for number in numbers]
        except InvalidRequestError:
            raise
        except pypdfium2.PdfiumError as error:
            encrypted = error.err_code == pypdfium2.raw.FPDF_ERR_PASSWORD
            reason = "the file is encrypted" if encrypted else "not a readable PDF"
            raise InvalidRequestError(f"{name}: cannot decode: {reason}") from None
        except Exception:
            raise InvalidRequestError(f"{name}: cannot decode") from None


def _page_numbers(count: int, pages: Sequence[int] | None, max_pages: int, name: str) -> list[int]:
    """The page numbers to draw, counted from 1."""
    if count == 0:
        raise InvalidRequestError(f"{name}: has no pages")
    numbers = list(range(1, count + 1)) if pages is None else list(pages)
    if len(numbers) > max_pages:
        raise InvalidRequestError(f"{name}: {len(numbers)} pages exceed the limit of {max_pages}, choose some")
    for number in numbers:
        if not 1 <= number <= count:
            raise InvalidRequestError(f"{name}: no page {number} in a file of {count}")
    return numbers
