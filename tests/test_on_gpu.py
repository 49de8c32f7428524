"""Tests the ten-minute GPU run without a GPU: whatever happens to a stage, the others run and all results are recorded.

The stages here are a few lines each, run as the real ones are; `python -m benchmarks.on_gpu --rehearse` runs those.
"""

import io
import itertools
import json
import math
import os
import shutil
import signal
import site
import subprocess
import sys
import time
import venv
from pathlib import Path

import numpy as np
import nvml_stub
import pytest
import torch

from benchmarks.on_gpu import engine_tests, iterations, kernel_tests, machine
from benchmarks.on_gpu.conduct import FILES, LOG_BYTES
from benchmarks.on_gpu.figures import cases_of, headline, idle
from benchmarks.on_gpu.page import TABLES, groups, page, without_figures
from benchmarks.on_gpu.plan import SHORTEST, STAGES, chosen, limit
from benchmarks.on_gpu.pytest_runs import explained, progress
from benchmarks.on_gpu.stage import Context, read_records, records_file
from benchmarks.on_gpu.traces import busy, range_of, work_of

pytestmark = pytest.mark.any_torch
ROOT = Path(__file__).parents[1]
DRIVER = """
import dataclasses, json, sys
from pathlib import Path
from benchmarks.on_gpu import conduct
from benchmarks.on_gpu.plan import Stage
given = json.loads(sys.argv[1])
STAGE = '''
import sys, types
from benchmarks.on_gpu import stage
def import_module(name):
    module = types.ModuleType(name)
    exec(%r[name.rpartition(".")[2]], module.__dict__)
    return module
stage.importlib.import_module = import_module
sys.exit(stage.main())
''' % (given["codes"],)
conduct.command = lambda context: [sys.executable, "-c", STAGE, json.dumps(dataclasses.asdict(context))]
conduct.prepared = lambda session: {"device": "none", "packages": {}, "capability": "", "sms": 0, "memory_bytes": 0}
stages = tuple(Stage(*stage) for stage in given["stages"])
sys.exit(conduct.conduct(conduct.Request(Path(given["out"]), given["seconds"], stages, given["rehearsal"], None)))
"""
GOOD = "def run(context):\n    context.record('found', value=1)\n    return 'passed', '1 found'"
HANGS = """
import signal, subprocess, time
def run(context):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(['sleep', '1000'])
    context.record('found', value=child.pid)
    time.sleep(1000)
"""
DIES = "import os\ndef run(context):\n    context.record('found', value=2)\n    os.kill(os.getpid(), 11)"
RAISES = "def run(context):\n    raise RuntimeError('broken\\nin two lines')"
LEAVES = "import os\ndef run(context):\n    print('on its way')\n    os._exit(0)"


def started(out, stages, seconds=60.0, rehearsal=False):
    """Starts the conductor on stages with this code, each limited to a third of the time."""
    given = {
        "out": str(out),
        "seconds": seconds,
        "rehearsal": rehearsal,
        "codes": stages,
        "stages": [(name[0], name, f"the stage {name}", 1 / 3, 0.0) for name in stages],
    }
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-c", DRIVER, json.dumps(given)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def conducted(out, stages, **options):
    """Returns the exit code, the output, and results.json."""
    process = started(out, stages, **options)
    printed, _ = process.communicate(timeout=120)
    return process.returncode, printed, results(out)


def results(out):
    return json.loads((out / "results.json").read_text())


def until(condition, seconds=60.0):
    """Waits until the condition is true and returns its value."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return result


def gone(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


# Outcomes of stages


def test_a_stage_that_hangs_is_killed_in_its_time_with_all_that_it_started_and_the_others_run(tmp_path):
    code, printed, result = conducted(tmp_path, {"hangs": HANGS, "good": GOOD}, seconds=24.0)
    hung = result["stages"]["hangs"]
    assert hung["verdict"] == "cut"
    assert hung["seconds"] < 24 / 3 + 4
    assert gone(hung["records"][0]["value"])
    assert result["stages"]["good"]["verdict"] == "passed"
    assert code == 0
    assert "the stage hangs: CUT" in printed
    assert "ended after its 8 s; 1 findings until then" in printed


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (DIES, "died of SIGSEGV; 1 findings until then"),
        (RAISES, "RuntimeError: broken"),
        (LEAVES, "ended with 0 and no verdict; nothing found until then; the last it printed: on its way"),
        ("import there_is_no_such_module", "ModuleNotFoundError: No module named 'there_is_no_such_module'"),
    ],
)
def test_a_stage_that_breaks_fails_and_the_others_run(tmp_path, stage, message):
    code, printed, result = conducted(tmp_path, {"broken": stage, "good": GOOD})
    assert result["stages"]["broken"]["verdict"] == "failed"
    assert message in result["stages"]["broken"]["message"]
    assert result["stages"]["good"]["records"] == [{"kind": "found", "value": 1}]
    assert message in (tmp_path / "page.md").read_text()
    assert printed.count("the stage good: PASSED") == 2  # when it ends, and on the page
    assert code == 1


def recorded(folder, stage):
    """Returns the stage's state in the file, once it has recorded something."""
    state = (folder / "results.json").exists() and results(folder)["stages"].get(stage)
    return state if state and state["records"] else None


def test_results_survive_a_kill_of_the_conductor_and_nothing_goes_on_running(tmp_path):
    process = started(tmp_path, {"good": GOOD, "hangs": HANGS})
    hung = until(lambda: recorded(tmp_path, "hangs"))
    process.kill()
    process.communicate()
    result = results(tmp_path)
    assert result["stages"]["good"]["verdict"] == "passed"
    assert result["stages"]["hangs"]["verdict"] == "running"
    assert not result["finished"]
    until(lambda: gone(hung["records"][0]["value"]), 10.0)


def test_it_ends_at_once_when_it_is_asked_to_and_says_what_did_not_run(tmp_path):
    process = started(tmp_path, {"good": GOOD, "hangs": HANGS, "later": GOOD})
    hung = until(lambda: recorded(tmp_path, "hangs"))
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=30)
    assert time.monotonic() < began + 10
    result = results(tmp_path)
    assert [state["verdict"] for state in result["stages"].values()] == ["passed", "cut", "not run"]
    assert result["stopped"] == "stopped by SIGTERM"
    assert "the stage later: NOT RUN (0 s): stopped by SIGTERM" in printed
    assert process.returncode == 1
    assert gone(hung["records"][0]["value"])


def test_an_error_of_the_conductor_s_own_is_reported_and_earlier_results_stay(tmp_path):
    spoils = "import os, shutil\ndef run(context):\n    os.remove(context.scratch + '/' + 'spoils.log')\n"
    spoils += "    os.mkdir(context.scratch + '/spoils.log')\n    return 'passed', ''"
    code, printed, result = conducted(tmp_path, {"good": GOOD, "spoils": spoils, "later": GOOD})
    assert result["stages"]["good"]["verdict"] == "passed"
    assert result["stopped"].startswith("IsADirectoryError")
    assert "IsADirectoryError" in printed
    assert (code, result["finished"]) == (1, False)


def test_it_is_done_in_time_whatever_happens(tmp_path):
    began = time.monotonic()
    _, _, result = conducted(tmp_path, dict.fromkeys(["a", "b", "c", "d"], HANGS), seconds=15.0)
    assert time.monotonic() < began + 15 + 3  # Python's start and end
    assert {state["verdict"] for state in result["stages"].values()} == {"cut", "not run"}
    assert result["seconds"] <= 15


def test_records_that_the_page_cannot_show_stop_nothing(tmp_path):
    odd = "def run(context):\n    context.record('overlap', model=1)\n    return 'passed', ''"
    code, printed, result = conducted(tmp_path, {"overlap": odd, "good": GOOD})
    assert (code, result["finished"]) == (0, True)
    assert result["stages"]["good"]["verdict"] == "passed"
    assert "No table: KeyError: " in printed


def test_the_folder_holds_few_small_files(tmp_path):
    loud = "def run(context):\n    print('x' * 3_000_000)\n    return 'passed', ''"
    traces = """
from pathlib import Path
def run(context):
    (Path(context.scratch) / 'trace.json.gz').write_bytes(b'x' * %s)
    return 'passed', ''
"""
    conducted(tmp_path, {"loud": loud, "traces": traces % 1000, "too": traces % (9 << 20)})
    result = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(result) == set(FILES)
    assert len(FILES) <= 6
    assert result["log.txt"] < LOG_BYTES + 1000
    assert result["trace.json.gz"] == 1000


def test_the_results_have_these_keys(tmp_path):
    _, _, result = conducted(tmp_path, {"good": GOOD.replace("value=1", "value=float('nan')")})
    assert result.keys() == {
        *("format", "rehearsal", "minutes", "began", "finished", "stopped", "source_sha256", "machine", "stages"),
        "seconds",
    }
    assert result["finished"]
    assert result["stages"]["good"].keys() == {"letter", "title", "verdict", "message", "seconds", "records"}
    assert result["stages"]["good"]["records"] == [{"kind": "found", "value": None}]  # JSON has no NaN


def test_a_rehearsal_passes_as_a_whole_or_not_at_all(tmp_path):
    not_run = "def run(context):\n    return 'not run', 'no images'"
    assert conducted(tmp_path / "a", {"good": GOOD, "none": not_run})[0] == 0
    code, printed, _ = conducted(tmp_path / "b", {"good": GOOD, "none": not_run}, rehearsal=True)
    assert code == 1
    assert printed.count("REHEARSAL") == 1
    assert "1 found" not in printed + json.dumps(results(tmp_path / "b"))


# The command


def command(*arguments, root=ROOT, python=sys.executable):
    given = [python, "-m", "benchmarks.on_gpu", *map(str, arguments)]
    return subprocess.run(given, cwd=root, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes: expected a number above 0, of at most 600, got 0"),
        (["--minutes", "nan"], "--minutes: expected a number above 0, of at most 600, got nan"),
        (["--stages", "a,z"], "--stages: no stage 'z'; there are a (examination), b (kernel_tests)"),
        (["--stages", ""], "--stages: no stage ''"),
        (["--data", "there/is/none.npz"], "--data: there/is/none.npz is no .npz file"),
    ],
)
def test_arguments_that_do_not_fit_are_reported_in_a_line(tmp_path, arguments, message):
    done = command("--out", tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_folder_with_results_and_an_npz_of_something_else_are_refused(tmp_path):
    (tmp_path / "page.md").touch()
    done = command("--out", tmp_path)
    assert (done.returncode, done.stderr) == (2, f"--out: {tmp_path} already holds page.md; name another folder\n")
    np.savez(tmp_path / "other.npz", images=np.zeros(1))
    done = command("--out", tmp_path / "out", "--data", tmp_path / "other.npz")
    assert done.returncode == 2
    assert "other.npz holds images; expected " in done.stderr


def test_stages_are_picked_by_letter_or_name_and_keep_their_order():
    assert [stage.letter for stage in chosen("d, bandwidth,c")] == ["c", "d", "e"]
    assert [stage.letter for stage in STAGES] == list("abcdefghi")


def test_the_conductor_needs_the_standard_library_alone():
    code = (
        "import sys, benchmarks.on_gpu.__main__\n"
        "print([m for m in ('torch', 'numpy', 'bt_fast', 'pytest') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def test_nvidia_smi_that_hangs_hides_no_gpu(monkeypatch):
    def hangs(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(machine.subprocess, "run", hangs)
    monkeypatch.setattr(machine, "gpu", lambda: {"device": "H100"})
    result = machine.machine()
    assert result["device"] == "H100"
    assert result["nvidia_smi"].startswith("TimeoutExpired: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = command("--out", tmp_path / "out", "--stages", "d", "--minutes", "3")
    assert done.returncode == 1
    assert "d  one TRADES iteration: NOT RUN (0 s): no GPU that torch can use" in done.stdout
    assert "--rehearse runs all on the CPU" in done.stdout


def test_it_works_from_a_copy_without_git_in_a_place_of_its_own_and_installs_the_package_offline(tmp_path):
    copy, python = tmp_path / "copy", tmp_path / "venv" / "bin" / "python"
    copy.mkdir()
    for name in ("bt_fast", "kernels", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    venv.create(tmp_path / "venv", symlinks=True)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    paths = [path for path in sys.path if "site-packages" in path and Path(path).is_dir()] or site.getsitepackages()
    (packages / "others.pth").write_text("\n".join(paths))  # .pth files of an installed package are not read
    done = command("--out", tmp_path / "out", "--stages", "b", "--minutes", "5", "--rehearse", root=copy, python=python)
    assert done.returncode == 0, done.stdout + done.stderr
    result = results(tmp_path / "out")
    assert result["machine"]["installed"]
    assert result["machine"]["bt_fast"] == str(copy / "bt_fast")
    assert result["machine"]["kernels"] == str(copy / "kernels")
    assert result["rehearsal"]


# The plan


@pytest.mark.parametrize("whole", [30.0, 240.0, 480.0])
def test_stages_that_take_all_they_can_leave_the_others_their_least(whole):
    left = whole
    for number, stage in enumerate(STAGES):
        seconds = limit(stage, STAGES[number + 1 :], whole, left)
        assert stage.least * whole - 1e-9 <= seconds <= left + 1e-9
        left -= seconds
    assert left >= -1e-9


def test_stages_that_are_picked_use_up_the_time():
    (alone,) = chosen("d")
    assert limit(alone, (), 240.0, 230.0) == 230.0
    engine, iteration_ = chosen("c,d")
    assert engine.share / iteration_.share == pytest.approx(0.18 / 0.48)
    assert engine.share + iteration_.share == pytest.approx(1.0)
    assert chosen("a,b,c,d,e,f,g,h,i") == STAGES


def test_in_the_four_minutes_of_a_second_try_every_stage_can_begin():
    assert all(240 * stage.least >= SHORTEST for stage in STAGES)


@pytest.mark.parametrize(("cores", "tests"), [(1, 2), (8, 4), (16, 8), (64, 8)])
def test_the_engine_s_tests_take_half_the_cores(cores, tests, tmp_path):
    context = Context("engine_tests", "", time.monotonic() + 1, str(tmp_path), False, "", None, 8.0)
    assert engine_tests.at_once(context, cores) == tests


INTERRUPTED = """
import time
print("tests/k/test_a.py::test_a PASSED [ 10%]")
print("tests/k/test_a.py::test_b FAILED [ 20%]", flush=True)
try:
    time.sleep(100)
except KeyboardInterrupt:
    print("FAILED tests/k/test_a.py::test_b - AssertionError: 1", flush=True)
    raise SystemExit(2)
"""


def test_when_the_time_is_up_the_kernels_tests_tell_what_has_failed_until_then_and_why(tmp_path, monkeypatch):
    """Kernel tests that run out of time report their failures so far, even if started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupted(tmp_path, monkeypatch)
    finally:
        signal.signal(signal.SIGINT, before)


def interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_tests, "pytest_command", lambda *_: [sys.executable, "-c", INTERRUPTED])
    context = Context("kernel_tests", "", time.monotonic() + 8, str(tmp_path), False, "", None, 8.0)
    assert kernel_tests.run(context) == ("failed", "1 passed, 1 failed until the time was up")
    assert context.left > 0
    reported = [(r["id"], r["message"]) for r in context.records("failure")]
    assert reported == [("tests/k/test_a.py::test_b", ""), ("tests/k/test_a.py::test_b", "AssertionError: 1")]
    shown = TABLES["kernel_tests"](context.records("failure"), {})
    assert shown == ["- `tests/k/test_a.py::test_b`: AssertionError: 1"]
    assert TABLES["kernel_tests"](context.records("failure")[:1], {})[0].endswith("before the reason was known")


# Common parts of stages


def test_a_line_that_was_cut_off_is_no_record(tmp_path):
    context = Context("x", "", time.monotonic() + 1, str(tmp_path), True, "", None, 1.0)
    context.record("found", value=1)
    with records_file(tmp_path, "x").open("a") as file:
        file.write('{"kind": "found", "val')
    assert read_records(records_file(tmp_path, "x")) == [{"kind": "found", "value": 1}]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("tests/k/test_a.py::test_b[x-1] PASSED     [ 10%]", ("tests/k/test_a.py::test_b[x-1]", "passed")),
        ("[gw3] [ 47%] FAILED tests/k/test_a.py::test_b[a b] ", ("tests/k/test_a.py::test_b[a b]", "failed")),
        ("tests/k/test_a.py::test_b SKIPPED (no GPU) [100%]", ("tests/k/test_a.py::test_b", "skipped")),
        ("FAILED tests/k/test_a.py::test_b - AssertionError: 1", None),
        ("tests/k/test_a.py::test_b ", None),
        ("3 passed in 1.2s", None),
    ],
)
def test_pytest_s_progress_is_read_with_xdist_and_without(line, found):
    assert progress(line) == found


def test_pytest_s_reasons_are_read():
    assert explained("FAILED tests/a.py::test_b[x] - AssertionError: 1 - 2") == (
        "tests/a.py::test_b[x]",
        "AssertionError: 1 - 2",
    )
    assert explained("ERROR tests/a.py::test_b") == ("tests/a.py::test_b", "")
    assert explained("tests/a.py::test_b FAILED") is None


def event(ts, dur, stream, cat="kernel", name="k"):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"stream": stream}}


def test_overlap_counts_the_time_in_which_two_streams_work():
    # stream 7: 0-10 and 10-14; stream 9: 6-12, and two pieces of its own beside each other: 20-24
    result = busy([event(0, 10, 7), event(10, 4, 7), event(6, 6, 9), event(20, 4, 9), event(21, 2, 9)])
    assert result == pytest.approx({"busy": 18e-6, "overlapping": 6e-6, "work": 26e-6})
    assert busy([event(0, 10, 7), event(10, 5, 9)])["overlapping"] == 0
    assert busy([]) == {"busy": 0.0, "overlapping": 0.0, "work": 0.0}


def test_work_is_that_of_a_range_and_no_annotation():
    ranges = [event(5, 10, None, "user_annotation", "a"), event(5, 20, 7, "gpu_user_annotation", "a")]
    trace = {"traceEvents": [*ranges, event(1, 2, 7), event(6, 2, 7), event(9, 1, 7, "gpu_memcpy"), event(15, 2, 7)]}
    assert range_of(trace, "a") == (5, 15)
    assert [e["ts"] for e in work_of(trace, "a")] == [6, 9]
    assert len(work_of(trace)) == 4


ROUNDS = [
    {
        "kind": "round",
        "case": "n/tf32",
        "seconds": {"reference": r, "bullet": b},
        "host": {"reference": 1.0, "bullet": b},
    }
    for r, b in ((4.0, 2.0), (6.0, 2.0), (9.0, 1.0))
]
FLOPS = [{"kind": "flops", "model": "n", "method": m, "flops": f} for m, f in (("reference", 40), ("bullet", 10))]
BUSY = [{"kind": "busy", "case": "n/tf32", "variant": "bullet", "launches": 9, "busy": 1.5, "overlapping": 0.0}]


def test_speedups_are_medians_of_pairs_and_shares_of_the_flop_limit():
    row = cases_of([*ROUNDS, *FLOPS, *BUSY])["n/tf32"]["bullet"]
    assert (row["seconds"], row["over reference"], row["limit over reference"]) == (2.0, 3.0, 4.0)
    assert row["of limit over reference"] == 0.75
    assert idle(row) == 0.25
    assert headline("n/tf32", {"bullet": row}) == (
        "n tf32: bullet 2000.0 ms, 3.00x over the authors' (0.75 of the FLOP limit)"
    )


def content(rehearsal):
    state = {"letter": "d", "title": "one TRADES iteration", "verdict": "passed", "message": "", "seconds": 5.0}
    machine = {"device": None, "packages": {"torch": "2.11.0"}, "cores": 2}
    whole = {"rehearsal": rehearsal, "minutes": 8.0, "began": "now", "finished": True, "stopped": None}
    records = [{"kind": "case", "case": "n/tf32", "batch": 8}, *ROUNDS, *FLOPS, *BUSY]
    return whole | {
        "source_sha256": "0" * 64,
        "machine": machine,
        "seconds": 5.0,
        "stages": {"iterations": state | {"records": records}},
    }


def test_the_page_of_a_rehearsal_says_so_and_holds_no_figure_that_was_taken():
    measured, rehearsed = page(content(False)), page(content(True))
    assert "| BulletTrain | 2000.0 | 3.00× (0.75) | – | 0 | 2000.0 | 25% | – | – |" in measured
    assert rehearsed.startswith("# REHEARSAL on a CPU")
    assert "| BulletTrain | · | · | · | · | · | · | · | · |" in rehearsed
    assert "3.00" not in rehearsed
    assert without_figures(["| a | b |", "| --- | ---: |", "| c 1 | 2 |", "text"])[2:] == ["| c 1 | · |", "text"]


# Cases of iterations


def attempts(tmp_path, monkeypatch, ends):
    """Returns the verdict of a case with processes that end as given: (variant being tried, exit code)."""
    context = Context("iterations", "", time.monotonic() + 1000, str(tmp_path), True, "", None, 8.0)
    monkeypatch.setattr(iterations, "cases", lambda *_: (("n", "tf32", 1.0),))
    left = iter(ends)

    def run_part(_, part, seconds):
        variant, code = next(left)
        context.record("trying", case="n/tf32", variant=variant)
        if code == 0:
            context.record("round", case="n/tf32", seconds={"bullet": 1.0}, host={"bullet": 1.0})
        return code

    monkeypatch.setattr(iterations, "run_part", run_part)
    verdict = iterations.run(context)
    assert next(left, None) is None
    return verdict, [r["variant"] for r in context.records("left_out")]


def test_a_variant_that_ends_the_process_is_left_out_and_the_case_taken_up_again(tmp_path, monkeypatch):
    ends = [("bullet, graphs", -11), ("bullet, captured", 1), (None, 0)]
    (verdict, message), out = attempts(tmp_path, monkeypatch, ends)
    assert verdict == "failed"
    assert out == ["bullet, graphs", "bullet, captured"]
    assert "n tf32: bullet 1000.0 ms" in message
    assert "n tf32, bullet, graphs: its process ended with -11 in it" in message


def test_a_variant_in_which_the_time_is_up_is_not_to_blame(tmp_path, monkeypatch):
    (verdict, message), out = attempts(tmp_path, monkeypatch, [("bullet, graphs", None)])
    assert (verdict, message, out) == ("cut", "nothing was measured", [])


def test_a_case_that_breaks_elsewhere_is_not_tried_again(tmp_path, monkeypatch):
    (verdict, message), out = attempts(tmp_path, monkeypatch, [(None, 3)])
    assert (verdict, out) == ("failed", [])
    assert "the case: its process ended with 3: it reported nothing" in message


# Images


def test_jpeg_files_and_arrays_give_the_same_kind_of_data_set(tmp_path):
    pytest.importorskip("PIL")
    from PIL import Image

    from benchmarks.on_gpu.training import images_of

    arrays = {}
    for half, n in (("train", 5), ("test", 3)):
        files = []
        for k in range(n):
            file = io.BytesIO()
            Image.fromarray(np.full((32, 32, 3), 40 * k, np.uint8)).save(file, "JPEG", quality=95)
            files.append(file.getvalue())
        arrays[f"{half}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{half}_offset"] = np.array([0, *itertools.accumulate(map(len, files))])
        arrays[f"{half}_label"] = np.arange(n) % 3
    np.savez(tmp_path / "pictures.npz", **arrays)
    result = images_of(tmp_path / "pictures.npz")
    assert (result.name, result.classes, list(result.x_train.shape)) == ("pictures", 3, [5, 3, 32, 32])
    assert result.y_test.tolist() == [0, 1, 2]
    assert [round(float(x.float().mean()) / 40) for x in result.x_train] == [0, 1, 2, 3, 4]
    plain = {"x_train": result.x_train, "y_train": result.y_train, "x_test": result.x_test, "y_test": result.y_test}
    np.savez(tmp_path / "plain.npz", **{key: value.numpy() for key, value in plain.items()})
    assert torch.equal(images_of(tmp_path / "plain.npz").x_train, result.x_train)


# Measurement of a case, in a separate process: the benchmarks have their own module `conftest`


def measured(tmp_path, function, **environment):
    """Runs a function of `measured_on_the_cpu.py` and returns the JSON it prints."""
    given = [sys.executable, "-m", "measured_on_the_cpu", function, str(tmp_path)]
    folders = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "tests")])
    there = {**os.environ, "PYTHONPATH": folders, **environment}
    done = subprocess.run(given, cwd=ROOT, env=there, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_is_not_exact_or_falls_back_or_raises_is_left_out(tmp_path):
    result = measured(tmp_path, "left_out")
    assert result["as it is"] == []
    assert "not exact: an update in float64 differs by" in result["beta"][0]["message"]
    assert [r["message"] for r in result["warns"]] == ["the attack runs without graphs: so"]
    assert [r["message"] for r in result["raises"]] == ["RuntimeError: capture failed"]
    assert result["tried last"] == {"as it is": None, "beta": None, "warns": "optimised", "raises": "optimised"}
    assert result["exact"] == {"as it is": 1, "beta": 0, "warns": 0, "raises": 0}


def test_a_check_for_exactness_takes_three_steps_of_ten_so_that_there_is_time_for_all_of_them(tmp_path):
    result = measured(tmp_path, "checked")
    assert result["steps"] == [[3, None]] * 3 + [[3, 3]] * 6  # three updates each; BulletTrain is its own baseline
    assert result["as the bench"]
    assert max(result["differences"]) < 1e-9
    assert all(map(math.isnan, result["of NaN"]))


def test_what_shares_the_part_of_the_engine_that_broke_is_left_out_with_it(tmp_path):
    result = measured(tmp_path, "without")
    assert len(result["nothing"]) == 13
    assert [name for name in result["nothing"] if name not in result["bullet, graphs"]] == [
        *("bullet, graphs", "bullet, graphs, captured", "optimised, graphs", "optimised, graphs, captured"),
    ]
    assert not any("captured" in name or "fast" in name for name in result["bullet, captured"])
    both = "bullet, streams, captured"  # each part works alone
    assert [name for name in result["nothing"] if name not in result[both]] == [both]
    assert [name for name in result["nothing"] if name not in result["bullet"]] == ["bullet"]


def test_times_are_taken_when_all_that_runs_step_by_step_has_its_memory_again(tmp_path):
    ran = measured(tmp_path, "warmed")["ran"]
    assert ran[:2] == ["reference", "bullet"]
    assert ran[-3:] == ["bullet, captured", "reference", "bullet"]


def test_in_sixteen_bits_the_groups_have_the_paper_s_sizes(tmp_path):
    result = measured(tmp_path, "groups")
    assert result["found"] == result["expected"]


def test_the_page_shows_the_groups_sizes_and_which_variants_differ(tmp_path):
    reported = measured(tmp_path, "warmed")["groups"]
    assert [(r["variant"], r["sizes"]) for r in reported] == [("bullet", [2, 0, 0]), ("bullet, captured", [2, 0, 0])]
    assert groups(reported) == ["- n/tf32: outliers / boundary / robust samples: 2 / 0 / 0"]
    reported[1]["sizes"] = [1, 0.5, 0]
    assert groups(reported)[0].endswith("2 / 0 / 0 (BulletTrain), 1 / 0.5 / 0 (BulletTrain, captured)")


def test_what_falls_back_while_times_are_taken_or_runs_without_kernels_is_reported(tmp_path):
    result = measured(tmp_path, "fell_back_later")
    message = [(r["case"], r.get("variant"), r["message"]) for r in result["broke"]]
    assert message == [
        ("n/tf32", None, "while times were taken: the attack runs without graphs: so"),
        ("n/bfloat16", "optimised", "bt_fast runs in plain torch on cuda:0, since so"),
    ]
    assert result["warmed"] == ["reference", "optimised"]


def test_no_peak_is_reported_of_what_works_in_a_graph_s_pool(tmp_path):
    assert measured(tmp_path, "peaks") == ["reference"]


def test_captures_that_would_share_memory_are_measured_on_networks_of_their_own(tmp_path):
    assert measured(tmp_path, "captures_of") == [0, 1]


def test_a_timed_run_moves_so_much_that_the_start_of_a_graph_is_no_matter(tmp_path):
    assert all(2 << 30 <= moved <= 10 << 30 for moved in measured(tmp_path, "runs"))


def test_joules_are_those_of_each_variant(tmp_path):
    if nvml_stub.COMPILER is None:
        pytest.skip("the stub of NVML needs a C compiler, and there is neither gcc nor cc")
    nvml_stub.compile_stub(tmp_path)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    result = measured(tmp_path, "joules", LD_LIBRARY_PATH=path)
    assert [r["variant"] for r in result] == ["reference", "optimised"]
    for record in result:
        assert record["source"] == "power"
        assert record["watts"] == pytest.approx(300.0)
        # every iteration is a sleep of 10 ms or a little more
        assert 3.0 <= record["joules"] < 30.0
        assert record["iterations"] >= 1
