"""Hundreds of broken requests (thousands in the long run) to every route: none breaks the server or delays a stream.

Valid bodies are changed as JSON and then as bytes. A seed per request makes failures reproducible. FUZZ_EXAMPLES sets
the number of requests.
"""

import contextlib
import copy
import functools
import itertools
import json
import os
import random
import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.counts import counted
from tests.server.test_auth import routes
from tests.server.test_limits import metric
from tests.serving import serving

NUM_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", counted(600, 12_000)))
NUM_AT_ONCE, ROUND = 4, 1000
MAX_BYTES = 200_000  # test_bad_input.py has larger bodies
MAX_STALL = 1.0  # seconds that a stream may pause longer than beside valid requests
MAX_GROWTH = 150 << 20  # bytes: compiled structures (the cache holds 32), and memory that the allocator keeps
# A small KV cache, which is full after some requests, so that its pages do not look like a leak.
FEW_PAGES = "import linalign.alignment_core.assembly as assembly\nassembly.pages_that_fit = lambda *_: 200"

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
    },
    {"role": "tool", "tool_call_id": "a", "content": "12"},
    {"role": "user", "content": "And now?", "name": "Ann"},
]
FUNCTION = {
    "name": "f",
    "description": "Adds one.",
    "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
    "strict": True,
}
SCHEMA = {
    "name": "s",
    "schema": {"type": "object", "properties": {"a": {"type": "string", "pattern": "^a+$"}, "b": {"$ref": "#/$defs/b"}},
               "$defs": {"b": {"type": "array", "items": {"type": "number", "multipleOf": 0.5}}}},
}  # fmt: skip
ALIGNMENT = {
    "principle": [{"text": "Be kind.", "weight": 1.0, "ratio": 2.0}, {"text": "Be brief."}],
    "alignment_ratio": 1.5,
    "alignment_method": "linear",
    "alignment_top_p": 0.9,
    "alignment_temperature": 0.7,
}
SAMPLING = {
    "n": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "seed": 1, "min_tokens": 1, "stop": ["xyz"],
    "stop_token_ids": [3], "ignore_eos": False, "presence_penalty": 0.5, "frequency_penalty": 0.5,
    "repetition_penalty": 1.1, "logit_bias": {"5": -1.0}, "stream": True, "stream_options": {"include_usage": True},
    "alignment_trace": True, "user": "u",
}  # fmt: skip
RANDOM_FIELDS = [
    {"response_format": {"type": "json_schema", "json_schema": SCHEMA}},
    {"response_format": {"type": "json_object"}},
    {"structured_outputs": {"regex": "(a|b){1,5}"}},
    {"structured_outputs": {"choice": ["yes", "no"]}},
    {"structured_outputs": {"grammar": 'root ::= "a" root | "b"'}},
    {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required", "parallel_tool_calls": False},
    {"chat_template_kwargs": {"a": True}},
]
BODIES = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 3, "logprobs": True, "top_logprobs": 2, **SAMPLING},
    "/v1/completions": {"prompt": "Hello", "max_tokens": 3, "logprobs": 2, "echo": True, **SAMPLING},
    "/v1/responses": {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
            {"type": "function_call", "call_id": "a", "name": "f", "arguments": '{"x": 1}'},
            {"type": "function_call_output", "call_id": "a", "output": "2"},
        ],
        "instructions": "Be brief.",
        "max_output_tokens": 3,
        "tools": [{"type": "function", **FUNCTION}],
        "text": {"format": {"type": "json_schema", **SCHEMA}},
        "metadata": {"a": "b"},
        "stream": True,
    },
    "/tokenize": {"messages": MESSAGES},
    "/detokenize": {"tokens": [5, 6]},
}
LENGTHS = {"/v1/chat/completions": "max_tokens", "/v1/completions": "max_tokens", "/v1/responses": "max_output_tokens"}
EVIL = [
    None, True, False, 0, -1, 1, 2, 10**6, 2**31, 2**63, 2**64, -(2**63) - 1, 10**300, 0.0, -0.0, 1e-320, 1.5, 1e308,
    float("inf"), float("nan"), "", " ", "a", "\0", "\ud800", "\udfff\ud800", "\ufdd0", "\u202e", "é" * 50, "🙂",
    "a" * 2000,
    "<|im_end|>", "<|im_start|>system\n", "<|endoftext|>", "{{ 7 * 7 }}", "{% for %}", "%s%n", "../../etc/passwd",
    "'; DROP TABLE", "(a+)+$", "(?=a)", "[", "(((((", "a{1,1000000000}", "(.|\\n)*a.{200}", "start: start start",
    "root ::= root", "smollm2", "smollm2:teacher", "smollm2:", "required", "none", "auto", "function", "text", "system",
    "assistant", [], {}, [[]], [None], [{}], {"": ""}, {"a": None}, {"type": "text"}, {"$ref": "#"}, [0] * 1000,
    ["a"] * 1000, {str(i): i for i in range(1000)}, {"type": "object"}, {"type": "array", "uniqueItems": True},
    {"allOf": [{"$ref": "#"}, {"$ref": "#"}]}, {"multipleOf": 1e-300}, {"pattern": "("}, {"enum": []}, {"const": "\0"},
]  # fmt: skip
ARGUMENTS = ["", "{}", "[]", "null", '{"a": 1e999}', '{"a": NaN}', '{"\\ud800": 1}', '{"a": 1, "a": 2}', "[" * 9000]
ARGUMENTS += ['{"a":' * 400 + "1" + "}" * 400, '{"a": ' + "9" * 5000 + "}", '{"a": "<|im_end|>"}', '{"a": "{{ 1 }}"}']
NAMES = ["", "model", "__class__", "constructor", "$ref", "a.b", "\ud800", "k" * 300, "0"]
TELLTALES = re.compile(
    r"Traceback|File \"|site-packages|backtrace|\.(py|so|rs|c)\b[:\"]|0x[0-9a-f]{6}"
    r"|/(usr|root|home|tmp|work|opt|var|proc)/"
)


def places(value):
    """Every (container, key) inside a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list) and value[key]:
            yield from places(value[key])


class Example:
    """One random request, determined by its seed."""

    def __init__(self, seed, app_routes):
        self.seed, rng = seed, random.Random(seed)
        self._chance = rng
        with_body = [pair for pair in app_routes if pair[0] == "POST"]
        self.method, self.path = rng.choice(with_body if rng.random() < 0.9 else app_routes)
        self.headers = {"Content-Type": "application/json"}
        self.content = self._bytes() if self.method == "POST" or rng.random() < 0.1 else b""
        if rng.random() < 0.03:
            self.headers["Content-Type"] = rng.choice(["text/plain", "", "multipart/form-data", "application/x+json"])
        if rng.random() < 0.05:
            self.path += rng.choice(["?a=b", "/", "/../..", "%00", "?" + "q" * 5000, "%ff%fe", "//", ";a"])

    def _bytes(self):
        rng = self._chance
        new = {field: value for body in BODIES.values() for field, value in body.items()}  # for routes not in BODIES
        body = {"model": "smollm2", **copy.deepcopy(BODIES.get(self.path, new))}
        for field in rng.sample(list(body), rng.randint(0, len(body) // 2)):
            if field not in ("model", "messages", "prompt", "input", "tokens"):
                del body[field]
        if self.path != "/detokenize":
            body |= copy.deepcopy({name: ALIGNMENT[name] for name in ALIGNMENT if rng.random() < 0.2})
        if self.path in ("/v1/chat/completions", "/v1/completions") and rng.random() < 0.5:
            body |= copy.deepcopy(rng.choice(RANDOM_FIELDS))
        if "stream" not in body:
            body.pop("stream_options", None)
        if "tools" in body:
            body.pop("text", None)
        for _ in range(rng.choice([0, 1, 1, 1, 2, 4])):
            self._change(body)
        if (name := LENGTHS.get(self.path)) and name not in body:
            body[name] = 2
        text = json.dumps(body, ensure_ascii=rng.random() < 0.8 or not self._is_text(body))
        return self._changed(text.encode()[:MAX_BYTES])

    @staticmethod
    def _is_text(body):
        with contextlib.suppress(UnicodeEncodeError):
            return bool(json.dumps(body, ensure_ascii=False).encode())
        return False

    def _change(self, body):
        """Change one random place of the body."""
        rng = self._chance
        place, key = rng.choice(list(places(body)) or [({"model": ""}, "model")])
        if key == "arguments":
            place[key] = rng.choice(ARGUMENTS)
            return
        match rng.randint(0, 6):
            case 0:
                del place[key]
            case 1 | 2 | 3:
                same_type = [value for value in EVIL if type(value) is type(place[key])]
                place[key] = copy.deepcopy(rng.choice(same_type if same_type and rng.random() < 0.7 else EVIL))
            case 4:
                for _ in range(rng.choice([1, 2, 110, 300])):
                    place[key] = [place[key]] if rng.random() < 0.5 else {"a": place[key]}
            case 5 if isinstance(place, dict):
                place[rng.choice([*NAMES, *SAMPLING, *ALIGNMENT])] = copy.deepcopy(rng.choice([place[key], *EVIL]))
            case _ if isinstance(place, list):
                place *= rng.choice([2, 100])

    def _changed(self, text):
        """The bytes, damaged in one of four cases."""
        rng = self._chance
        if rng.random() < 0.75:
            return text
        begin = rng.randrange(len(text))
        end = min(len(text), begin + rng.choice([1, 1, 5, 40]))
        match rng.randint(0, 6):
            case 0:
                return text[:begin]
            case 1:
                return text[:begin] + text[end:]
            case 2:
                return text[:end] + text[begin:end] * rng.choice([1, 3, 1000]) + text[end:]
            case 3:
                flipped = bytearray(text)
                for _ in range(rng.choice([1, 1, 4])):
                    flipped[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
                return bytes(flipped)
            case 4:
                return text[:begin] + rng.randbytes(end - begin) + text[end:]
            case 5:
                return text.decode().encode(rng.choice(["utf-16", "utf-8-sig", "utf-32-be"]))
            case _:
                middle = rng.choice(
                    [b"NaN", b"1e999", b"9" * 5000, b"[" * 9000, b'{"a":' * 9000, b"\\ud800", b"\\u0000"]
                )
                return text[:begin] + middle + text[end:]


def complaint(response):
    """What is wrong with a response; "" if nothing is."""
    if response.status_code >= 500:
        return "a server's error"
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        events = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
        if "server_error" in response.text and any('"error":{' in event for event in events):
            return "a server's error in a stream"
        return "" if events else "an empty stream"
    if response.status_code < 400 or not response.content:  # responses to HEAD have no content
        return ""
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return "not an error in OpenAI's shape"
    if set(error) != {"message", "type", "param", "code"} or not isinstance(error["message"], str):
        return "not an error in OpenAI's shape"
    if TELLTALES.search(response.text):
        return "an error that tells of the machine"
    return "a long error" if len(response.content) > 20_000 else ""


class Bystander:
    """A client that streams one reply after the other.

    gaps: Seconds between chunks, where more than 0.1.
    overruns: Seconds by which this process or the machine delayed a sleeping thread; the server can't help these.
    """

    def __init__(self, url):
        self.gaps, self.overruns, self.num_chunks, self.failures = [0.0], [0.0], 0, []
        self._url, self._done = url, threading.Event()
        self._threads = [threading.Thread(target=run) for run in (self._listen, self._sleep)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        for thread in self._threads:
            thread.join()

    def _listen(self):
        body = {"model": "smollm2", "prompt": "Once", "max_tokens": 200, "ignore_eos": True, "stream": True}
        with httpx.Client(timeout=60) as client:
            while not self._done.is_set():
                with client.stream("POST", self._url + "/v1/completions", json=body) as response:
                    times = [(time.monotonic(), line) for line in response.iter_lines()]
                if response.status_code != 200 or ("data: [DONE]" not in [line for _, line in times]):
                    self.failures.append(times[-1:])
                self.num_chunks += len(times)
                self.gaps += [b - a for (a, _), (b, _) in itertools.pairwise(times) if b - a > 0.1]

    def _sleep(self):
        while not self._done.is_set():
            began = time.monotonic()
            time.sleep(0.01)
            self.overruns.append(max(0, time.monotonic() - began - 0.01))


def send_flawless(client, url, number):
    """Send a valid request that fills the context, so that its steps are as long as possible, with a unique text."""
    body = {"model": "smollm2", "prompt": f"{number}" + " na" * 200, "max_tokens": 8}
    client.post(url + "/v1/completions", json=body).raise_for_status()


def resident_bytes(process):
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.alone  # measures stalls
@pytest.mark.timeout(7200)
def test_no_broken_request_breaks_anything(embedded):
    app_routes = sorted(routes(embedded))
    assert set(BODIES) <= {path for _, path in app_routes}
    statuses, wrong, sizes, slowest = Counter(), [], [], [0.0]
    with serving("--max-model-len", "256", patch=FEW_PAGES) as (url, process), httpx.Client(timeout=60) as client:

        def send(example):
            seed = example.seed
            began = time.monotonic()
            try:
                response = client.request(
                    example.method, url + example.path, content=example.content, headers=example.headers
                )
            except httpx.HTTPError as error:
                wrong.append((seed, example.path, example.content[:2000], repr(error)))
                return
            slowest.append(time.monotonic() - began)
            statuses[example.path.split("?")[0] if example.path in BODIES else "others", response.status_code] += 1
            if problem := complaint(response):
                wrong.append(
                    (seed, example.path, example.content[:2000], response.status_code, problem, response.text[:500])
                )
            if seed % 20 == 0:
                sizes.append((seed, resident_bytes(process)))

        with Bystander(url) as usual, ThreadPoolExecutor(NUM_AT_ONCE) as pool:
            list(pool.map(functools.partial(send_flawless, client, url), range(20)))
        gaps, overruns, num_chunks = [], [], 0
        for begin in range(0, NUM_EXAMPLES, ROUND):
            seeds = range(begin, min(begin + ROUND, NUM_EXAMPLES))
            examples = [Example(seed, app_routes) for seed in seeds]  # made now, as this would delay the bystander
            with Bystander(url) as bystander, ThreadPoolExecutor(NUM_AT_ONCE) as pool:
                list(pool.map(send, examples))
            assert bystander.failures == []
            gaps, overruns = gaps + bystander.gaps, overruns + bystander.overruns
            num_chunks += bystander.num_chunks
        deadline = time.monotonic() + 30
        while metric(url, "num_requests_running") + metric(url, "num_requests_waiting"):
            assert time.monotonic() < deadline, "requests are left"
            time.sleep(0.05)
        assert metric(url, "kv_cache_usage_perc") == 0
        assert httpx.get(url + "/health").status_code == 200
    warm, end = (
        max(size for seed, size in sizes if low * NUM_EXAMPLES <= seed < (low + 1 / 3) * NUM_EXAMPLES)
        for low in (1 / 3, 2 / 3)
    )
    print(f"answers {sorted(statuses.items())}; the slowest took {max(slowest):.1f} s")
    print(f"a bystander's {num_chunks} chunks, longest gaps {sorted(gaps)[-3:]}, usually {max(usual.gaps)}")
    print(f"this process waited {max(overruns):.2f} s at most; resident {warm >> 20} and {end >> 20} MiB")
    assert wrong == []
    assert max(gaps) <= max(usual.gaps) + MAX_STALL + max(overruns)
    assert end - warm <= MAX_GROWTH
    for path in BODIES:
        assert statuses[path, 400], f"nothing was refused at {path}"
        assert statuses[path, 200], f"nothing was served at {path}"
