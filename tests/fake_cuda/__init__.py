"""A CUDA device made of a CPU: tensors that say they are on `cuda`, whose numbers a CPU computes.

Unlike torch's FakeTensorMode its tensors have values, so that the oracle can judge whole replies, and CUDA graphs
replay. It is as strict as a device: operands on two devices are a Fault, `empty` is full of NaN, what the device
copies to the host is there after an event only, and what it copies from pinned memory has to stay until then. A graph
repeats what it has recorded and runs no Python, and writes where later graphs of its pool may have their results.
Memory is counted and limited. Whatever makes the host wait for the device is written down with the line that asked for
it.
"""

from tests.fake_cuda.device import FakeCuda
from tests.fake_cuda.memory import Fault
from tests.fake_cuda.tensor import CUDA, CudaTensor

__all__ = ["CUDA", "CudaTensor", "FakeCuda", "Fault"]
