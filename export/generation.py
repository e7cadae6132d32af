"""A chat model in onnxruntime alone: the two exported halves and a greedy loop."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..runtime.backends.manifest import Manifest
from ..runtime.backends.onnx_session import onnxruntime

Array = npt.NDArray[Any]


def open_graph(path: Path) -> Any:
    """An onnxruntime session on the CPU that computes what the graph says.

    On its own it adds int8 products in 16 bits where a processor has no better instruction, and rounds the activations
    of 4-bit weights to int8.
    """
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class OnnxChat:
    """The vision and the decoder part of an exported folder, or one of them. files: part -> its graph."""

    def __init__(self, manifest: Manifest, files: Mapping[str, Path]) -> None:
        self.manifest = manifest
        self._graphs = {name: open_graph(path) for name, path in files.items()}
        inputs = self._graphs["decoder"].get_inputs() if "decoder" in files else []
        self._past = [entry for entry in inputs if entry.name.startswith("past_key_values.")]

    def encode(self, tiles: Array) -> Array:
        """tiles: (n, tile, tile, 3) uint8. Returns (n * tokens_per_tile, llm hidden)."""
        tokens: Array = self._graphs["vision"].run(None, {"tiles": tiles})[0]
        return tokens.reshape(-1, tokens.shape[-1])

    def no_past(self, batch: int) -> list[Array]:
        """Keys and values of nothing yet."""
        kind = np.float16 if "float16" in self._past[0].type else np.float32
        return [np.zeros((batch, entry.shape[1], 0, entry.shape[3]), kind) for entry in self._past]

    def step(
        self, input_ids: Array, visual: Array, past: Sequence[Array], mask: Array | None = None
    ) -> tuple[Array, list[Array]]:
        """Logits (batch, vocab) of the last position, and keys and values with those of this call.

        input_ids: (batch, tokens); mask: (batch, context), 1 where there is a token; positions count those.
        """
        context = past[0].shape[2] + input_ids.shape[1]
        mask = np.ones((len(input_ids), context), np.int64) if mask is None else mask
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -input_ids.shape[1] :]
        inputs = {"input_ids": input_ids, "visual_tokens": visual, "position_ids": positions, "attention_mask": mask}
        inputs |= {entry.name: part for entry, part in zip(self._past, past, strict=True)}
        logits, *present = self._graphs["decoder"].run(None, inputs)
        return logits, present

    def greedy(self, token_ids: Sequence[int], tiles: Array, max_new_tokens: int) -> list[int]:
        """The answer's ids, a stop token among them if it ended so."""
        stops = set(self.manifest.prompt["stop_token_ids"])
        visual, past = self.encode(tiles), self.no_past(1)
        step, answer = np.array([token_ids]), list[int]()
        while len(answer) < max_new_tokens and not stops.intersection(answer[-1:]):
            logits, past = self.step(step, visual, past)
            answer.append(int(logits[0].argmax()))
            step, visual = np.array([answer[-1:]]), visual[:0]
        return answer
