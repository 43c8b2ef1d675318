"""python -m mst_train.evaluate.write_tasks out=FOLDER [key=value ...]: texts to learn from."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mst_train.cli.command import run_command, show_help
from mst_train.cli.settings import shown
from mst_train.errors import UserError
from mst_train.files import expanded, make_folder, replace_file, replace_text, writing_to

HELP = """\
python -m mst_train.evaluate.write_tasks out=FOLDER [key=value ...]

Writes FOLDER/texts.jsonl, texts of the tasks that python -m mst_train.evaluate asks, for a model to
learn them from: data.source=FOLDER/texts.jsonl. None of them is drawn as the evaluation's are.
Without data.tokenizer it writes a tokenizer too, in which each word and digit of the tasks is a
token: data.tokenizer=FOLDER.
  --help       this page

  out          the folder
  documents    how many texts (1000)
  seed         of what is drawn (0)

Settings, as of the evaluation:
  evaluation.tasks, evaluation.lengths (tokens in a text), evaluation.ruler.*, data.tokenizer"""

NUMBERS = {"documents": (1000, 1, 10**9), "seed": (0, 0, 2**63 - 1)}
"""By key: what holds where it is not given, the least and the most."""

KEYS = ("out", *NUMBERS)

USED = ("evaluation.", "data.tokenizer")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run_command(_run, arguments, "the texts are not finished")


def _run(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        show_help(HELP)
        return 0
    asked, settings = _read(arguments)
    from mst_train.bar import bar
    from mst_train.cli.compose import compose, warn_of_unused
    from mst_train.data import load_tokenizer
    from mst_train.evaluate.tasks import sample_texts, texts
    from mst_train.evaluate.vocabulary import WORDS
    from mst_train.evaluate.word_tokenizer import word_tokenizer

    config = compose(settings)
    warn_of_unused(settings, USED)
    make_folder(asked.out, "out")
    given = config.data.tokenizer
    with writing_to(f"out={asked.out}", "make room there, or name another folder"):
        if given is None:
            for name, content in word_tokenizer(sample_texts(config.evaluation), WORDS).items():
                replace_text(asked.out / name, content)
        tokenizer = load_tokenizer(asked.out if given is None else given)
        found = bar(
            texts(config, tokenizer, asked.documents, asked.seed),
            total=asked.documents,
            desc="texts",
            leave=False,
            disable=None,
        )
        lines = [json.dumps({"text": text}) + "\n" for text in found]
        replace_file(asked.out / "texts.jsonl", "".join(lines).encode())
    print(f"Written: {asked.documents:,} texts in {asked.out / 'texts.jsonl'}")
    print(
        f"To train on: data.source={asked.out / 'texts.jsonl'} data.tokenizer={given or asked.out}"
    )
    if given is None:
        print(f"The tokenizer has {tokenizer.vocab_size} ids: model.vocab_size can be that")
    return 0


class _Asked(NamedTuple):
    out: Path
    documents: int
    seed: int


def _read(arguments: Sequence[str]) -> tuple[_Asked, list[str]]:
    """What is asked for, and the other arguments, which are settings. UserError with problems."""
    split = [argument.partition("=") for argument in arguments]
    given = {key: value for key, equals, value in split if equals and key in KEYS}
    settings = [a for a, (key, equals, _) in zip(arguments, split, strict=True) if key not in KEYS]
    problems = []
    numbers = {}
    for key, (default, least, most) in NUMBERS.items():
        try:
            numbers[key] = int(given.get(key, default))
            if not least <= numbers[key] <= most:
                raise ValueError
        except ValueError:
            problems.append(
                f"{key}={shown(given[key])} must be a whole number from {least} to {most}"
            )
    if not given.get("out"):
        problems.append("out is missing: give out=FOLDER, the folder to write to")
    if problems:
        raise UserError(problems)
    return _Asked(expanded(given["out"]), **numbers), settings


if __name__ == "__main__":
    sys.exit(main())
