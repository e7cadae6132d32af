"""The application of Ray Serve: what settings become, and what is refused, without a cluster."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

import ray
import yaml
from ray.serve.schema import ServeDeploySchema

from vitrail.runtime.distributed import ray_app
from vitrail.runtime.errors import ConfigError, UnsupportedError
from vitrail.runtime.server.settings import Settings

CONFIG = Path(__file__).resolve().parents[3] / "docs/deploy/ray.yaml"


@pytest.fixture
def gpus(monkeypatch):
    """`gpus(n)`: the cluster has so many."""

    def have(count):
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": count} if count else {})

    have(0)
    return have


def deployments(application: Any) -> dict[str, Any]:
    """The deployments of an application, by name, with those that they are given."""
    found, waiting = {}, [application]
    while waiting:
        deployment = waiting.pop()._bound_deployment
        found[deployment.name] = deployment
        waiting += [one for one in deployment.init_args if isinstance(one, ray.serve.Application)]
    return found


def resources(deployment: Any) -> tuple[float, float]:
    options = deployment.ray_actor_options
    return options["num_cpus"], options.get("num_gpus", 0)


def test_arguments_are_settings_as_strings_or_values(gpus, monkeypatch):
    monkeypatch.setenv("VITRAIL_API_KEY", "a,b")
    for given in ({"replicas": "3", "max-num-seqs": "5"}, {"llm_replicas": 3, "max_num_seqs": 5}):
        found = deployments(ray_app.build({"model": "nano", **given}))
        assert set(found) == {"Ingress", "Replica"}
        assert found["Replica"].num_replicas == 3
        settings = found["Ingress"].init_args[0]
        assert (settings.max_num_seqs, settings.api_key) == (5, ("a", "b"))


def test_the_halves_are_scaled_apart(gpus):
    found = deployments(ray_app.build({"model": "nano", "llm_replicas": 2, "vision_replicas": 3}))
    assert {name: one.num_replicas for name, one in found.items()} == {"Ingress": 1, "Replica": 2, "VisionHalf": 3}


def test_a_replica_has_the_gpus_of_its_tensor_parallelism(gpus):
    arguments = {"model": "nano", "tensor_parallel_size": 2, "vision_replicas": 1}
    assert resources(deployments(ray_app.build(arguments))["Replica"]) == (1, 0)
    gpus(8)
    found = deployments(ray_app.build(arguments))
    assert resources(found["Replica"]) == (1, 2)
    assert resources(found["VisionHalf"]) == (1, 1)
    assert resources(deployments(ray_app.build({**arguments, "device": "cpu"}))["Replica"]) == (1, 0)


def test_a_replica_refuses_too_many_calls_before_ray_holds_them_back(gpus):
    replica = deployments(ray_app.build({"max_num_seqs": 5, "max_num_queued_reqs": 7}))["Replica"]
    assert replica.max_ongoing_requests > 12


def test_what_cannot_be_meant_is_refused(gpus):
    with pytest.raises(ConfigError, match="prot is not a setting"):
        ray_app.build({"prot": 1})
    with pytest.raises(ConfigError, match="replicas must be"):
        ray_app.build({"llm_replicas": 0})
    with pytest.raises(ConfigError, match="cuda:1"):
        ray_app.build({"device": "cuda:1"})


def test_vision_halves_are_of_chat_models(gpus, monkeypatch):
    monkeypatch.setattr(ray_app, "load_any_config", lambda _: None)
    with pytest.raises(UnsupportedError, match="no chat model"):
        ray_app.build({"model": "nano", "vision_replicas": 1})


def test_the_config_file_says_what_ray_serve_and_the_server_understand(gpus):
    schema = ServeDeploySchema(**yaml.safe_load(CONFIG.read_text("utf-8")))
    [application] = schema.applications
    assert application.import_path == "vitrail.runtime.distributed.ray_app:build"
    found = deployments(ray_app.build({**application.args, "model": "nano"}))
    assert {one.name for one in application.deployments} == set(found)
    for one in application.deployments:
        if one.name != "Ingress":
            assert one.num_replicas == found[one.name].num_replicas


def test_settings_of_replicas_are_checked():
    assert (Settings().replicas, Settings().vision_replicas) == (1, 0)
    assert Settings(replicas="4", vision_replicas="2").replicas == 4
    for name, value in (("replicas", 0), ("vision_replicas", -1), ("replicas", "many")):
        with pytest.raises(ConfigError, match=name):
            Settings(**{name: value})
