"""`runtime.pdf`: pages at the size asked for, checked before they are drawn."""

import io
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vitrail.runtime import pdf
from vitrail.runtime.errors import InvalidRequestError, UnsupportedError
from vitrail.runtime.image import ImageLimits
from vitrail.runtime.pdf import render_pages

pytest.importorskip("pypdfium2")

COLOURS = ["red", "lime", "blue"]


def encoded(*sizes, resolution=72):
    """A PDF with a page of each size, in units of 1/72 inch, in turn red, lime and blue with a black left half."""
    pages = []
    for number, size in enumerate(sizes):
        page = Image.new("RGB", size, COLOURS[number % 3])
        ImageDraw.Draw(page).rectangle((0, 0, size[0] // 2 - 1, size[1]), fill="black")
        pages.append(page)
    buffer = io.BytesIO()
    pages[0].save(buffer, "PDF", save_all=True, append_images=pages[1:], resolution=resolution)
    return buffer.getvalue()


def written(*objects, trailer=""):
    """A PDF of numbered objects, the first of which is the catalogue."""
    data, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    size = len(objects) + 1
    tail = f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer\n<< /Size {size} /Root 1 0 R {trailer} >>\n"
    return data + f"{tail}startxref\n{len(data)}\n%%EOF\n".encode()


CATALOGUE = "<< /Type /Catalog /Pages 2 0 R >>"
ONE_PAGE = (CATALOGUE, "<< /Type /Pages /Kids [3 0 R] /Count 1 >>")


def page_of(width, height):
    return written(*ONE_PAGE, f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {width} {height}] >>")


def colour_names(images):
    return [COLOURS[int(np.argmax(image.getpixel((image.width * 3 // 4, image.height // 2))))] for image in images]


@pytest.mark.parametrize(("dpi", "size"), [(72, (100, 60)), (144, (200, 120)), (36, (50, 30)), (100, (139, 84))])
def test_a_page_has_the_size_of_its_resolution(dpi, size, tmp_path):
    path = tmp_path / "page.pdf"
    path.write_bytes(encoded((100, 60)))
    for source in (path, str(path), path.read_bytes()):
        (image,) = render_pages(source, dpi)
        assert image.size == size
        assert image.mode == "RGB"


def test_pages_show_what_was_drawn_in_order():
    images = render_pages(encoded((60, 40), (40, 60), (50, 50)))
    assert [image.size for image in images] == [(120, 80), (80, 120), (100, 100)]
    assert colour_names(images) == COLOURS
    assert max(images[0].getpixel((10, 40))) < 8  # the left half


def test_chosen_pages_come_in_the_order_asked_for():
    data = encoded((60, 40), (60, 40), (60, 40))
    assert colour_names(render_pages(data, pages=[3, 1])) == ["blue", "red"]
    assert colour_names(render_pages(data, pages=[2, 2], max_pages=2)) == ["lime", "lime"]


def test_an_empty_page_is_white():
    (image,) = render_pages(page_of(20, 10), 72)
    assert image.size == (20, 10)
    assert image.getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize("number", [0, -1, 4])
def test_a_page_that_is_not_there_is_refused(number):
    with pytest.raises(InvalidRequestError, match=rf"^pdf: no page {number} in a file of 3$"):
        render_pages(encoded((60, 40), (60, 40), (60, 40)), pages=[1, number])


def test_more_pages_than_the_limit_are_refused():
    with pytest.raises(InvalidRequestError, match=r"^report: 3 pages exceed the limit of 2, choose some$"):
        render_pages(encoded((60, 40), (60, 40), (60, 40)), max_pages=2, name="report")


@pytest.mark.parametrize("dpi", [0, -72, 0.5, 2401, float("nan"), float("inf")])
def test_a_senseless_resolution_is_refused(dpi):
    with pytest.raises(InvalidRequestError, match=r"^pdf: dpi must be between 1 and 2400"):
        render_pages(encoded((60, 40)), dpi)


def test_page_sizes_are_checked_before_the_first_page_is_drawn(monkeypatch):
    import pypdfium2

    monkeypatch.setattr(pypdfium2.PdfPage, "render", lambda *arguments, **keywords: pytest.fail("drawn"))
    with pytest.raises(InvalidRequestError, match=r"^pdf: page 1 at 144 dpi: 28800x28800 exceeds the limit"):
        render_pages(page_of(14400, 14400))
    with pytest.raises(InvalidRequestError, match=r"^pdf: page 1 at 72 dpi: 10x2010 exceeds the aspect ratio limit"):
        render_pages(page_of(10, 2010), 72)
    with pytest.raises(InvalidRequestError, match=r"^pdf: page 2 at 72 dpi: 60x41 exceeds the limit of 2400 pixels"):
        render_pages(encoded((60, 40), (60, 41)), 72, limits=ImageLimits(max_pixels=2400))
    monkeypatch.setattr(pdf, "MAX_RENDERED_PIXELS", 2 * 2400 - 1)
    with pytest.raises(InvalidRequestError, match=r"^pdf: 2 pages at 72 dpi exceed 4799 pixels"):
        render_pages(encoded((60, 40), (60, 40)), 72)


def test_an_encrypted_file_is_refused_as_such():
    key = "00" * 32
    data = written(
        *ONE_PAGE,
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 20 10] >>",
        f"<< /Filter /Standard /V 1 /R 2 /O <{key}> /U <{key}> /P -4 >>",
        trailer=f"/Encrypt 4 0 R /ID [<{key}> <{key}>]",
    )
    with pytest.raises(InvalidRequestError, match=r"^pdf: cannot decode: the file is encrypted$"):
        render_pages(data)


@pytest.mark.parametrize("data", [b"", b"abc", b"%PDF-1.4\n", b"%PDF-1.4\n%%EOF", bytes(500), encoded((60, 40))[:200]])
def test_what_is_no_pdf_cannot_be_decoded(data):
    with pytest.raises(InvalidRequestError, match=r"^pdf 1: cannot decode: not a readable PDF$"):
        render_pages(data, name="pdf 1")


def test_a_file_without_pages_is_refused():
    with pytest.raises(InvalidRequestError, match=r"^pdf: "):
        render_pages(written(CATALOGUE, "<< /Type /Pages /Kids [] /Count 0 >>"))


def test_a_page_that_cannot_be_loaded_is_refused():
    with pytest.raises(InvalidRequestError, match=r"^pdf: "):
        render_pages(written(*ONE_PAGE, "<< /Type /Nothing >>"), pages=[1])


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path):
    (tmp_path / "empty.pdf").touch()
    for source, reason in (
        (tmp_path / "none.pdf", "no such file"),
        (tmp_path, "is a directory"),
        (tmp_path / "empty.pdf", "is empty"),
        ("https://example.org/a.pdf", "URLs are not fetched here"),
    ):
        with pytest.raises(InvalidRequestError, match=rf"^pdf: .*{reason}"):
            render_pages(source)


def test_threads_may_render_at_the_same_time():
    data = encoded((60, 40), (60, 40), (60, 40))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: colour_names(render_pages(data)), range(16)))
    assert results == [COLOURS] * 16


def test_without_pypdfium2_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'vitrail\[pdf\]'"):
        render_pages(b"")
