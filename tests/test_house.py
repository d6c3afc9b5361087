"""The order of the house: who imports whom, what an import costs, how long a file may be."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from minitron.config.verbs import VERBS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minitron"

# The one direction of imports: a folder or file of minitron/ may import those of the lines above it, and itself.
ORDER = [
    {"errors"},
    {"files", "packages", "hardware"},
    {"arch"},
    {"config"},
    {"engine"},
    {"weights", "data"},
    {"importance", "pruning", "distillation", "evaluation"},
    {"search"},
    {"launching", "reporting"},
    {"checks", "record"},
    {"session"},
    {"calibration", "training", "teaching"},
    {"stages"},
    {"cli"},
]
MEGATRON = {"engine": "megatron", "data": "megatron.core.datasets"}  # who may import which part of it
COMPOSED = {("family", "compress"), ("submit", "family"), ("submit", "compress")}  # stages that may import a certain other one
LONGEST = 450  # lines

MODULES = sorted(path.relative_to(ROOT) for path in PACKAGE.rglob("*.py"))
SOURCES = sorted(path.relative_to(ROOT) for folder in ("minitron", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


def imported(source, module):
    """The dotted names that `source`, the text of the file `module`, imports anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(Path(module).parent.parts)[: len(Path(module).parent.parts) + 1 - node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def faults(source, module):
    """What is wrong with the imports of the file `module` (relative to the repository)."""
    unit = Path(module).parts[1].removesuffix(".py")
    if unit in ("__init__", "__main__"):
        return []
    rank = next(number for number, units in enumerate(ORDER) if unit in units)
    allowed = {unit, "__init__", "__version__"}.union(*ORDER[:rank])
    found = []
    for name in imported(source, module):
        top, *rest = name.split(".")
        if top == "minitron" and rest and rest[0] not in allowed:
            found.append(f"{module} imports {name}, which comes after it or beside it")
        if top == "megatron" and not f"{name}.".startswith(f"{MEGATRON.get(unit, 'nothing')}."):
            found.append(f"{module} imports {name}")
        stage = Path(module).stem
        inside = rest[1:2] if unit == "stages" and rest[:1] == ["stages"] else []
        if inside and stage not in (*inside, "compress") and (stage, *inside) not in COMPOSED:
            found.append(f"{module} imports {name}: stages do not import each other")
    return found


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_follow_the_one_direction(module):
    assert faults((ROOT / module).read_text(encoding="utf-8"), module) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("minitron/arch/arch.py", "import minitron.config.schema"),
        ("minitron/arch/arch.py", "from minitron.config import schema"),
        ("minitron/arch/arch.py", "from minitron import config"),
        ("minitron/arch/arch.py", "from ..config import schema"),
        ("minitron/data/sources.py", "def late():\n    from minitron.weights import load"),
        ("minitron/pruning/cut.py", "import minitron.importance"),
        ("minitron/stages/prune.py", "from minitron.stages import distill"),
        ("minitron/stages/family.py", "from minitron.stages import distill"),
        ("minitron/pruning/cut.py", "import megatron.core"),
        ("minitron/data/sources.py", "from megatron.core import parallel_state"),
        ("minitron/errors.py", "from minitron.arch import Arch"),
    ],
)
def test_the_rule_sees_wrong_imports(module, source):
    assert len(faults(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("minitron/stages/compress.py", "from minitron.stages import prune"),
        ("minitron/stages/family.py", "from minitron.stages import compress"),
        ("minitron/engine/model.py", "from megatron.core import parallel_state"),
        ("minitron/data/sources.py", "from megatron.core.datasets import indexed_dataset"),
        ("minitron/data/sources.py", "from .corpus import read\nfrom minitron.arch import Arch\nimport megatronics"),
    ],
)
def test_the_rule_lets_right_imports_pass(module, source):
    assert faults(source, module) == []


def test_every_verb_has_a_stage_and_every_stage_a_verb():
    assert {path.stem for path in (PACKAGE / "stages").glob("[!_]*.py")} == set(VERBS)


def python(code, *flags):
    done = subprocess.run([sys.executable, *flags, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_importing_the_package_and_its_command_line_does_nothing():
    code = """
import json, os, sys
asked, get = [], type(os.environ).__getitem__
type(os.environ).__getitem__ = lambda self, key: (asked.append(key), get(self, key))[1]
before = os.environ.copy()
asked.clear()
import minitron, minitron.__main__, minitron.cli
during = [*asked]
heavy = {"torch", "megatron", "transformers", "datasets", "matplotlib", "hydra", "wandb"} & set(sys.modules)
print(json.dumps({"asked": during, "heavy": sorted(heavy), "changed": before != os.environ.copy()}))
"""
    result = python(code, "-W", "error")
    assert result["heavy"] == [], "these are imported where they are used"
    assert result["asked"] == [], "the environment is read when a verb runs"
    assert not result["changed"]


def test_modules_import_without_megatron():
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in MODULES if path.parts[1] not in MEGATRON]
    code = f"""
import importlib, json, sys, warnings
warnings.simplefilter("ignore")
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron", "transformer_engine"):
            raise ModuleNotFoundError("absent: " + name)
sys.meta_path.insert(0, Absent())
failed = {{}}
for name in {names!r}:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed[name] = str(error)
import torch
print(json.dumps({{"failed": failed, "cuda": torch.cuda.is_initialized()}}))
"""
    result = python(code)
    assert not result["failed"], "\n".join(f"{name}: {error}" for name, error in result["failed"].items())
    assert not result["cuda"]


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_no_file_is_too_long(source):
    assert len((ROOT / source).read_text(encoding="utf-8").splitlines()) <= LONGEST
