"""More than the server can do: answers or refusals, and nothing in between; those that come in are not kept long."""

import asyncio
import time

import httpx
import pytest

from .conftest import ROWS, ask, wait_until


async def flood(url, number, body):
    """Statuses, headers and seconds of that many calls at once."""
    limits = httpx.Limits(max_connections=number)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:

        async def call():
            start = time.perf_counter()
            response = await client.post("/v1/chat/completions", json=body)
            return response, time.perf_counter() - start

        return await asyncio.gather(*[call() for _ in range(number)])


@pytest.mark.parametrize("stream", [False, True])
def test_four_times_the_capacity_is_answered_or_refused(make_server, stream):
    server = make_server(max_num_queued_reqs=2 * ROWS)
    capacity = 3 * ROWS
    body = ask(max_tokens=24, ignore_eos=True, stream=stream)
    alone = max(seconds for _, seconds in asyncio.run(flood(server.url, capacity, body)))
    results = asyncio.run(flood(server.url, 4 * capacity, body))
    assert {response.status_code for response, _ in results} == {200, 429}
    accepted = [(response, seconds) for response, seconds in results if response.status_code == 200]
    refused = [(response, seconds) for response, seconds in results if response.status_code == 429]
    assert len(accepted) >= capacity
    for response, _ in accepted:
        assert (
            response.text.rstrip().endswith("[DONE]") if stream else response.json()["usage"]["completion_tokens"] == 24
        )
    # All of the capacity at once is what the last accepted one waits for; slack for a machine that does other things.
    assert max(seconds for _, seconds in accepted) < 4 * alone + 1
    for response, _ in refused:
        assert response.json()["error"]["code"] == "overloaded"
        assert 1 <= int(response.headers["retry-after"]) <= 60
    server.assert_nothing_is_held()
    assert server.chat().status_code == 200


def test_answers_count_and_not_calls(make_server):
    server = make_server(max_num_queued_reqs=0, max_num_seqs=ROWS)
    with httpx.Client(base_url=server.url, timeout=60) as other:
        with other.stream(
            "POST", "/v1/chat/completions", json=ask(n=3, max_tokens=900, ignore_eos=True, stream=True)
        ) as held:
            pieces = held.iter_lines()  # kept: dropping it would close the response
            next(pieces)
            assert server.chat(n=2).status_code == 429
            assert server.chat(n=1).status_code == 200
        wait_until(lambda: not server.service.flights, "it leaves")
    prompts = {"prompt": ["a"] * 5, "max_tokens": 2}
    assert server.post("/v1/completions", prompts).status_code == 200  # alone it may
    server.assert_nothing_is_held()


def test_the_calls_in_flight_are_counted(make_server):
    server = make_server()
    with server.http.stream(
        "POST", "/v1/chat/completions", json=ask(n=2, max_tokens=900, ignore_eos=True, stream=True)
    ) as held:
        pieces = held.iter_lines()  # kept: dropping it would close the response
        next(pieces)
        text = httpx.get(f"{server.url}/metrics").text
        assert "vitrail_server_calls 1.0" in text
        assert "vitrail_server_answers 2.0" in text
    server.assert_nothing_is_held()


def test_a_client_that_does_not_read_holds_up_nobody(make_server):
    server = make_server()
    body = ask(n=ROWS, max_tokens=900, ignore_eos=True, stream=True, logprobs=True, top_logprobs=20)
    with server.http.stream("POST", "/v1/chat/completions", json=body) as held:
        pieces = held.iter_raw()  # kept: dropping it would close the response
        next(pieces)
        assert httpx.post(f"{server.url}/v1/chat/completions", json=ask(), timeout=60).status_code == 200
        # Its answers are complete although nobody takes them, and no longer count.
        wait_until(lambda: server.engine.blocks.num_used == 0, "the engine is done")
    server.assert_nothing_is_held()
