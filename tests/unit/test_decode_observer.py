import time

from alpamayo_dflash.decode.observer import Observer, Observers, Recorder, RoundTrace, StageTimer

ROUND = RoundTrace(0, 1, ())


def test_timer_adds_spans_up():
    timer = StageTimer()
    for _ in range(2):
        with timer.span("draft"):
            time.sleep(0.005)
    assert timer.totals_ms["draft"] >= 10
    assert timer.totals_ms["verify"] == 0


def test_observers_hand_on():
    recorder, timer = Recorder(), StageTimer()
    both = Observers(recorder, timer, Observer())
    both.on_prefill(5, (1, 2))
    with both.span("cache"):
        time.sleep(0.001)
    both.on_round(ROUND)
    assert recorder.first_tokens == (1, 2)
    assert recorder.rounds == [ROUND]
    assert timer.totals_ms["cache"] > 0


def test_recorder_starts_again_at_a_prefill():
    recorder = Recorder()
    recorder.on_round(ROUND)
    recorder.on_prefill(5, (1,))
    assert recorder.rounds == []
