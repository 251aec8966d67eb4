"Edits by hand, kept in a store as `stages` keeps them: for tests that need one stage alone."

from dataclasses import replace

from tokenflow_nb import edit as room
from tokenflow_nb.support.progress import drive


def run_kept(edit, store, **execution):
    "Takes all steps through interruptions; the step that it began with."
    edit.execution = replace(edit.execution, store=store, **execution)
    return drive(room.kept_steps(edit))


def record_for(edit, store):
    "The record of the source branch for an edit."
    edit.execution = replace(edit.execution, store=store)
    return drive(room._recording(edit))
