import re
import shlex
import subprocess
import sys
from dataclasses import fields
from hashlib import sha256

import pytest

from linalign import EngineConfig
from linalign.evaluation.command import EvalSettings
from linalign.server.command_line import help_source, parse
from linalign.server.commands import main as command_line
from linalign.server.commands.bench import BenchSettings
from linalign.server.commands.serve import engine_config
from linalign.server.commands.terminal_chat import ChatSettings
from linalign.server.settings import Settings
from linalign.server.settings_loading import load_settings


def test_precedence_is_flag_then_variable_then_file_then_default(tmp_path, monkeypatch):
    file = tmp_path / "server.yaml"
    file.write_text("port: 1\nmax_num_seqs: 2\nhost: 0.0.0.0\n")
    monkeypatch.setenv("LINALIGN_PORT", "3")
    monkeypatch.setenv("LINALIGN_MAX_NUM_SEQS", "4")
    settings = load_settings(["--config", str(file), "--port", "5"])
    assert (settings.port, settings.max_num_seqs, settings.host) == (5, 4, "0.0.0.0")
    assert settings.max_num_batched_tokens is None
    assert settings.model is None


def test_the_config_file_can_be_set_by_a_variable(tmp_path, monkeypatch):
    file = tmp_path / "server.yaml"
    file.write_text("default_alignment_ratio: 3.5\n")
    monkeypatch.setenv("LINALIGN_CONFIG", str(file))
    assert load_settings(["some/model"]).default_alignment_ratio == 3.5
    assert load_settings(["some/model"]).model == "some/model"


def test_unknown_settings_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "server.yaml"
    file.write_text("prot: 1\n")
    with pytest.raises(ValueError, match="prot"):
        load_settings(["--config", str(file)])
    with pytest.raises(ValueError, match="no config file"):
        load_settings(["--config", str(tmp_path / "missing.yaml")])
    with pytest.raises(SystemExit):
        load_settings(["--prot", "1"])
    with pytest.raises(ValueError, match="less than or equal to 65535"):
        load_settings(["--port", "70000"])
    for content, words in [("a: [", "not valid YAML"), ("- port", "mapping"), ("config: x.yaml", "can't set config")]:
        file.write_text(content)
        with pytest.raises(ValueError, match=words):
            load_settings(["--config", str(file)])
    monkeypatch.setenv("linalign_prot", "1")
    with pytest.raises(ValueError, match="LINALIGN_PORT"):
        load_settings([])
    monkeypatch.delenv("linalign_prot")
    for keys in ("secret,", "schlüssel", "two words"):
        monkeypatch.setenv("LINALIGN_API_KEYS", keys)
        with pytest.raises(ValueError, match="printable ASCII"):
            load_settings([])
    monkeypatch.delenv("LINALIGN_API_KEYS")
    monkeypatch.setenv("LINALIGN_API_KEY", "that of our clients")
    load_settings([])
    for keys in ("12345", "[00123]", "yes", "{a: b}", "[[a]]"):
        file.write_text(f"api_keys: {keys}")
        with pytest.raises(ValueError, match="must be strings"):
            load_settings(["--config", str(file)])


def test_the_engine_gets_its_settings():
    changed = {
        "max_model_len": 100,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 50,
        "gpu_memory_utilization": 0.5,
        "num_speculative_tokens": 4,
        "kv_cache_dtype": "fp8",
        "batch_invariant": True,
        "enforce_eager": True,
        "max_queued_requests": 7,
        "max_queued_tokens": 8,
    }
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in changed.items()]
    config = engine_config(load_settings(flags))
    unchanged = {field.name for field in fields(EngineConfig)} - set(changed)
    assert all(getattr(config, name) == value for name, value in changed.items())
    assert all(getattr(config, name) == getattr(EngineConfig(), name) for name in unchanged)


@pytest.mark.parametrize(
    "content",
    [
        "teacher: 1",
        "teacher: {principal: x}",
        "[",
        "teacher: {alignment_ratio: 30}",
        '"a\\nb": {principle: x}',
        '"\\ud800": {principle: x}',
        'teacher: {principle: "\\ud800"}',
    ],
)
def test_invalid_presets_are_an_error_at_the_start(tmp_path, content):
    file = tmp_path / "presets.yaml"
    file.write_text(content)
    command = [
        sys.executable,
        "-c",
        "from linalign.server.commands.main import main; main()",
        "serve",
        "--presets",
        str(file),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "linalign serve: the presets of" in done.stderr
    assert "pydantic" not in done.stderr
    assert "Traceback" not in done.stderr


def test_keys_of_a_file_are_added(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# the team's\nfirst-key\n\n  second-key  \n")
    settings = load_settings(["--api-keys", "third-key", "--api-keys-file", str(file)])
    assert settings.api_keys == tuple(sha256(key).digest() for key in (b"third-key", b"first-key", b"second-key"))


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "has no API key"), (b"# none\n", "has no API key"), (b"two words", "printable ASCII")]
)
def test_files_without_a_key_are_an_error(tmp_path, content, words):
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load_settings(["--api-keys-file", str(file)])
    with pytest.raises(ValueError, match="can't be read"):
        load_settings(["--api-keys-file", str(tmp_path / "nowhere")])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-requests-per-key", "2"], "needs api_keys"),
        (["--max-tokens-per-minute-per-key", "2"], "needs api_keys"),
        (["--prefix-cache-per-key"], "needs api_keys"),
        (["--cors-origins", "example.org"], "not an origin"),
        (["--cors-origins", "https://example.org/path"], "not an origin"),
        (["--forwarded-allow-ips", "proxy.example.org"], "does not appear to be"),
        (["--log-format", "xml"], "'text' or 'json'"),
    ],
)
def test_invalid_settings_are_refused(flags, words):
    with pytest.raises(ValueError, match=words):
        load_settings(flags)


@pytest.mark.parametrize("source", ["variable", "flag", "file"])
def test_api_keys(tmp_path, monkeypatch, source):
    file = tmp_path / "server.yaml"
    file.write_text("api_keys: [first-key, second-key]\n" if source == "file" else "")
    args = ["--config", str(file)] + (["--api-keys", "first-key,second-key"] if source == "flag" else [])
    if source == "variable":
        monkeypatch.setenv("LINALIGN_API_KEYS", "first-key, second-key")
    settings = load_settings(args)
    assert settings.api_keys == tuple(sha256(key).digest() for key in (b"first-key", b"second-key"))


PAGES = {"serve": Settings, "chat": ChatSettings, "bench": BenchSettings, "eval": EvalSettings}
EXAMPLES = re.findall(
    r"^  (?:LINALIGN_\w+=\S+ )?linalign .*",
    "\n".join([command_line.EPILOG, *(of.EPILOG for of in PAGES.values())]),
    re.M,
)


@pytest.mark.parametrize("command", PAGES)
def test_every_option_has_a_description_and_a_default(command):
    options = {
        action.dest: action for action in help_source(PAGES[command]).root_parser._actions if action.dest != "help"
    }
    assert set(options) == set(PAGES[command].model_fields)
    for name, action in options.items():
        required = PAGES[command].model_fields[name].is_required()
        what, mark, _ = action.help.partition(" (required)" if required else " (default: ")
        assert len(what) > 5, name
        assert mark, name
        assert action.nargs == 0 or re.fullmatch(r"[A-Z]+|\{[a-z0-9,]+\}", action.metavar), name  # no Python type names


def test_sections_begin_with_settings_that_are_there():
    assert set(Settings.SECTIONS) <= set(Settings.model_fields)
    assert next(iter(Settings.SECTIONS)) == next(iter(Settings.model_fields))


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize("args", [["--help"], *([command, "--help"] for command in PAGES)])
def test_help_is_as_wide_as_the_terminal_up_to_a_hundred_columns(args, columns, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["linalign", *args])
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINALIGN_API_KEY", "not to be shown")
    with pytest.raises(SystemExit) as exit:
        command_line.main()
    shown = capsys.readouterr().out
    assert exit.value.code == 0
    assert "not to be shown" not in shown
    longest = max(map(len, shown.splitlines()))
    assert longest <= 80 if columns <= 80 else longest <= 100


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_of_the_help_are_what_the_commands_take(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = re.search(r"^server\.yaml:\n((?:  .+\n)+)", Settings.EPILOG, re.M).group(1).replace("/run/secrets/", "")
    (tmp_path / "server.yaml").write_text(re.sub("^  ", "", block, flags=re.M))
    (tmp_path / "linalign-keys").write_text("key-1\n")
    words = shlex.split(example, comments=True)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        monkeypatch.setenv(name, value)
    _, command, *args = words
    settings = load_settings(args) if command == "serve" else parse(PAGES[command], args)
    flags = [word for word in args if word.startswith("--")]
    assert {flag[2:].replace("-", "_") for flag in flags} <= settings.model_fields_set
    if "server.yaml" in args:
        assert (settings.model, settings.default_alignment_ratio) == ("Qwen/Qwen3-8B", 1.5)


def test_there_is_an_example_of_every_command():
    assert (
        {re.search(r"linalign (\w+)", example).group(1) for example in EXAMPLES}
        == set(PAGES)
        == set(command_line.COMMANDS)
    )
    assert len(EXAMPLES) > 20


EVAL = ["eval", "follow", "--output", "out"]


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        ([], 2, "which command? serve, chat, bench, eval"),
        (["srve"], 2, "invalid choice: 'srve'"),
        (["bench", "--requests", "0"], 1, "linalign bench: requests: Input should be greater"),
        (["chat", "--alignment-ratio", "21"], 1, "linalign chat: alignment_ratio: Input should be less"),
        (["eval", "follow"], 1, "linalign eval: output: Field required"),
        ([*EVAL, "--url", "http://127.0.0.1:1"], 1, "linalign eval: "),
        ([*EVAL, "--ratios", "a,b"], 1, "linalign eval: ratios.0: Input should be a valid number"),
        ([*EVAL, "--ratios", "1,99"], 1, "linalign eval: ratios.1: Input should be less"),
        ([*EVAL, "--temperatures", "hot"], 1, "linalign eval: temperatures.0: Input should be a valid number"),
        ([*EVAL, "--alignment-top-ps", "0"], 1, "linalign eval: alignment_top_ps.0: Input should be greater"),
        ([*EVAL, "--methods", "linear,nonsense"], 1, "linalign eval: methods.1: Input should be 'linear'"),
        (["serve", "--port", "70000"], 1, "linalign serve: port: Input should be less"),
        (["serve", "--por", "1"], 2, "unrecognized arguments: --por"),
    ],
)
def test_invalid_command_lines_are_refused(args, status, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["linalign", *args])
    with pytest.raises(SystemExit) as exit:
        command_line.main()
    message = capsys.readouterr().err if isinstance(exit.value.code, int) else exit.value.code
    assert (exit.value.code if isinstance(exit.value.code, int) else 1) == status
    assert words in message
