import os

import torch
import torch.distributed as dist
from forked import run_ranks

from bit_ray.training import agreement as module
from bit_ray.training.agreement import Agreement, least

ANSWERS = {  # by rank: its answers at each step
    0: [(False, False), (False, True), (False, False), (False, False)],
    1: [(False, False), (False, False), (True, False), (False, False)],
    2: [(False, False), (False, False), (False, False), (False, False)],
}


def exchange_all(rank, rendezvous, folder):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=3)
    agreement = Agreement(3)
    known = [agreement.exchange(*answers) for answers in ANSWERS[rank]]
    agreement.finish()
    assert least(7 - rank, torch.device("cpu")) == 5  # of 7, 6 and 5
    (folder / str(rank)).write_text(repr(known))
    dist.destroy_process_group()


def test_all_workers_know_at_the_same_step_what_any_of_them_wanted(tmp_path):
    run_ranks(exchange_all, (tmp_path / "rendezvous", tmp_path), 3)
    expected = [(False, False), (False, False), (False, True), (True, False)]
    assert {(tmp_path / str(rank)).read_text() for rank in range(3)} == {repr(expected)}


def test_a_single_worker_knows_at_once():
    assert Agreement(1).exchange(True, False) == (True, False)


def ask_until_known(rank, rendezvous, folder):
    module._WORKERS_PER_STEP, module._MANY_WORKERS = 1, 3  # as of a thousand workers
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=3)
    agreement = Agreement(3)
    assert os.environ["TORCH_GLOO_LAZY_INIT"] == "1"
    # Rank 2 wants something from step 1 on, and keeps asking.
    known = [agreement.exchange(rank == 2 and step >= 1, False)[0] for step in range(8)]
    agreement.finish()
    (folder / str(rank)).write_text(repr(known))
    dist.destroy_process_group()


def test_many_workers_have_some_steps_for_an_exchange_and_know_at_the_same_step(tmp_path):
    run_ranks(ask_until_known, (tmp_path / "rendezvous", tmp_path), 3)
    # Sent at steps 0, 3 and 6, known three steps later: rank 2's wish of step 1 is sent at 3.
    expected = [False, False, False, False, False, False, True, False]
    assert {(tmp_path / str(rank)).read_text() for rank in range(3)} == {repr(expected)}
