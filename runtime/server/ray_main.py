"""The process of `vitrail serve --replicas N`: our socket and our front, and Ray with the replicas while it lives.

Ray runs on this machine alone: it listens on loopback, behind a secret made for this one run, and keeps its files in
a folder that is deleted at the end.
"""

import logging
import os
import secrets
import threading
from typing import Any

import torch

from ..config import load_any_config
from ..distributed.ray_folder import ray_folder
from ..errors import ConfigError, UnsupportedError, VitrailError
from ..weights import resolve_checkpoint
from .front import Front
from .logs import configure
from .main import listen, serve
from .service import State
from .settings import Settings

# Ray reads them when it is imported. The third has it use loopback in place of the machine's address.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_COLOR_PREFIX": "0",
}
_OBJECTS = 2**30  # bytes of shared memory for what travels between processes
_STARTS = 1  # of a replica that cannot load: it will not be able to the second time
_APP = "vitrail"
_LOOK_S = 0.5
_END_S = 20.0  # for Ray to end


def run(settings: Settings) -> int:
    """Serve until a signal; returns the exit status. Needs the extra `ray`."""
    configure(settings.log_level)
    load_any_config(resolve_checkpoint(settings.model, settings.revision))  # a mistake should not cost Ray's start
    gpus = _takes_gpus(settings)
    os.environ |= _ENVIRONMENT | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    from ..distributed.ray_app import RayReplicas, replicas_of

    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    application = replicas_of(settings, num_cpus=0, gpus=gpus, threads=_threads_of(settings), starts=_STARTS)
    listener = listen(settings)
    replicas = RayReplicas()
    front = Front(replicas, settings)
    with ray_folder() as folder:
        cluster = _Cluster(application, front, replicas, folder)
        cluster.start()
        try:
            serve(front, front, settings, listener)
        finally:
            cluster.end()
    if cluster.failure is not None:
        raise cluster.failure
    if cluster.is_alive():  # Ray's processes were ended before this one, and it still calls them
        logging.shutdown()
        os._exit(0)
    return 0


class _Cluster(threading.Thread):
    """Ray and the replicas; ends the server if none of them can start.

    All of it in one thread: the kernel ends Ray's processes with the thread that started them.
    """

    def __init__(self, application: Any, front: Front, replicas: Any, folder: str) -> None:
        super().__init__(name="vitrail-ray", daemon=True)
        self._application, self._front, self._replicas, self._folder = application, front, replicas, folder
        self._ending = threading.Event()
        self.failure: VitrailError | None = None

    def end(self) -> None:
        """End Ray, and wait until it has ended."""
        self._ending.set()
        self.join(_END_S)

    def run(self) -> None:
        import ray

        try:
            self._start()
        except Exception as error:
            self.failure = error if isinstance(error, VitrailError) else VitrailError(f"Ray: {error}")
            while not self._front.started and not self._ending.wait(_LOOK_S):
                pass
            self._front.on_end()
        self._ending.wait()
        ray.shutdown()

    def _start(self) -> None:
        import ray
        from ray import serve

        ray.init(
            num_cpus=1,  # nothing is scheduled by them
            include_dashboard=False,
            configure_logging=False,
            object_store_memory=_OBJECTS,
            _temp_dir=self._folder,
        )
        self._front.keep_signals()
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False})
        [self._replicas.handle] = serve.run_many(
            [serve.RunTarget(self._application, name=_APP, route_prefix=None)], wait_for_applications_running=False
        )
        while self._front.state is State.LOADING and not self._ending.wait(_LOOK_S):
            status = serve.status().applications[_APP]
            if status.status == "DEPLOY_FAILED":
                messages = [one.message for one in status.deployments.values() if "FAILED" in one.status]
                raise VitrailError(_reason("\n".join([status.message, *messages])))


def _takes_gpus(settings: Settings) -> bool:
    """Whether replicas run on GPUs. Raises `ConfigError` or `UnsupportedError` where there are too few."""
    if settings.device == "cpu" or not torch.cuda.is_available():
        if settings.device not in (None, "cpu"):
            raise UnsupportedError(f"device {settings.device}: {torch.cuda.device_count()} CUDA devices are visible")
        return False
    needed = settings.replicas * settings.tensor_parallel_size + settings.vision_replicas
    if needed > torch.cuda.device_count():
        raise ConfigError(
            f"replicas {settings.replicas} x tensor_parallel_size {settings.tensor_parallel_size} + vision_replicas "
            f"{settings.vision_replicas} need {needed} GPUs; {torch.cuda.device_count()} are visible"
        )
    return True


def _threads_of(settings: Settings) -> int | None:
    """Threads of each process, which share the cores; None where the user has said how many."""
    if "OMP_NUM_THREADS" in os.environ:
        return None
    processes = settings.replicas * settings.tensor_parallel_size + settings.vision_replicas
    return max(1, len(os.sched_getaffinity(0)) // processes)


def _reason(message: str) -> str:
    """What a replica that could not start raised, of the traceback that Ray tells."""
    lines = [line.strip() for line in message.splitlines() if "Error" in line and not line.startswith(" ")]
    return f"a replica cannot start: {lines[-1].partition(': ')[2] if lines else message}"
