"""Progress, cancel and the errors that teach."""
import io
import os
import pickle
import pty
import subprocess
import sys
import threading
import time

import pytest

from vidgen.errors import Canceled, DoesNotFit, WeightsMissing, nearest, need, unknown
from vidgen.progress import Cancel, Progress, bar

TALK = "import time\nfrom vidgen.progress import bar, Progress\nwith bar('toy', after={after}) as p:\n    for i in range(6):\n        p(Progress('work', i + 1, 6)); time.sleep(0.1)\nprint('end')\n"


def in_a_terminal(code, **env):
    "Run code with standard error on a pseudo terminal; return (stdout, stderr)."
    ours, theirs = pty.openpty()
    clean = {k: v for k, v in os.environ.items() if k not in ("CI", "TERM")}
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=theirs, env={**clean, "TERM": "xterm", **env})
    os.close(theirs)
    seen = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:
            break
        if not piece:
            break
        seen += piece
    out = run.stdout.read().decode()
    assert run.wait() == 0
    os.close(ours)
    return out, seen.decode()


def test_a_bar_is_drawn_on_a_terminal_and_never_into_the_output():
    out, err = in_a_terminal(TALK.format(after=0.1))
    assert out == "end\n" and "toy work" in err and "6/6" in err


def test_short_work_and_ci_draw_nothing():
    assert in_a_terminal(TALK.format(after=30)) == ("end\n", "")
    assert in_a_terminal(TALK.format(after=0), CI="true") == ("end\n", "")
    assert in_a_terminal(TALK.format(after=0), TERM="dumb") == ("end\n", "")


def test_nothing_is_drawn_without_a_terminal():
    run = subprocess.run([sys.executable, "-c", TALK.format(after=0)], capture_output=True, text=True, env={k: v for k, v in os.environ.items() if k != "CI"})
    assert (run.stdout, run.stderr, run.returncode) == ("end\n", "", 0)


def test_the_bar_appears_even_if_the_next_event_is_far_away(monkeypatch):
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    with bar(after=0.05, disable=False) as progress:
        progress(Progress("decode", 1, 3))
        time.sleep(0.4)
    assert "decode" in err.getvalue()


def test_events_from_many_threads_and_after_the_end(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with bar(after=0, disable=False) as progress:
        threads = [threading.Thread(target=lambda s=s: [progress(Progress(f"stage {s}", i, 50)) for i in range(51)]) for s in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert all(t.completed == 50 for t in progress.progress.tasks) and len(progress.progress.tasks) == 8
    progress(Progress("late", 1, 1))


def test_an_exception_takes_the_bar_away_and_goes_on(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with pytest.raises(KeyboardInterrupt), bar(after=0, disable=False) as progress:
        progress(Progress("work", 1, 0, note="unknown total"))
        raise KeyboardInterrupt
    assert progress.painted is None


@pytest.mark.parametrize("done, total", [(-1, 5), (6, 5), (0, -1)])
def test_impossible_progress_is_refused(done, total):
    with pytest.raises(ValueError, match="can't be"):
        Progress("work", done, total)


def test_cancel_keeps_the_first_reason_and_stops_another_thread():
    cancel, steps = Cancel(), []

    def work():
        try:
            while True:
                cancel.check()
                steps.append(1)
                time.sleep(0.005)
        except Canceled as err:
            steps.append(str(err))

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.03)
    cancel.cancel("first")
    cancel.cancel("second")
    thread.join(2)
    assert not thread.is_alive() and steps[-1] == "canceled: first" and cancel.canceled


def test_errors_name_what_is_near():
    assert nearest("shapes-t2w", ["cogvideox-2b", "shapes-t2v"]) == ["shapes-t2v"]
    assert nearest("anything", []) == [] and nearest("", ["a"]) == []
    assert str(unknown("model", "zzz", ["a-model"])) == "unknown model 'zzz'; all: `vidgen models`"
    assert "there is no preset yet" in str(unknown("preset", "cpu", []))
    long = str(unknown("key", "nothing like it", [f"option{i}" for i in range(100)]))
    assert len(long) < 200


def test_need_tells_missing_from_broken(tmp_path, monkeypatch):
    with pytest.raises(ImportError, match=r"needs vidgen\[serve\]: pip install 'vidgen\[serve\]'"):
        need("nobody_wrote_this.sub", "serve")
    (tmp_path / "broken_part.py").write_text("import something_it_needs\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="installed but does not import"):
        need("broken_part", "serve")


def test_errors_travel_between_processes():
    err = pickle.loads(pickle.dumps(DoesNotFit("too big", plan={"peak_gib": 3})))
    assert str(err) == "too big" and err.plan == {"peak_gib": 3}
    assert isinstance(pickle.loads(pickle.dumps(WeightsMissing("none"))), FileNotFoundError)
