"""Foreign clients in environments of their own: chats, streams, tools, formats, errors, alignment in their own way."""

import httpx
import pytest

from tests.clients.matrix import CLIENTS, run
from tests.server.test_chat import PRINCIPLE, create

pytestmark = [pytest.mark.slow, pytest.mark.long]


def num_aligned(url):
    lines = httpx.get(url + "/metrics").text.splitlines()
    (line,) = (line for line in lines if line.startswith("linalign:aligned_requests_total"))
    return float(line.split()[-1])


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_works_and_its_requests_are_aligned(name, url, client):
    before = num_aligned(url)
    output = run(name, url)
    assert num_aligned(url) > before
    if "messages" in output:
        expected = create(client, {"principle": PRINCIPLE, "alignment_ratio": 2}, messages=output["messages"])
        assert output["text"] == expected.choices[0].message.content
