"""A job of trainer and rollout servers, with stand-ins for Slurm's commands and for vLLM."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.unit.slurm_jobs import ROOT, SAVE, Job, asked, directives, needs_bash

pytestmark = needs_bash

EXTENSION = "megatron_occ.rollout.remote.vllm_worker.ReloadExtension"
GPUS = {"SLURM_GPUS_PER_NODE_HET_GROUP_0": "2", "SLURM_GPUS_PER_NODE_HET_GROUP_1": "h200:8"}


class ServerJob(Job):
    """node7 and node8 train, node1 and node2 have servers; one of these is really started."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.model = folder / "model"
        self.model.mkdir()
        self.write_model("MiMoForCausalLM", 1)
        self.environment |= {
            "SERVER_MODEL": str(self.model),
            "SERVER_PAUSE": "0",
            "SLURM_HET_SIZE": "2",
            "SLURM_JOB_NUM_NODES_HET_GROUP_1": "2",
            "SLURM_JOB_NODELIST_HET_GROUP_1": "node[1-2]",
            "SLURM_JOB_CPUS_PER_NODE_HET_GROUP_1": "24,16(x2)",
            "STEP": self.when_started(1),
        }

    def write_model(self, architecture: str, depths: int) -> None:
        config = {"architectures": [architecture], "num_nextn_predict_layers": depths}
        (self.model / "config.json").write_text(json.dumps(config, indent=2))

    def when_started(self, times: int, then: str = "") -> str:
        """A step of the ranks that waits until the server was started so often."""
        count = '$(cat "$CALLS.vllm" 2>/dev/null | wc -l)'
        return f"for _ in {{1..400}}; do (({count} < {times})) || break; sleep 0.05; done; {then}"

    def __call__(self, *arguments: str, **environment: str):
        return super().__call__(*arguments, script="rl_servers", **environment)

    @property
    def step(self) -> str:
        """Of the servers: options of srun."""
        return Path(f"{self.calls_file}.servers").read_text()

    @property
    def starts(self) -> list[list[str]]:
        """Of the server: process, GPUs, development mode, key, path, arguments."""
        return [line.split(" ", 5) for line in Path(f"{self.calls_file}.vllm").open()]

    def is_alive(self, process: str) -> bool:
        """An orphan that has ended may wait to be reaped."""
        try:
            return ") Z " not in Path("/proc", process, "stat").read_text()
        except OSError:
            return False


@pytest.fixture
def job(tmp_path):
    return ServerJob(tmp_path)


def test_both_components_may_be_requeued():
    text = (ROOT / "slurm" / "rl_servers.sbatch").read_text()
    first, second = text.split("#SBATCH hetjob\n")
    assert "#SBATCH --requeue\n" in first and "#SBATCH --requeue\n" in second
    assert {"--signal=B:USR1@120", "--open-mode=append"} <= directives("rl_servers")


def test_the_trainer_gets_the_urls_of_all_servers(job):
    done = job("rl.steps=3", SERVER_TENSOR_PARALLEL="4", **GPUS)
    assert done.returncode == 0, done.stderr
    (call,) = job.calls
    urls = ",".join(f"'http://node{n}:800{i}'" for n in (1, 2) for i in (0, 1))
    assert call.endswith(f" rl rl.steps=3 rl.rollout.engine=vllm rl.rollout.server.urls=[{urls}]")
    assert call.startswith("4 node7 23456 ")
    assert " --het-group=0 --gpus-per-node=2 " in call


def test_servers_have_the_second_component_and_a_log_each(job):
    job(SERVER_TENSOR_PARALLEL="4", **GPUS)
    log = f"{job.run_dir}.logs/123456/server_%4t.log"
    wanted = ["het-group=1", "cpus-per-task=8", "gpus-per-node=8", "gpu-bind=none", "nodes=2"]
    wanted += ["ntasks=4", "ntasks-per-node=2", "kill-on-bad-exit=0", "wait=0"]
    wanted += [f"output={log}", "open-mode=append bash slurm/server.sh\n"]
    assert job.step.removeprefix("--").split(" --") == wanted


def test_without_gpus_there_is_a_server_on_each_node(job):
    done = job(SERVER_PORT="9000")
    assert done.returncode == 0, done.stderr
    assert job.calls[0].endswith("urls=['http://node1:9000','http://node2:9000']")
    assert "--cpus-per-task=16 --nodes=2 --ntasks=2 --ntasks-per-node=1 " in job.step
    assert "--gpu" not in job.step
    ((_, gpus, *_),) = job.starts
    assert gpus == ""


@pytest.mark.parametrize("seen", ["", "8,9,10,11,12,13,14,15"], ids=["not named", "named"])
def test_a_server_takes_its_share_of_gpus_and_its_port(job, seen):
    environment = {"CUDA_VISIBLE_DEVICES": seen, "SLURM_GPUS_ON_NODE": "8", "LOCAL": "1"}
    options = "--max-model-len 4096"
    job(
        SERVER_TENSOR_PARALLEL="2",
        SERVER_OPTIONS=options,
        ROLLOUT_API_KEY="word",
        **{**GPUS, **environment},
    )
    ((_, gpus, mode, key, path, arguments),) = job.starts
    assert gpus == ("10,11" if seen else "2,3")
    assert (mode, key, path) == ("1", "word", str(ROOT))
    wanted = f"serve {job.model} --port 8001 --tensor-parallel-size 2"
    wanted += f" --worker-extension-cls {EXTENSION} {options} --speculative-config "
    assert arguments.startswith(wanted)
    drafts = json.loads(arguments.removeprefix(wanted))
    assert drafts == {"method": "mtp", "num_speculative_tokens": 1}


@pytest.mark.parametrize(
    ("architecture", "depths", "asked_for", "drafts"),
    [
        ("MiMoForCausalLM", 0, None, None),
        ("Qwen3MoeForCausalLM", 1, None, None),
        ("Glm4MoeForCausalLM", 2, None, 1),
        ("MiMoForCausalLM", 1, "0", None),
        ("MiMoForCausalLM", 1, "3", 3),
    ],
)
def test_a_server_drafts_where_the_head_is_served(job, architecture, depths, asked_for, drafts):
    job.write_model(architecture, depths)
    job(**({} if asked_for is None else {"SERVER_DRAFTS": asked_for}))
    ((*_, arguments),) = job.starts
    _, given, settings = arguments.partition(" --speculative-config ")
    assert bool(given) == (drafts is not None)
    assert not given or json.loads(settings)["num_speculative_tokens"] == drafts


def test_a_server_that_dies_is_started_again_with_nothing_of_it_left(job):
    """A worker that outlives its server would keep the GPU's memory."""
    worker = 'sleep 60 & echo $! >>"$CALLS.workers"; '
    serve = f'{worker} [[ $(wc -l <"$CALLS.vllm") -ge 2 ]] || exit 3; wait'
    done = job(SERVE=serve, STEP=job.when_started(2))
    assert done.returncode == 0, done.stderr
    assert "the server ended with exit status 3" in done.stdout
    assert len(job.starts) == 2
    workers = Path(f"{job.calls_file}.workers").read_text().split()
    assert not any(map(job.is_alive, workers))


@pytest.mark.parametrize("status", [0, 7])
def test_servers_end_with_the_ranks_whose_status_is_that_of_the_job(job, status):
    done = job(STEP=job.when_started(1, f"exit {status}"))
    assert done.returncode == status
    assert "the servers are ended" in done.stdout
    ((process, *_),) = job.starts
    assert not job.is_alive(process)


def test_servers_have_ended_when_nodes_are_checked_or_the_job_is_requeued(job):
    step = job.when_started(1) + asked(SAVE)
    done = job(STEP=step, RUN_DIR=str(job.run_dir))
    assert done.returncode == 0, done.stderr
    assert job.calls[1:] == ["requeue 123456"]
    assert done.stdout.index("the servers are ended") < done.stdout.index("requeueing")


def test_a_server_that_never_comes_up_is_given_up(job):
    done = job(SERVE="exit 3", STEP=job.when_started(5, "sleep 2; exit 4"))
    assert done.returncode == 4
    assert "ended 5 times in a row within 600 seconds of its start: given up" in done.stdout
    assert "the servers had ended before" in done.stdout
    assert len(job.starts) == 5


def test_nodes_of_servers_are_checked_too(job):
    bad = 'if [[ $node == node2 ]]; then echo "unhealthy: GPU 3: lost"; exit 1; fi; echo healthy'
    done = job(HEALTH=bad, **GPUS)
    assert "node2 failed the health check: unhealthy: GPU 3: lost" in done.stdout
    assert job.calls == ["requeue 123456", "update JobId=123456 ExcNodeList=node2"]
    folder = f"--folder {job.run_dir}.logs/123456/health --gpus"
    checked = [check.partition(" --free")[0] for check in job.checks]
    assert checked == [f"node{n} {folder} {8 if n < 3 else 2}" for n in (1, 2, 7, 8)]
    assert not Path(f"{job.calls_file}.servers").exists()


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"SLURM_HET_SIZE": ""}, "this is no job of two components: sbatch --nodes=N : --nodes=M"),
        ({"SERVER_MODEL": ""}, "SERVER_MODEL is not set: export the folder"),
        ({"SERVER_MODEL": "nowhere"}, "SERVER_MODEL=nowhere has no config.json"),
        ({"SERVER_TENSOR_PARALLEL": "3", **GPUS}, "does not divide the 8 GPUs of a node"),
        ({"SERVER_TENSOR_PARALLEL": "16", **GPUS}, "does not divide the 8 GPUs of a node"),
    ],
)
def test_a_job_that_can_not_have_servers_is_refused(job, environment, told):
    done = job(**environment)
    assert done.returncode == 1
    assert told in done.stderr
    assert job.calls == []


@pytest.mark.parametrize("missing", ["SLURM_LOCALID", "SERVER_MODEL"])
def test_a_server_started_by_hand_says_what_starts_it(job, missing):
    names = {"SLURM_LOCALID": "0", "SERVER_PORT": "1", "SERVER_TENSOR_PARALLEL": "1"}
    environment = {**job.environment, **names}
    del environment[missing]
    done = subprocess.run(
        ["bash", "slurm/server.sh"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {missing} is not set: slurm/server.sh is called by")
