"""The books of scoring balance, also after a state was loaded."""

import numpy as np

from vlmrb_torchrl.clips import Clip
from vlmrb_torchrl.scoring_ledger import Ledger


def clip(transitions):
    slots = np.arange(transitions)
    return Clip(slots, slots, None, None, 0)


def test_what_was_pending_in_a_loaded_state_counts_once_it_is_queued_again():
    """Three of 4, 2 and 1 transitions are submitted, one is dropped, two wait."""
    clips = [clip(4), clip(2), clip(1)]
    before = Ledger()
    before.submitted(clips)
    before.dropped(clips[:1])
    after = Ledger()
    after.load_state_dict(before.state_dict())
    figures = after.statistics()
    assert (figures["clips_submitted"], figures["clips_pending"]) == (1, 0)
    after.submitted(clips[1:])
    figures = after.statistics()
    assert (figures["clips_submitted"], figures["clips_pending"]) == (3, 2)
    assert (figures["transitions_submitted"], figures["transitions_pending"]) == (7, 3)


def test_a_fault_of_a_loaded_state_is_counted_on_and_still_the_first_here():
    before, after = Ledger(), Ledger()
    assert before.fault("raised", retried=True)
    assert not before.fault("raised", retried=True)
    after.load_state_dict(before.state_dict())
    assert [after.fault("raised", retried=False) for _ in range(2)] == [True, False]
    assert after.statistics()["faults_raised"] == 4
