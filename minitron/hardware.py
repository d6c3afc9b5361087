"""What GPUs and the machines around them can do at most, by their makers' data sheets, none of it measured here; and the name of this CPU."""

import dataclasses
import platform

# Dense matrix products in 10^12 a second, by part of the device's name, the first that fits (a GH200 is an H200 here), and by type. fp32 is
# without TF32, which stays off here. From NVIDIA's data sheets of these GPUs (A100, H100, H200, L40S) and of HGX B200; figures that a sheet
# gives "with sparsity" are halved.
PEAK_TFLOPS = (
    ("H100 PCIe", {"bf16": 756.0, "fp32": 51.0}),
    ("H100 NVL", {"bf16": 835.0, "fp32": 60.0}),
    ("H100", {"bf16": 989.0, "fp32": 67.0}),
    ("H200", {"bf16": 989.0, "fp32": 67.0}),
    ("B200", {"bf16": 2250.0, "fp32": 75.0}),
    ("A100", {"bf16": 312.0, "fp32": 19.5}),
    ("L40S", {"bf16": 362.0, "fp32": 91.6}),
)


@dataclasses.dataclass(frozen=True)
class Machine:
    """A GPU in a machine of eight, as its maker sells it. Speeds in GB/s (10^9 bytes), in one direction, of one GPU.

    `memory_gib`: what torch reports of the GPU's memory, rounded down, which is less than what is printed on it. `hbm`: its memory's speed;
    `nvlink`: to the others of the machine; `network`: its share of the cards that lead out of it; `host`: to the host's memory.
    """

    memory_gib: float
    hbm: float
    nvlink: float
    network: float
    host: float


# NVLink: half of what a sheet gives for both directions together (600, 900, 900, 1800 GB/s). Network: one card per GPU in NVIDIA's DGX of that
# generation, 200 Gbit/s (DGX A100) or 400 (DGX H100, H200, B200). Host: PCIe of 16 lanes, generation 4 or 5. HBM: the GPUs' data sheets, B200's
# of DGX B200 (64 TB/s over eight).
MACHINES = {
    "A100": Machine(memory_gib=79, hbm=2039, nvlink=300, network=25, host=32),
    "H100": Machine(memory_gib=79, hbm=3350, nvlink=450, network=50, host=64),
    "H200": Machine(memory_gib=139, hbm=4800, nvlink=450, network=50, host=64),
    "B200": Machine(memory_gib=178, hbm=8000, nvlink=900, network=50, host=64),
}


def peak_of(device_name: str, dtype: str) -> float | None:
    """TFLOP/s that a GPU of this name can reach at most; None where the table does not know it."""
    return next((peaks[dtype] for part, peaks in PEAK_TFLOPS if part in device_name), None)


def cpu_model() -> str:
    """What the kernel calls the processor of this machine."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            lines = handle.read().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor() or platform.machine())
