"""The training run, from a configuration to a trained model.

train   set up (setup.py), loop over steps (engine/step.py), evaluate, save, report (run.py)
"""

import logging
from typing import Any

from mst_train.config import Config
from mst_train.distributed import init_distributed
from mst_train.engine.step import BadStep, train_step
from mst_train.optim import learning_rate
from mst_train.run.run import Run, finished_before, running
from mst_train.run.setup import find_start, set_up

log = logging.getLogger(__name__)


def train(config: Config) -> dict[str, Any]:
    """Train as configured and return the summary that is written to summary.json.

    Where torchrun has started several processes, all of them call this with the same configuration;
    the first one writes the run's folder, and all return the same.

    Raises UserError where the run cannot start, TrainingError where it cannot go on, and Stopped
    where a signal has ended it: SIGTERM and SIGUSR1 do, once the run has begun (cli/signals.py).
    """
    with init_distributed(config) as topology:
        start = find_start(config, topology)
        length = start.config.train
        if start.progress["step"] >= length.steps:
            step, key = start.progress["step"], "steps" if length.tokens is None else "tokens"
            come = f"come to step {step} of {length.steps} and is finished"
            if step > length.steps:
                come = f"already come to step {step}, beyond train.{key}={getattr(length, key)}"
            log.info(
                "the run in %s has %s: set train.%s higher to go on", start.folder.path, come, key
            )
            return finished_before(start)
        with running(set_up(start)) as run:
            return _all_steps(run)


def _all_steps(run: Run) -> dict[str, Any]:
    config = run.config
    if run.fresh and config.train.eval_every:
        run.validate()
    while run.step < config.train.steps:
        batches = run.next_batches()
        if batches is None:
            raise run.stop()
        rate = learning_rate(run.step + 1, config.train.steps, config.optimizer)
        outcome: dict[str, Any]
        try:
            loss, gradient_norm, _ = train_step(
                run.engine,
                batches,
                rate,
                config.optimizer.max_grad_norm,
                run.bad_steps.loss_limit,
            )
            run.bad_steps.good(loss)
            outcome = {"loss": loss, "grad_norm": gradient_norm}
        except BadStep as problem:
            outcome = run.leave_out(problem)
        run.finish_step(batches, outcome, rate)
        if run.due(config.train.eval_every):
            run.validate()
        if run.due(config.evaluation.every):
            run.answer()
        if run.due(config.checkpoint.every):
            run.save()
    return run.finish()
