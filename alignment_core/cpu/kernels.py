"""kernels.cpp as a shared library: compiled on first use, kept in the user's cache, called through ctypes."""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_void_p
from pathlib import Path

import platformdirs
import torch  # noqa: F401 - imported first, so that our library shares torch's OpenMP runtime and threads

from linalign.alignment_core import disk_cache

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
FILE = "kernels.so"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")


class Matrix(ctypes.Structure):
    _fields_ = (
        ("format", c_int32),
        ("rows", c_int32),
        ("cols", c_int32),
        ("data", c_void_p),
        ("scale", c_void_p),
        ("offset", c_void_p),
        ("bias", c_void_p),
    )


class Layer(ctypes.Structure):
    _fields_ = (
        ("qkv", Matrix),
        ("out", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("window", c_int32),
    )


class Shape(ctypes.Structure):
    _fields_ = (
        ("hidden", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("rotary_dim", c_int32),
        ("intermediate", c_int32),
        ("epsilon", c_float),
        ("scaling", c_float),
    )


class Batch(ctypes.Structure):
    _fields_ = (
        ("tokens", c_int32),
        ("page_size", c_int32),
        ("pages", c_int32),
        ("row", c_void_p),
        ("position", c_void_p),
        ("page_table", c_void_p),
        ("slot", c_void_p),
    )


_P, _I, _F = c_void_p, c_int32, c_float
SIGNATURES: dict[str, Sequence[type]] = {
    "linalign_encode": (_P, _I, _I, _P, _P, _I, _I, _I, _P, _I),
    "linalign_log_totals": (_P, _I, _I, _P, _P, _P, _I),
    "linalign_narrow": (_P, _I, _I, _P, _P, _P, _I, _P, _I),
    "linalign_release_threads": (),
    "linalign_linear": (_P, _P, _I, _P, _I),
    "linalign_attention": (_P, _I, _I, _I, _F, _I, _F, _P, _P, _P, _P, _I),
    "linalign_layers": (_P, _I, _P, _P, _P, _P, _P, _I),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels. None, after a warning, if no C++ compiler can compile them."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        log.warning("No C++ compiler (c++) was found: running without the CPU kernels, several times slower")
        return None
    try:
        lib = _loaded(compiler)
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or error
        log.warning("The CPU kernels could not be compiled; running without them, several times slower: %s", detail)
        return None
    for name, arguments in SIGNATURES.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, None
    lib.linalign_encode.restype = c_int32
    return lib


def release_threads() -> None:
    """End the OpenMP threads of the calling thread.

    If a process has more OpenMP threads than cores, libgomp's threads sleep instead of spinning while they wait for
    each other, and a step takes twice as long. So the thread that has loaded the model must call this before another
    thread runs the engine.
    """
    if (lib := library()) is not None:
        lib.linalign_release_threads()


def _loaded(compiler: str) -> ctypes.CDLL:
    """The library for this source, compiler and processor, from the cache if possible.

    Raises CalledProcessError and OSError if it can't be compiled or loaded.
    """
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), version, " ".join(FLAGS).encode(), _processor()]))
    cached = platformdirs.user_cache_path("linalign") / f"kernels-{key.hexdigest()[:16]}"
    if disk_cache.has(cached):
        try:
            return ctypes.CDLL(str(cached / FILE))
        except OSError as error:
            log.warning("The cached CPU kernels are damaged (%s); compiling them again", error)
            with contextlib.suppress(OSError):
                disk_cache.discard(cached)
    log.info("Compiling the CPU kernels, once; this takes some seconds")

    def build(directory: Path) -> None:
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(directory / FILE)]
        subprocess.run(command, capture_output=True, check=True, text=True)

    try:
        disk_cache.add(cached, build)
        return ctypes.CDLL(str(cached / FILE))
    except (OSError, subprocess.CalledProcessError) as error:
        log.warning("The CPU kernels can't be cached, so every start will compile them: %s", error)
    with tempfile.TemporaryDirectory() as scratch:
        build(Path(scratch))
        return ctypes.CDLL(str(Path(scratch, FILE)))


def _processor() -> bytes:
    """A description of the processor, on which -march=native depends."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().split(b"\n\n")[0].splitlines()
    except OSError:
        return " ".join(os.uname()).encode()
    return b"\n".join(line for line in lines if line.startswith((b"model name", b"flags", b"Features", b"CPU")))
