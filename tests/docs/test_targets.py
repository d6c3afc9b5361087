"""One list of make targets: the Makefile's, what help tells, what continuous integration calls, what the documents name."""

import os
import re
import subprocess

import yaml

from minitron.config.verbs import VERBS
from tests.docs.blocks import PAGES, ROOT

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))


def called(text):
    """The targets that `make` is given in a text of commands."""
    return re.findall(r"\bmake ([a-z][a-z-]*)", text)


def test_every_target_is_phony_and_told_by_help():
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split()
    assert sorted(phony) == sorted(TARGETS)
    outside = {name: value for name, value in os.environ.items() if name not in ("MAKELEVEL", "MAKEFLAGS", "MFLAGS")}  # those of `make test`
    told = subprocess.run(["make", "--no-print-directory", "help"], cwd=ROOT, env=outside, capture_output=True, text=True, check=True).stdout
    assert {line.split()[1] for line in told.splitlines()} == TARGETS


def test_the_workflow_calls_what_the_script_calls():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    jobs = {name: [target for step in job["steps"] for target in called(step.get("run", ""))] for name, job in workflow["jobs"].items()}
    loop = re.search(r"^for target in (.*); do$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)[1].split()
    checked = [target for name in ("check", "slurm") for target in jobs[name] if target != "install"]
    assert checked == loop
    assert set().union(*jobs.values()) <= TARGETS
    assert set(loop) <= TARGETS


def test_documents_name_targets_and_verbs_that_exist():
    for page in PAGES:
        spans = re.findall(r"`((?:make|minitron) [^`]*)`", page.read_text(encoding="utf-8"))
        for span in spans:
            program, word, *_ = [*span.split(), ""]
            known = TARGETS if program == "make" else {*VERBS, "VERB", "..."}
            assert word in known or word.startswith("-"), f"{page.name}: `{span}`"
