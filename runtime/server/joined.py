"""The metrics of several servers as one page, each number with the name of the server that counted it."""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

FRONT = "front"
# Calls are counted by the front, which all of them pass, and everything else by the replicas.
_OF_FRONT = "vitrail_http_responses"
_OF_PROCESSES = "process_"


def joined(pages: Iterable[tuple[str, bytes]]) -> bytes:
    """Pages in Prometheus's text format as one, the name of each as the label `replica`."""
    families: dict[str, Metric] = {}
    for name, page in pages:
        for family in text_string_to_metric_families(page.decode()):
            if (family.name == _OF_FRONT) != (name == FRONT) and not family.name.startswith(_OF_PROCESSES):
                continue
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                whole.samples.append(sample._replace(labels={"replica": name, **sample.labels}))
    registry = CollectorRegistry()
    registry.register(_Families(list(families.values())))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)
