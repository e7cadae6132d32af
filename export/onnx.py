"""`vitrail export onnx`: the parts of a checkpoint as ONNX graphs, and a manifest that says how to run them."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..runtime.backends.manifest import MANIFEST, Manifest, Part, file_sha256
from ..runtime.config import ContrastiveConfig, InternVLConfig, VisionConfig, load_any_config
from ..runtime.errors import CheckpointError, ConfigError, UnsupportedError
from ..runtime.quantization.config import QuantizationConfig
from ..runtime.quantization.model import plan
from ..runtime.tokenizer import load_tokenizer
from ..runtime.weights import make_model, resolve_checkpoint
from . import description
from .calibration import Prompt, input_ranges
from .checkpoint import Checkpoint
from .folder import check_space, new_folder
from .packages import require
from .parts import build_part, chosen_parts, owns
from .rounding import METHODS, Quantization

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
QUANTIZATIONS = ("int8", "int4")


@dataclass(frozen=True)
class Options:
    """part: one of those the model has, None for all. dtype: of weights and activations. quantization: "int8" for the
    layers of both halves, activations too; "int4" for those of the language half; None as the checkpoint is.

    group_size: of int4. progress: show a bar; None on a terminal only.
    """

    part: str | None = None
    dtype: str = "float32"
    quantization: str | None = None
    group_size: int = 128
    progress: bool | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is not known; known: {', '.join(DTYPES)}")
        if self.quantization not in (None, *QUANTIZATIONS):
            raise ConfigError(f"quantization {self.quantization!r} is not exported; known: {', '.join(QUANTIZATIONS)}")


def export_onnx(
    source: str | Path,
    target: str | Path,
    options: Options | None = None,
    prompts: Callable[[], Sequence[Prompt]] | None = None,
) -> Manifest:
    """Write parts of the checkpoint `source` (folder, hub id or nano) into the new folder `target`.

    Weights go from the checkpoint's files to the target's one by one, whatever the size of the model. prompts: makes
    those that int8 activations are calibrated with, and is called only for these. Raises a `VitrailError` for what
    cannot be exported or written, and leaves nothing behind then.
    """
    target = Path(target).expanduser()
    with new_folder(target) as partial:
        manifest = write_onnx(source, partial, options or Options(), prompts)
    return replace(manifest, folder=target)


def write_onnx(
    source: str | Path, target: Path, options: Options, prompts: Callable[[], Sequence[Prompt]] | None
) -> Manifest:
    """`export_onnx` into an empty folder that is there, and where an error leaves what was written before it."""
    require("onnx", "onnxscript")
    folder = resolve_checkpoint(source)
    config = load_any_config(folder)
    names = chosen_parts(config, options.part, str(source))
    assert not isinstance(config, VisionConfig)
    return _Run(str(source), folder, config, names, options, target, prompts).run()


class _Run:
    def __init__(
        self,
        name: str,
        folder: Path,
        config: InternVLConfig | ContrastiveConfig,
        parts: Sequence[str],
        options: Options,
        target: Path,
        prompts: Callable[[], Sequence[Prompt]] | None,
    ) -> None:
        self.name, self.folder, self.config, self.options, self.target = name, folder, config, options, target
        self.parts, self.prompts = parts, prompts
        self.dtype = DTYPES[options.dtype]
        self.tokenizer = load_tokenizer(folder)
        self.checkpoint = Checkpoint(folder, config)
        self.files: dict[str, str] = {}
        self._ranges: dict[str, float] | None = None
        check_space(target, self._bytes())

    def run(self) -> Manifest:
        config = self.config
        # First, and of all parts, since it refuses what cannot be.
        quantizations = {name: self._quantization(name) for name in self.parts}
        parts = {name: self._part(name, quantization) for name, quantization in quantizations.items()}
        for file in description.tokenizer_files(self.folder):
            shutil.copyfile(file, self.target / file.name)
            self.files[file.name] = file_sha256(file)
        manifest = Manifest(
            folder=self.target,
            checkpoint=self.name,
            model={**description.model_sizes(config), **self._contrastive_numbers()},
            preprocessing=description.preprocessing(config),
            prompt=self._prompt(),
            cache=description.cache_shape(config, self.options.dtype) if isinstance(config, InternVLConfig) else {},
            parts=parts,
            files=self.files,
            versions=description.versions(),
        )
        text = json.dumps(manifest.to_json(), indent=1, ensure_ascii=False)
        (self.target / MANIFEST).write_text(text + "\n", encoding="utf-8")
        return manifest

    def _part(self, name: str, quantization: Quantization) -> Part:
        # Here, because they need the packages that only exporting needs.
        import onnx_ir as ir

        from .trace import OPSET, trace
        from .weights import add_weights
        from .writer import WeightFile

        context_id = None
        if isinstance(self.config, InternVLConfig):
            context_id = description.context_token_id(self.config, self.tokenizer)
        traced = trace(lambda memory: build_part(name, self.config, self.dtype, context_id, memory))
        parameters = traced.parameters.keys()
        dropped = [path for path in self.checkpoint.parameters() if owns(name, path) and path not in parameters]
        if dropped:
            raise CheckpointError(f"{name}: the graph reads nothing of {len(dropped)} parameters, first {dropped[0]}")
        file = WeightFile(self.target / f"{name}.data")
        try:
            method = add_weights(traced, self.checkpoint, file, self.dtype, quantization, self.options.progress)
        finally:
            digest = file.close()
        ir.save(traced.model, self.target / f"{name}.onnx")
        self.files[f"{name}.data"] = digest
        self.files[f"{name}.onnx"] = file_sha256(self.target / f"{name}.onnx")
        part = traced.part
        return Part(
            name=name,
            file=f"{name}.onnx",
            data=f"{name}.data",
            dtype=self.options.dtype,
            quantization=method,
            opset=OPSET,
            inputs=part.inputs,
            outputs=part.outputs,
            limits=dict(part.limits),
            parameters=self.checkpoint.consumed(set(traced.parameters)),
            group_size=self.options.group_size if method == "int4" else None,
        )

    def _quantization(self, name: str) -> Quantization:
        """How the weights of a part become codes."""
        asked = self.options.quantization
        if asked is not None and self.checkpoint.stored is not None:
            raise ConfigError(f"{self.name}: is quantised already; export it as it is, without quantization={asked!r}")
        methods = {module: method for module, method in self.checkpoint.methods().items() if owns(name, module)}
        for module, method in methods.items():
            if method not in METHODS:
                raise UnsupportedError(f"{module}: is {method}, which is not exported; {', '.join(METHODS)} are")
        rounded = {}
        if asked is not None:
            config = QuantizationConfig(
                llm=asked, vision=None if asked == "int4" else asked, group_size=self.options.group_size
            )
            with torch.device("meta"):
                model = make_model(self.config)
            rounded = plan(model, config)
            if self.options.part is not None and not any(owns(name, module) for module in rounded):
                raise UnsupportedError(f"{name}: {asked} is for the language half, of which this part has nothing")
        if "int8" not in {*methods.values(), *rounded.values()}:
            return Quantization(rounded, self.options.group_size, {})
        if self._ranges is None:
            context_id = -1
            if isinstance(self.config, InternVLConfig):
                context_id = description.context_token_id(self.config, self.tokenizer)
            prompts = () if self.prompts is None else self.prompts()
            self._ranges = input_ranges(self.checkpoint, prompts, context_id, self.parts, self.options.progress)
        return Quantization(rounded, self.options.group_size, self._ranges)

    def _prompt(self) -> dict[str, Any]:
        if isinstance(self.config, InternVLConfig):
            return description.prompt(self.config, self.tokenizer)
        return description.text_prompt(self.tokenizer)

    def _contrastive_numbers(self) -> dict[str, Any]:
        """What scores are multiplied by."""
        if isinstance(self.config, InternVLConfig):
            return {}
        return {"logit_scale": float(self.checkpoint.dense("logit_scale").float().exp())}

    def _bytes(self) -> int:
        """About as many as the parts will have."""
        bits = {"int8": 8, "int4": 4.25}.get(self.options.quantization or "", 8 * self.dtype.itemsize)
        with torch.device("meta"):
            parameters = dict(make_model(self.config).named_parameters())
        sizes = [p.numel() for part in self.parts for name, p in parameters.items() if owns(part, name)]
        return int(sum(sizes) * bits / 8)
