"""/tokenize says from headers alone what a request will cost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.runtime.server import schemas

from .conftest import ask, data_url


@settings(max_examples=8)
@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 400), st.integers(10, 400)).filter(lambda s: max(s) < 150 * min(s)), max_size=2
    ),
    text=st.text(max_size=30),
    cap=st.none() | st.integers(1, 6),
)
def test_the_count_is_what_is_used(server, sizes, text, cap):
    body = ask(text, *[data_url(*size) for size in sizes], max_tokens=1, max_tiles=cap)
    counted = server.post("/tokenize", {"messages": body["messages"], "max_tiles": cap}).json()
    answer = server.post("/v1/chat/completions", body).json()
    assert counted["count"] == len(counted["tokens"]) == answer["usage"]["prompt_tokens"]
    assert counted["image_tiles"] == answer["usage"]["prompt_tokens_details"]["image_tiles"]
    assert counted["images"] == answer["vitrail"]["images"]


def test_a_plain_prompt_is_counted_as_it_stands(server):
    body = server.post("/tokenize", {"prompt": "What is the total?"}).json()
    schemas.Tokens.model_validate(body, strict=True)
    assert body["tokens"] == server.service.runtime.tokenizer.encode("What is the total?")
    assert body["max_model_len"] == server.service.runtime.max_model_len


def test_a_prompt_that_is_too_long_is_counted_too(server):
    assert server.post("/tokenize", {"messages": ask("long " * 3000)["messages"]}).json()["count"] > 3000


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": ask()["messages"]}, {"prompt": 1}])
def test_one_of_both_is_needed(server, body):
    assert server.post("/tokenize", body).status_code == 400
