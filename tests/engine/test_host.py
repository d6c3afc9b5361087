"""Megatron on the CPU: every name that is bridged is what it was afterwards, and every place that needs a bridge has one."""

import ast
import importlib
import inspect
import subprocess
import sys

import pytest
import torch

from minitron.engine.host import FACTORIES, LITERALS, on_host
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.models import save_model, tokens_of

# Modules of Megatron that are imported too and write device="cuda" where no run of ours comes: what the code there is for
ELSEWHERE = {
    "megatron.core.dist_checkpointing.strategies.state_dict_saver": "reusing an earlier checkpoint's plan",
    "megatron.core.distributed.fsdp.src.megatron_fsdp.mixed_precision": "fully sharded data parallelism",
    "megatron.core.fp8_utils": "fp8",
    "megatron.core.fusions.fused_indices_converter": "a fused dispatcher of tokens to experts",
    "megatron.core.pipeline_parallel.hybrid_cp_schedule": "context parallelism over groups that change",
    "megatron.core.pipeline_parallel.utils": "streams that overlap experts' communication",
    "megatron.core.rerun_state_machine": "running a step again to find faulty hardware",
    "megatron.core.transformer.moe.moe_utils": "records of losses that balance experts",
    "megatron.core.transformer.utils": "masks of Megatron's own attention, which ours takes the place of",
}


def owners():
    """Everything whose attributes the bridge may touch."""
    modules = {name: importlib.import_module(name) for name in (*LITERALS, "megatron.core.tensor_parallel.random")}
    return {"torch.cuda": torch.cuda, "Tensor": torch.Tensor, "Module": torch.nn.Module, "torch": torch, **modules}


def snapshot():
    return {name: {key: getattr(owner, key) for key in dir(owner) if not key.startswith("__")} for name, owner in owners().items()}


def changed(before, after):
    """Names that lead elsewhere, or are there in one of the two only."""
    return sorted(
        f"{name}.{key}" for name in before for key in before[name].keys() | after[name].keys() if before[name].get(key) is not after[name].get(key)
    )


def test_every_name_is_what_it_was_after_the_block():
    before = snapshot()
    with on_host():
        inside = changed(before, snapshot())
    assert changed(before, snapshot()) == []
    assert {"torch.cuda.current_device", "Tensor.cuda", "Tensor.type", "Module.cuda", "megatron.core.utils.torch"} <= set(inside)
    assert not [name for name in inside if name.startswith("torch.") and not name.startswith("torch.cuda.")]


def test_every_name_is_what_it_was_after_a_failure_and_after_nesting():
    before = snapshot()
    with pytest.raises(ZeroDivisionError), on_host(), on_host():
        1 / 0  # noqa: B018
    assert changed(before, snapshot()) == []


def test_inside_the_block_cuda_s_names_lead_to_the_cpu():
    with on_host():
        assert torch.cuda.current_device() == torch.device("cpu")
        assert torch.ones(2).cuda().device.type == "cpu"
        assert torch.ones(2).type() == "torch.cuda.FloatTensor"
        assert torch.ones(2).type(torch.bfloat16).dtype == torch.bfloat16
        bridged = importlib.import_module("megatron.core.utils").torch
        made = [bridged.tensor([1], device="cuda"), *(getattr(bridged, name)(2, device="cuda") for name in ("empty", "ones", "zeros"))]
        assert {tensor.device.type for tensor in [*made, bridged.full((2,), 1.0, device=torch.device("cuda"))]} == {"cpu"}
        assert bridged.zeros(2, device="meta").is_meta
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.synchronize()
        event = torch.cuda.Event()
        event.record()
        assert event.elapsed_time(torch.cuda.Event()) == 0.0


def test_what_a_dispatcher_of_tokens_keeps_on_its_class_does_not_stay():
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher").MoEAlltoAllTokenDispatcher
    before = dispatcher.cuda_dtoh_stream
    with on_host():
        assert isinstance(dispatcher.cuda_dtoh_stream, torch.cuda.Stream)
        dispatcher.cuda_dtoh_stream = torch.cuda.Stream()
    assert dispatcher.cuda_dtoh_stream is before


def test_importing_the_engine_starts_no_cuda_and_no_thread():
    code = """
import threading
from minitron import engine
engine.Trainer
import torch
assert not torch.cuda.is_initialized()
assert not torch.distributed.is_initialized()
assert threading.active_count() == 1, threading.enumerate()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def literals(module):
    """The calls in a module's source with device="cuda": (function that is called, line)."""
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError):
        return []
    return [
        (ast.unparse(node.func), node.lineno)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "device" and isinstance(keyword.value, ast.Constant) and str(keyword.value.value).startswith("cuda")
    ]


def imported_after_a_step(world, folder, out):
    """Train a step, save, load; then {module of Megatron: its calls with device="cuda"}."""
    from minitron.config.schema import Distill, Train
    from minitron.distillation.signal import LiveTeacher
    from minitron.distillation.step import distillation_loss
    from minitron.engine.batch import Batch
    from minitron.engine.checkpoint import Checkpoints
    from minitron.engine.trainer import Trainer
    from minitron.weights.load import load
    from minitron.weights.source import open_folder

    student, teacher = (load(open_folder(folder, "model.path"), world, torch.bfloat16) for _ in range(2))
    trainer = Trainer(student, Train(steps=2), world)
    batch = [Batch(tokens_of(61, 2, 9))]
    trainer.update(batch, distillation_loss(student, LiveTeacher(teacher.requires_grad_(False), world), Distill(), world)(0, batch))
    Checkpoints(out).save(trainer)
    Checkpoints(out).resume(trainer)
    loaded = {name: module for name, module in sys.modules.items() if name.startswith("megatron.core")}
    return {name: calls for name, module in loaded.items() if (calls := literals(module))}


@pytest.mark.multirank
def test_every_place_that_a_cpu_run_can_reach_is_bridged(tmp_path):
    found = on_ranks(imported_after_a_step, Layout(tp=2, dp=2), save_model(tmp_path / "model"), tmp_path / "checkpoints")[0]
    assert {name: calls for name, calls in found.items() if name not in {*LITERALS, *ELSEWHERE}} == {}
    assert set(LITERALS) <= set(found)  # no bridge without a river
    called = {function for name in LITERALS for function, _ in found[name] if function.startswith("torch.")}
    assert called <= {f"torch.{name}" for name in FACTORIES}
