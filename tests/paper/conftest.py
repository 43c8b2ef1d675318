"""Reports of each piece, small and with made-up numbers."""

import pytest

from mst_train.memory.tracker import KINDS

PREDICTION = {
    "fits": True,
    "peak_bytes": 60 * 2**30,
    "budget_bytes": 79 * 2**30,
    "breakdown": dict.fromkeys((*KINDS, "overhead"), 7 * 2**30),
    "predicted_step_seconds": 6.5,
    "device": "a100_80gb",
    "sequence_length": 16384,
}
ORIGIN = {
    "command": "python -m mst_train.paper",
    "date": "2026-01-02T03:04:05+00:00",
    "git_commit": "0123456789ab",
    "hardware": {"cpu": "a processor", "threads": 2},
    "versions": {"python": "3.11", "torch": "2.13", "transformers": "5.0", "triton": "3"},
    "seconds": 12.0,
}
ASSUMED = {
    "device": "a100_80gb",
    "device_bytes": 79 * 2**30,
    "context_bytes": 2**29,
    "workspace_bytes": 2**25,
    "unusable_share": 0.02,
    "communication_bytes": 3 * 2**29,
    "rates": "assumed: half of everything",
}


@pytest.fixture
def at():
    """at(kibi_tokens, key=value, ...): a prediction at a length."""
    return lambda kibi_tokens, **changes: (
        PREDICTION | {"sequence_length": int(kibi_tokens * 1024)} | changes
    )


@pytest.fixture
def reports(at):
    """A report of each piece."""
    llama3 = {
        "name": "Llama3-8B",
        "experiment": "llama3_8b_seq60k",
        "vanilla": 5,
        "recompute": 14,
        "mst": 60,
        "confirmed": ["mst"],
    }
    gemma = llama3 | {"name": "Gemma-2-9B", "vanilla": 1.5, "mst": 36, "confirmed": []}
    run = {
        "losses": [6.0, 5.0, 4.5, 4.25],
        "step_seconds": [0.5] * 4,
        "median_step_seconds": 0.5,
        "validation": [{"step": 2, "loss": 5.1}, {"step": 4, "loss": 4.4}],
        "sequence_length": 64,
    }
    final = {
        "mean": {"long": 4.4, "short": 4.6},
        "by_position": {"long": [4.5, 4.4, 4.35, 4.2], "short": [4.5, 4.6, 4.6, 4.7]},
    }
    predicted = {
        "longest": {
            "rows": [
                {
                    "reported": llama3,
                    "predicted": {
                        "vanilla": at(4),
                        "recompute": at(16),
                        "mst": at(104),
                        "offload": at(945),
                    },
                },
                {
                    "reported": gemma,
                    "predicted": {"vanilla": None, "recompute": at(6.25), "mst": at(63)},
                },
            ]
        },
        "several": {
            "rows": [
                {
                    "model": "Llama3-8B",
                    "gpus": 2,
                    "reported_tokens": 120 * 1024,
                    "at_reported": at(120, fits=False),
                    "longest": at(90),
                }
            ]
        },
        "lengths": {
            "ways": {
                "vanilla": [at(1), at(8, fits=False, peak_bytes=100 * 2**30)],
                "mst": [at(1), at(8)],
            }
        },
        "ablations": {
            "rows": [
                at(16) | {"tokens": 16384, "kind": kind, "chunks": chunks}
                for kind in ("head", "mlp", "block")
                for chunks in (1, 2)
            ]
        },
    }
    seed = {
        "relative_difference": {"float64": 1.5e-13, "fp32": 2.5e-6},
        "validation_sequences": 4,
        "final_sequences": 8,
        "start": run,
        "runs": {"mst": run, "vanilla": run, "short": run | {"sequence_length": 16}},
        "final": {"mst": final, "short": final | {"mean": {"long": 4.9, "short": 4.7}}},
    }
    lower = {"values": [-0.3, -0.2], "mean": -0.25, "deviation": 0.0707, "half_interval": 0.635}
    measured = {
        "reach": {
            "text": "a text",
            "training_tokens": 4096,
            "scored_tokens": 1024,
            "losses": [
                {"window": 0, "loss": 2.0},
                {"window": 512, "loss": 1.6},
                {"window": 2048, "loss": 1.3},
                {"window": 8192, "loss": 1.1},
            ],
        },
        "convergence": {
            "text": "a text",
            "tokens_per_step": 128,
            "long": 64,
            "short": 16,
            "start": {"batches": 2, "sequences": 2, "warmup_steps": 1},
            "parameters": 12345,
            "exact_steps": 3,
            "relative_difference": {"float64": 1.5e-13, "fp32": 2.5e-6},
            "seeds": [seed | {"seed": 0}, seed | {"seed": 1}],
            "long_minus_short": {
                "each with its own context": lower,
                "first positions": lower | {"values": [0.1, -0.1]},
            },
        },
    }
    found = {name: ORIGIN | {"assumed": ASSUMED} | report for name, report in predicted.items()}
    return found | {name: ORIGIN | report for name, report in measured.items()}
