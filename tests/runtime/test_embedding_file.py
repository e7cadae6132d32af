"""An .npz that is written piece by piece: whatever a run was killed at, the next one comes to the same bytes."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.runtime.embedding_file import EmbeddingFile
from vitrail.runtime.errors import InvalidRequestError

NAMES = [f"folder/{number}.jpg" for number in range(7)] + ["bild-ü.png", "一.png"]
SETTINGS = {"model": "m", "mode": "c"}
DIM = 3


def outcome(index):
    return f"image {index + 1}: cannot decode" if index in (2, 7) else np.full(DIM, index, np.float32)


def write(path, upto=9, size=2, **changes):
    """Go on with the file as far as `upto`, in batches; returns it."""
    file = EmbeddingFile(path, NAMES, SETTINGS | changes, DIM)
    while file.done < upto:
        file.append([outcome(index) for index in range(file.done, min(file.done + size, len(NAMES)))])
    return file


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "e.npz"
    write(path).finish()
    return path


def test_the_file_holds_rows_for_what_could_be_read_and_reasons_for_the_rest(whole):
    good = [index for index in range(len(NAMES)) if index not in (2, 7)]
    with np.load(whole, allow_pickle=False) as found:
        assert found["embeddings"].dtype == np.float32
        assert found["embeddings"].tolist() == [[index] * DIM for index in good]
        assert found["names"].tolist() == [NAMES[index] for index in good]
        assert found["failed"].tolist() == [NAMES[2], NAMES[7]]
        assert found["errors"].tolist() == ["image 3: cannot decode", "image 8: cannot decode"]
        assert json.loads(str(found["settings"][0])) == SETTINGS
    assert [path.name for path in whole.parent.iterdir()] == ["e.npz"]


@settings(max_examples=40)  # every batch waits for the disk
@given(st.data())
def test_a_run_that_was_cut_anywhere_goes_on_to_the_same_bytes(whole, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "e.npz"
        write(path, data.draw(st.integers(0, len(NAMES)), label="written"))
        partial = path.with_name("e.npz.partial")
        # A crash may keep any beginning of either file.
        for name in ("rows.f32", "progress.jsonl"):
            length = (partial / name).stat().st_size
            kept = data.draw(st.integers(0, length), label=name)
            with (partial / name).open("rb+") as file:
                file.truncate(kept)
        write(path).finish()
        assert path.read_bytes() == whole.read_bytes()
        assert not partial.exists()


def test_rows_behind_the_last_whole_line_are_thrown_away(tmp_path, whole):
    path = tmp_path / "e.npz"
    write(path, 4)
    partial = tmp_path / "e.npz.partial"
    with (partial / "rows.f32").open("ab") as rows, (partial / "progress.jsonl").open("ab") as progress:
        rows.write(b"\x07" * 17)
        progress.write(b'{"done": 6, "rows"')
    file = write(path)
    assert file.failed == {2: "image 3: cannot decode", 7: "image 8: cannot decode"}
    file.finish()
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(("change", "message"), [({"mode": "g"}, "mode='c', not 'g'"), ({"new": 1}, "new=None, not 1")])
def test_other_settings_do_not_go_on_with_a_file(tmp_path, change, message):
    write(tmp_path / "e.npz", 4)
    with pytest.raises(InvalidRequestError, match=message):
        write(tmp_path / "e.npz", **change)


def test_other_images_do_not_go_on_with_a_file(tmp_path):
    write(tmp_path / "e.npz", 4)
    with pytest.raises(InvalidRequestError, match="was begun with names="):
        EmbeddingFile(tmp_path / "e.npz", [*NAMES[:-1], "other.png"], SETTINGS, DIM)
    with pytest.raises(InvalidRequestError, match="was begun with images=9, not 8"):
        EmbeddingFile(tmp_path / "e.npz", NAMES[:-1], SETTINGS, DIM)


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "e.npz.partial").mkdir()
    (tmp_path / "e.npz.partial" / "mine").touch()
    with pytest.raises(InvalidRequestError, match="is no run to go on with"):
        write(tmp_path / "e.npz")
    assert (tmp_path / "e.npz.partial" / "mine").exists()


def test_a_file_is_finished_only_when_all_is_done(tmp_path):
    file = write(tmp_path / "e.npz", 8)
    with pytest.raises(ValueError, match="8 of 9 are done"):
        file.finish()


def test_images_that_all_fail_leave_a_file_of_no_rows(tmp_path):
    file = EmbeddingFile(tmp_path / "e.npz", ["a", "b"], {}, DIM)
    file.append(["one", "two"])
    file.finish()
    with np.load(tmp_path / "e.npz") as found:
        assert found["embeddings"].shape == (0, DIM)
        assert found["names"].shape == (0,)
