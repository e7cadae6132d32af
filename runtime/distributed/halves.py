"""A model over its devices: what of it is in this process, and the processes that hold the rest."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ..config import InternVLConfig, ModelConfig
from ..engine.runner import Runner
from ..engine.scheduler import CHUNK_TOKENS
from ..engine.vision_stage import VisionWorkers
from ..layers.parallel import Part
from ..models.internvl import InternVLModel
from ..quantization.config import QuantizationConfig
from ..weights import Model, load_model
from .placement import Placement
from .ranks import Ranks
from .tensor_parallel import TensorParallelRunner
from .vision_pool import VisionPool


@dataclass
class Halves:
    """What one engine runs.

    model: the part of it in this process. ranks: the others that share its language half. vision: the workers that its
    tiles go to, where it has no vision half of its own; several engines may have the same.
    """

    model: Model
    ranks: Ranks | None = None
    vision: VisionWorkers | None = None

    @property
    def chunk_tokens(self) -> int:
        """Of prompts in a step in which others decode: n devices run n times as many in the same time."""
        return CHUNK_TOKENS * (1 if self.ranks is None else self.ranks.size)

    def runner(self, **limits: Any) -> Runner:
        """A runner of all of it; limits: the keywords of `Runner`."""
        model = cast(InternVLModel, self.model)
        return Runner(model, **limits) if self.ranks is None else TensorParallelRunner(model, self.ranks, **limits)

    def close(self) -> None:
        """End the processes."""
        if self.ranks is not None:
            self.ranks.close()
        if self.vision is not None:
            self.vision.close()


def open_halves(
    folder: Path,
    config: ModelConfig,
    placement: Placement,
    *,
    dtype: torch.dtype,
    quantization: QuantizationConfig | None = None,
    vision_workers: VisionWorkers | None = None,
    has_session: bool = False,
    deterministic: bool = False,
    enforce_eager: bool = False,
    progress: bool | None = None,
) -> list[Halves]:
    """Load a model where `placement` says, one for each replica; on a CPU replicas share their weights.

    vision_workers: they encode, whatever `placement` says of the vision half. has_session: an exported vision half in
    this process does.
    Raises what a process raises while it loads; none is left then.
    """
    groups = [[torch.device(name) for name in group] for group in placement.groups]
    common: dict[str, Any] = {"dtype": dtype, "quantization": quantization}
    with ExitStack() as undo:
        vision = vision_workers
        if vision is None and placement.vision_devices:
            assert isinstance(config, InternVLConfig)  # `place` spreads no other
            vision = VisionPool(
                *(folder, config, placement.vision_devices),
                out_device=groups[0][0],
                exact=deterministic,
                enforce_eager=enforce_eager,
                threads=_threads(placement.vision_devices, placement),
                **common,
            )
            undo.callback(vision.close)  # not others' workers
        halves: list[Halves] = []
        for group in groups:
            if len(group) > 1:
                assert isinstance(config, InternVLConfig)
                ranks = Ranks(
                    *(folder, config, group),
                    vision=vision is None and not has_session,
                    deterministic=deterministic,
                    progress=progress,
                    **common,
                )
                undo.callback(ranks.close)
                halves.append(Halves(ranks.model, ranks, vision))
            elif halves and group[0].type == "cpu":
                halves.append(Halves(halves[0].model, None, vision))
            else:
                part = Part(vision=vision is None)
                loaded = load_model(folder, config, device=group[0], progress=progress, part=part, **common)
                halves.append(Halves(loaded, None, vision))
        undo.pop_all()
    return halves


def _threads(devices: Sequence[str], placement: Placement) -> int | None:
    """Threads of each process of a CPU: the halves run at the same time, and share them evenly."""
    if devices[0] != "cpu":
        return None
    return max(1, torch.get_num_threads() // (len(devices) + len(placement.llm_devices)))
