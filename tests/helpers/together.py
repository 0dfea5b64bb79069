"""Files whose tests run in one process when several share the work: they trace the same models or start commands.

What one of them traced is given again to the next (see traces.py), and tracing is a quarter of what all tests cost. Any
other file goes to whichever process is free.
"""

import pytest
from xdist.scheduler import LoadFileScheduling

_TOGETHER = (
    (
        "tests/capture/test_families.py",
        "tests/passes/test_sites.py",
        "tests/capture/test_more_captures.py",
        "tests/capture/test_quantized_checkpoints.py",
        "tests/lower/test_agreement.py",
        "tests/lower/test_fpa_intb.py",
        "tests/lower/test_more_families.py",
        "tests/passes/model/test_rotation.py",
    ),
    (
        "tests/capture/test_encoders.py",
        "tests/lower/test_encoder_files.py",
        "tests/lower/test_standard_form.py",
        "tests/validation/test_reader.py",
    ),
    (
        "tests/lower/test_seq2seq.py",
        "tests/calibrate/test_own_text.py",
        "tests/runtime/test_search.py",
        "tests/mixed_precision/test_pairs.py",
        "tests/api/test_pair_validation.py",
        "tests/sampling_study/test_study_pairs.py",
    ),
    (
        "tests/lower/test_experts.py",
        "tests/lower/test_kv_cache.py",
        "tests/lower/test_prompt_attention.py",
    ),
    (
        "tests/lower/test_vision_language.py",
        "tests/cli/test_cli_vision_language.py",
    ),
    (  # these start commands, and a process has one server that imports for them
        "tests/cli/test_cli.py",
        "tests/cli/test_cli_refusals.py",
        "tests/cli/test_verbosity.py",
        "tests/artifact/test_wholeness.py",
        "tests/fuzz/test_fuzz.py",
    ),
)  # fmt: skip
# Few tests that take long: begun last, they would leave one process waiting for the other.
_LONG = (
    "tests/capture/test_families.py",
    "tests/capture/test_encoders.py",
    "tests/cli/test_cli.py",
    "tests/lower/test_seq2seq.py",
    "tests/lower/test_experts.py",
    "tests/samples/test_samples.py",
    "tests/validation/test_validate.py",
    "tests/validation/test_planted_faults.py",
    "tests/validation/test_foreign.py",
    "tests/quant/test_memory.py",
)
_FIRST = {file: group[0] for group in _TOGETHER for file in group}


@pytest.hookimpl(optionalhook=True)  # with -p no:xdist there is none
def pytest_xdist_make_scheduler(config, log):
    return Together(config, log) if config.getoption("dist") == "loadfile" else None


class Together(LoadFileScheduling):
    """As `--dist loadfile`, for groups of files, and long files first."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return _FIRST.get(file, file)

    def _assign_work_unit(self, node) -> None:
        if (long := next((file for file in _LONG if file in self.workqueue), None)) is not None:
            self.workqueue.move_to_end(long, last=False)
        super()._assign_work_unit(node)
