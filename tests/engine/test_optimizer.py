"""What the optimizer is told: the learning rate of each step, which parameters decay, in what precision gradients add up."""

import dataclasses
import math

import pytest
import torch

from minitron.config.schema import Train
from minitron.engine.checkpoint import Checkpoints
from minitron.engine.trainer import Trainer
from minitron.errors import RequestError
from minitron.weights.load import load
from minitron.weights.source import open_folder
from tests.engine.runs import SETTINGS, Run
from tests.oracles.models import BIASES, UNTIED, save_model

PEAK, LEAST, WARMUP, STEPS = 3e-3, 1e-4, 3, 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "model", 4, num_hidden_layers=1, **BIASES, **UNTIED)


def settings(**changes):
    return Train(**{"lr": PEAK, "min_lr": LEAST, "warmup_steps": WARMUP, "steps": STEPS, "eval_tokens": 1, **changes})


def rates(model, world, train):
    """The learning rate of every step."""
    trainer = Trainer(model, train, world)
    found = []
    for _ in range(train.steps):
        trainer.scheduler.step(1)
        found.append(trainer.optimizer.param_groups[0]["lr"])
    trainer.close()
    return found


# share of the decay that is done -> share of (peak - least) that is left
FORMS = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "exponential": lambda x: 2 * 0.5**x - 1,
    "minus_sqrt": lambda x: 1 - math.sqrt(x),
}


def expected(form, first, last, peak=PEAK):
    """Warm-up, the peak until step `first`, then down to the least at step `last`."""
    after = [LEAST + (peak - LEAST) * FORMS[form](min(max(step - first, 0) / (last - first), 1.0)) for step in range(WARMUP + 1, STEPS + 1)]
    return [peak * step / WARMUP for step in range(1, WARMUP + 1)] + after


def test_learning_rates_follow_their_formulas(folder, alone):
    model = load(open_folder(folder, "model.path"), alone, torch.float32)
    for schedule in ("cosine", "linear"):
        assert rates(model, alone, settings(schedule=schedule)) == pytest.approx(expected(schedule, WARMUP, STEPS))
    constant = rates(model, alone, settings(schedule="constant"))
    assert constant == pytest.approx([PEAK / 3, PEAK * 2 / 3, *[PEAK] * 18])
    for form in FORMS:
        found = rates(model, alone, settings(schedule="wsd", decay_steps=5, decay_form=form))
        assert found == pytest.approx(expected(form, STEPS - 5, STEPS))
        assert found[14] == PEAK > found[15] and found[-1] == pytest.approx(LEAST)
    assert rates(model, alone, settings(schedule="wsd", decay_steps=17, decay_form="linear")) == pytest.approx(expected("linear", WARMUP, STEPS))


@pytest.mark.parametrize(("changes", "most"), [({"decay_steps": None}, 17), ({"decay_steps": 18}, 17), ({"decay_steps": 2, "warmup_steps": 30}, 1)])
def test_a_decay_that_does_not_fit_is_refused(changes, most):
    with pytest.raises(RequestError, match=rf"^train.decay_steps=\w+: 1 to {most} steps, what the warm-up leaves of train.steps=20, are needed with"):
        settings(schedule="wsd", **changes)


def test_decays_branch_off_a_stable_checkpoint(folder, alone, tmp_path):
    """From one checkpoint of a constant rate, a decay of the last steps, in whatever form: the rate at a step is what today's settings give."""
    stable = dataclasses.replace(SETTINGS, schedule="constant", save_interval=3)
    run = Run(alone, folder, stable)
    run.fit(tmp_path, report=lambda line: None)
    for step in (6, 3):
        assert (tmp_path / f"step_{step:08d}").is_dir()
    for form in ("linear", "exponential"):
        branch = Run(alone, folder, dataclasses.replace(stable, schedule="wsd", decay_steps=3, decay_form=form))
        only = tmp_path / form
        only.mkdir()
        (only / "step_00000003").symlink_to(tmp_path / "step_00000003")
        Checkpoints(only).resume(branch.trainer)
        line = branch.step()
        assert branch.trainer.step == 4
        assert line["lr"] == pytest.approx(1e-4 + (3e-3 - 1e-4) * FORMS[form](1 / 3))


def test_matrices_and_embeddings_decay_and_norms_and_biases_do_not(folder, alone):
    """Two optimizers that differ in weight decay alone, one step on the same gradients: what moved otherwise decays."""
    found = {}
    for decay in (0.0, 0.5):
        run = Run(alone, folder, dataclasses.replace(SETTINGS, weight_decay=decay))
        start = {name: parameter.detach().clone() for name, parameter in run.trainer.model.named_parameters()}
        line = run.step()
        found[decay] = {name: parameter.detach().clone() for name, parameter in run.trainer.model.named_parameters()}
    decayed = {name for name, parameter in found[0.5].items() if not torch.equal(parameter, found[0.0][name])}
    matrices = {name for name, parameter in start.items() if parameter.dim() == 2}
    assert decayed == matrices
    for part in ("word_embeddings.weight", "output_layer.weight", "linear_fc1.weight", "linear_qkv.weight"):
        assert any(name.endswith(part) for name in decayed)
    for part in ("layernorm.weight", "linear_fc1.bias", "linear_qkv.bias"):
        assert any(name.endswith(part) for name in set(start) - decayed)
    for name in decayed:  # decoupled: the weight itself, by lr x decay, whatever its gradient
        assert torch.allclose(found[0.0][name] - found[0.5][name], line["lr"] * 0.5 * start[name], atol=1e-7, rtol=1e-3), name


def test_gradients_of_bf16_weights_add_up_in_fp32(folder, alone):
    """Of 256 equal parts of a gradient, bf16 would lose all that come after the sum is 256 times as large as a part."""
    run = Run(alone, folder, dtype=torch.bfloat16)
    chunk = run.trainer.wrapped[0]
    weight = next(parameter for parameter in chunk.parameters() if parameter.dim() == 2)
    assert (weight.dtype, weight.main_grad.dtype) == (torch.bfloat16, torch.float32)
    chunk.zero_grad_buffer()
    part = 1.0 + 2.0**-7
    for _ in range(1024):
        (weight * part).sum().backward()
    assert torch.equal(weight.main_grad, torch.full(weight.shape, 1024 * part))
    masters = {parameter.dtype for group in run.trainer.optimizer.param_groups for parameter in group["params"]}
    assert masters == {torch.float32}
