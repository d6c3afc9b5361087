"""The settings under `plan`: see schema.py."""

import dataclasses

from minitron.config.setting import setting
from minitron.hardware import MACHINES


@dataclasses.dataclass(frozen=True)
class Planning:
    """The machines that a training is planned for. What is not measured is assumed, and said with the plan."""

    hardware: str = setting("H100", "GPU, in machines as their maker sells them", allowed=tuple(MACHINES))
    nodes: int | None = setting(
        None, "machines; layouts that fill them are then ranked (null: as many GPUs as tp x pp x cp takes, one replica)", least=1
    )
    gpus_per_node: int = setting(8, "GPUs of each machine", least=1)
    memory_gib: float | None = setting(None, "memory of a GPU in GiB, as torch reports it (null: known of plan.hardware)", above=0)
    network_gbits: float | None = setting(None, "Gbit/s that a GPU has out of its machine (null: known of plan.hardware)", above=0)
    tflops: float | None = setting(
        None,
        "measured TFLOP/s of one GPU at this work, such as tflop_per_second_per_rank in metrics.jsonl of a run on one (null: plan.efficiency)",
        above=0,
    )
    efficiency: float = setting(
        0.5, "assumed share of the GPU's peak in a model's passes, beside communication and waiting, which are counted apart", above=0, most=1
    )
    reserve: float = setting(0.05, "share of a GPU's memory to leave free, for what can't be told before", least=0, below=1)
    micro_batch_sizes: list[int] = setting([1, 2, 4, 8], "micro-batch sizes of the layouts to rank, beside train.micro_batch_size", least=1)
    layouts: int = setting(10, "ranked layouts to print, the fastest first; plan.json has all that fit (0: rank none)", least=0)
    price: float | None = setting(None, "price of a GPU for an hour, in any currency (null: no cost is told)", above=0)

    @property
    def gpus(self) -> int | None:
        """All of them."""
        return None if self.nodes is None else self.nodes * self.gpus_per_node
