"""The pool: verifiers that fail in every way, and the run that goes on."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import pytest

from megatron_occ.rl.rewards import VerifierPool, VerifierResult, cores_of_rank, register_verifier
from megatron_occ.rl.rewards.worker import VerifierWorker

USER_MODULE = """
import ctypes, os, sys, time

def length(response, answer):
    return len(response)

def pid(response, answer):
    return os.getpid()

def echo_equal(response, answer):
    return float(response == answer)

def raises(response, answer):
    raise KeyError("no such unit")

def leaves(response, answer):
    sys.exit(3)

def dies(response, answer):
    os._exit(9)

def not_a_number(response, answer):
    return float("nan")

def returns_text(response, answer):
    return "1"

def returns_nothing(response, answer):
    pass

def one_argument(response):
    return 1.0

def loops(response, answer):
    while True:
        pass

def stuck_in_c(response, answer):
    ctypes.PyDLL(None).sleep(60)  # does not release the interpreter lock

def has_child(response, answer):
    import subprocess
    child = subprocess.Popen(["sleep", "60"])
    with open(response, "w") as file:
        file.write(str(child.pid))
    child.wait()

def hungry(response, answer):
    return len(bytearray(8 * 2**30))

def recursive(response, answer):
    return recursive(response, answer)

def chatty(response, answer):
    print('{"score": 99.0}')
    os.write(1, b'{"score": 99.0}\\n')
    return 0.5 if sys.stdin.read() == "" else 0.0
"""


@pytest.fixture(scope="module", autouse=True)
def user_module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "occ_test_user.py").write_text(USER_MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        for line in USER_MODULE.splitlines():
            if line.startswith("def "):
                name = line[4 : line.index("(")]
                register_verifier(f"user {name}", f"occ_test_user:{name}")
        yield


@pytest.fixture(scope="module")
def pool(user_module):
    """A pool with time enough for all that ends."""
    with VerifierPool(timeout_seconds=30.0) as pool:
        yield pool


@pytest.fixture(scope="module")
def hurried(user_module):
    """A pool for what never ends."""
    with VerifierPool(timeout_seconds=0.5) as pool:
        yield pool


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A killed process that its new parent has not reaped yet still has an entry.
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def test_text_verifiers_need_no_process():
    pool = VerifierPool()
    results = pool.score([("arithmetic", "1=2.", "2"), ("exact", "a", "b")] * 2)
    assert results == [VerifierResult(1.0, "ok"), VerifierResult(0.0, "ok")] * 2
    assert pool._workers[0]._process is None
    assert pool.score([]) == []
    pool.close()


def test_results_keep_the_order_of_mixed_items(pool):
    items = [
        ("user length", "four", ""),
        ("exact", "x", "x"),
        ("math", r"\boxed{0.5}", "1/2"),
        ("user length", "", ""),
        ("reversed_addition", "3.", "3"),
    ]
    assert [result.score for result in pool.score(items)] == [4.0, 1.0, 1.0, 0.0, 1.0]


def test_the_process_is_kept_between_calls(pool):
    first, second = (pool.score([("user pid", "", "")])[0].score for _ in range(2))
    assert first == second != os.getpid()


@pytest.mark.parametrize(
    ("name", "detail"),
    [
        ("raises", "KeyError: 'no such unit' (at "),
        ("leaves", "SystemExit: 3"),
        ("dies", "exit code 9"),
        ("not_a_number", "the verifier returned nan (float), not a finite number"),
        ("returns_text", "the verifier returned '1' (str), not a finite number"),
        ("returns_nothing", "the verifier returned None (NoneType), not a finite number"),
        ("one_argument", "takes 1 positional argument but 2 were given"),
        ("recursive", "RecursionError"),
        ("hungry", "MemoryError"),
    ],
)
def test_a_failing_verifier_scores_zero_and_says_why(pool, name, detail):
    results = pool.score([(f"user {name}", "r", "a"), ("user length", "abc", "")])
    assert (results[0].score, results[0].status) == (0.0, "error")
    assert detail in results[0].detail
    assert "worker_main.py" not in results[0].detail, "no place that the user could correct"
    assert results[1] == VerifierResult(3.0, "ok")


@pytest.mark.parametrize("name", ["loops", "stuck_in_c"])
def test_a_verifier_over_its_time_is_killed(hurried, name):
    old = hurried.score([("user pid", "", "")])[0].score
    late, after = hurried.score([(f"user {name}", "r", "a"), ("user pid", "", "")])
    assert (late.score, late.status, late.detail) == (0.0, "timeout", "no answer within 0.5 s")
    assert after.status == "ok"
    assert after.score != old
    assert not is_running(int(old))


def test_the_time_to_import_a_verifier_does_not_count(hurried, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = "import time\ntime.sleep(0.6)\ndef one(response, answer):\n    return 1\n"
    (tmp_path / "occ_test_slow.py").write_text(source)
    register_verifier("user slow import", "occ_test_slow:one")
    hurried._workers[0].kill()  # the next process gets the new import path
    items = [("user slow import", "", ""), ("user loops", "", ""), ("user slow import", "", "")]
    assert [result.status for result in hurried.score(items)] == ["ok", "timeout", "ok"]


def test_what_a_verifier_started_is_killed_with_it(hurried, tmp_path):
    note = tmp_path / "pid"
    assert hurried.score([("user has_child", str(note), "")])[0].status == "timeout"
    pid = int(note.read_text())
    deadline = time.monotonic() + 5
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(pid)


def test_a_process_that_ended_between_calls_costs_no_item(pool):
    pid = int(pool.score([("user pid", "", "")])[0].score)
    os.kill(pid, 9)
    pool._workers[0]._process.wait()
    assert pool.score([("user length", "ab", "")])[0] == VerifierResult(2.0, "ok")


def test_output_and_input_of_a_verifier_do_not_touch_the_protocol(pool):
    results = pool.score([("user chatty", "", ""), ("user length", "abc", "")])
    assert [(result.score, result.detail) for result in results] == [(0.5, ""), (3.0, "")]


@pytest.mark.parametrize(
    "response", ["\0" * 9, "\ud800 \U0001f600 é\n\r\u2028", "a" * 1_000_000, '"\\u0000\\"}\n{']
)
def test_any_text_arrives_unchanged(pool, response):
    assert pool.score([("user echo_equal", response, response)])[0] == VerifierResult(1.0, "ok")


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{9^{9^{9^{9}}}}",
        "#### 9**9**9**9",
        r"\boxed{" + "{" * 100_000,
        r"\boxed{" + "(" * 500_000 + "1" + ")" * 500_000 + "}",
        "answer is " * 100_000,
        "\\boxed{5\0\ud800}",
    ],
)
def test_hostile_mathematics_scores_zero_and_the_next_item_counts(hurried, response):
    hostile, after = hurried.score([("math", response, "5"), ("user length", "ab", "")])
    assert hostile.score == 0.0
    assert after == VerifierResult(2.0, "ok")


def test_unusable_items_are_errors_without_a_verifier(pool):
    results = pool.score([("exact", None, "a"), ("math", "r", 5), ("exact", "x" * 2_000_001, "x")])
    assert [result.status for result in results] == ["error"] * 3
    assert "response is NoneType" in results[0].detail
    assert "answer is int" in results[1].detail
    assert "2000001 characters" in results[2].detail


def test_two_workers_share_the_items_off_the_main_thread():
    answers = []

    def work() -> None:
        with VerifierPool(timeout_seconds=20.0, workers=2) as pool:
            items = [("user length", "a" * i, "") for i in range(40)]
            answers.extend(result.score for result in pool.score(items))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == list(range(40))


def test_a_rank_has_its_share_of_the_cores(monkeypatch):
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_PROCID", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert cores_of_rank() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert cores_of_rank() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert cores_of_rank() == 1
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "12")
    assert cores_of_rank() == 1  # of a batch script, which is no task
    monkeypatch.setenv("SLURM_PROCID", "5")
    assert cores_of_rank() == 12


def test_an_item_that_runs_out_of_time_costs_its_own_slot_alone(user_module):
    items = [("user loops", "r", "a")] + [("user length", "four", "a")] * 20
    with VerifierPool(timeout_seconds=0.5, workers=2) as pool:
        found = pool.score(items)
    assert [result.status for result in found] == ["timeout"] + ["ok"] * 20
    assert {result.score for result in found[1:]} == {4.0}


def test_set_up_mistakes_are_told_at_once(pool):
    with pytest.raises(ValueError, match="did you mean 'exact'"):
        pool.score([("exakt", "", "")])
    register_verifier("user nowhere", "occ_no_such_module:f")
    with pytest.raises(ValueError, match="No module named 'occ_no_such_module'"):
        pool.score([("user nowhere", "", "")])
    assert pool.score([("user length", "ab", "")])[0].score == 2.0


@pytest.mark.parametrize(
    "arguments",
    [
        {"timeout_seconds": 0},
        {"timeout_seconds": float("inf")},
        {"timeout_seconds": None},
        {"workers": 0},
        {"workers": 1.5},
        {"memory_gib": -1},
    ],
)
def test_bad_limits_are_refused(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=name):
        VerifierPool(**arguments)


def test_a_process_whose_trainer_is_gone_ends_by_itself():
    idle, stuck = VerifierWorker(None), VerifierWorker(None)
    for worker in (idle, stuck):
        assert worker.ask("occ_test_user:length", "ab", "", 30.0) == {"score": 2.0}
    processes = [worker._process for worker in (idle, stuck)]
    request = {"path": "occ_test_user:stuck_in_c", "response": "", "answer": "", "limit": 0.01}
    stuck._process.stdin.write(json.dumps(request).encode() + b"\n")
    for process in processes:
        process.stdin.close()
    assert [process.wait(timeout=30) for process in processes] == [0, -signal.SIGALRM]
    for worker in (idle, stuck):
        worker.kill()


def test_closing_ends_the_process():
    pool = VerifierPool()
    pid = int(pool.score([("user pid", "", "")])[0].score)
    pool.close()
    pool.close()
    assert not is_running(pid)
    with pytest.raises(ValueError, match="closed"):
        pool.score([("exact", "a", "a")])
