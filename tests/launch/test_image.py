"""docker/: what the linter of `make lint` does not know of the image, and the two scripts that its build runs."""

import importlib.util
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docker" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_smoke_test_ends_the_build_as_a_user_without_rights():
    steps = re.findall(r"^([A-Z]+) ((?:.*\\\n)*.*)", DOCKERFILE, re.MULTILINE)
    users = [number for number, (name, value) in enumerate(steps) if name == "USER" and value not in ("root", "0")]
    *_, last = [number for number, (name, _) in enumerate(steps) if name == "RUN"]
    assert len(users) == 1 and users[0] < last
    assert "docker/smoke.py --image" in steps[last][1]
    assert not any(name == "ADD" for name, _ in steps)
    # a tag that names a month: those are never changed
    assert re.search(r"^ARG TAG=\d\d\.\d\d-py3$", DOCKERFILE, re.MULTILINE)


def test_nothing_enters_the_image_but_what_it_needs():
    first, *names = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith(("#", "**"))]
    assert first == "*"
    assert all(name.startswith("!") and (ROOT / name[1:]).exists() for name in names)


def test_the_constraints_keep_the_images_torch_and_what_is_compiled_against_it():
    installed = {
        "torch": "2.10.0a0+b4e4ee81d3.nv25.12", "transformer_engine": "2.10.0+769ed778", "Flash_Attn": "2.7.4", "nvidia.nccl": "2", "numpy": "1.26.4",
        "pytorch-lightning": "2.5", "PyYAML": "6.0.1",
    }  # fmt: skip
    ours = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    lines = script("constraints").merged(ours, installed)
    names = [Requirement(line).name for line in lines]
    assert len(names) == len(set(names))
    assert {"torch==2.10.0a0+b4e4ee81d3.nv25.12", "transformer-engine==2.10.0+769ed778", "flash-attn==2.7.4", "nvidia-nccl==2"} < {*lines}
    assert "numpy==1.26.4" in lines and "pytorch-lightning" not in names
    theirs = {"torch", "numpy"}
    assert [line for line in ours if re.match(r"\w", line) and line.split("==")[0] not in theirs] == lines[5:]


@pytest.mark.parametrize(
    ("versions", "wrong"),
    [
        ({"torch": "2.10.0a0+b4e4ee81d3.nv25.12", "transformer-engine": "2.10.0+769ed778"}, []),
        ({"torch": "2.5.1", "transformer-engine": "2.12.0"}, ["torch 2.5.1", "transformer-engine 2.12.0"]),
    ],
)
def test_an_image_is_held_against_what_megatron_names(versions, wrong):
    from importlib.metadata import requires

    found = script("smoke").out_of_range(requires("megatron-core"), versions)
    assert [line.partition(",")[0] for line in found] == wrong


def test_this_environment_has_what_the_dockerfile_says_of_megatron():
    assert f"megatron-core {version('megatron-core')}" in DOCKERFILE
