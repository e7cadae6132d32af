"""The server as an application of Ray Serve: `serve run vitrail.runtime.distributed.ray_app:build model=...`.

Three deployments: `Ingress` lets calls in, `Replica`s answer them, and `VisionHalf`s, if there are any, encode their
tiles. Each can be scaled by itself in a config file of Ray Serve (docs/deploy/ray.yaml).
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import fields
from functools import partial
from typing import Any, cast

import ray
import torch
from ray import serve
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import Message
from torch import Tensor

from ..config import InternVLConfig, load_any_config
from ..engine.runner import Runner
from ..errors import ConfigError, UnsupportedError
from ..layers.parallel import Part
from ..models.internvl import InternVLModel
from ..options import read_device, read_dtype, read_quantization
from ..quantization.model import capturable
from ..server.front import Front
from ..server.relay import ReplicaLost
from ..server.replica import Replica
from ..server.settings import Settings, load_settings
from ..weights import load_model, resolve_checkpoint
from .ray_vision import JOBS_PER_HALF, Encode, VisionHalf

ROUTER = "vitrail.runtime.distributed.ray_router:PictureRouter"
ASK_S = 5.0  # in which replicas must say how they are
_QUIET = {"log_level": "WARNING", "enable_access_log": False}


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application of some settings of `vitrail serve`, as a config file or `serve run` gives them.

    llm_replicas is another name for replicas. Variables (VITRAIL_API_KEY) count as ever. Raises `ConfigError`.
    """
    given = {name.replace("-", "_"): value for name, value in args.items()}
    if "llm_replicas" in given:
        given["replicas"] = given.pop("llm_replicas")
    known = [one.name for one in fields(Settings)]
    for name in given:
        if name not in known:
            raise ConfigError(f"{name} is not a setting; known: {', '.join(known)}")
    settings = load_settings(given)
    gpus = settings.device != "cpu" and cast(Any, ray).cluster_resources().get("GPU", 0) > 0
    ingress = serve.deployment(
        name="Ingress",
        max_ongoing_requests=settings.replicas * _most_calls(settings),
        ray_actor_options={"num_cpus": 0.1},
        graceful_shutdown_timeout_s=settings.shutdown_timeout,
        logging_config=_QUIET,
    )(serve.ingress()(Ingress))
    return ingress.bind(settings, replicas_of(settings, num_cpus=1, gpus=gpus))


def replicas_of(
    settings: Settings, *, num_cpus: float, gpus: bool, threads: int | None = None, starts: int | None = None
) -> serve.Application:
    """The replicas alone, and the vision halves that they share. Raises `ConfigError`.

    num_cpus: of a replica and of a vision half. threads: of torch in each. starts: how often one may fail to start.
    """
    if settings.device not in (None, "cpu", "cuda"):
        raise ConfigError(f"device {settings.device}: replicas take what they are given; use cpu or cuda")
    if settings.llm_devices or settings.vision_devices:
        raise ConfigError("llm_devices and vision_devices go without replicas, which take the devices they are given")
    common: dict[str, Any] = {"graceful_shutdown_timeout_s": settings.shutdown_timeout, "logging_config": _QUIET}
    if starts is not None:
        common["max_constructor_retry_count"] = starts
    vision = None
    if settings.vision_replicas:
        if not isinstance(load_any_config(resolve_checkpoint(settings.model, settings.revision)), InternVLConfig):
            raise UnsupportedError(f"vision_replicas: {settings.model} is no chat model")
        halves = serve.deployment(
            name="VisionHalf",
            num_replicas=settings.vision_replicas,
            max_ongoing_requests=JOBS_PER_HALF,
            ray_actor_options={"num_cpus": num_cpus, "num_gpus": int(gpus)},
            health_check_period_s=2,
            **common,
        )(VisionHalf)
        vision = halves.bind(partial(load_vision, settings), threads)
    replicas = serve.deployment(
        name="Replica",
        num_replicas=settings.replicas,
        max_ongoing_requests=_most_calls(settings),
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": settings.tensor_parallel_size if gpus else 0},
        request_router_config={"request_router_class": ROUTER},
        health_check_period_s=2,
        health_check_timeout_s=max(30.0, settings.stall_timeout),
        **common,
    )(Replica)
    return replicas.bind(settings, threads, vision)


def _most_calls(settings: Settings) -> int:
    """What a replica refuses itself, and says so, is not for Ray Serve to hold back; and it is asked how it is."""
    return settings.max_num_seqs + settings.max_num_queued_reqs + 16


def load_vision(settings: Settings) -> Encode:
    """The vision half of the model that settings name, on the device of this process."""
    device = read_device(settings.device)
    folder = resolve_checkpoint(settings.model, settings.revision)
    model = load_model(
        folder,
        load_any_config(folder),
        dtype=read_dtype(settings.dtype),
        device=device,
        quantization=read_quantization(None, settings.vision_quantization, device),
        part=Part(language=False),
    )
    assert isinstance(model, InternVLModel)
    runner = Runner(
        model,
        max_num_seqs=1,
        max_model_len=1,
        enforce_eager=settings.enforce_eager or not capturable(model),
        exact=settings.deterministic,
    )
    runner.warm_up_vision()

    def encode(tiles: Tensor) -> Tensor:
        encoded = runner.encode_beside(tiles)
        if isinstance(encoded.ended, torch.cuda.Event):
            encoded.ended.synchronize()
        return encoded.tokens

    return encode


class Ingress:
    """What callers reach through Ray Serve's proxies."""

    def __init__(self, settings: Settings, replicas: DeploymentHandle[Replica]) -> None:
        self._front = Front(RayReplicas(replicas), settings)

    def __serve_build_asgi_app__(self) -> Front:
        return self._front


class RayReplicas:
    """`Replicas` of a `Front` by a handle of Ray Serve; there are none until it has one."""

    def __init__(self, handle: DeploymentHandle[Any] | None = None) -> None:
        self.handle = handle

    async def send(self, scope: dict[str, Any], body: bytes, key: str) -> AsyncGenerator[list[Message], None]:
        """Have a replica answer."""
        assert self.handle is not None
        call: Any = self.handle.options(stream=True, session_id=key).answer.remote(scope, body)
        ended = False
        try:
            async for messages in call:
                ended = messages[-1]["type"] == "vitrail.end"
                yield messages
        except (RayError, RayServeException) as error:
            ended = True
            if isinstance(error, RayTaskError | TaskCancelledError):  # what the replica itself raised, or was told
                raise
            raise ReplicaLost from error
        finally:
            if not ended:
                call.cancel()

    async def ask(self, method: str) -> list[Any]:
        """Ask all that are running."""
        if self.handle is None:
            return []
        try:
            async with asyncio.timeout(2 * ASK_S):
                found = await self.handle.broadcast(method).results_async(timeout_s=ASK_S, return_exceptions=True)
        except DeploymentUnavailableError:
            return []
        if any(isinstance(one, TimeoutError) for one in found) and method == "state":
            raise TimeoutError
        return [one for one in found if not isinstance(one, BaseException)]
