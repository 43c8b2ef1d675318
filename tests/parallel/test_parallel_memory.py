"""P processes that share a sequence hold 1/P of its activations each."""

import pytest
from memory import peak_bytes
from processes import run

DEGREES = (1, 2, 4)


@pytest.mark.distributed
def test_activations_are_shared_out(tmp_path):
    for found in run(peak_bytes, 4, tmp_path, degrees=DEGREES):
        assert found.keys() == {"vanilla", "recompute", "mst"}
        for policy, peaks in found.items():
            for degree, peak in zip(DEGREES, peaks, strict=True):
                assert peak == pytest.approx(peaks[0] / degree, rel=0.1), policy
