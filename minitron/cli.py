"""The command line: `minitron VERB [--help] [--cfg] [SETTING=VALUE ...]`, and `minitron submit VERB ...`."""

import contextlib
import difflib
import importlib
import os
import shutil
import sys
import traceback
from collections.abc import Sequence

import minitron
from minitron.config.compose import compose, to_yaml
from minitron.config.help import overview, verb_help
from minitron.config.verbs import VERBS
from minitron.errors import EXIT_DEFECT, EXIT_DONE, EXIT_REQUEST, EXIT_STOPPED, RequestError, Stopped, say_once

EXIT_INTERRUPTED = 130  # what shells report after Ctrl-C
NARROWEST, WIDEST = 60, 120  # characters per line of help, whatever the terminal
FLAGS = ("--help", "-h", "--cfg", "--version")


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for and return the exit code (minitron/errors.py says what the codes mean)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return run(
            words=[argument for argument in arguments if not argument.startswith("-")],
            flags={argument for argument in arguments if argument.startswith("-")},
        )
    except RequestError as error:
        if not error.said:
            say_once(str(error))
        if not error.passing:
            leave_word(str(error))
        return EXIT_REQUEST
    except Stopped as stopped:
        if not stopped.said:
            say_once(str(stopped), stopped.topic)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        print("minitron: interrupted: the same command continues", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception:
        traceback.print_exc()
        return EXIT_DEFECT


def run(words: list[str], flags: set[str]) -> int:
    """Help, the composed settings, or the verb itself."""
    own = {flag: verb for verb, entry in VERBS.items() for flag, _ in entry.flags}
    for flag in flags.difference(FLAGS):
        if flag not in own:
            options = [*FLAGS, *(flag for flag, verb in own.items() if words[:1] == [verb])]
            raise RequestError(f"{flag}: no such option; the options are {', '.join(options)}, everything else is SETTING=VALUE")
        if words[:1] != [own[flag]]:
            raise RequestError(f"{flag}: minitron {own[flag]} alone has this option")
    if "--version" in flags:
        show(f"minitron {minitron.__version__}")
        return EXIT_DONE
    width = max(NARROWEST, min(WIDEST, shutil.get_terminal_size().columns))
    wants_help = bool(flags & {"--help", "-h"})
    if not words:
        show(overview(width))
        return EXIT_DONE if wants_help else EXIT_REQUEST
    verb, *overrides = words
    check_verb(verb)
    if wants_help:
        show(verb_help(verb, width))
        return EXIT_DONE
    stage = f"minitron.stages.{verb}"
    if VERBS[verb].carries:
        if not overrides:
            raise RequestError(f"minitron {verb}: the verb to {verb} is needed: minitron {verb} VERB [SETTING=VALUE ...]")
        check_verb(overrides[0])
        if "--cfg" not in flags:
            importlib.import_module(stage).run(overrides[0], overrides[1:], flags)
            return EXIT_DONE
        verb, *overrides = overrides
    config = compose(verb, overrides, complete="--cfg" not in flags)
    if "--cfg" in flags:
        show(to_yaml(config).rstrip())
    else:
        importlib.import_module(stage).run(config)
    return EXIT_DONE


def check_verb(verb: str) -> None:
    """Refuse a verb that there is not."""
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1)
        raise RequestError(f"{verb}: no such verb; " + (f"did you mean {near[0]}?" if near else f"the verbs are {', '.join(VERBS)}"))


def leave_word(refusal: str) -> None:
    """Tell the batch script that started this rank, if one did, that there is no use in trying again: torchrun does not pass exit codes on."""
    if file := os.environ.get("MINITRON_REFUSAL"):
        # every rank says it and the first is heard; where none can write, the script tries again, a few times
        with contextlib.suppress(OSError), open(file, "x", encoding="utf-8") as handle:
            handle.write(f"{refusal}\n")


def show(text: str) -> None:
    """Print to stdout, for as long as somebody reads it (`| head` does not for long)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
