"""The command line: `minitron VERB [--help] [--cfg] [SETTING=VALUE ...]`."""

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
        say_once(str(error))
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
    for flag in flags.difference(FLAGS):
        raise RequestError(f"{flag}: no such option; the options are {', '.join(FLAGS)}, everything else is SETTING=VALUE")
    if "--version" in flags:
        show(f"minitron {minitron.__version__}")
        return EXIT_DONE
    width = max(NARROWEST, min(WIDEST, shutil.get_terminal_size().columns))
    wants_help = bool(flags & {"--help", "-h"})
    if not words:
        show(overview(width))
        return EXIT_DONE if wants_help else EXIT_REQUEST
    verb, *overrides = words
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1)
        raise RequestError(f"{verb}: no such verb; " + (f"did you mean {near[0]}?" if near else f"the verbs are {', '.join(VERBS)}"))
    if wants_help:
        show(verb_help(verb, width))
        return EXIT_DONE
    config = compose(verb, overrides, complete="--cfg" not in flags)
    if "--cfg" in flags:
        show(to_yaml(config).rstrip())
    else:
        importlib.import_module(f"minitron.stages.{verb}").run(config)
    return EXIT_DONE


def show(text: str) -> None:
    """Print to stdout, for as long as somebody reads it (`| head` does not for long)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
