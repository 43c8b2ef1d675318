"""Checkpoints in Hugging Face's format: a folder of safetensors files with a config.json.

``load_pretrained`` makes a decoder of one, ``save_pretrained`` writes one; tensors pass unchanged
but for a change of type that was asked for. Files are safetensors alone, which cannot carry code.
``config`` says which models are supported.

    folder/
        config.json
        model.safetensors                       all tensors, or
        model-00001-of-00003.safetensors, ...   some of them each, and
        model.safetensors.index.json            which file holds which
"""

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from mst_train.attention.select import Attention, select_attention
from mst_train.config import ModelConfig
from mst_train.errors import UserError
from mst_train.files import UNFINISHED, expanded, remove_unfinished, to_disk, unwritable
from mst_train.model import Policy
from mst_train.model.hf.config import read_config, read_model_type, write_config
from mst_train.model.hf.names import Place, places_by_name
from mst_train.model.transformer import Transformer, build_model, materialize

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

SHARD_BYTES = 5 * 10**9
"""What a file of a checkpoint may hold before the next one is begun."""

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
"""What is copied beside a checkpoint, where it is there."""

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

TYPES = ("F64", "F32", "F16", "BF16")
"""Of tensors, by safetensors' names; others are quantized."""

STACKED = (".experts.gate_up_proj", ".experts.down_proj")
"""Tensors of all experts, which transformers makes of those of a checkpoint, and can write."""

POINTER = b"version https://git-lfs"
"""How what Git LFS leaves in the place of a large file begins."""

MOST_PROBLEMS = 50
"""What is said of a checkpoint that is another model's altogether."""


@dataclass(frozen=True)
class Found:
    """A checkpoint's tensors, each of which a decoder can take.

    files: the tensors' names, by the file that holds them.
    """

    model_type: str
    files: Mapping[Path, list[str]]


def load_pretrained(
    name: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    config: ModelConfig | None = None,
    policy: Policy | None = None,
    attention: Attention | None = None,
) -> Transformer:
    """The decoder of a checkpoint.

    Args:
        name: a folder, or a repository's name on the Hugging Face Hub.
        dtype, device: of the decoder; tensors are converted one by one.
        config: settings in the place of the checkpoint's, of the same shapes: other rotary
            embeddings, for example.
        policy: the memory policy; None: nothing is computed again.
        attention: None: the fastest that works here.

    Memory: on the host, one file of the checkpoint at a time, mapped and not read as a whole.

    Raises:
        UserError: with everything that is wrong: an unsupported model, tensors that are missing,
            unknown, or of other shapes, files that cannot be read. Nothing is allocated then.
    """
    folder = pretrained_folder(name)
    device = torch.device(device)
    model = build_model(
        config or pretrained_config(folder),
        policy=policy,
        attention=attention or select_attention("auto", device, dtype),
        device="meta",
        dtype=dtype,
    )
    found = _checked(folder, model)
    materialize(model, device)
    copy_weights(found, model)
    return model


def load_weights(model: Transformer, name: str | Path) -> None:
    """Put a checkpoint's tensors into a decoder of their shapes, converted to its types.

    Raises UserError as ``load_pretrained`` does, and leaves the decoder as it was then.
    """
    copy_weights(find_weights(model.config, name), model)


def find_weights(config: ModelConfig, name: str | Path) -> Found:
    """A checkpoint's tensors, all of which a decoder of ``config`` can take.

    Raises UserError as ``load_pretrained`` does.
    """
    return _checked(pretrained_folder(name), build_model(config, device="meta"))


@torch.no_grad()
def copy_weights(
    found: Found,
    model: Transformer,
    whole: Callable[[nn.Parameter], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Put what ``find_weights`` has found into a decoder.

    whole: gives, for a parameter, a context in which it has its whole shape and takes new values.
        It is entered once for all of a parameter's tensors that one file holds.
    """
    places = dict(places_by_name(model, found.model_type))
    for path, names in found.files.items():
        with safe_open(path, framework="pt") as file:
            for _, group in groupby(names, lambda name: [*map(id, places[name].parameters)]):
                parts = [*group]
                with ExitStack() as gathered:
                    for parameter in places[parts[0]].parameters:
                        gathered.enter_context(whole(parameter))
                    for name in parts:
                        places[name].read(file.get_tensor(name))


def pretrained_config(name: str | Path) -> ModelConfig:
    """The settings of a checkpoint's model. Raises UserError where it is not supported."""
    path = pretrained_folder(name) / "config.json"
    return read_config(_read_json(path), str(path))


@torch.no_grad()
def save_pretrained(
    model: Transformer,
    folder: str | Path,
    *,
    model_type: str | None = None,
    sequence_length: int | None = None,
    tokenizer: str | Path | None = None,
    token_ids: Mapping[str, int] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a decoder as a checkpoint that transformers reads. The folder is whole or not there.

    Args:
        folder: where to; it must be new or empty.
        model_type: the family it is written as; None: the first that has such models.
        sequence_length: the longest sequence it is for, where ``max_positions`` is less.
        tokenizer: a folder whose tokenizer's files are copied, and whose config.json's token ids
            are taken over; or a tokenizer's file.
        token_ids: bos_token_id, eos_token_id and pad_token_id, as far as they are known.
        shard_bytes: bytes of tensors in a file, if a tensor is not larger by itself.

    Memory: on the host, one file's tensors where they are on another device.

    Raises:
        UserError: no family has such models, the folder is not empty or cannot be written.
        TrainingError: there is no room for it.
    """
    folder = Path(folder)
    values = write_config(model.config, model_type, sequence_length)
    values["torch_dtype"] = str(model.embedding.weight.dtype).removeprefix("torch.")
    to_copy, known_ids = _tokenizer_files(tokenizer)
    values |= dict.fromkeys(TOKEN_IDS) | known_ids | dict(token_ids or {})
    places = dict(places_by_name(model, values["model_type"]))
    with _written_whole(folder) as temporary:
        shards = list(_shards(places, shard_bytes))
        total = sum(_size(place) for place in places.values())
        files: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            part = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            file = SINGLE if len(shards) == 1 else part
            tensors = {name: places[name].stored().cpu().contiguous() for name in shard}
            save_file(tensors, temporary / file, metadata={"format": "pt"})
            files |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
            _write_json(temporary / INDEX, index)
        _write_json(temporary / "config.json", values)
        for source, target in to_copy.items():
            shutil.copyfile(source, temporary / target)


# --- reading -------------------------------------------------------------------------------------


def pretrained_folder(name: str | Path) -> Path:
    """A checkpoint's folder, downloaded where it is the Hub's. Raises UserError without one."""
    folder = expanded(name)
    if folder.is_dir():
        return folder
    parts = str(name).split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise UserError(
            f"there is no folder {name}: give a checkpoint's folder, or a repository's name on the "
            f"Hugging Face Hub (owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["config.json", SINGLE, INDEX, "model-*.safetensors", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"there is no folder {name}, and the Hugging Face Hub does not give it: {reason}"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    if path.exists() and not path.is_file():
        raise UserError(f"cannot read {path}: it is no file")
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object")
    return values


def _checked(folder: Path, model: Transformer) -> Found:
    """The tensors to take from each file; everything about them is as the model wants it."""
    config = folder / "config.json"
    model_type = read_model_type(_read_json(config), str(config))
    wanted = {name: place.stored() for name, place in places_by_name(model, model_type)}
    stored = _stored_tensors(folder)
    problems: list[str] = []
    stacked = next((n for n in stored if n.endswith(STACKED) and n not in wanted), None)
    if stacked is not None:
        raise UserError(
            f"{folder}: {stacked} has the weights of all experts, and a tensor for each of an "
            f"expert's matrices is read: write it with save_original_format=True, the default of "
            f"transformers' save_pretrained"
        )
    for name, tensor in wanted.items():
        if name not in stored:
            problems.append(f"{folder}: {name} is missing")
            continue
        _, shape, dtype = stored[name]
        if shape != list(tensor.shape):
            expected = list(tensor.shape)
            problems.append(f"{folder}: {name} has the shape {shape}, and the model {expected}")
        if dtype not in TYPES:
            problems.append(f"{folder}: {name} is of type {dtype}: only floating point is read")
    unknown = [name for name in stored if name not in wanted and not _is_derived(name)]
    if model.config.tie_embeddings and "lm_head.weight" in unknown and not problems:
        unknown.remove("lm_head.weight")
        if not _equal(stored, "lm_head.weight", "model.embed_tokens.weight"):
            problems.append(
                f"{folder}: lm_head.weight is not model.embed_tokens.weight, and config.json says "
                f"tie_word_embeddings=true"
            )
    problems += [f"{folder}: {name} is not a tensor of such a model" for name in unknown]
    if len(problems) > MOST_PROBLEMS:  # each expert has three tensors in each layer
        more = len(problems) - MOST_PROBLEMS
        problems[MOST_PROBLEMS:] = [f"{folder}: and {more:,} more tensors that are wrong"]
    if problems:
        raise UserError(problems)
    files = defaultdict(list)
    for name in wanted:
        files[stored[name][0]].append(name)
    return Found(model_type, files)


def _stored_tensors(folder: Path) -> dict[str, tuple[Path, list[int], str]]:
    """File, shape and type of each tensor, from the files' headers.

    Raises UserError with every file that cannot be read: what is in it is not known to be missing.
    """
    problems: list[str] = []
    index = folder / INDEX
    places = _read_json(index).get("weight_map") if index.exists() else None
    if places is None:
        files = [SINGLE]
    elif isinstance(places, dict) and all(Path(str(f)).name == f for f in places.values()):
        files = sorted(set(places.values()))
    else:
        raise UserError(f"{index}: weight_map does not name files of this folder")
    stored = {}
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(name)
                    stored[name] = (folder / file, part.get_shape(), part.get_dtype())
        except (OSError, SafetensorError, UnicodeEncodeError) as error:
            problems.append(f"cannot read {folder / file}: {_unread(folder / file, error)}")
    for name, file in (places or {}).items():
        if not problems and (name not in stored or stored[name][0].name != file):
            problems.append(f"{folder / file}: {name} is not in it, and {INDEX} says so")
    if problems:
        raise UserError(problems)
    return stored


def _unread(path: Path, error: Exception) -> str:
    """Why a file of tensors could not be read, and what to do."""
    if not path.exists():
        return f"it is not there: weights are read from {SINGLE}, or from what {INDEX} names"
    with suppress(OSError), path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            return "it is Git LFS's pointer to the file: fetch the file itself (git lfs pull)"
    return f"{error}: it is not whole, or not safetensors: fetch or write it again"


def _is_derived(name: str) -> bool:
    """Whether a tensor is one that early Llama checkpoints hold, and is computed here."""
    return name.endswith("self_attn.rotary_emb.inv_freq")


def _equal(stored: Mapping[str, tuple[Path, list[int], str]], *names: str) -> bool:
    tensors = []
    for name in names:
        with safe_open(stored[name][0], framework="pt") as file:
            tensors.append(file.get_tensor(name))
    return torch.equal(*tensors)


# --- writing -------------------------------------------------------------------------------------


def _tokenizer_files(tokenizer: str | Path | None) -> tuple[dict[Path, str], dict[str, Any]]:
    """The files to copy and their new names; token ids."""
    if tokenizer is None:
        return {}, {}
    path = Path(tokenizer)
    if path.is_file():
        return {path: "tokenizer" + path.suffix}, {}
    files = {path / name: name for name in TOKENIZER_FILES if (path / name).is_file()}
    if not files:
        raise UserError(f"{path} holds no tokenizer: none of {', '.join(TOKENIZER_FILES)}")
    config = path / "config.json"
    values = _read_json(config) if config.is_file() else {}
    return files, {key: values[key] for key in TOKEN_IDS if key in values}


def _shards(places: Mapping[str, Place], shard_bytes: int) -> Iterator[list[str]]:
    """Names of tensors, in their order, as many as fit a file."""
    shard: list[str] = []
    filled = 0
    for name, place in places.items():
        size = _size(place)
        if shard and filled + size > shard_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(name)
        filled += size
    yield shard


def _size(place: Place) -> int:
    """Bytes of a tensor."""
    return place.stored(lambda parameter: parameter.detach().to("meta")).nbytes


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


@contextmanager
def _written_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``folder``, once everything in it is on the disk."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} is there already: name a new folder, or empty it")
    temporary = folder.parent / f"{UNFINISHED}{folder.name}-{os.getpid()}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder.parent, rf"{re.escape(folder.name)}-\d+(-[0-9a-f]{{8}})?")
        temporary.mkdir()
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            to_disk(path)
        temporary.rename(folder)
        to_disk(folder.parent)
    except (OSError, SafetensorError) as error:
        raise unwritable(f"cannot write {folder}: {error}", error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
