"""A checkpoint that is written piece by piece, survives being killed, and takes its place only when it is whole.

Beside `FOLDER` stands `FOLDER.partial` while it is made: finished shards, and in `progress/` what is made
(`settings.json`), a line for every finished piece (`done.jsonl`), and what the next piece begins with
(`state-N.safetensors`). A shard and the state are on the disk before their line is, so that a later run goes on behind
the last whole line. `config.json`, without which nothing loads, is written last.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import InvalidRequestError


class CheckpointFolder:
    """A checkpoint of `num_shards` shards in the making.

    settings: whatever decides what is written; a folder begun with others is not gone on with. `done`: what was
    said of each finished piece, in order. Errors of writing raise `InvalidRequestError` with the file's name.
    """

    def __init__(self, path: Path, num_shards: int, settings: Mapping[str, Any]) -> None:
        if path.exists():
            raise InvalidRequestError(f"{path}: exists already")
        self.path = path
        self.num_shards = num_shards
        self.partial = path.with_name(path.name + ".partial")
        self.done: list[dict[str, Any]] = []
        self._progress = self.partial / "progress"
        if not path.parent.is_dir():
            raise InvalidRequestError(f"{path}: its folder does not exist")
        begun = self._progress / "settings.json"
        if not begun.is_file():
            if self.partial.exists() and any(self.partial.iterdir()):
                raise InvalidRequestError(f"{self.partial}: is no run to go on with; remove it")
            self._try(self._progress, lambda: self._progress.mkdir(parents=True, exist_ok=True))
            self._write_text(begun, json.dumps(dict(settings)))
        self._check_same(begun, dict(settings))
        self._recover()

    def finish_piece(
        self, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], entry: Mapping[str, Any]
    ) -> None:
        """Write the next shard, what the piece behind it begins with, and a line about it."""
        number = len(self.done)
        self._write_tensors(self.partial / self.shard_name(number), tensors)
        self._write_tensors(self._state(number + 1), state)
        entry = {**entry, "tensors": list(tensors), "bytes": sum(tensor.nbytes for tensor in tensors.values())}
        line = json.dumps(entry).encode() + b"\n"
        self._try(self._progress / "done.jsonl", lambda: _append(self._progress / "done.jsonl", line))
        self.done.append(entry)
        self._state(number).unlink(missing_ok=True)

    def state(self) -> dict[str, Tensor]:
        """What the next piece begins with, as it was handed to `finish_piece`."""
        return load_file(self._state(len(self.done)))

    def shard_name(self, number: int) -> str:
        return f"model-{number + 1:05d}-of-{self.num_shards:05d}.safetensors"

    def write_index(self, config: Mapping[str, Any]) -> None:
        """All pieces are finished: write their index, then `config.json`; from here on the partial folder loads."""
        weight_map = {
            name: self.shard_name(number) for number, entry in enumerate(self.done) for name in entry["tensors"]
        }
        size = sum(entry["bytes"] for entry in self.done)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        self.write("model.safetensors.index.json", json.dumps(index, indent=1))
        self.write("config.json", json.dumps(dict(config), indent=2, ensure_ascii=False) + "\n")

    def write(self, name: str, text: str) -> None:
        """A text file beside the shards."""
        self._write_text(self.partial / name, text)

    def copy(self, file: Path) -> None:
        """A file of another checkpoint."""
        target = self.partial / file.name
        self._try(target, lambda: shutil.copyfile(file, target))

    def take_its_place(self) -> None:
        """The folder is whole."""
        if self.path.exists():
            raise InvalidRequestError(f"{self.path}: exists by now; the checkpoint is in {self.partial}")
        self.partial.rename(self.path)
        shutil.rmtree(self.path / self._progress.name)

    def _state(self, number: int) -> Path:
        return self._progress / f"state-{number}.safetensors"

    def _check_same(self, begun: Path, wanted: dict[str, Any]) -> None:
        try:
            settings = json.loads(begun.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise InvalidRequestError(f"{self.partial}: is no run to go on with; remove it") from None
        if settings != wanted:
            odd = next((key for key in wanted if settings.get(key) != wanted[key]), "settings")
            raise InvalidRequestError(
                f"{self.partial}: was begun with {odd}={settings.get(odd)!r}, not {wanted.get(odd)!r}; "
                "remove it to begin anew, or give the same options to go on"
            )

    def _recover(self) -> None:
        """Read the whole lines, and cut off what is not."""
        lines = self._progress / "done.jsonl"
        whole = 0
        if lines.is_file():
            for line in lines.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                self.done.append(json.loads(line))
                whole += len(line)
            os.truncate(lines, whole)

    def _write_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._replace(path, lambda fresh: save_file(contiguous, fresh, metadata={"format": "pt"}))

    def _write_text(self, path: Path, text: str) -> None:
        self._replace(path, lambda fresh: fresh.write_text(text, encoding="utf-8"))

    def _replace(self, path: Path, write: Callable[[Path], object]) -> None:
        """Write under another name, and to the disk, before the file takes its own."""
        fresh = path.with_name(path.name + ".fresh")

        def whole() -> None:
            try:
                write(fresh)
                with fresh.open("rb") as file:
                    os.fsync(file.fileno())
                fresh.replace(path)
            except BaseException:
                fresh.unlink(missing_ok=True)
                raise

        self._try(path, whole)

    def _try(self, path: Path, action: Callable[[], object]) -> None:
        try:
            action()
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise InvalidRequestError(f"{path}: cannot be written ({reason})") from None


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
