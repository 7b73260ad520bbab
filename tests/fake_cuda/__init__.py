"""A fake CUDA device: tensors that report device `cuda` and whose values are computed on the CPU.

Unlike the tensors of torch's FakeTensorMode, these have values: the oracle can judge whole replies, and CUDA graphs
replay. The fake is as strict as a device:
- Operands on two devices raise a Fault. `empty` is filled with NaN.
- Data copied to the host is there only after an event. Pinned memory copied to the device must not change until then.
- A graph replays what it recorded and runs no Python. It overwrites memory that later graphs of its pool may use for
  their results.
- Memory is counted and limited.
- Each synchronisation of the host with the device is recorded, with the function that caused it.
"""

from tests.fake_cuda.device import FakeCuda
from tests.fake_cuda.memory import Fault
from tests.fake_cuda.tensor import CUDA, CudaTensor

__all__ = ["CUDA", "CudaTensor", "FakeCuda", "Fault"]
