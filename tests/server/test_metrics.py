"""Metrics: every stage is there, and the numbers are those of the requests that were made."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from vitrail.runtime.server.metrics import STAGES

from .conftest import ask, data_url


def scrape(server):
    """Samples by name and the values of their labels."""
    response = server.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(response.text))
    assert len({family.name for family in families}) == len(families)
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


def test_a_request_is_counted_in_every_stage(make_server):
    server = make_server()
    before = scrape(server)
    usage = server.chat("Which?", data_url(200, 100)).json()["usage"]
    server.assert_nothing_is_held()
    after = scrape(server)

    def grown(*key):
        return after[key] - before.get(key, 0)

    for stage in STAGES:
        assert grown("vitrail_request_stage_seconds_count", stage) == 1
    for stage in ("preprocess", "image_decode", "tile", "vision", "prefill", "decode"):
        assert grown("vitrail_request_stage_seconds_sum", stage) > 0, stage
    for stage in ("queue", "image_decode", "tile", "transfer", "vision", "prefill", "decode", "sample"):
        assert grown("vitrail_engine_stage_runs_total", stage) >= 1, stage
    assert grown("vitrail_time_to_first_token_seconds_count") == grown("vitrail_request_seconds_count") == 1
    assert grown("vitrail_request_prompt_tokens_sum") == usage["prompt_tokens"]
    assert grown("vitrail_request_generated_tokens_sum") == usage["completion_tokens"]
    assert grown("vitrail_engine_tokens_total", "generated") == usage["completion_tokens"]
    assert grown("vitrail_engine_tokens_total", "prompt") == usage["prompt_tokens"]
    tiles = usage["prompt_tokens_details"]["image_tiles"]
    assert grown("vitrail_request_tiles_sum") == grown("vitrail_engine_tiles_total", "encoded") == tiles
    assert grown("vitrail_engine_request_ends_total", "finished") == 1
    assert grown("vitrail_http_responses_total", "/v1/chat/completions", "200") == 1
    assert after["vitrail_engine_vision_cache_lookups_total", "miss"] == 1
    assert after["process_resident_memory_bytes",] > 0
    server.chat("Which?", data_url(200, 100))
    assert scrape(server)["vitrail_engine_vision_cache_lookups_total", "hit"] == 1


def test_what_callers_make_up_is_no_label(make_server):
    server = make_server()
    for path in ("/a", "/b", "/v1/chat/completions/../c"):
        server.http.get(path)
    server.chat(model="made-up")
    samples = scrape(server)
    assert samples["vitrail_http_responses_total", "other", "404"] == 3
    assert not any("made-up" in str(key) or "/a" in key for key in samples)


@pytest.mark.parametrize("status", [400, 413])
def test_refusals_are_counted_by_status(make_server, status):
    server = make_server(max_request_bytes=1000)
    assert server.chat("x" * (2000 if status == 413 else 1), n=0).status_code == status
    assert (
        scrape(server)[
            "vitrail_http_responses_total", "/v1/chat/completions" if status == 400 else "other", str(status)
        ]
        == 1
    )


def test_the_same_body_gives_the_same_counts_streamed(make_server):
    server = make_server()
    for stream in (False, True):
        assert server.post("/v1/chat/completions", ask(stream=stream)).status_code == 200
    server.assert_nothing_is_held()
    assert scrape(server)["vitrail_request_seconds_count",] == 2
