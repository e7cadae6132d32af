"""Compile the kernels of this folder into cubins for sm_80 and sm_90a. Needs nvcc and a host compiler, no GPU.

`python csrc/cuda/build.py` puts them into kernels/cubin, where a checkout looks, unless they are there already.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).resolve().parent
CHECKOUT = SOURCES.parent.parent / "kernels" / "cubin"
INDEX = "index.json"
# The folder for an architecture, and what nvcc calls it. Code for sm_80 runs on every 8.x.
ARCHS: Mapping[str, str] = {"sm_80": "sm_80", "sm_90": "sm_90a"}
FLAGS = ("-std=c++17", "-O3", "-cubin", "-Werror", "all-warnings")


def find_nvcc() -> Path | None:
    """The compiler: of CUDA_HOME or CUDA_PATH, on the path, or where toolkits are installed."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))
    candidates = [shutil.which("nvcc", path=f"{home}/bin") for home in homes if home]
    candidates += [shutil.which("nvcc"), shutil.which("nvcc", path="/usr/local/cuda/bin")]
    return next((Path(found) for found in candidates if found), None)


def nvcc_version(nvcc: Path) -> str:
    """E.g. `13.0`."""
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", told)
    if found is None:
        raise RuntimeError(f"{nvcc} does not tell its version")
    return found[1]


def sources_digest() -> str:
    """Stands for the sources; `kernels/cubins.py` makes the same to know binaries of others."""
    digest = hashlib.sha256()
    for file in sorted((*SOURCES.glob("*.cu"), *SOURCES.glob("*.h"))):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def index_of(folder: Path) -> dict[str, Any]:
    """What the folder's index says; nothing if there is none."""
    try:
        return dict(json.loads((folder / INDEX).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def build(folder: Path, nvcc: Path) -> bool:
    """Compile all into `folder`, unless it has them of these sources and this nvcc. True if it compiled.

    `RuntimeError` with nvcc's words where it fails; then the folder is as it was.
    """
    index = {"nvcc": nvcc_version(nvcc), "sources": sources_digest(), "archs": list(ARCHS)}
    if index_of(folder) == index:
        return False
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    jobs = [(arch, source) for arch in ARCHS for source in sorted(SOURCES.glob("*.cu"))]

    def compile_one(job: tuple[str, Path]) -> None:
        arch, source = job
        cubin = partial / arch / f"{source.stem}.cubin"
        command: list[str | Path] = [nvcc, *FLAGS, f"-arch={ARCHS[arch]}", "-o", cubin, source]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"nvcc on {source.name} for {ARCHS[arch]}:\n{done.stdout}{done.stderr}")

    try:
        for arch in ARCHS:
            (partial / arch).mkdir(parents=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, jobs))
        (partial / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the CUDA kernels.")
    parser.add_argument("-o", "--output", type=Path, default=CHECKOUT, metavar="FOLDER")
    folder = parser.parse_args().output
    nvcc = find_nvcc()
    if nvcc is None:
        print("no nvcc found: set CUDA_HOME", file=sys.stderr)
        return 1
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        compiled = build(folder, nvcc)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{folder}: {'compiled' if compiled else 'up to date'} with nvcc {index_of(folder)['nvcc']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
