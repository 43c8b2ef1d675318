"""python -m mst_train.generate run.dir=DIR prompt=TEXT [key=value ...]: text from a model."""

import logging
import sys
from difflib import get_close_matches
from itertools import islice
from typing import Any, NamedTuple

from mst_train.cli.command import run_command, show_help
from mst_train.cli.settings import shown
from mst_train.errors import UserError

HELP = """\
python -m mst_train.generate run.dir=DIR prompt=TEXT [key=value ...]
python -m mst_train.generate model.from_pretrained=FOLDER prompt=TEXT [key=value ...]

Writes what a model makes of a prompt, up to the end of a document: a run's newest checkpoint or one
that is named (run.dir=DIR/checkpoints/step_NNNNNNNN), or a checkpoint in Hugging Face's format.
  --help       this page

  prompt       the text to go on with; -: standard input; empty: a new document
  new_tokens   tokens to write at most (200)
  temperature  0: the most probable token each time; 1: tokens as probable as they are (1)
  top_p        draw from the most probable tokens that have this probability together (1)
  seed         of what is drawn (0)

Settings are the run's own, but for those given: data.tokenizer, kernel.attention, ... With
model.from_pretrained, precision and model.rope_scaling.* too."""

NUMBERS = {
    "new_tokens": (200, 1, 2**31),
    "temperature": (1.0, 0, 1000),
    "top_p": (1.0, 0, 1),
    "seed": (0, 0, 2**63 - 1),
}
"""By key: what holds where it is not given, the least and the most."""

KEYS = ("prompt", *NUMBERS)

USED = ("run.", "data.", "kernel.", "memory.mlp_chunk_tokens", "model.", "precision")
"""How the settings begin, besides those, that this command reads."""


log = logging.getLogger("mst_train.generate")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_command(_run, arguments, "the text is not finished")


def _run(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        show_help(HELP)
        return 0
    asked, settings = _read(arguments)
    from mst_train.cli.run_folder import named_run

    named_run(settings, tell=False)
    # torch is imported only now: a mistake in the command line is answered at once.
    from mst_train.checkpoint.trained import best_device, trained_model
    from mst_train.cli.compose import warn_of_unused
    from mst_train.data import load_vocabulary
    from mst_train.generate.decode import CachedAttention, continuation
    from mst_train.generate.sample import Sampler
    from mst_train.generate.text import TextStream

    with trained_model(settings) as trained:
        warn_of_unused(settings, USED)
        tokenizer = load_vocabulary(trained.config.data)
        trained.check_tokenizer(tokenizer)
        if tokenizer.model is None:
            raise UserError("the tokens of data.source have no tokenizer: give data.tokenizer=FILE")
        tokens = tokenizer.encode([asked.prompt])[0] or [tokenizer.eod]
        log.info(
            "%s on %s: up to %s tokens after a prompt of %s",
            trained.name,
            "the GPU" if best_device().type == "cuda" else "the CPU",
            f"{asked.new_tokens:,}",
            f"{len(tokens):,}",
        )
        model = trained.load(best_device(), CachedAttention)
    sampler = Sampler(asked.temperature, asked.top_p, asked.seed, tokenizer.vocab_size)
    stream = TextStream(tokenizer, tokens)
    for token in islice(continuation(model, tokens, sampler), asked.new_tokens):
        if token == tokenizer.eod:
            break
        print(stream.add(token), end="", flush=True)
    print(stream.rest())
    return 0


class _Asked(NamedTuple):
    prompt: str
    new_tokens: int
    temperature: float
    top_p: float
    seed: int


def _read(arguments: list[str]) -> tuple[_Asked, list[str]]:
    """What is asked for, and the other arguments, which are settings of a run.

    Texts are taken as they are, without the rules of settings. Raises UserError with every problem.
    """
    given, settings = {}, []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in KEYS:
            given[key] = value
        else:
            settings.append(argument)
    numbers: dict[str, Any] = {}
    problems = []
    for key in (argument.partition("=")[0] for argument in settings):
        if "." not in key and (close := get_close_matches(key[:200], KEYS, 1, 0.7)):
            problems.append(f"{shown(key)} is not a setting: did you mean {close[0]}?")
    for key, (default, least, most) in NUMBERS.items():
        kind = type(default)
        try:
            numbers[key] = kind(given.get(key, default))
            if not least <= numbers[key] <= most:
                raise ValueError
        except ValueError:
            number = "whole number" if kind is int else "number"
            problems.append(f"{key}={given[key]:.40} must be a {number} from {least} to {most}")
    try:
        prompt = _text(given["prompt"])
    except KeyError:
        problems += [f"cannot read '{a:.80}': expected key=value" for a in settings if "=" not in a]
        problems.append("prompt is missing: give prompt=TEXT, or prompt=- for standard input")
    except UnicodeError:
        problems.append("prompt is no text: give it in UTF-8")
    if problems:
        raise UserError(problems)
    return _Asked(prompt, **numbers), settings


def _text(prompt: str) -> str:
    """Raises UnicodeError where it is none."""
    if prompt == "-":
        return sys.stdin.buffer.read().decode()
    prompt.encode()
    return prompt


if __name__ == "__main__":
    sys.exit(main())
