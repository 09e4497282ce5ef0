"""The Slurm examples, run in a shell in which srun, torchrun and scontrol only write down what they are told."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "slurm"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")

STUB = """#!/bin/bash
echo "$(basename "$0") $*" >> "$RECORD"
case "$(basename "$0")" in
    srun) exec "$@" ;;
    torchrun) eval "$TORCHRUN" ;;
    scontrol) [ "$1" = show ] && printf 'node7\\nnode8\\n' ;;
esac
exit 0
"""


@pytest.fixture
def slurm(tmp_path):
    """Starts an example; ``slurm.record()`` are the commands that it started."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("srun", "torchrun", "scontrol", "nnssl_pretrain"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    record = tmp_path / "record.txt"
    variables = {f"nnUNet_{k}": str(tmp_path) for k in ("raw", "preprocessed", "results")}
    variables |= {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16", "SLURM_CPUS_PER_TASK": "4"}
    variables |= {
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[7-8]",
    }
    variables |= {"RECORD": str(record), "PATH": f"{folder}:{os.environ['PATH']}"}

    class Slurm:
        def start(self, name, torchrun="exit 0"):
            environment = {**os.environ, **variables, "TORCHRUN": torchrun}
            return subprocess.Popen(["bash", EXAMPLES / name], env=environment, stderr=subprocess.PIPE, text=True)

        def record(self):
            return record.read_text().splitlines() if record.exists() else []

    return Slurm()


def parsed(words):
    from nnssl.pretrain.cli import parser

    return parser().parse_args(words)


def test_each_job_of_the_array_takes_its_part(slurm):
    process = slurm.start("preprocess.sbatch")
    assert process.wait() == 0, process.stderr.read()
    words = slurm.record()[-1].split()
    assert words[0] == "nnssl_pretrain"
    args = parsed(words[1:])
    assert (args.sources, args.target, args.part, args.processes, args.preprocess_only) == (
        ["500"],
        "501",
        "3/16",
        4,
        True,
    )


def test_the_pretraining_starts_one_process_per_gpu_and_continues_by_itself(slurm):
    process = slurm.start("pretrain.sbatch")
    assert process.wait() == 0, process.stderr.read()
    line = next(r for r in slurm.record() if r.startswith("torchrun"))
    launcher, _, command = line.partition(" -m nnssl.pretrain.cli ")
    for option in ("--nnodes=2", "--nproc_per_node=4", "--max_restarts=3", "--rdzv_endpoint=node7:29500"):
        assert option in launcher
    assert parsed(command.split()).auto_continue
    assert not [r for r in slurm.record() if "requeue" in r]


def test_an_error_ends_the_job_and_the_time_limit_starts_it_again(slurm):
    process = slurm.start("pretrain.sbatch", "exit 1")
    assert process.wait() == 1
    assert not [r for r in slurm.record() if "requeue" in r]
    process = slurm.start(
        "pretrain.sbatch", "trap 'exit 143' TERM; echo torchrun is up >> $RECORD; while :; do sleep 0.05; done"
    )
    while "torchrun is up" not in slurm.record():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143, process.stderr.read()
    assert slurm.record()[-1] == "scontrol requeue 77"
