import pytest

from server.settings import load_settings


def test_precedence_is_flag_then_variable_then_file_then_default(tmp_path, monkeypatch):
    file = tmp_path / "server.yaml"
    file.write_text("port: 1\nmax_num_seqs: 2\nhost: 0.0.0.0\n")
    monkeypatch.setenv("LINALIGN_PORT", "3")
    monkeypatch.setenv("LINALIGN_MAX_NUM_SEQS", "4")
    settings = load_settings(["--config", str(file), "--port", "5"])
    assert (settings.port, settings.max_num_seqs, settings.host) == (5, 4, "0.0.0.0")
    assert settings.max_num_batched_tokens is None
    assert settings.model is None


def test_the_file_can_come_from_the_variable(tmp_path, monkeypatch):
    file = tmp_path / "server.yaml"
    file.write_text("default_alignment_ratio: 3.5\n")
    monkeypatch.setenv("LINALIGN_CONFIG", str(file))
    assert load_settings(["some/model"]).default_alignment_ratio == 3.5
    assert load_settings(["some/model"]).model == "some/model"


def test_nothing_is_silently_ignored(tmp_path, monkeypatch):
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
    for content, words in [("a: [", "not valid YAML"), ("- port", "mapping"), ("config: other.yaml", "another config")]:
        file.write_text(content)
        with pytest.raises(ValueError, match=words):
            load_settings(["--config", str(file)])
    monkeypatch.setenv("linalign_prot", "1")
    with pytest.raises(ValueError, match="LINALIGN_PORT"):
        load_settings([])
    monkeypatch.delenv("linalign_prot")
    monkeypatch.setenv("LINALIGN_API_KEYS", "secret")
    with pytest.raises(ValueError, match="LINALIGN_API_KEYS"):
        load_settings([])
