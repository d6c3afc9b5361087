"""The figures of a step, and the FLOPs that they are made of."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from minitron.arch.counts import count, training_flops
from minitron.arch.families import from_hf
from minitron.engine.meter import GIB, Meter, peak_memory
from minitron.hardware import peak_of
from tests.oracles.models import UNTIED, config_of


@pytest.mark.parametrize("changes", [{}, UNTIED, {"num_key_value_heads": 1}, {"head_dim": 14, "num_hidden_layers": 1}], ids=str)
@pytest.mark.parametrize("with_teacher", [False, True])
def test_the_flops_of_training_are_those_that_torch_counts(with_teacher, changes):
    config, teacher_config, batch, length = config_of(**changes), config_of(num_hidden_layers=3), 3, 7
    student, teacher = (AutoModelForCausalLM.from_config(one, attn_implementation="eager") for one in (config, teacher_config))
    tokens = torch.zeros(batch, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        student(tokens).logits.sum().backward()
        if with_teacher:
            with torch.no_grad():
                teacher(tokens)
    arch, other = (from_hf(one.to_dict(), "x") for one in (config, teacher_config))
    assert training_flops(arch, length, other if with_teacher else None) == counter.get_total_flops() / (batch * length)


def test_a_backward_pass_counts_as_two_forward_passes():
    arch = from_hf(config_of().to_dict(), "x")
    assert training_flops(arch, 11, None) == 3 * count(arch, 11).flops_per_token


def test_the_figures_of_a_step():
    assert Meter(6000, 3, flops_per_token=2e9, peak_tflops=4.0).figures(step_seconds=2.0, data_seconds=0.5, memory_gib=1.5) == {
        "tokens_per_second": 3000.0, "tokens_per_second_per_rank": 1000.0, "step_seconds": 2.0, "data_seconds": 0.5, "peak_memory_gib": 1.5,
        "tflop_per_second_per_rank": 2.0, "mfu": 0.5,
    }  # fmt: skip


def test_what_is_not_known_is_not_told():
    found = Meter(6000, 3, flops_per_token=2e9).figures(2.0, 0.5, 1.5)
    assert "mfu" not in found and "tflop_per_second_per_rank" in found
    assert not {"mfu", "tflop_per_second_per_rank"} & {*Meter(6000, 3, peak_tflops=4.0).figures(2.0, 0.5, 1.5)}


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.0),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H100 NVL", "fp32", 60.0),
        ("NVIDIA GH200 480GB", "bf16", 989.0),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("NVIDIA GeForce RTX 4090", "bf16", None),
    ],
)
def test_the_peak_of_a_gpu(name, dtype, peak):
    assert peak_of(name, dtype) == peak


def test_memory_is_the_high_water_mark_that_the_system_keeps():
    """It only grows, so what lies between two looks at it lies between the two."""
    look = lambda: int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024 / GIB  # noqa: E731
    before = look()
    assert before * 0.99 <= peak_memory(torch.device("cpu")) <= look() * 1.01  # the system counts pages of threads in lots
