"""A plan: placements of a model on so many GPUs, predicted, simulated, and ranked by what is asked of them."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..config import InternVLConfig
from ..errors import CapacityError
from ..quantization.config import QuantizationConfig
from .costs import Costs, Roofline, read_measured
from .gpus import Gpu
from .planner import MOST_GPUS, Planner, Prediction, gpus_needed
from .simulator import simulated_capacity, simulated_load
from .sizes import ModelSizes, check_methods
from .workload import Workload

# Where latencies are given for, of the best capacity, if no rate is asked for.
USUAL_LOAD = 0.7
RUNNERS_UP = 3
RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


@dataclass(frozen=True)
class Latency:
    """Milliseconds: the mean and the 99th percentile."""

    mean: float
    p99: float


@dataclass(frozen=True)
class Candidate:
    """A placement, what is predicted of it and what the scheduler did in simulated time (None: was not asked).

    meets: whether it keeps the targets; True if there are none.
    """

    prediction: Prediction
    simulated_requests_per_s: float | None = None
    ttft: Latency | None = None
    itl: Latency | None = None
    meets: bool = True

    @property
    def difference(self) -> float | None:
        """What the simulated capacity has over the predicted one, as a share of that."""
        if self.simulated_requests_per_s is None:
            return None
        return self.simulated_requests_per_s / self.prediction.requests_per_s - 1

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        one = self.prediction
        groups = {"memory": one.memory, "encoder_memory": one.encoder}
        return {
            "placement": str(one.placement),
            "kind": one.placement.kind,
            "encoders": one.placement.encoders,
            "groups": one.placement.groups,
            "tensor_parallel_size": one.placement.tensor_parallel,
            "max_num_seqs": one.rows,
            "requests_per_s": one.requests_per_s,
            "output_tokens_per_s": one.output_tokens_per_s,
            "limit": one.limit,
            "simulated_requests_per_s": self.simulated_requests_per_s,
            "difference": self.difference,
            "ttft_ms": one.ttft_ms,
            "itl_ms": one.itl_ms,
            "itl_bound_ms": one.itl_bound_ms,
            "simulated_ttft_ms": asdict(self.ttft) if self.ttft else None,
            "simulated_itl_ms": asdict(self.itl) if self.itl else None,
            "meets_targets": self.meets,
            **{name: {**asdict(held), "kv": held.kv} if held else None for name, held in groups.items()},
        }


@dataclass(frozen=True)
class Plan:
    """What `make_plan` found: the best candidate first. rate: that latencies are for."""

    planner: Planner
    gpus: int
    rate: float
    candidates: Sequence[Candidate]
    costs_from: str


def find_costs(
    model: str, sizes: ModelSizes, gpu: Gpu, quantization: QuantizationConfig, table: Path | None
) -> tuple[Costs, str]:
    """What was measured of a model on a GPU, in `table` or below `bench/results`, else the roofline; and where from."""
    paths = [table] if table is not None else [RESULTS / device / "costs.json" for device in gpu.devices]
    for path in paths:
        measured = read_measured(path, model, quantization) if table is not None or path.is_file() else None
        if measured is not None:
            return measured, f"measured: {path}"
    roofline = Roofline(sizes, gpu, quantization)
    return roofline, f"the roofline, not measured; shares of the datasheet are {gpu.shares.source}"


def make_planner(
    model: str,
    config: InternVLConfig,
    gpu: Gpu,
    quantization: QuantizationConfig,
    workload: Workload,
    *,
    table: Path | None = None,
    gpu_memory_utilization: float = 0.9,
) -> tuple[Planner, str]:
    """A planner with the best costs there are, and a sentence that says which."""
    check_methods(quantization)
    sizes = ModelSizes.of(config)
    costs, costs_from = find_costs(model, sizes, gpu, quantization, table)
    return Planner(sizes, gpu, quantization, costs, workload, gpu_memory_utilization), costs_from


def make_plan(
    planner: Planner,
    gpus: int,
    *,
    costs_from: str = "",
    ttft_ms: float | None = None,
    itl_ms: float | None = None,
    simulate: bool = True,
    progress: Callable[[Sequence[Prediction]], Sequence[Prediction]] = lambda predictions: predictions,
) -> Plan:
    """The placements of a model on so many GPUs, the best first.

    ttft_ms, itl_ms: what 99 % of first tokens and of waits between tokens shall keep; those who do come first, and
    among them who answers most requests. Without `simulate` the mean TTFT and the longest step stand for the
    percentiles. progress: wraps the placements that are simulated. Raises `CapacityError` where none fits or the rate
    is too high.
    """
    planner.check_fits(gpus)
    best = planner.predictions(gpus)[0]
    asked = planner.workload.rate
    if asked is not None and asked >= best.requests_per_s:
        enough = gpus_needed(planner, asked)
        remedy = f"{enough} of them would do" if enough else f"{MOST_GPUS} of them would not do either"
        raise CapacityError(
            f"{asked:g} requests a second are more than {gpus} x {planner.gpu.name} can answer: at best "
            f"{best.requests_per_s:.2f} ({best.placement}); {remedy}"
        )
    rate = USUAL_LOAD * best.requests_per_s if asked is None else asked
    loaded = replace(planner, workload=replace(planner.workload, rate=rate))
    predictions = [one for one in loaded.predictions(gpus) if one.requests_per_s > rate]
    if ttft_ms is None and itl_ms is None:
        predictions = predictions[: 1 + RUNNERS_UP]
    candidates = []
    for one in progress(predictions):
        candidate = _simulate(loaded, one, rate) if simulate else Candidate(one)
        first = candidate.ttft.p99 if candidate.ttft else one.ttft_ms
        between = candidate.itl.p99 if candidate.itl else one.itl_bound_ms
        meets = (ttft_ms is None or (first is not None and first <= ttft_ms)) and (itl_ms is None or between <= itl_ms)
        candidates.append(replace(candidate, meets=meets))
    candidates.sort(key=lambda one: not one.meets)
    return Plan(loaded, gpus, rate, candidates[: 1 + RUNNERS_UP], costs_from)


def _simulate(planner: Planner, prediction: Prediction, rate: float) -> Candidate:
    capacity = simulated_capacity(planner, prediction)
    load = simulated_load(planner, prediction, rate)
    ttft, itl = (Latency(statistic(), statistic(99)) for statistic in (load.ttft_ms, load.itl_ms))
    return Candidate(prediction, capacity, ttft, itl)
