"What the tests of the edit panel and of its state share."


import pytest

from tokenflow_nb import source
from tokenflow_nb.edit import Edit, edit_video
from tokenflow_nb.panels.base import Worker
from tokenflow_nb.panels.state import EditState
from tokenflow_nb.store import Store
from tokenflow_nb.toy.world import Scene

SCENE = Scene("star", "blue", "grass", centre=(58, 66), radius=36, velocity=(0.8, -0.3))
STEPS, FRAMES = 3, 4
ROWS = (3 * 2 + 2 * FRAMES) + (2 * 2 + FRAMES) * (STEPS - 1)  # of an edit with a record: keyframes and frames, and guidance at the first step
PATIENCE = 120  # seconds


@pytest.fixture(scope="module")
def clip():
    return SCENE.render(frames=FRAMES, size=64)


@pytest.fixture(scope="module")
def options(model):
    return dict(
        model=model, prompt="a gold star on grass", source_prompt=SCENE.caption, num_inference_steps=STEPS, keyframe_interval=2, seed=3
    )


@pytest.fixture
def make(clip, options, tmp_path):
    "A state whose work is done in place, on a store of its own."

    def made(shown=clip, **changes):
        return EditState(shown, store=Store(tmp_path / "store"), worker=Worker(threaded=False), **options | changes)

    return made


@pytest.fixture(scope="module")
def expected(clip, options, tmp_path_factory):
    "What edit_video makes of the same settings."
    settings = {name: value for name, value in options.items() if name != "prompt"}
    return edit_video(clip, options["prompt"], **settings, store=Store(tmp_path_factory.mktemp("store")), progress=False)


@pytest.fixture
def cancelling(monkeypatch):
    "Cancels a state's work after its n-th step of any kind; counts the steps that were begun."

    def after(state, count):
        begun, once, record_once, predict = [0], Edit.step, source.record_step, state.given.predict

        def tick():
            begun[0] += 1
            if begun[0] == count:
                state.cancel()

        def whole(take):
            "Counts a step as one, whatever the model is asked in it."

            def step(*arguments):
                tick()
                monkeypatch.setattr(state.given, "predict", predict)
                try:
                    return take(*arguments)
                finally:
                    monkeypatch.setattr(state.given, "predict", counted)

            return step

        def counted(*arguments, **named):
            tick()
            return predict(*arguments, **named)

        monkeypatch.setattr(Edit, "step", whole(once))
        monkeypatch.setattr(source, "record_step", whole(record_once))
        monkeypatch.setattr("tokenflow_nb.panels.state.learn", lambda *what: None)  # looks at the model, too
        monkeypatch.setattr(state.given, "predict", counted)
        return begun

    return after


def same(result, other):
    return (result.edited.frames == other.edited.frames).all()
