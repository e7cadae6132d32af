"""Samples from folders, tables and webdatasets."""

import io
import tarfile

import pytest

from vitrail.runtime.datasets import Sample, read_samples
from vitrail.runtime.errors import InvalidRequestError


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_a_folder_gives_its_images_in_order_with_labels_and_captions(tmp_path):
    for name in ("dog/b.JPG", "dog/a.png", "cat/x/y.webp", "top.gif", "dog/notes.md", "zoo.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "dog/a.txt").write_text(" a dog \n\none dog\n", encoding="utf-8")
    assert list(read_samples(tmp_path)) == [
        Sample("cat/x/y.webp", tmp_path / "cat/x/y.webp", label="cat"),
        Sample("dog/a.png", tmp_path / "dog/a.png", label="dog", captions=("a dog", "one dog")),
        Sample("dog/b.JPG", tmp_path / "dog/b.JPG", label="dog"),
        Sample("top.gif", tmp_path / "top.gif"),
        Sample("zoo.mp4", tmp_path / "zoo.mp4", is_video=True),
    ]


@pytest.mark.parametrize(("name", "comma"), [("data.csv", ","), ("data.tsv", "\t")])
def test_rows_of_one_image_are_one_sample(tmp_path, name, comma):
    rows = [
        ("image", "caption", "label", "more"),
        ("b.jpg", '"one, two"', "7", "x"),
        ("a/c.png", "一只猫", "", ""),
        ("b.jpg", "three", "7", ""),
        ("d.png", "", "9", ""),
    ]
    (tmp_path / name).write_text("\ufeff" + "\n".join(map(comma.join, rows)), encoding="utf-8")
    assert list(read_samples(tmp_path / name)) == [
        Sample("b.jpg", tmp_path / "b.jpg", label="7", captions=("one, two", "three")),
        Sample("a/c.png", tmp_path / "a/c.png", captions=("一只猫",)),
        Sample("d.png", tmp_path / "d.png", label="9"),
    ]


def test_a_table_of_videos_names_them_so(tmp_path):
    (tmp_path / "v.csv").write_text("video,caption\nclip.mp4,a clip\n")
    assert list(read_samples(tmp_path / "v.csv")) == [
        Sample("clip.mp4", tmp_path / "clip.mp4", is_video=True, captions=("a clip",))
    ]


def test_members_of_one_name_are_one_sample_of_a_webdataset(tmp_path):
    write_tar(
        tmp_path / "1.tar",
        {"s/0002.jpg": b"two", "s/0002.txt": "zwei\n二".encode(), "s/0003.cls": b"5\n", "s/0003.PNG": b"three"},
    )
    write_tar(tmp_path / "0.tar", {"0001.mp4": b"one", "0001.txt": b"eins", "0001.json": b"{}", "readme": b"?"})
    expected = [
        Sample("0001.mp4", b"one", is_video=True, captions=("eins",)),
        Sample("s/0002.jpg", b"two", captions=("zwei", "二")),
        Sample("s/0003.png", b"three", label="5"),
    ]
    assert list(read_samples(tmp_path)) == expected
    assert list(read_samples(tmp_path / "1.tar")) == expected[1:]


def test_a_webdataset_is_read_as_it_is_asked_for(tmp_path):
    write_tar(tmp_path / "0.tar", {f"{number}.jpg": bytes(10) for number in range(3)})
    (tmp_path / "1.tar").write_bytes(b"no tar")
    samples = read_samples(tmp_path)
    assert [next(samples).name for _ in range(3)] == ["0.jpg", "1.jpg", "2.jpg"]
    with pytest.raises(InvalidRequestError, match=r"1\.tar: not readable as a tar file"):
        next(samples)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"path,caption\na.jpg,b\n", "no column named image or video"),
        ("a.csv", b"", "no column named image or video"),
        ("a.csv", b"image,caption\n,b\n", "row 2 names no image"),
        ("a.csv", b"image,caption\n\xff\xfe,b\n", "not readable as a table"),
        ("a.csv", b'image,caption\n"a.jpg,b\n', "not readable as a table"),
        ("a.zip", b"", "a folder, a .csv or .tsv table or a .tar is expected"),
        ("nowhere", None, "no such file or folder"),
    ],
)
def test_what_is_no_data_set_is_said_so(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidRequestError) as error:
        list(read_samples(tmp_path / name))
    assert message in str(error.value)
