"""Work in threads: ahead of its use, and after who hands it over has gone on."""

import threading

import pytest

from alpamayo_dflash.common.ahead import Behind


class FaultError(Exception):
    """What a piece of work raises."""


def test_pieces_are_done_in_order_by_one_thread():
    done, threads = [], set()

    def piece(number):
        done.append(number)
        threads.add(threading.get_ident())

    with Behind(3) as behind:
        for number in range(20):
            behind(lambda number=number: piece(number))
    assert done == list(range(20))
    assert len(threads) == 1
    assert threads != {threading.get_ident()}


def test_only_so_many_pieces_wait():
    begun, going_on, gate = [], threading.Event(), threading.Event()

    def hand_over(behind):
        for number in range(3):
            behind(gate.wait)
            begun.append(number)
        going_on.set()

    with Behind(2) as behind:
        caller = threading.Thread(target=hand_over, args=(behind,))
        caller.start()
        assert not going_on.wait(0.2)  # the third waits until the first is done
        assert begun == [0, 1]
        gate.set()
        assert going_on.wait(10)
        caller.join()


def fail():
    raise FaultError


def test_an_error_comes_with_the_next_piece_and_ends_the_work():
    done, failed = [], threading.Event()

    def piece():
        failed.set()
        fail()

    def hand_over(behind):
        behind(piece)
        assert failed.wait(10)
        while True:  # at the latest once the failed piece counts as done
            behind(lambda: done.append(1))

    with pytest.raises(FaultError), Behind(2) as behind:
        hand_over(behind)
    assert done == []


def test_an_error_of_the_last_piece_comes_on_leaving():
    with pytest.raises(FaultError), Behind(2) as behind:
        behind(fail)


def test_leaving_by_an_error_waits_and_hides_it_by_none():
    done = []
    with pytest.raises(KeyError), Behind(4) as behind:
        behind(lambda: done.append(1))
        behind(fail)
        raise KeyError
    assert done == [1]
