"What the panels stand on, under every version of ipywidgets: threads, bounds and words."

import threading
import time

import anywidget
import ipywidgets
import pytest
import traitlets

from tokenflow_nb.panels.base import (
    Busy,
    Code,
    ErrorBox,
    Note,
    Panel,
    Progress,
    Worker,
    in_words,
    progress_bar,
)

PATIENCE = 30  # seconds until a thread that should have moved counts as stuck


def held(worker, task="rendering"):
    "Starts work that lasts until it is cancelled, and waits until it runs."
    running = threading.Event()

    def work(stop):
        running.set()
        assert stop.wait(PATIENCE)

    worker.start(task, work)
    assert running.wait(PATIENCE)


def test_work_runs_on_another_thread_and_start_returns():
    worker, seen = Worker(), []
    held(worker)
    assert worker.busy and worker.task == "rendering"
    worker.cancel()
    assert worker.wait(PATIENCE) and not worker.busy and worker.task == ""
    worker.start("naming", lambda stop: seen.append(threading.current_thread()))
    worker.wait(PATIENCE)
    assert seen and seen[0] is not threading.current_thread()


def test_of_many_starts_at_once_one_wins():
    worker, refused, barrier = Worker(), [], threading.Barrier(8)

    def start():
        barrier.wait(PATIENCE)
        try:
            worker.start("rendering", lambda stop: stop.wait(PATIENCE))
        except Busy as busy:
            refused.append(str(busy))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    worker.cancel()
    assert worker.wait(PATIENCE)
    assert len(refused) == 7 and all("already rendering" in words and "cancel" in words for words in refused)


def test_a_late_cancel_does_not_stop_the_next_work():
    worker = Worker(threaded=False)
    worker.start("first", lambda stop: None)
    worker.cancel()
    seen = []
    worker.start("second", lambda stop: seen.append(stop.is_set()))
    assert seen == [False]


@pytest.mark.parametrize("threaded", [False, True])
def test_an_error_is_handed_over_and_the_worker_is_free_again(threaded):
    errors, done = [], []
    worker = Worker(errors.append, threaded)
    worker.start("reading", lambda stop: [][0])
    worker.wait(PATIENCE)
    worker.start("reading", lambda stop: done.append(True))
    worker.wait(PATIENCE)
    assert [type(error) for error in errors] == [IndexError] and done == [True]


def test_closing_ends_the_thread_and_refuses_the_rest():
    worker = Worker()
    held(worker)
    worker.close()
    assert worker.wait(PATIENCE)
    with pytest.raises(Busy, match="closed"):
        worker.start("rendering", lambda stop: None)


def test_progress_is_told_ten_times_a_second_at_most_and_the_end_always():
    progress, told = Progress(), []
    progress.observe(lambda change: told.append(change.new), "text")
    for done in range(1, 1001):
        progress.update(done, 1000, f"step {done}")
    assert told[0] == "step 1" and told[-1] == "step 1000" and progress.fraction == 1
    assert len(told) < 100


def test_the_time_left_counts_what_this_start_has_done(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("tokenflow_nb.panels.base.time.monotonic", lambda: clock[0])
    progress = Progress()
    progress.start()
    for now, done in ((100, 50), (110, 60)):  # a resumed run: 50 were done before
        clock[0] = now
        progress.update(done, 100, "editing")
    assert progress.text == "editing · about 40 s left"


@pytest.mark.parametrize("text", ["<img src=x onerror=alert(1)>", "a & b", "it's \"quoted\"", "naïve 星"])
def test_text_is_shown_as_it_is(text):
    box, words = ErrorBox(), Note(text)
    box.show(text)
    assert box.text == text
    assert "<img" not in box.value + words.value
    box.clear()
    assert box.value == ""


def test_errors_have_words_even_without_a_message():
    assert in_words(ValueError("prompt is empty")) == "prompt is empty"
    assert in_words(MemoryError()) == "MemoryError"
    assert in_words(KeyError("up 1")) == "KeyError: 'up 1'"


def test_code_is_only_a_trait_and_a_script():
    made = Code()
    assert isinstance(made, anywidget.AnyWidget) and made.traits()["text"].help
    state = made.get_state()
    assert "export default" in state["_esm"] and "--tfnb-accent" in state["_css"]


class State(traitlets.HasTraits):
    error, closed = traitlets.Unicode(), traitlets.Int()

    def close(self):
        self.closed += 1


def test_a_panel_shows_its_errors_and_closes_everything_inside():
    button, progress = ipywidgets.Button(description="Run"), Progress()
    bar = progress_bar(progress)
    panel = Panel(State(), [ipywidgets.HBox([button]), bar], "example")
    panel.state.error = "no <b>clip</b>"
    assert panel.errors.text == "no <b>clip</b>" and "<b>" not in panel.errors.value
    panel.state.error = ""
    assert panel.errors.value == ""
    progress.update(1, 2, "editing")
    assert 'role="progressbar"' in bar.children[0].value and 'aria-valuenow="50"' in bar.children[0].value
    assert 'role="status"' in bar.children[1].value and 'role="status"' not in Note("a hint", live=False).value
    panel.close()
    panel.close()
    assert panel.state.closed == 1
    assert panel.comm is None and button.comm is None and bar.children[0].comm is None


IN_A_KERNEL = """
import threading
import time
from tokenflow_nb.panels.base import Worker

worker, ends = Worker(), []

def work(stop):
    ends.append("stopped" if stop.wait(60) else "ran to its end")

worker.start("waiting", work)
"""


def test_the_kernels_interrupt_stops_what_a_worker_does_when_no_cell_runs():
    "■ in a real kernel, twice: ipykernel itself ignores the signal between two cells. A cell is interrupted as ever."
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")

    def run(code):
        found = []
        client.execute_interactive(code, timeout=120, output_hook=lambda message: found.append(message["content"].get("text", "")))
        return "".join(found).strip()

    try:
        for code in (IN_A_KERNEL, "ends.clear(); worker.start('waiting', work)"):
            run(code)
            assert run("print(worker.busy)") == "True"
            time.sleep(0.2)  # until the kernel has told that the cell is done, the signal is the cell's
            manager.interrupt_kernel()
            assert run("print(worker.wait(30), ends)") == "True ['stopped']"
        asked = client.execute("import time; time.sleep(60)")
        time.sleep(1)
        manager.interrupt_kernel()
        while (reply := client.get_shell_msg(timeout=60))["parent_header"].get("msg_id") != asked:
            pass
        assert reply["content"]["ename"] == "KeyboardInterrupt"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
