"""What remains to be done after an update: every row of the tables of ``remaining_work``."""

import pytest

from engine.remaining_work import BestFile, count_evaluations, remaining_work

NO, YES = False, True


@pytest.mark.parametrize(
    ("num_updates", "is_evaluated", "is_saved", "evaluate", "save", "stop"),
    [
        pytest.param(0, YES, NO, NO, NO, NO, id="before the first update"),
        pytest.param(13, NO, NO, NO, NO, NO, id="within an epoch"),
        pytest.param(59, NO, NO, NO, NO, NO, id="within the last epoch"),
        pytest.param(10, NO, NO, NO, NO, NO, id="end of an epoch, nothing due"),
        pytest.param(20, NO, YES, YES, NO, NO, id="EVAL_FREQ due, not evaluated"),
        pytest.param(20, NO, NO, YES, NO, NO, id="EVAL_FREQ due, neither evaluated nor saved"),
        pytest.param(20, YES, YES, NO, NO, NO, id="EVAL_FREQ due, already evaluated"),
        pytest.param(30, NO, NO, NO, YES, NO, id="SAVE_FREQ due, not saved"),
        pytest.param(30, NO, YES, NO, NO, NO, id="SAVE_FREQ due, already saved"),
        pytest.param(60, NO, YES, YES, YES, YES, id="end of the last epoch, not evaluated"),
        pytest.param(60, YES, YES, NO, NO, YES, id="end of the last epoch, evaluated and saved"),
        pytest.param(60, YES, NO, NO, YES, YES, id="end of the last epoch, evaluated, not saved"),
        pytest.param(73, NO, YES, YES, YES, YES, id="TRAIN.EPOCHS reduced, not evaluated"),
        pytest.param(73, YES, YES, NO, NO, YES, id="TRAIN.EPOCHS reduced, evaluated"),
        pytest.param(80, NO, YES, YES, YES, YES, id="TRAIN.EPOCHS reduced, end of an epoch"),
    ],
)
def test_evaluation_save_and_stop_follow_the_table(num_updates, is_evaluated, is_saved, evaluate, save, stop):
    """6 epochs of 10 updates, with an evaluation every 2 epochs and a checkpoint every 3 epochs."""
    frequencies = {"updates_per_epoch": 10, "num_epochs": 6, "eval_freq": 2, "save_freq": 3}
    work = remaining_work(num_updates, **frequencies, is_evaluated=is_evaluated, is_saved=is_saved)
    assert (work.evaluate, work.save, work.stop) == (evaluate, save, stop)
    assert not work.link
    assert not work.reset
    assert work.is_finished == (stop and not evaluate)


@pytest.mark.parametrize(
    ("best", "unfinished", "finished"),
    [
        (BestFile.IN_PLACE, (NO, NO), (NO, NO)),
        (BestFile.ELSEWHERE, (YES, NO), (YES, NO)),
        (BestFile.UNUSABLE, (NO, YES), (NO, NO)),
    ],
    ids=lambda value: value.name if isinstance(value, BestFile) else "",
)
def test_link_and_reset_of_the_best_checkpoint_follow_the_table(best, unfinished, finished):
    frequencies = {"updates_per_epoch": 10, "num_epochs": 6, "eval_freq": 1, "save_freq": 1}
    for num_updates, is_evaluated, expected in ((33, NO, unfinished), (60, NO, unfinished), (60, YES, finished)):
        work = remaining_work(num_updates, **frequencies, is_evaluated=is_evaluated, is_saved=True, best=best)
        assert (work.link, work.reset) == expected


@pytest.mark.parametrize(("num_epochs", "eval_freq"), [(6, 1), (6, 2), (7, 3), (2, 5)])
def test_the_number_of_remaining_evaluations_is_that_of_the_updates_after_which_one_is_due(num_epochs, eval_freq):
    sizes = {"updates_per_epoch": 4, "num_epochs": num_epochs, "eval_freq": eval_freq}
    updates, options = range(4 * num_epochs + 1), {"save_freq": 1, "is_evaluated": NO, "is_saved": True}
    due = [remaining_work(update, **sizes, **options).evaluate for update in updates]
    for update in updates:
        assert count_evaluations(update, **sizes) == sum(due[update:])
