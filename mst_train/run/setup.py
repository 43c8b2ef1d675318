"""A run's set-up: everything that can be refused, before anything is written.

find_start   the folder, and the checkpoint that the run goes on from
set_up       settings, data, model and optimizer, as they were at that checkpoint
"""

import logging
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from mst_train.attention import keep_to, select_kernels
from mst_train.attention.select import Attention, shared
from mst_train.checkpoint.files import first_undamaged, load_part
from mst_train.checkpoint.form import load_progress, load_states, load_weights
from mst_train.checkpoint.trained import run_settings
from mst_train.config import Config, KeepConfig, MemoryConfig, OptimizerConfig
from mst_train.data import Data, load_data, vocabulary_file
from mst_train.distributed import Topology, check_same, together
from mst_train.engine import Engine, build_engine, check_engine, partition, whole_parameters
from mst_train.errors import UserError
from mst_train.evaluate.probe import Probe
from mst_train.evaluate.tasks import make_probes
from mst_train.model import Policy, Transformer, build_model
from mst_train.model.experts import untaught_routers
from mst_train.model.hf.weights import copy_weights, find_weights
from mst_train.model.rope import beyond_positions, idle_scaling
from mst_train.mst import Offload
from mst_train.optim import too_short
from mst_train.plan.before import before_training, largest_parts
from mst_train.plan.predict import Prediction
from mst_train.precision import weight_type
from mst_train.rendezvous.dist_env import local_rank
from mst_train.run.budget import with_steps
from mst_train.run.deterministic import choose_algorithms
from mst_train.run.folder import RunFolder, check_beginning, check_continuation
from mst_train.run.random_state import restore_random_state, seed_everything
from mst_train.tracking.tensorboard_run import check_tensorboard
from mst_train.units import GIB

SETTING_UP = timedelta(days=1)
"""How long processes wait for one that prepares the data or plans the run."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a run begins or goes on.

    config: with the steps that train.tokens comes to.
    patient: all processes, waiting for each other as long as a set-up may take.
    checkpoint: None for a fresh start.
    origin: another run's checkpoint, with whose weights a fresh start begins; None: with its own.
    tokenizer: the fingerprint of the tokenizer that the weights know; None: not known.
    progress: how far the run had come, as its checkpoint says.
    """

    config: Config
    topology: Topology
    patient: Topology
    folder: RunFolder
    checkpoint: Path | None
    origin: Path | None
    tokenizer: str | None
    progress: dict[str, Any]


@dataclass(frozen=True)
class SetUp:
    """What a run is made of, ready for its next step; the folder is open.

    config: with what ``memory.policy=auto`` stands for.
    prediction: the first process's; None on the others. largest_parts: of the predicted memory.
    """

    start: Start
    config: Config
    prediction: Prediction | None
    largest_parts: str
    data: Data
    probes: list[Probe]
    model: Transformer
    engine: Engine


def find_start(config: Config, topology: Topology) -> Start:
    """Raises UserError where the folder or its checkpoints do not allow such a run."""
    patient = topology.with_timeout(SETTING_UP)
    found: list[str] = ["", ""]
    with together(patient):
        check_engine(config, topology.world)
        check_tensorboard(config)
        folder = RunFolder(config)
        if topology.is_rank_zero:
            origins = [] if folder.origin is None else [folder.origin]
            found = [str(first_undamaged(some) or "") for some in (folder.candidates, origins)]
    checkpoint, origin = (Path(name) if name else None for name in patient.from_first(found))
    summary = {"val_loss": None}
    progress: dict[str, Any] = {"step": 0, "tokens": 0, "position": 0, "summary": summary}
    with together(patient):
        if checkpoint is not None:
            progress = load_progress(checkpoint)
        config = folder.config = with_steps(config, progress, topology.data_parallel)
        if checkpoint is not None:
            check_continuation(progress["config"], config, checkpoint)
        weights_from = progress
        if origin is not None:
            weights_from = load_progress(origin)
            check_beginning(weights_from["config"], config, origin)
        tokenizer = weights_from.get("tokenizer")
        for problem in (
            too_short(config.train.steps, config.optimizer),
            idle_scaling(config.model.rope_scaling),
            beyond_positions(config.model, config.data.sequence_length),
            untaught_routers(config.model),
        ):
            if problem is not None:
                log.warning("%s", problem)
    return Start(config, topology, patient, folder, checkpoint, origin, tokenizer, progress)


def set_up(start: Start) -> SetUp:
    """Everything that the run's steps need; opens the folder last.

    Raises UserError for what cannot be: then nothing is written.
    """
    topology, patient = start.topology, start.patient
    checkpoint = start.checkpoint or start.origin
    prediction, config, largest = _predict(start.config, patient)
    data = _load_data(config, patient)
    with together(patient):
        _check_data(start, config, data)
        probes = make_probes(config, data.tokenizer) if config.evaluation.every else []
        choose_algorithms(config)
        keep_to(start.progress.get("attention", {}))
        attention = select_kernels(config.kernel, topology.device, weight_type(config.precision))
    model = _build_model(config, attention, topology)
    if checkpoint is None and config.model.from_pretrained is not None:
        with together(patient):
            pretrained = find_weights(config.model, config.model.from_pretrained)
        copy_weights(pretrained, model, whole_parameters(config, topology))
    engine = build_engine(model, config, topology)
    seed_everything(config.train.seed)
    with together(patient):
        if topology.is_rank_zero:
            start.folder.open()
    lock = patient.from_first(start.folder.lock)
    with together(patient):
        start.folder.require_shared(lock)
        if checkpoint is not None:
            weights, states = load_weights(checkpoint, model), load_states(checkpoint, model)
    if checkpoint is not None:
        if start.origin is not None and not config.run.init_optimizer:
            states = {
                name: {key: t for key, t in state.items() if key == "master"}
                for name, state in states.items()
            }
        engine.load(weights, states)
    if start.checkpoint is not None:
        with together(patient):
            restore_random_state(load_part(start.checkpoint, "random"))
        log.info("continuing from %s", checkpoint)
    elif start.origin is not None:
        what = "weights and optimizer states" if config.run.init_optimizer else "weights"
        log.info("starting with the %s of %s", what, start.origin)
    return SetUp(start, config, prediction, largest, data, probes, model, engine)


def _predict(config: Config, topology: Topology) -> tuple[Prediction | None, Config, str]:
    """What the first process expects of a step: the prediction, which it alone has; the settings
    with what memory.policy=auto stands for; the largest parts of the memory.
    """
    prediction: Prediction | None = None
    told: tuple[Any, ...] = ()
    with together(topology):
        if topology.is_rank_zero:
            prediction = before_training(config, topology.device, topology.world)
            chosen = prediction.config
            told = asdict(chosen.memory), asdict(chosen.optimizer), largest_parts(prediction)
    memory, optimizer, parts = topology.from_first(told)
    config = replace(
        config,
        memory=MemoryConfig(**memory | {"keep": KeepConfig(**memory["keep"])}),
        optimizer=OptimizerConfig(**optimizer),
    )
    return prediction, config, parts


def _load_data(config: Config, topology: Topology) -> Data:
    """What the first process prepares the others find, in a cache of their machine's at the latest
    after one of them has prepared it there."""
    loaded: list[Data] = []
    for mine in (topology.is_rank_zero, local_rank() == 0, True):
        with together(topology):
            if mine and not loaded:
                loaded.append(load_data(config.data))
    (data,) = loaded
    check_same(topology, {"what data.source holds": data.corpus_fingerprint})
    return data


def _build_model(config: Config, attention: Attention, topology: Topology) -> Transformer:
    """The model as it is drawn; with parallel.zero_stage=3 this process's part of it."""
    if topology.sharing is not None:
        attention = shared(attention, topology.sharing, topology.device)
    model = build_model(
        config.model,
        policy=Policy.from_config(config.memory),
        attention=attention,
        device=topology.device,
        dtype=weight_type(config.precision),
        seed=config.train.seed,
        partition=partition(config, topology),
    )
    if config.memory.offload == "host":
        budget = config.memory.host_budget_gib
        model.offload = Offload(topology.device, None if budget is None else int(budget * GIB))
    return model


def _check_data(start: Start, config: Config, data: Data) -> None:
    known = start.tokenizer or data.tokenizer.fingerprint
    if start.origin is not None and known != data.tokenizer.fingerprint:
        before = run_settings(load_progress(start.origin)["config"], start.origin)
        file = vocabulary_file(before.data, known)
        raise UserError(
            f"run.init_from={start.origin} was trained with another tokenizer than these data: set "
            f"data.tokenizer{' to its file' if file is None else f'={file}'}"
        )
    if data.tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer's "
            f"vocabulary of {data.tokenizer.vocab_size}: raise it to that at least, or take "
            f"another tokenizer (data.tokenizer, or data.tokenizer_vocab_size for one trained here)"
        )
    if start.checkpoint is not None and start.progress["corpus"] != data.corpus_fingerprint:
        raise UserError(
            f"data.source holds other documents than when {start.checkpoint} was made, or another "
            f"version of mst_train made tokens of them, so the run's place in them is lost: "
            f"restore them, or that version, or go on with these in a new run, by another run.name "
            f"and run.init_from={start.checkpoint}"
        )
